"""The server against the documentation that it serves at ``/openapi.json``, by schemathesis and by hand.

schemathesis makes requests of every operation out of that document, such as it allows (positive) and such as it does
not (negative), at the edges of what it tells and at random, and sends them with an admin key to the real server over a
real socket: label sets sealed and being built, a recording under way, jobs in every state. Values that the server knows
take the place of random ones in some of them, or almost all would name nothing. Each answer is held against the
document by all checks of schemathesis that judge one answer, but for these:

- ``positive_data_acceptance`` takes 404, 409, 413 and 422 as well: which ids are there, of which kind, and how many
  rows they have, no schema tells. What is left of it: a body that the schema allows is parsed (no 400), and neither its
  media type (no 415) nor its media type of the answer (no 406) is refused. Of safetensors the document says that they
  are bytes, so what is in them is judged in `tests.server.test_http_shapes` and by ``tests/attacks``.
- ``unsupported_method``: what is no route needs an admin key and a JSON content type before it is told 405, lest a form
  on somebody's page find out; see `tests.server.test_access`.
- ``missing_required_header``, ``allow_header_conformance``: no operation takes a header parameter or OPTIONS.
- ``use_after_free``, ``ensure_resource_availability``, ``object_level_authorization``: they judge sequences of creating
  and deleting; nothing is deleted over HTTP, and keys have no objects of their own.

Then every status that the document tells of an operation is reached by hand, and no other.
"""

import errno
import os
import random
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import httpx
import hypothesis
import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, strategies
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi import checks as conformance
from tests.attacks.bodies import BODIES
from tests.building import build, reference
from tests.server.test_recording import body_of, terms_of

from logitcache.labels import identity, wire
from logitcache.labels.errors import StorageFault
from logitcache.labels.ids import as_ids
from logitcache.labels.recorded import Who
from logitcache.server.config import Config
from logitcache.server.http import catalog, messages, recording_routes
from logitcache.server.http.access import Access
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.load import Load
from logitcache.server.http.serve import running
from logitcache.server.jobs import queue
from logitcache.server.jobs.folder import FOLDER, JobFolder
from logitcache.server.jobs.job import STATES, Asked, Job, JobError, ProcessId, State
from logitcache.server.jobs.queue import Jobs
from logitcache.server.keys import Keys, KeyScope, KnownKeys
from logitcache.storage import shards
from logitcache.storage.files import Files
from logitcache.storage.lock import WriterLock

EXAMPLES = 8
"""Of each operation and mode, at random; what schemathesis makes of the edges comes on top."""

SEED = 7
"""Of what schemathesis draws for the edges."""

PROOF_EXAMPLES = 400

STEERED = 0.7
"""Of the values for which this server knows others, so many make place for one."""

JSON, SAFETENSORS = {"Content-Type": messages.JSON}, {"Content-Type": messages.SAFETENSORS}

schemathesis.serializer.alias(messages.SAFETENSORS, "application/octet-stream")

DOCUMENT = create_app(Catalog(Path("nowhere"))).openapi()

OPERATIONS: dict[str, dict[str, Any]] = {
    f"{method.upper()} {path}": operation
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}

FETCH, MISSING = "POST /v1/label-sets/{name}/fetch", "POST /v1/label-sets/{name}/missing"
LIST, DESCRIBE = "GET /v1/label-sets", "GET /v1/label-sets/{name}"
EXAMPLE = "GET /v1/label-sets/{name}/examples/{id}"
BEGIN, RECORD = "PUT /v1/label-sets/{name}/recording", "POST /v1/label-sets/{name}/record"
FINISH = "POST /v1/label-sets/{name}/recording/finish"
ASK_JOB, JOB_LIST = "POST /v1/jobs", "GET /v1/jobs"
DESCRIBE_JOB, CANCEL = "GET /v1/jobs/{id}", "POST /v1/jobs/{id}/cancel"
HEALTH, READY, METRICS = "GET /healthz", "GET /readyz", "GET /metrics"

ELSE = "another method"
"""Whose answers are those of no operation."""

