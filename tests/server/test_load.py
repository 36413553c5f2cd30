"""What a server takes on at once has bounds, and a peer that stops does not keep what it holds."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio import CapacityLimiter
from fastapi import FastAPI
from tests.building import build, reference

from logitcache.client import connect
from logitcache.labels import wire
from logitcache.labels.errors import ServerBusy
from logitcache.labels.ids import as_ids
from logitcache.server.http import protocol, serve
from logitcache.server.http.app import READERS, create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.load import Load
from logitcache.server.http.protocol import ProblemProtocol
from logitcache.server.http.record import Record
from logitcache.server.http.serve import running
from logitcache.storage import LocalLabelSet

FETCH = "/v1/label-sets/digits/fetch"
SAFETENSORS = {"Content-Type": wire.MEDIA_TYPE}
EVERYTHING = bytes(wire.encode_ids(as_ids(list(range(10_000)) * 6)))
"""A fetch with an answer of some 2 MB: more than the sockets between hold."""


def until(claim: Any) -> None:
    """Wait until it holds; pytest's own time limit ends the wait."""
    pause = threading.Event()
    while not claim():
        pause.wait(0.01)


def sent(url: str, data: bytes) -> socket.socket:
    """A connection over which so much was sent."""
    at = httpx.URL(url)
    connection = socket.create_connection((at.host, at.port or 0), timeout=20)
    connection.sendall(data)
    return connection


def head(length: int) -> bytes:
    kind = wire.MEDIA_TYPE
    return f"POST {FETCH} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()


UNFINISHED = head(1_000_001) + bytes(1_000_000)


def test_bytes_that_were_only_promised_keep_no_others_out(finished_store: Path) -> None:
    load = Load(most_bytes=1 << 20)
    promised = head(1_000_000).replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
    with running(create_app(Catalog(finished_store), load=load)) as url, sent(url, promised) as slow:
        assert slow.recv(65_536).startswith(b"HTTP/1.1 100")
        ids = bytes(wire.encode_ids(as_ids(list(range(10_000)))))
        assert httpx.post(url + FETCH, headers=SAFETENSORS, content=ids).status_code == 200


def test_an_example_for_a_person_counts_as_well(finished_store: Path) -> None:
    load = Load(most_bytes=1)
    with running(create_app(Catalog(finished_store), load=load)) as url:
        assert httpx.get(f"{url}/v1/label-sets/digits/examples/7").status_code == 200
        until(lambda: load.bytes == 0)
        load.add(1)
        refused = httpx.get(f"{url}/v1/label-sets/digits/examples/7")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


def test_bytes_beyond_the_bound_are_refused_before_they_are_read(finished_store: Path) -> None:
    load = Load(most_bytes=1 << 20)
    with running(create_app(Catalog(finished_store), load=load)) as url, sent(url, UNFINISHED) as slow:
        until(lambda: load.bytes == 1_000_000)
        refused = httpx.post(url + FETCH, headers=SAFETENSORS, content=EVERYTHING[:100_000])
        assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (
            503,
            "server-busy",
            "1",
        )
        assert refused.json()["retry"] is True
        assert httpx.get(f"{url}/healthz").status_code == 200
        slow.close()
        until(lambda: load.bytes == 0)
        assert httpx.post(url + FETCH, headers=SAFETENSORS, content=EVERYTHING).status_code == 200
        until(lambda: load.bytes == 0)


def test_tokens_and_json_are_answered_beside_others(tmp_path: Path) -> None:
    build(tmp_path / "tokens", reference(2, alignment="causal"))
    path, load = "/v1/label-sets/tokens/fetch", Load(most_bytes=4 << 20)
    with running(create_app(Catalog(tmp_path), load=load)) as url, sent(url, UNFINISHED):
        until(lambda: load.bytes == 1_000_000)
        ids = bytes(wire.encode_ids(as_ids([1, 0])))
        assert httpx.post(url + path, headers=SAFETENSORS, content=ids).status_code == 200
        assert httpx.post(url + path, json={"ids": [1], "rows": [0, 1]}).status_code == 200
        until(lambda: load.bytes == 1_000_000)


def test_chunks_count_as_they_come(finished_store: Path) -> None:
    load = Load(most_bytes=1 << 20)
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with running(create_app(Catalog(finished_store), load=load)) as url, sent(url, chunked) as slow:
        slow.sendall(b"%x\r\n%s\r\n" % (700_000, b"x" * 700_000))
        until(lambda: load.bytes == 700_000)
        with sent(url, chunked) as other:
            other.sendall(b"%x\r\n%s\r\n" % (700_000, b"x" * 700_000))
            assert other.recv(12) == b"HTTP/1.1 503"
        slow.close()
        until(lambda: load.bytes == 0)


