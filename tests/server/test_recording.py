"""The routes by which a run records, over a real socket: every answer that they give, and what others see meanwhile."""

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import TypeAdapter
from tests.building import reference
from tests.server.job_site import until
from tests.server.test_cli import refused, run
from tests.server.test_http_api import JSON, SAFETENSORS, problem_of
from tests.server.test_protocol import exchanged, statuses

from logitcache.labels import wire
from logitcache.labels.errors import (
    DigestChanged,
    DiskFull,
    IdentityChanged,
    InvalidIds,
    InvalidName,
    InvalidRequest,
    LabelSetNotFound,
    LogitcacheError,
    MalformedMessage,
    RecorderReplaced,
    RequestRefused,
    RowsMissing,
    ShapeMismatch,
    StorageFault,
    TeacherFault,
    TooManyRows,
)
from logitcache.labels.identity import Identity
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import Description
from logitcache.labels.recorded import RecordedRows, RecordingTerms, Stand, Who, recorder_id
from logitcache.labels.soft_labels import SoftLabels
from logitcache.server.http import catalog, id_lists, openapi, recordings
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.messages import MAX_REQUEST_BYTES
from logitcache.server.http.recording_routes import MOST_BYTES
from logitcache.server.http.serve import running
from logitcache.storage import Recording
from logitcache.storage.files import Files, explained

EXAMPLES, CLASSES, K = 12, 10, 3
SOURCE = reference(1, short_by=0, k=K, classes=CLASSES, seed=4)
RUN = "/v1/label-sets/run-1"
WHO = {"rank": 0, "sitting": 1}


def terms_of(**changes: Any) -> RecordingTerms:
    asked: dict[str, Any] = {"recorders": 1, "examples": EXAMPLES, "ids": "ordinal", "k": K, "temperatures": (1.0, 2.0)}
    asked |= changes
    teacher = recorder_id("run-1", range(50), "train", "moving", "")
    identity = Identity(teacher, asked["k"], CLASSES, asked["temperatures"], "float16", ids=asked["ids"])
    return RecordingTerms(identity, range(50), asked["examples"], asked["recorders"])


def body_of(ids: Any, *, step: int = 3, who: Who | None = None, ordinals: Any = None, **changes: Any) -> bytes:
    """Rows of the reference's examples, with what a test changes."""
    order = np.arange(len(ids)) if ordinals is None else np.asarray(ordinals)
    arrays = SOURCE.arrays(range(EXAMPLES))
    soft = SoftLabels(
        indices=arrays["indices"][order],
        logits=arrays["logits"][order],
        logit_max=arrays["scalars"][order, 0],
        tail_logsumexp=arrays["scalars"][order, 1:],
        fingerprint=arrays["fingerprint"][order, 0],
        temperatures=(1.0, 2.0),
    )
    for name, value in changes.items():
        getattr(soft, name)[...] = value
    count = len(ids)
    rows = RecordedRows(as_ids(ids), np.zeros(count, np.int64), np.full(count, step), soft)
    return rows.encode(who or Who(0, 1))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    return store


@pytest.fixture
def server(store: Path) -> Iterator[httpx.Client]:
    with running(create_app(Catalog(store), record=True)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def stand_of(answer: httpx.Response) -> Stand:
    """How the recording stands, after checking the answer against what the documentation says."""
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), answer.text
    TypeAdapter(Stand).validate_json(answer.content)
    return Stand.from_json(answer.json())


def begin(
    server: httpx.Client, *, rank: int = 0, sitting: int = 1, name: str = "run-1", **asked: Any
) -> httpx.Response:
    told = {"rank": rank, "sitting": sitting, "terms": terms_of(**asked).to_json()}
    return server.put(f"/v1/label-sets/{name}/recording", json=told)


def send(server: httpx.Client, body: bytes, name: str = "run-1") -> httpx.Response:
    return server.post(f"/v1/label-sets/{name}/record", content=body, headers=SAFETENSORS)


