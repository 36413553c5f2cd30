"""Who answers: the event loop what is at hand, worker threads all else, so that a disk holds nobody else up."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from logitcache.labels import wire
from logitcache.labels.ids import Ids
from logitcache.server.http import catalog as catalogs
from logitcache.server.http.app import READERS, create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage import LocalLabelSet, local, paging, shards
from logitcache.storage import gather as gathering

FETCH = "/v1/label-sets/digits/fetch"
SAFETENSORS = {"Content-Type": wire.MEDIA_TYPE}
BATCH = wire.encode_ids(Ids(np.array([4096, 1], np.int64)))


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does, a gather counts as fast, and a look at folders as recent."""
    monkeypatch.setattr(paging, "FIXED_S", 1e9)
    monkeypatch.setattr(shards, "REFRESH_S", 1e9)
    monkeypatch.setattr(shards, "SETTLED_S", 1e9)
    monkeypatch.setattr(catalogs, "LOOK_AGAIN_S", 1e9)


@pytest.fixture
def catalog(own_store: Path) -> Catalog:
    """A catalog whose label set ``digits`` is at hand."""
    catalog = Catalog(own_store)
    digits = catalog.get("digits")
    digits.verify_all()
    digits.fetch([0])
    assert digits.is_at_hand(len(BATCH) // 8)
    return catalog


@pytest.fixture
def client(catalog: Catalog) -> Iterator[httpx.Client]:
    with running(create_app(catalog)) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads in which rows were gathered, or states looked up."""
    names: list[str] = []
    gather, states = gathering.gather_rows, LocalLabelSet.states

    def gathered(*arguments: Any) -> dict[str, np.ndarray]:
        names.append(threading.current_thread().name)
        return gather(*arguments)

    def looked_up(*arguments: Any, **options: Any) -> np.ndarray:
        names.append(threading.current_thread().name)
        return states(*arguments, **options)

    monkeypatch.setattr(local, "gather_rows", gathered)
    monkeypatch.setattr(LocalLabelSet, "states", looked_up)
    return names


Ask = Callable[[httpx.Client], httpx.Response]

AT_HAND: dict[str, Ask] = {
    "a batch": lambda client: client.post(FETCH, content=BATCH, headers=SAFETENSORS),
    "which are missing": lambda client: client.post(
        "/v1/label-sets/digits/missing", content=BATCH, headers=SAFETENSORS
    ),
}
NOT_AT_HAND: dict[str, Ask] = {
    "JSON": lambda client: client.post(FETCH, json={"ids": [4096]}),
    "JSON wanted": lambda client: client.post(
        FETCH, content=BATCH, headers=SAFETENSORS | {"Accept": "application/json"}
    ),
    "JSON sent": lambda client: client.post(FETCH, json={"ids": [4096]}, headers={"Accept": wire.MEDIA_TYPE}),
    "many ids": lambda client: client.post(
        FETCH, content=wire.encode_ids(Ids(np.zeros(50_000, np.int64))), headers=SAFETENSORS
    ),
    "one example": lambda client: client.get("/v1/label-sets/digits/examples/7"),
}


@pytest.mark.parametrize("what", AT_HAND)
def test_what_is_at_hand_is_answered_on_the_event_loop(client: httpx.Client, threads: list[str], what: str) -> None:
    assert AT_HAND[what](client).status_code == 200
    assert threads == ["logitcache-server"]


def _opened(catalog: Catalog) -> LocalLabelSet:
    label_set = catalog.get("digits")
    assert isinstance(label_set, LocalLabelSet)
    return label_set


@pytest.mark.parametrize("what", NOT_AT_HAND)
def test_what_takes_longer_is_answered_in_a_worker_thread(client: httpx.Client, threads: list[str], what: str) -> None:
    assert NOT_AT_HAND[what](client).status_code == 200
    assert len(threads) == 1
    assert "logitcache-server" not in threads


def test_rows_that_are_on_the_disk_are_read_in_a_worker_thread(
    client: httpx.Client, catalog: Catalog, threads: list[str]
) -> None:
    _opened(catalog)._paging.cold = True
    assert AT_HAND["a batch"](client).status_code == 200
    assert AT_HAND["a batch"](client).status_code == 200  # the first was fast
    assert [name == "logitcache-server" for name in threads] == [False, True]


def test_a_label_set_is_looked_for_in_a_worker_thread(
    client: httpx.Client, catalog: Catalog, threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogs, "LOOK_AGAIN_S", 0.0)
    assert AT_HAND["a batch"](client).status_code == 200
    catalog.close()
    assert AT_HAND["a batch"](client).status_code == 200
    assert "logitcache-server" not in threads


def test_ids_that_are_not_there_are_told_without_a_thread_as_with_one(client: httpx.Client, catalog: Catalog) -> None:
    body = wire.encode_ids(Ids(np.array([1, -1, 2**62], np.int64)))
    answers = []
    for cold in (False, True):
        _opened(catalog)._paging.cold = cold
        answer = client.post(FETCH, content=body, headers=SAFETENSORS | {"X-Request-Id": "same"})
        answers.append((answer.status_code, answer.json()))
    assert answers[0] == answers[1]
    assert answers[0][0] == 404
    assert answers[0][1]["unknown"] == [-1, 2**62]


def test_a_batch_at_hand_does_not_wait_for_another_label_set_that_is_being_opened(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, go_on = threading.Event(), threading.Event()

    class Slow(LocalLabelSet):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            opening.set()
            assert go_on.wait(30)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(catalogs, "open_label_set", Slow)
    thread = threading.Thread(target=client.get, args=("/v1/label-sets/half",))
    thread.start()
    try:
        assert opening.wait(30)
        answer = AT_HAND["a batch"](client)
        assert wire.decode_rows(answer.content).logit_max.tolist() == [4096, 1]
        assert NOT_AT_HAND["JSON"](client).status_code == 200
        assert client.get("/healthz").text == "ok\n"
        assert client.get("/readyz").status_code == 200
    finally:
        go_on.set()
        thread.join()


def test_a_label_set_is_opened_once_however_many_ask_for_it_at_once(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    asking = threading.Barrier(4)

    class Counted(LocalLabelSet):
        def __init__(self, path: Path, **options: Any) -> None:
            opened.append(path)
            super().__init__(path, **options)

    def get(catalog: Catalog) -> Any:
        asking.wait()
        return catalog.get("half")

    monkeypatch.setattr(catalogs, "open_label_set", Counted)
    with ThreadPoolExecutor(4) as threads, closing(Catalog(own_store)) as catalog:
        found = [each.result() for each in [threads.submit(get, catalog) for _ in range(4)]]
        assert len({id(each) for each in found}) == len(opened) == 1


def test_health_and_batches_at_hand_are_answered_while_all_readers_wait_for_a_disk(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, go_on = threading.Semaphore(0), threading.Event()
    plain = gathering.gather_rows

    def slow(*arguments: Any) -> dict[str, np.ndarray]:
        if threading.current_thread().name != "logitcache-server":
            waiting.release()
            assert go_on.wait(30)
        return plain(*arguments)

    monkeypatch.setattr(local, "gather_rows", slow)
    threads = [threading.Thread(target=NOT_AT_HAND["JSON"], args=(client,)) for _ in range(2 * READERS)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(READERS):
            assert waiting.acquire(timeout=30)
        assert client.get("/healthz").text == "ok\n"
        assert client.get("/readyz").status_code == 200
        assert AT_HAND["a batch"](client).status_code == 200
        assert not waiting.acquire(blocking=False)  # no more of them than there are readers
    finally:
        go_on.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("path", ["", "/below"])
def test_batches_are_answered_alike_below_another_app(catalog: Catalog, path: str) -> None:
    """A short cut takes the usual path; from another one the framework finds the way."""
    outer = Starlette(routes=[Mount(path, create_app(catalog))])
    with running(outer) as url, httpx.Client(base_url=url + path, timeout=30) as client:
        answer = client.post(FETCH, content=BATCH, headers=SAFETENSORS)
        assert answer.content == bytes(catalog.get("digits").fetch_body(wire.parse(BATCH)[0]["ids"])[0])
        for refused, status, code in (
            (client.post(FETCH, content=b"{}", headers=SAFETENSORS), 400, "malformed-message"),
            (
                client.post(FETCH.replace("digits", "none"), content=BATCH, headers=SAFETENSORS),
                404,
                "label-set-not-found",
            ),
            (client.post(FETCH.replace("digits", ""), content=BATCH, headers=SAFETENSORS), 404, "request-refused"),
            (client.get(FETCH), 405, "request-refused"),
        ):
            assert (refused.status_code, refused.json()["code"]) == (status, code)
            assert refused.json()["request_id"] == refused.headers["x-request-id"]
        counted = re.findall(r'requests_total\{.*fetch.*status="(\d+)"\} (\S+)', client.get("/metrics").text)
    assert {(status, float(count)) for status, count in counted} >= {("200", 1.0), ("400", 1.0), ("405", 1.0)}