CAN_BE_WRONG = [label for label, operation in OPERATIONS.items() if {"parameters", "requestBody"} & set(operation)]
"""Operations of which a request can be other than the document allows."""

REFUSED = ["400", "404", "405", "415", "422"]
"""What a request may be told that the document does not allow."""

TAKEN = ["2xx", "404", "409", "413", "422"]
"""And one that it does."""

CHECKS = [
    not_a_server_error,
    conformance.status_code_conformance,
    conformance.content_type_conformance,
    conformance.response_schema_conformance,
    conformance.response_headers_conformance,
    conformance.ignored_auth,
]
"""Of every answer; those that judge by what was sent come on top."""

POINTS = reference(1, short_by=4000)
TOKENS = reference(1, alignment="causal", longest=3000, short_by=500)
TEXTS = reference(1, short_by=4060, ids="text", targets=True)
LONG = int(np.argmax(TOKENS.row_counts))
JOB: dict[str, Any] = {"label_set": "fresh", "teacher": "one", "dataset": "points", "top_k": 3}
DIGEST = "sha256:" + "1" * 64


CONFIG = """\
[teachers]
one = {spec = "nowhere:one"}
two = {spec = "nowhere:two"}

[datasets.points]
spec = "nowhere:points"
"""


def job(state: State, number: int) -> Job:
    """A job of each state, as a server that ran it would have left it."""
    new = Job.of(Asked(**JOB | {"label_set": f"set-{number}"}).request())
    if state == "queued":
        return new
    process = new.running(ProcessId(pid=2**22 + 1, began="never"), "cpu")
    if state == "running":
        return process
    error = JobError(code="teacher-fault", message="the teacher's own trouble")
    return process.over(state, error=error) if state == "failed" else process.over(state, digest=DIGEST)


JOBS = {state: job(state, number) for number, state in enumerate(STATES)}

SOUND_BODIES: list[bytes] = [
    wire.encode_ids(as_ids([3, 1])),
    wire.encode_ids(as_ids(TEXTS.at([5]))),
    wire.encode({"ids": np.array([1]), "rows": np.array([[0, 1]])}),
    body_of([3, 1]),
]