def finish(server: httpx.Client, **asked: Any) -> httpx.Response:
    return server.post(f"{RUN}/recording/finish", json={"rank": 0, "sitting": 1} | asked)


def sealed(server: httpx.Client, **asked: Any) -> Stand:
    """How it stands once it is sealed; asked until then, as the documentation says."""
    while (stand := stand_of(finish(server, **asked))).sealing:
        continue
    return stand


def test_a_run_begins_records_and_finishes(server: httpx.Client) -> None:
    assert stand_of(begin(server)) == Stand(EXAMPLES, 0, 0)
    answer = send(server, body_of([3, 1, 4], ordinals=[3, 1, 4]))
    assert (answer.status_code, answer.json()) == (200, {"rows": 3})
    openapi.Recorded.model_validate(answer.json())
    stand = stand_of(finish(server))
    assert (stand.recorded, stand.finished, stand.missing) == (3, (0,), (0, 2, 5, 6, 7, 8, 9, 10, 11))
    assert stand_of(begin(server, sitting=2)).finished == ()
    send(server, body_of(range(EXAMPLES), who=Who(0, 2)))
    stand = sealed(server, sitting=2)
    assert stand.digest == server.get(RUN).json()["digest"]
    assert stand_of(finish(server, sitting=2)).digest == stand.digest


def test_a_part_is_sealed_when_it_is_said(server: httpx.Client) -> None:
    begin(server)
    assert stand_of(finish(server, part=True)).digest is None  # there is nothing to seal
    send(server, body_of([3, 1]))
    assert sealed(server, part=True).digest is not None
    assert server.get(RUN).json()["identity"]["ids"] == "integer"