def test_an_answer_that_nobody_takes_counts_until_its_connection_is_closed(finished_store: Path) -> None:
    load = Load(most_bytes=3 << 20)
    with running(create_app(Catalog(finished_store), load=load)) as url, ExitStack() as stack:
        statuses: set[int] = set()
        while 503 not in statuses:  # they pile up until there is no room
            stack.enter_context(sent(url, head(len(EVERYTHING)) + EVERYTHING))
            statuses.add(httpx.post(url + FETCH, headers=SAFETENSORS, content=EVERYTHING).status_code)
        stack.close()
        until(lambda: load.bytes == 0)
        assert httpx.post(url + FETCH, headers=SAFETENSORS, content=EVERYTHING).status_code == 200


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that looks often and waits shortly."""
    monkeypatch.setattr(serve, "SWEEP_S", 0.1)
    for name in ("SLOW_S", "SILENT_S"):
        monkeypatch.setattr(protocol, name, 0.5)


def refusals(app: FastAPI, status: str) -> float | None:
    """How often it was answered so to what is no request."""
    labels = {"method": "other", "route": "unmatched", "status": status}
    value: float | None = app.state.metrics.registry.get_sample_value("logitcache_requests_total", labels)
    return value


SLOW: dict[str, bytes] = {
    "nothing": b"",
    "half a head": b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    "half a body": head(1000) + b"x" * 500,
    "an answer that is not taken": head(len(EVERYTHING)) + EVERYTHING,
}


@pytest.mark.parametrize("what", SLOW)
def test_a_peer_that_stops_is_closed(finished_store: Path, impatient: None, what: str) -> None:
    load = Load()
    app = create_app(Catalog(finished_store), load=load)
    with running(app) as url, sent(url, SLOW[what]) as slow:
        if what == "an answer that is not taken":
            until(lambda: load.bytes > 0)
            until(lambda: load.bytes == 0)
            return
        answer = b"".join(iter(lambda: slow.recv(65_536), b""))
        assert answer == b"" or answer.startswith(b"HTTP/1.1 408 Request Timeout")
    assert refusals(app, "408") == (1 if what == "half a head" else None)


@pytest.mark.parametrize("name", ["half a head", "half a body"])
def test_a_peer_that_dribbles_is_closed(finished_store: Path, impatient: None, name: str) -> None:
    with running(create_app(Catalog(finished_store))) as url, sent(url, SLOW[name]) as slow:
        pause = threading.Event()
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 20:
                slow.sendall(b"x")
                pause.wait(0.05)
        assert time.monotonic() - began < 20


def test_a_peer_that_is_slow_but_steady_is_served(finished_store: Path, impatient: None) -> None:
    with running(create_app(Catalog(finished_store))) as url, sent(url, b"") as connection:
        pause = threading.Event()
        for _ in range(8):  # seconds of it in all, more than the patience for one
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
            pause.wait(0.2)


def test_connections_beyond_what_the_process_may_open_are_told_so(
    finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "most_connections", lambda: 3)
    app = create_app(Catalog(finished_store))
    with running(app) as url, ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(sent(url, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"))
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        with sent(url, b"") as one_more:
            answer = b"".join(iter(lambda: one_more.recv(65_536), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 1" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "server-busy"
    assert refusals(app, "503") == 1


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Fetches that take a thread, and do not end before this is set."""
    released = threading.Event()
    fetch_body = LocalLabelSet.fetch_body

    def held(self: LocalLabelSet, *arguments: Any, **options: Any) -> Any:
        released.wait()
        return fetch_body(self, *arguments, **options)

    monkeypatch.setattr(LocalLabelSet, "fetch_body", held)
    monkeypatch.setattr(LocalLabelSet, "is_at_hand", lambda self, examples: False)
    yield released
    released.set()


def test_requests_that_would_wait_too_long_are_told_to_come_back_while_the_rest_is_done(
    finished_store: Path, held_up: threading.Event
) -> None:
    waiting = 4
    app = create_app(Catalog(finished_store), load=Load(most_waiting=waiting))
    readers: CapacityLimiter = app.state.readers
    ids = bytes(wire.encode_ids(as_ids([3])))
    with running(app) as url, ThreadPoolExecutor(READERS + waiting) as threads:
        asked = [
            threads.submit(httpx.post, url + FETCH, headers=SAFETENSORS, content=ids, timeout=60)
            for _ in range(READERS + waiting)
        ]
        until(lambda: readers.statistics().tasks_waiting == waiting)
        refused = httpx.post(url + FETCH, headers=SAFETENSORS, content=ids)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert httpx.get(f"{url}/healthz").status_code == 200
        held_up.set()
        assert {each.result().status_code for each in asked} == {200}