BODIES_OF_BATCHES = [*SOUND_BODIES * (len(BODIES) // 4), *BODIES.values()]
"""Of safetensors: as many sound ones as others."""

KNOWN: dict[str, list[Any]] = {
    "name": ["points", "tokens", "texts", "half", "run-1"],
    "ids": [[3, 1, 4], [0], TEXTS.at([5, 1]), [LONG], [0, 10**6]],
    "rows": [None, [0, 1], [[0, 1]]],
    "view": [0, [0]],
    "digest": [None, DIGEST],
    "like": [None, "texts", "points"],
    "terms": [terms_of().to_json(), terms_of(ids="text").to_json()],
    "rank": [0],
    "sitting": [1],
    "label_set": [f"fresh-{number}" for number in range(40)],
    "teacher": ["one", ["one", "two"]],
    "dataset": ["points"],
    "views": [None, 2],
    "seed": [None, 5],
    "temperatures": [[], [2.0]],
    "rows_per_shard": [None, 8192],
    "id": [each.id for each in JOBS.values()],
    f"name of {BEGIN}": ["run-1", "run-2", "run-3", "points"],
    f"id of {EXAMPLE}": ["3", "95", "999", str(LONG), TEXTS.ids[5]],
}
"""What this server knows, by the name of a parameter or of a body's field."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: a configuration, and a store with label sets. Only to be copied."""
    folder = tmp_path_factory.mktemp("schema")
    (folder / "logitcache.toml").write_text(CONFIG)
    store = folder / "label-sets"
    store.mkdir()
    build(store / "points", POINTS)
    build(store / "tokens", TOKENS)
    build(store / "texts", TEXTS)
    build(store / "half", reference(2), [0])
    (store / FOLDER).mkdir()
    for each in JOBS.values():
        JobFolder(store / FOLDER, each.id).write(each)
    (folder / "keys").mkdir()
    return folder


@dataclass
class Served:
    """A server with keys, and how often it answered what."""

    folder: Path
    url: str
    keys: dict[str, str]
    client: httpx.Client
    session: requests.Session
    seen: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def store(self) -> Path:
        return self.folder / "label-sets"

    def headers(self, scope: str | None = "admin") -> dict[str, str]:
        return {} if scope is None else {"Authorization": f"Bearer {self.keys[scope]}"}


@contextmanager
def served(built: Path, folder: Path, *, load: Load | None = None, jobs: bool = True) -> Iterator[Served]:
    """The real server over a copy of what was built, with a recording under way.

    Its jobs do not run: another holds their lock, so it leaves what it is asked for that one to do.
    """
    shutil.copytree(built, folder, dirs_exist_ok=True)
    store, config = folder / "label-sets", Config.read(folder / "logitcache.toml")
    keyring = Keys(folder / "keys")
    keys = {scope: keyring.make(f"{scope}-key", scope) for scope in get_args(KeyScope)}
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patience:
        # Machines that test are shared, and a server that is kept waiting for its keys lets nobody in.
        patience.setattr("logitcache.server.keys.TRUSTED_S", 60.0)
        stack.callback(WriterLock(store / FOLDER / "lock").release)
        app = create_app(
            Catalog(store),
            Jobs(store, config) if jobs else None,
            record=True,
            access=Access(KnownKeys(keyring)),
            load=load,
        )
        url = stack.enter_context(running(app))
        client = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        session = stack.enter_context(requests.Session())
        session.trust_env = False
        found = Served(folder, url, keys, client, session)
        if load is None:
            terms = {"rank": 0, "sitting": 1, "terms": terms_of().to_json()}
            assert client.put("/v1/label-sets/run-1/recording", json=terms, headers=found.headers()).status_code == 200
        yield found


@cache
def documented() -> Any:
    """The document, for schemathesis; that it is the one which is served is a test's claim."""
    config = SchemathesisConfig.from_dict(
        {
            "seed": SEED,
            "generation": {"with-security-parameters": False},
            "checks": {
                "negative_data_rejection": {"expected-statuses": REFUSED},
                "positive_data_acceptance": {"expected-statuses": TAKEN},
            },
        }
    )
    return schemathesis.openapi.from_dict(DOCUMENT, config=config)


def place(case: Any, label: str, known: Callable[[list[Any]], Any]) -> None:
    """Put names and ids that this server knows into a request's path; ``known`` chooses one of several, or None."""
    for name in case.path_parameters:
        values = KNOWN.get(f"{name} of {label}", KNOWN[name])
        if (value := known(values)) is not None:
            case.path_parameters[name] = value


def changed(case: Any) -> set[Any]:
    """Where schemathesis made a request other than the document allows, or put the edge that it tries."""
    made = case.meta.phase.data
    return {made.parameter_location, *(one.parameter_location for one in getattr(made, "mutations", ()))}


def fill(case: Any, known: Callable[[list[Any]], Any]) -> None:
    """Put what this server knows into a body that the document allows."""
    if case.media_type == messages.SAFETENSORS:
        case.body = known(BODIES_OF_BATCHES) or case.body
    elif isinstance(case.body, dict):
        found = {name: known(KNOWN[name]) for name in case.body if name in KNOWN}
        case.body = case.body | {name: value for name, value in found.items() if value is not None}


def explore(server: Served, label: str, mode: GenerationMode, examples: int, seed: int | None = None) -> int:
    """Send what schemathesis makes of one operation, and check every answer; how many requests that were."""
    operation = documented().find_operation_by_label(label)
    positive, sent = mode == GenerationMode.POSITIVE, 0

    def check(case: Any) -> None:
        nonlocal sent
        answer = case.call(base_url=server.url, session=server.session, headers=server.headers())
        sent += 1
        server.seen[label if label.startswith(case.method) else ELSE, answer.status_code] += 1
        judged = [conformance.positive_data_acceptance] if case.media_type != messages.SAFETENSORS else []
        checks = [*CHECKS, *(judged if positive else [conformance.negative_data_rejection])]
        case.validate_response(answer, checks=checks, headers=server.headers())

    asked = operation.schema.config.generation_for(operation=operation, phase="coverage")
    for case in operation.schema.iter_coverage_cases(operation, generation_modes=[mode], generation_config=asked):
        if ParameterLocation.PATH not in changed(case):
            place(case, label, lambda of: of[sent % len(of)])
        check(case)

    @hypothesis.settings(
        max_examples=examples,
        derandomize=seed is None,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode), strategies.randoms(use_true_random=False))
    def at_random(case: Any, rng: random.Random) -> None:
        def known(values: list[Any]) -> Any:
            return rng.choice(values) if rng.random() < STEERED else None

        if positive or ParameterLocation.PATH not in changed(case):
            place(case, label, known)
        if positive:
            fill(case, known)
        check(case)

    (at_random if seed is None else hypothesis.seed(seed)(at_random))()
    return sent


def told(seen: Counter[tuple[str, int]]) -> str:
    """Requests by operation and status, as a table."""
    lines = []
    for label in [*OPERATIONS, *({ELSE} & {label for label, _ in seen})]:
        counts = {status: count for (of, status), count in sorted(seen.items()) if of == label}
        by_status = ", ".join(f"{status}: {count:,}" for status, count in counts.items())
        lines.append(f"{label}: {sum(counts.values()):,} ({by_status})")
    return "\n".join([*lines, f"{sum(seen.values()):,} requests of {len(OPERATIONS)} operations"])


@pytest.fixture(scope="module")
def server(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(built, tmp_path_factory.mktemp("served")) as server:
        yield server
        print("\n" + told(server.seen))


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_document_allows_is_answered_as_it_says(server: Served, label: str) -> None:
    assert explore(server, label, GenerationMode.POSITIVE, EXAMPLES) > 0


@pytest.mark.parametrize("label", CAN_BE_WRONG)
def test_what_the_document_does_not_allow_is_refused_as_it_says(server: Served, label: str) -> None:
    assert explore(server, label, GenerationMode.NEGATIVE, EXAMPLES) > 0


def test_the_document_that_is_served_is_the_one_of_these_tests(server: Served) -> None:
    assert server.client.get("/openapi.json", headers=server.headers()).json() == DOCUMENT


def test_the_document_tells_the_names_that_a_label_set_may_have() -> None:
    patterns = {
        parameter["schema"]["pattern"]
        for operation in OPERATIONS.values()
        for parameter in operation.get("parameters", [])
        if parameter["name"] == "name"
    }
    assert patterns == {identity.NAME_PATTERN}


RUN, WHO = "run-1", {"rank": 0, "sitting": 1}
SOUND: dict[str, dict[str, Any]] = {
    FETCH: {"name": "points", "json": {"ids": [3, 1]}},
    MISSING: {"name": "points", "json": {"ids": [3, 1]}},
    LIST: {},
    DESCRIBE: {"name": "points"},
    EXAMPLE: {"name": "points", "id": "3"},
    BEGIN: {"name": RUN, "json": WHO | {"terms": terms_of().to_json()}},
    RECORD: {"name": RUN, "content": body_of([3]), "headers": SAFETENSORS},
    FINISH: {"name": RUN, "json": WHO},
    ASK_JOB: {"json": JOB},
    JOB_LIST: {},
    DESCRIBE_JOB: {"id": JOBS["failed"].id},
    CANCEL: {"id": JOBS["queued"].id, "json": {}},
    HEALTH: {},
    READY: {},
    METRICS: {},
}
"""A request of each operation that is done."""

KEYED = [label for label, operation in OPERATIONS.items() if "security" in operation]
CHANGING = [label for label in OPERATIONS if "403" in OPERATIONS[label]["responses"]]
WITH_BODY = [label for label, operation in OPERATIONS.items() if "requestBody" in operation]
READING = [label for label in WITH_BODY if label != CANCEL]
OF_STORE = [LIST, DESCRIBE, EXAMPLE, READY]

FAULTS: dict[tuple[str, int], dict[str, Any]] = {
    (FETCH, 404): {"name": "nothing"},
    (FETCH, 406): {"headers": {"Accept": "text/html"}},
    (FETCH, 409): {"json": {"ids": [3], "digest": DIGEST}},
    (FETCH, 422): {"json": {"ids": []}},
    (MISSING, 404): {"name": "nothing"},
    (MISSING, 406): {"headers": {"Accept": "text/html"}},
    (MISSING, 409): {"json": {"ids": [3], "digest": DIGEST}},
    (MISSING, 422): {"json": {"ids": []}},
    (DESCRIBE, 404): {"name": "nothing"},
    (DESCRIBE, 422): {"name": "Points"},
    (EXAMPLE, 404): {"id": "999"},
    (EXAMPLE, 413): {"name": "tokens", "id": str(LONG)},
    (EXAMPLE, 422): {"id": "three"},
    (BEGIN, 404): {"name": "run-2", "json": WHO | {"terms": terms_of(ids="integer").to_json(), "like": "nothing"}},
    (BEGIN, 409): {"json": WHO | {"terms": terms_of(examples=13).to_json()}},
    (BEGIN, 422): {"json": WHO | {"terms": {}}},
    (RECORD, 404): {"content": body_of([12])},
    (RECORD, 409): {"content": body_of([3], who=Who(0, 7))},
    (RECORD, 422): {"content": body_of([3], step=50)},
    (FINISH, 404): {"name": "nothing"},
    (FINISH, 409): {"json": WHO | {"sitting": 7}},
    (FINISH, 422): {"json": {"rank": 0}},
    (ASK_JOB, 404): {"json": JOB | {"teacher": "nobody"}},
    (ASK_JOB, 422): {"json": JOB | {"top_k": 0}},
    (DESCRIBE_JOB, 404): {"id": "0" * 16},
    (CANCEL, 404): {"id": "0" * 16},
}
"""What must change in a sound request for each refusal that is one operation's own."""


@dataclass
class Hand:
    """Asks by hand, and holds every answer against the document."""

    server: Served

    def ask(self, label: str, *, scope: str | None = "admin", **changes: Any) -> httpx.Response:
        asked = SOUND[label] | changes
        asked = {name: value for name, value in asked.items() if name != "json" or "content" not in asked}
        method, path = label.split()
        named = {name: quote(asked.pop(name), safe="") for name in ("name", "id") if name in asked}
        sent = self.server.headers(scope) | ({"Content-Type": messages.JSON} if "content" in asked else {})
        sent |= SOUND[label].get("headers", {}) | asked.pop("headers", {})
        answer = self.server.client.request(method, path.format(**named), headers=sent, **asked)
        case = documented().find_operation_by_label(label).Case(path_parameters=named)
        case.validate_response(answer, checks=[conformance.status_code_conformance, *CHECKS[2:5]])
        if answer.is_error:
            problem = answer.json()
            assert (problem["status"], problem["request_id"]) == (answer.status_code, answer.headers["x-request-id"])
        self.server.seen[label, answer.status_code] += 1
        return answer

    def expect(self, status: int, label: str, **changes: Any) -> None:
        answer = self.ask(label, **changes)
        assert answer.status_code == status, (label, changes, answer.text)


def no_space(self: Files, handle: int, data: memoryview, at: int) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def in_trouble(path: Path) -> WriterLock:
    raise StorageFault(f"{path} cannot be read")


def test_every_documented_status_is_reached_and_no_other(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[tuple[str, int]] = Counter()

    @contextmanager
    def hand(name: str, **options: Any) -> Iterator[Hand]:
        with served(built, tmp_path / name, **options) as server:
            server.seen = seen
            yield Hand(server)

    with hand("plain") as by:
        for label in KEYED:
            by.expect(401, label, scope=None)
        for label in CHANGING:
            by.expect(403, label, scope="write" if label == CANCEL else "read")
        for label in OPERATIONS:
            by.expect(421, label, headers={"Host": "evil.example"})
        for label in WITH_BODY:
            by.expect(415, label, content=b"{}", headers={"Content-Type": "text/plain"})
        monkeypatch.setattr(recording_routes, "MOST_BYTES", 1 << 20)
        for label in READING:
            by.expect(413, label, content=bytes((2 << 20) + 1))
            by.expect(400, label, content=b"{")
        for (label, status), changes in FAULTS.items():
            by.expect(status, label, **changes)
        with monkeypatch.context() as full:
            full.setattr(Files, "put", no_space)
            for label in (RECORD, FINISH, ASK_JOB, CANCEL):
                by.expect(507, label)
            by.expect(507, BEGIN, name="run-2")
        by.expect(202, ASK_JOB)
        for label in OPERATIONS:
            by.expect(200, label)
        for label in (FETCH, MISSING):
            for kind in (messages.JSON, messages.SAFETENSORS):
                by.expect(200, label, headers={"Accept": kind})
        for state, each in JOBS.items():
            assert by.ask(DESCRIBE_JOB, id=each.id).json()["state"] == ("cancelled" if state == "queued" else state)
        monkeypatch.setattr(catalog, "LOOK_AGAIN_S", 1e9)
        monkeypatch.setattr(shards, "REFRESH_S", 0.0)
        by.expect(200, LIST)
        shutil.rmtree(by.server.store / "points")
        for label in (DESCRIBE, EXAMPLE):
            by.expect(409, label)
        monkeypatch.undo()
        monkeypatch.setattr("logitcache.server.keys.LOOK_EVERY_S", -1.0)
        keyring = by.server.folder / "keys" / ".keys"
        (keyring / "zzz.json").write_text("{}")
        for label in KEYED:
            by.expect(500, label)
        keyring.rename(by.server.folder / "away")
        for label in KEYED:
            by.expect(503, label)
        monkeypatch.undo()
    with hand("away") as by:
        by.server.store.rename(tmp_path / "elsewhere")
        monkeypatch.setattr(catalog, "LOOK_AGAIN_S", 0.0)
        for label in OF_STORE:
            by.expect(503, label)
        (tmp_path / "elsewhere").rename(by.server.store)
        monkeypatch.undo()
    with hand("without jobs", jobs=False) as by:
        for label in (JOB_LIST, DESCRIBE_JOB, ASK_JOB, CANCEL):
            by.expect(404, label)
    load = Load(most_bytes=1)
    with hand("overloaded", load=load) as by:
        load.add(2)
        for label in READING:
            by.expect(503, label)
    monkeypatch.setattr(queue, "WriterLock", in_trouble)
    with hand("in trouble") as by:
        by.expect(503, CANCEL)
    documented_statuses = {
        (label, int(status)) for label, operation in OPERATIONS.items() for status in operation["responses"]
    }
    print("\n" + told(seen))
    assert set(seen) == documented_statuses


def test_a_misspelt_option_of_an_example_is_refused_and_not_passed_over(server: Served) -> None:
    answer = server.client.get("/v1/label-sets/points/examples/3?veiw=1", headers=server.headers())
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid-request")
    assert "'veiw'; it has view and rows" in answer.json()["detail"]


PROOF_SEED = "SCHEMA_SEED"
"""Environment variable with the seed of an earlier proof, to see the same requests again."""


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_hundreds_of_requests_of_each_operation_and_kind_are_answered_as_documented(
    built: Path, tmp_path: Path
) -> None:
    seed, seen = int(os.environ.get(PROOF_SEED, secrets.randbits(32))), Counter[tuple[str, int]]()
    print(f"\nseed {seed}")
    sent = Counter[str]()
    for mode in GenerationMode:
        for label in OPERATIONS if mode == GenerationMode.POSITIVE else CAN_BE_WRONG:
            # A server of its own for each: what recordings and jobs leave does not pile up.
            with served(built, tmp_path / f"{mode.value}-{len(sent)}-{sum(sent.values())}") as server:
                server.seen = seen
                sent[mode.value] += explore(server, label, mode, PROOF_EXAMPLES, seed)
    print(told(seen))
    print(", ".join(f"{count:,} {mode}" for mode, count in sent.items()))
    assert not any(status >= 500 for _, status in seen)