def test_the_documentation_tells_all_three_routes_and_what_they_answer(server: httpx.Client) -> None:
    api = server.get("/openapi.json").json()
    base = "/v1/label-sets/{name}"
    found = {
        (path.removeprefix(base), method): told
        for path, methods in api["paths"].items()
        for method, told in methods.items()
        if "recording" in told.get("tags", [])
    }
    assert set(found) == {("/recording", "put"), ("/record", "post"), ("/recording/finish", "post")}
    for (path, _), told in found.items():
        kind = wire.MEDIA_TYPE if path == "/record" else "application/json"
        assert set(told["requestBody"]["content"]) == {kind}
        assert set(told["responses"]) >= {"200", "409", "507"}
        assert set(told["responses"]["507"]["content"]) == {"application/problem+json"}
        answered = told["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert answered == ("Recorded" if path == "/record" else "Stand")
        assert answered in api["components"]["schemas"]
    properties = found["/recording", "put"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert set(properties) == {"rank", "sitting", "terms", "ids", "like"}


def test_bodies_as_the_schema_has_them_are_never_a_fault_of_the_server(server: httpx.Client) -> None:
    """What a generator makes of the schema: legal in form, and most of it nonsense."""
    begin(server)
    nonsense = [{}, {"identity": {}}, {"identity": None, "steps": [0, 1], "examples": 1, "recorders": 1}]
    good = terms_of().to_json()
    wrong: dict[str, list[Any]] = {
        "steps": [None, [], [1], ["a", "b"], [5, 2], [-1, 4], [0, 2**70], [0, 1, 2]],
        "examples": [0, -1, 1.5, "7", 2**60, True, None],
        "recorders": [0, 2**20, "1", None],
        "identity": [None, [], {}, {**good["identity"], "k": 0}, {**good["identity"], "classes": 10**12}],
    }
    nonsense += [good | {key: value} for key, values in wrong.items() for value in values]
    for terms in nonsense:
        answer = server.put("/v1/label-sets/run-2/recording", json={"rank": 0, "sitting": 1, "terms": terms})
        problem_of(answer, InvalidRequest, 422)
    for name in ("sitting", "rank"):
        for value in (-1, 2**63, 1.5, "1", None):
            answer = finish(server, **{name: value})
            assert answer.status_code in (409, 422), (name, value, answer.text)
    assert server.get("/v1/label-sets/run-2").status_code == 404


def test_a_server_that_does_not_record_names_the_flag(store: Path) -> None:
    with running(create_app(Catalog(store))) as url, httpx.Client(base_url=url) as client:
        for answer in (begin(client), send(client, body_of([1])), finish(client)):
            assert "logitcache serve --record" in problem_of(answer, RequestRefused, 403).message
    assert list(store.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "kind", "status", "says"),
    [
        (b"", MalformedMessage, 400, ""),
        (body_of([1])[:-1], MalformedMessage, 400, ""),
        (wire.encode_ids(as_ids([1])), MalformedMessage, 400, "recorded rows"),
        (body_of([12, 1]), RowsMissing, 404, "12 examples"),
        (body_of([1], who=Who(0, 7)), RecorderReplaced, 409, "recorder 0"),
        (body_of([1], who=Who(1, 1)), RecorderReplaced, 409, "has not begun"),
        (body_of([1], step=50), InvalidRequest, 422, "0 to 49"),
        (body_of(["a"]), InvalidIds, 422, "whole numbers"),
        (body_of([1], logits=np.nan), TeacherFault, 422, "ids: 1"),
        (body_of([1], logit_max=np.inf), TeacherFault, 422, "NaN"),
        (body_of([1], indices=CLASSES), TeacherFault, 422, "beyond"),
        (body_of([1], indices=2), TeacherFault, 422, "twice"),
    ],
)
def test_rows_that_cannot_be_recorded_are_refused_and_nothing_of_them_is_kept(
    server: httpx.Client, body: bytes, kind: type[LogitcacheError], status: int, says: str
) -> None:
    begin(server)
    assert says in problem_of(send(server, body), kind, status).message
    assert stand_of(finish(server)).rows == 0


def test_rows_of_another_shape_are_refused_with_both(server: httpx.Client) -> None:
    begin(server, k=4)
    assert "uint16 [1, 4]" in problem_of(send(server, body_of([1])), ShapeMismatch, 422).message


def test_what_is_not_recorded_is_not_recorded_into(server: httpx.Client) -> None:
    for answer in (send(server, body_of([1])), finish(server)):
        assert answer.status_code in (404, 422)
        assert "run-1" in answer.json()["detail"]
    problem_of(send(server, body_of([1]), "Run"), InvalidName, 422)
    problem_of(begin(server, name="Run"), InvalidName, 422)


def test_beginning_something_else_or_again_is_refused(server: httpx.Client) -> None:
    begin(server, sitting=5)
    problem_of(begin(server, sitting=4), RecorderReplaced, 409)
    error = problem_of(begin(server, sitting=6, examples=13), IdentityChanged, 409)
    assert "examples was 12 and is now 13" in error.message
    problem_of(begin(server, rank=1), InvalidRequest, 422)
    problem_of(send(server, body_of([1], who=Who(0, 4))), RecorderReplaced, 409)
    send(server, body_of(range(EXAMPLES), who=Who(0, 5)))
    assert sealed(server, sitting=5).digest
    problem_of(begin(server, sitting=6), IdentityChanged, 409)


@pytest.mark.parametrize(
    ("asked", "kind", "says"),
    [
        ({"ids": [1, 2]}, InvalidRequest, "ids"),
        ({"ids": list(range(12)), "like": "digits"}, InvalidRequest, "give one"),
        ({"like": "nothing"}, LabelSetNotFound, "nothing"),
    ],
)
def test_examples_that_cannot_be_are_refused(
    server: httpx.Client, asked: Any, kind: type[LogitcacheError], says: str
) -> None:
    terms = terms_of(ids="integer").to_json()
    answer = server.put(f"{RUN}/recording", json={"rank": 0, "sitting": 1, "terms": terms} | asked)
    assert says in problem_of(answer, kind, kind.status).message


@pytest.mark.parametrize(
    ("kind", "ids"),
    [
        ("integer", [f"photo-{number}" for number in range(EXAMPLES)]),
        ("integer", ["abcd"] + [f"efgh{number}" for number in range(11)]),
        ("text", list(range(EXAMPLES))),
    ],
)
def test_ids_of_the_other_kind_are_refused_before_anything_is_made(
    server: httpx.Client, store: Path, kind: str, ids: list[Any]
) -> None:
    terms = terms_of(ids=kind).to_json()
    answer = server.put(f"{RUN}/recording", json={"rank": 0, "sitting": 1, "terms": terms, "ids": ids})
    assert "whole numbers" in problem_of(answer, InvalidIds, 422).message
    assert not (store / "run-1").exists()


def test_ids_of_another_number_or_kind_do_not_continue_a_recording(server: httpx.Client, store: Path) -> None:
    told = {"rank": 0, "sitting": 1, "terms": terms_of(ids="integer").to_json()}
    assert server.put(f"{RUN}/recording", json=told | {"ids": list(range(EXAMPLES))}).status_code == 200
    others = ([1], list(range(EXAMPLES - 1)), list(range(EXAMPLES + 1)), [str(id) for id in range(EXAMPLES)])
    for ids in others:
        answer = server.put(f"{RUN}/recording", json=told | {"ids": ids})
        assert "ids was '12 whole numbers'" in problem_of(answer, IdentityChanged, 409).message
    with running(create_app(Catalog(store), record=True)) as url:  # one that has not opened it
        answer = httpx.put(f"{url}{RUN}/recording", json=told | {"ids": [1]})
    assert answer.status_code in (409, 422)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperatures": [1.0 + number / 10 for number in range(102)]}, "100 can be declared"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**4000}, "seed"),
        ({"format_version": 2}, "format_version"),
        ({"format_version": 0}, "format_version"),
        ({"k": 3_000_000, "classes": 3_000_000}, "store fewer classes"),
    ],
)
def test_terms_that_nobody_could_read_or_hold_are_refused(
    server: httpx.Client, store: Path, changes: dict[str, Any], says: str
) -> None:
    terms = terms_of().to_json()
    terms["identity"] |= changes
    answer = server.put(f"{RUN}/recording", json={"rank": 0, "sitting": 1, "terms": terms})
    assert says in problem_of(answer, InvalidRequest, 422).message
    assert not (store / "run-1").exists()