def test_what_a_server_that_ends_cannot_finish_is_told_to_come_back(
    finished_store: Path, held_up: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "DRAIN_S", 0.1)
    app = create_app(Catalog(finished_store))
    ids = bytes(wire.encode_ids(as_ids([3])))
    with ThreadPoolExecutor(1) as threads:
        with running(app) as url:
            asked = threads.submit(httpx.post, url + FETCH, headers=SAFETENSORS, content=ids, timeout=60)
            until(lambda: app.state.readers.statistics().borrowed_tokens == 1)
        answer = asked.result()
    assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
    assert (answer.json()["code"], answer.json()["retry"]) == ("server-busy", True)
    assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")


def test_routes_that_are_plain_functions_are_refused_as_well_when_too_many_wait(
    finished_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the framework's 40 threads; probes have threads of their own."""
    released, waiting, more = threading.Event(), 4, 8
    fetch = LocalLabelSet.fetch

    def held(self: LocalLabelSet, *arguments: Any, **options: Any) -> Any:
        released.wait()
        return fetch(self, *arguments, **options)

    monkeypatch.setattr(LocalLabelSet, "fetch", held)
    asking = 40 + waiting + more
    with (
        running(create_app(Catalog(finished_store), load=Load(most_waiting=waiting))) as url,
        httpx.Client(base_url=url, timeout=60, limits=httpx.Limits()) as client,
        ThreadPoolExecutor(asking) as threads,
    ):
        asked = [threads.submit(client.get, "/v1/label-sets/digits/examples/3") for _ in range(asking)]
        try:
            until(lambda: sum(each.done() for each in asked) == more)
            for path in ("/v1/label-sets", "/v1/label-sets/digits", "/v1/jobs"):
                refused = client.get(path)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            for path in ("/healthz", "/readyz", "/metrics"):
                assert client.get(path).status_code == 200
        finally:
            released.set()
        assert sorted(each.result().status_code for each in asked) == [200] * (40 + waiting) + [503] * more


def test_the_sdk_comes_back(finished_store: Path, held_up: threading.Event) -> None:
    app = create_app(Catalog(finished_store))
    with running(app) as url:
        labels = connect(f"{url}/digits", timeout_s=30)
        app.state.load._most_waiting = 0
        with ThreadPoolExecutor(1) as threads:
            asked = threads.submit(labels.fetch, [3, 1, 4])
            until(lambda: labels.stats.retries > 0)
            app.state.load._most_waiting = 1000
            held_up.set()
            assert len(asked.result()) == 3


def test_a_request_that_is_alone_may_be_larger_than_the_bound() -> None:
    load, alone, other = Load(most_bytes=100), Record("1", "POST"), Record("2", "POST")
    load.hold(alone, 80)
    load.hold(alone, 80)
    with pytest.raises(ServerBusy, match="160 bytes"):
        load.hold(other, 1)
    load.settle(alone, 80, 10)
    assert (load.bytes, alone.held_bytes) == (90, 90)
    load.hold(other, 10)
    with pytest.raises(ServerBusy):
        load.hold(alone, 1)


def test_an_answer_is_complete_however_slowly_it_is_taken(finished_store: Path, impatient: None) -> None:
    with running(create_app(Catalog(finished_store))) as url:
        at = httpx.URL(url)
        connection = http.client.HTTPConnection(at.host, at.port or 0, timeout=20)
        connection.request("POST", FETCH, EVERYTHING, SAFETENSORS)
        answer = connection.getresponse()
        parts = []
        pause = threading.Event()
        while part := answer.read(600 << 10):
            parts.append(part)
            pause.wait(0.2)
        assert len(wire.decode_rows(bytearray(b"".join(parts)))) == 60_000
        connection.close()


class Taken:
    """In the place of a connection's transport: so many bytes are not taken yet."""

    unsent, aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize("steady", [True, False])
def test_a_peer_is_not_slow_because_the_next_answer_begins(steady: bool) -> None:
    """It takes 600 KiB in 20 s, and more is left after the next answer of 1 MiB was given than before."""
    connection, taken = ProblemProtocol.__new__(ProblemProtocol), Taken()
    connection.transport, connection.cycle = taken, None  # type: ignore[assignment]
    for second in range(0, 200, 20):
        if taken.unsent < 600 << 10:
            connection._given += 1 << 20
            taken.unsent += 1 << 20
        connection.look(second)
        taken.unsent -= 600 << 10 if steady else 1
    assert taken.aborted == (not steady)