def test_a_sitting_that_was_replaced_seals_nothing(server: httpx.Client) -> None:
    begin(server)
    begin(server, sitting=5)
    send(server, body_of([0, 1], who=Who(0, 5)))
    finish(server, sitting=5)
    problem_of(finish(server, part=True), RecorderReplaced, 409)
    assert server.get(RUN).json()["digest"] is None


def test_more_recordings_than_are_held_open_are_all_recorded_into(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "MOST_OPEN", 3)
    names = [f"run-{number}" for number in range(1, 8)]
    before = len(open_files())
    for name in names:
        begin(server, name=name)
    for _ in range(2):
        for name in names:
            assert send(server, body_of([3, 1]), name).status_code == 200
    assert len(open_files()) - before < 3 * 3 + len(names) + 5
    assert [server.get(f"/v1/label-sets/{name}").json()["labelled"] for name in names] == [2] * len(names)


def test_fetches_are_answered_while_it_is_sealed(server: httpx.Client) -> None:
    for number in range(3):
        name = f"run-{number}"
        begin(server, name=name)
        send(server, body_of(range(EXAMPLES)), name)
        path, over = f"/v1/label-sets/{name}", threading.Event()

        def fetched(path: str = path, over: threading.Event = over) -> set[int]:
            statuses = set()
            while not over.is_set():
                statuses.add(server.post(f"{path}/fetch", json={"ids": [3, 1]}).status_code)
            return statuses

        with ThreadPoolExecutor(4) as threads:
            fetching = [threads.submit(fetched) for _ in range(4)]
            while server.post(f"{path}/recording/finish", json={"rank": 0, "sitting": 1}).json()["digest"] is None:
                continue
            for _ in range(20):
                assert server.get(path).json()["digest"]
            over.set()
        assert [one.result() for one in fetching] == [{200}] * 4


def test_a_label_set_that_was_sealed_stays_open_for_those_who_read_it_and_not_for_ever(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Catalog(store)
    with running(create_app(served, record=True)) as url, httpx.Client(base_url=url, timeout=60) as server:
        begin(server)
        send(server, body_of(range(EXAMPLES)))
        reader = served.get("run-1")
        assert sealed(server).digest
        served.look_again()
        assert served.get("run-1") is not reader
        until(lambda: removed_logs() == 1, "the recorder to close it, and the reader not to")
        assert len(reader.fetch([3])) == 1
        monkeypatch.setattr(catalog, "IN_USE_S", 0.0)
        served.save_tallies()
        assert removed_logs() == 0, "its log takes room on the disk as long as it is open"


def removed_logs() -> int:
    links = [os.readlink(f"/proc/self/fd/{number}") for number in open_files()]  # noqa: PTH115
    return sum(link.endswith("/recording/log (deleted)") for link in links)


def open_files() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{name}").is_symlink()]  # noqa: PTH208


def test_bodies_that_are_too_long_or_of_another_type_are_not_read(server: httpx.Client) -> None:
    begin(server)
    for method, path, kind, most in (
        ("POST", "record", SAFETENSORS, MOST_BYTES),
        ("POST", "recording/finish", JSON, MAX_REQUEST_BYTES["application/json"]),
        ("PUT", "recording", JSON, MOST_BYTES),
    ):
        answer = server.request(method, f"{RUN}/{path}", content=bytes(most + 1), headers=kind)
        problem_of(answer, TooManyRows, 413)
    for path, kind in ((f"{RUN}/record", JSON), (f"{RUN}/recording/finish", SAFETENSORS)):
        problem_of(server.post(path, content=b"{}", headers=kind), RequestRefused, 415)
    problem_of(server.put(f"{RUN}/recording", content=b"{}", headers=SAFETENSORS), RequestRefused, 415)
    problem_of(server.put(f"{RUN}/recording", content=b"{", headers=JSON), RequestRefused, 400)


def test_a_long_body_is_not_waited_for_where_nothing_would_be_recorded(
    server: httpx.Client, finished_store: Path
) -> None:
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {MOST_BYTES}\r\n\r\n"
    with running(create_app(Catalog(finished_store))) as url:
        answer = exchanged(httpx.Client(base_url=url), f"PUT {RUN}/recording HTTP/1.1\r\n{head}".encode())
        assert statuses(answer) == [403]
    answer = exchanged(server, f"PUT /v1/label-sets/Run/recording HTTP/1.1\r\n{head}".encode())
    assert statuses(answer) == [422]


@pytest.mark.parametrize(
    ("ids", "status"),
    [
        ("[]", 422),
        ("[1,]", 422),
        ("[1 2]", 422),
        ("[1.5]", 422),
        ("[true]", 422),
        ("[null]", 422),
        ("[[1]]", 422),
        ("{}", 422),
        ("7", 422),
        ('["a", 1]', 422),
        ('[1, "a"]', 422),
        (json.dumps([*range(10_000), "a"]), 422),
        ("[9223372036854775808]", 422),
        ("[" + "1" * 5000 + "]", 422),
        ('["' + "a" * 5000 + '"]', 422),
        ('["' + "a" * 500_000 + '"]', 422),
        ('["a\\u0000"]', 422),
        ('["\\ud800"]', 422),
        ('[1], "ids": [1]', 422),
        ("[01]", 400),
        ('["a\n"]', 400),
        ("[1", 422),
        ("[" * 100_000, 422),
        ("[" + "[]," * 400_000, 422),
    ],
)
def test_ids_that_are_none_are_refused(server: httpx.Client, ids: str, status: int) -> None:
    terms = json.dumps(terms_of(ids="integer").to_json())
    body = f'{{"rank": 0, "sitting": 1, "terms": {terms}, "ids": {ids}}}'
    answer = server.put(f"{RUN}/recording", content=body.encode(), headers=JSON)
    assert answer.status_code == status, answer.text
    assert server.get(RUN).status_code == 404


def test_what_is_read_at_once_of_a_long_body_is_short(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading JSON keeps all other threads waiting: a list of ids is read in pieces, and nothing else may be long."""
    read: list[int] = []

    def counted(piece: bytes, loads: Any = json.loads) -> Any:
        read.append(len(piece))
        return loads(piece)

    monkeypatch.setattr(id_lists, "json", SimpleNamespace(loads=counted))
    terms = terms_of(ids="integer", examples=100_000).to_json()
    told = WHO | {"terms": terms, "ids": list(range(100_000))}
    assert server.put(f"{RUN}/recording", json=told).status_code == 200
    assert sum(read) > 400_000
    assert max(read) < 1000
    told = WHO | {"terms": terms | {"nothing": [[]] * 100_000}}
    problem_of(server.put(f"{RUN}/recording", json=told), TooManyRows, 413)


def test_names_that_are_made_up_are_no_labels_of_metrics(server: httpx.Client) -> None:
    made_up = "made-up-name"
    told = {"rank": 0, "sitting": 1, "terms": {}}
    assert server.put(f"/v1/label-sets/{made_up}/recording", json=told).status_code == 422
    assert send(server, body_of([1]), made_up).is_error
    assert server.post(f"/v1/label-sets/{made_up}/recording/finish", json=WHO).is_error
    assert made_up not in server.get("/metrics").text
    begin(server)
    assert 'logitcache_response_bytes_total{label_set="run-1"}' in server.get("/metrics").text


def test_a_recording_that_broke_once_goes_on(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(server)

    def fails(self: Files, *_: Any) -> None:
        raise StorageFault("the disk is away")

    with monkeypatch.context() as patched:
        for what in ("append", "cut", "erase"):
            patched.setattr(Files, what, fails)
        problem_of(send(server, body_of([1])), StorageFault, 500)
        problem_of(send(server, body_of([1])), StorageFault, 500)
    assert send(server, body_of([1])).json() == {"rows": 1}
    assert stand_of(begin(server, sitting=2)).recorded == 1


def test_a_recording_is_begun_while_the_log_of_another_is_read(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()

    class Slow(Recording):
        def __init__(self, path: Path, *arguments: Any) -> None:
            if path.name == "slow":
                reading.set()
                assert go_on.wait(60)
            super().__init__(path, *arguments)

    monkeypatch.setattr("logitcache.server.http.recordings.Recording", Slow)
    with ThreadPoolExecutor(2) as threads:
        slow = [threads.submit(begin, server, name="slow", sitting=sitting) for sitting in (1, 2)]
        try:
            assert reading.wait(60)
            assert stand_of(begin(server)).recorded == 0
            assert send(server, body_of([1])).status_code == 200
        finally:
            go_on.set()
        assert {each.result().status_code for each in slow} <= {200, 409}  # the first may come behind the second


def test_a_full_disk_is_507_and_what_is_sent_again_is_recorded(
    server: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(server)

    def full(self: Files, handle: int, path: Path, end: int, data: Any) -> None:
        os.pwrite(handle, bytes(data)[:100], end)
        with explained(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Files, "append", full)
        problem_of(send(server, body_of([1])), DiskFull, 507)
    assert send(server, body_of([1])).json() == {"rows": 1}
    assert stand_of(finish(server)).rows == 1


def test_rows_are_served_listed_and_counted_while_they_are_recorded(server: httpx.Client) -> None:
    begin(server)
    send(server, body_of([5, 0], ordinals=[5, 0]))
    listed = [Description.from_json(value) for value in server.get("/v1/label-sets").json()]
    described = Description.from_json(server.get(RUN).json())
    openapi.Description.model_validate(server.get(RUN).json())
    assert listed == [described]
    assert (described.examples, described.labelled, described.rows, described.digest) == (EXAMPLES, 2, 2, None)
    assert described.identity.teacher.name == "run-1"
    fetched = server.post(f"{RUN}/fetch", json={"ids": [0, 5, 0]})
    assert fetched.json()["indices"] == SOURCE.order[[0, 5, 0]].tolist()
    assert "logitcache-digest" not in fetched.headers
    assert server.get(f"{RUN}/examples/5").json()["indices"] == SOURCE.order[5].tolist()
    error = problem_of(server.post(f"{RUN}/fetch", json={"ids": [0, 3, 99]}), RowsMissing, 404)
    assert (error.details["unknown"], error.details["unlabelled"]) == ([99], [3])
    assert "record" in error.message
    masked = server.post(f"{RUN}/fetch", json={"ids": [3, 5], "on_missing": "mask"}).json()
    assert masked["present"] == [False, True]
    states = server.post(f"{RUN}/missing", json={"ids": [0, 3, 99]}).json()
    assert (states["unknown"], states["unlabelled"]) == ([99], [3])
    pinned = {"ids": [0], "digest": "sha256:" + "1" * 64}
    assert "is being recorded" in problem_of(server.post(f"{RUN}/fetch", json=pinned), DigestChanged, 409).message
    metrics = server.get("/metrics").text
    assert 'logitcache_rows_served_total{label_set="run-1"}' in metrics
    assert server.get("/readyz").status_code == 200


def test_the_command_line_tells_of_a_recording_and_seals_it(store: Path) -> None:
    with running(create_app(Catalog(store), record=True)) as url, httpx.Client(base_url=url) as client:
        begin(client)
        send(client, body_of([5, 0], ordinals=[5, 0]))
        locked = refused(run("seal", "run-1", "--part", store=store))
        assert "run-1" in locked
    assert "run-1" in run("ls", store=store).stdout
    page = run("info", "run-1", store=store).stdout
    assert "it is being recorded" in page
    assert "steps 0 to 49; train mode" in page
    assert json.loads(run("info", "run-1", "--json", store=store).stdout)["labelled"] == 2
    assert json.loads(run("fetch", "run-1", "5", store=store).stdout)["indices"] == [SOURCE.order[5].tolist()]
    assert "3" in refused(run("fetch", "run-1", "3", store=store))
    assert run("verify", "run-1", store=store).exit_code == 0
    told = refused(run("seal", "run-1", store=store))
    assert "10 of 12 examples" in told
    done = run("seal", "run-1", "--part", store=store)
    assert done.exit_code == 0, done.stderr
    digest = json.loads(run("info", "run-1", "--json", store=store).stdout)["digest"]
    assert digest in done.stdout
    assert "2 examples" in done.stdout
    assert json.loads(run("fetch", "run-1", "5", store=store).stdout)["digest"] == digest
    assert run("verify", "run-1", store=store).exit_code == 0
    refused(run("seal", "run-1", store=store))
    assert "run-1" in refused(run("seal", "run-2", store=store))


@pytest.fixture
def again(store: Path) -> Callable[[], Any]:
    return lambda: running(create_app(Catalog(store), record=True))


def test_a_server_that_is_started_anew_goes_on_with_the_same_recorders(again: Callable[[], Any]) -> None:
    with again() as url, httpx.Client(base_url=url) as client:
        begin(client)
        send(client, body_of(range(6)))
    with again() as url, httpx.Client(base_url=url) as client:
        assert send(client, body_of(range(6, 12), ordinals=range(6, 12))).json() == {"rows": 6}
        assert sealed(client).digest is not None


def test_several_recorders_finish_before_it_is_sealed(server: httpx.Client) -> None:
    for rank in (0, 1):
        begin(server, rank=rank, recorders=2)
        send(server, body_of(range(rank, 12, 2), ordinals=range(rank, 12, 2), who=Who(rank, 1)))
    stand = stand_of(finish(server, rank=1))
    assert (stand.finished, stand.digest, stand.recorded) == ((1,), None, 12)
    assert not stand.sealing
    assert sealed(server, rank=0).digest == stand_of(finish(server, rank=1)).digest
