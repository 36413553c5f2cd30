"""Every failure of the network, at every call: the right bytes after a retry, or a typed error within the deadline.

A real server stands behind a network that is told how to fail. Where the failure passes after some attempts, the
call gives what it gives undisturbed; where it does not, its error is the one in the table, no later than the deadline
and `LATE_S`. Afterwards no thread and no socket is left, and what was recorded is whole.
"""

import gc
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tests.building import Reference, build, reference
from tests.client import network as net
from tests.client.network import Network
from tests.client.rows import dense_logits
from torch.utils.data import DataLoader

from logitcache.client import connect, record, retrying, with_ids
from logitcache.labels.errors import (
    DeadlineExceeded,
    DigestChanged,
    HostNotFound,
    LogitcacheError,
    MalformedMessage,
    RequestRefused,
    ServerBusy,
    ServerFault,
    ServerUnreachable,
)
from logitcache.labels.label_set import Limits
from logitcache.labels.soft_labels import SoftLabels
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running

TIMEOUT_S = 1.5
"""The deadline of calls that never succeed."""

LATE_S = 1.5
"""Longest that an error may come after the deadline: this machine runs some twenty calls at once."""

LONG_S = 60.0
"""The deadline of calls that succeed."""

TRIES = (1, 3)
"""Attempts that fail before one that passes."""

EXAMPLES, CLASSES = 60, 12
LOGITS = dense_logits(EXAMPLES, CLASSES, seed=5).astype(np.float32)
IDS = np.random.default_rng(0).permutation(3000)[:100]


class Failure(NamedTuple):
    """A way to fail: the error where it never passes, and where that is `DeadlineExceeded`, the error it stands for."""

    fault: Any
    error: type[LogitcacheError]
    cause: type[LogitcacheError] | None = None
    passes: bool = True


def _away(fault: Any, cause: type[LogitcacheError] = ServerUnreachable, *, passes: bool = True) -> Failure:
    return Failure(fault, DeadlineExceeded, cause, passes)


FAILURES = {
    "the connection ends": _away(net.hang_up),
    "the connection is reset": _away(net.reset),
    "it ends in the head": _away(net.end_in_the_head),
    "it ends in the body": _away(net.end_in_the_body),
    "it is reset in the body": _away(net.reset_in_the_body),
    "it ends in a chunk": _away(net.end_in_a_chunk),
    "another protocol": _away(net.no_http),
    "nobody listens": _away(net.nobody_listens),
    "no resolver": _away(net.no_resolver),
    "the name is gone": _away(net.no_such_name),
    "a page: 429": _away(net.page(429), ServerBusy),
    "a page: 502": _away(net.page(502), ServerBusy),
    "a page: 503, later": _away(net.page(503, ("Retry-After", "0")), ServerBusy),
    "a page: 504": _away(net.page(504), ServerBusy),
    # A stall takes all the time there is, so no attempt comes after it.
    "nothing comes": _away(net.stall, passes=False),
    "nothing more comes": _away(net.stall_in_the_body, passes=False),
    "a trickle comes": _away(net.trickle, passes=False),
    "a page: 200": Failure(net.page(200), MalformedMessage),
    "a page: 302": Failure(net.page(302, ("Location", "http://example/login")), ServerFault),
    "a page: 404": Failure(net.page(404), RequestRefused),
    "a page: 413": Failure(net.page(413), RequestRefused),
    "a page: 500": Failure(net.page(500), ServerFault),
    "another content type": Failure(net.of_another_type, MalformedMessage),
    "compressed": Failure(net.compressed, MalformedMessage),
    "a short body": Failure(net.short_and_said_so, MalformedMessage),
    "a garbled body": Failure(net.garbled, MalformedMessage),
    "a body far too long": Failure(net.far_too_long, MalformedMessage),
}

NO_SUCH_HOST = Failure(net.no_such_name, HostNotFound)
"""What a name that is gone means for whoever asks for the first time."""

Act = Callable[[], Any]


class Place(NamedTuple):
    """Where a call is made: the server as the network names it, and directly; a deadline, and a name of its own."""

    url: str
    server: str
    timeout_s: float
    number: int


def bits(soft: SoftLabels) -> Any:
    return {name: array.tobytes() for name, array in soft.arrays().items()}, soft.digest


@contextmanager
def describing(at: Place) -> Iterator[Act]:
    with connect(f"{at.url}/set", timeout_s=at.timeout_s) as labels:
        # What others fetch is counted meanwhile, and shards are verified.
        yield lambda: labels.describe().to_json() | {"served": None, "shards": None}


@contextmanager
def fetching(at: Place) -> Iterator[Act]:
    """In parts, because the server's limit is 40 ids."""
    with connect(f"{at.url}/set", timeout_s=at.timeout_s) as labels:
        yield lambda: bits(labels.fetch(IDS))


@contextmanager
def asking_states(at: Place) -> Iterator[Act]:
    with connect(f"{at.url}/part", timeout_s=at.timeout_s) as labels:
        yield lambda: labels.missing(np.arange(4000, 4150))


@contextmanager
def an_epoch(at: Place) -> Iterator[Act]:
    loader = DataLoader(with_ids(np.zeros((300, 1), np.float32)), batch_size=50)
    with connect(f"{at.url}/set", timeout_s=at.timeout_s) as labels:
        steps = iter(labels.attach(loader, ids=-1, depth=1))
        next(steps)  # it fails in mid-epoch

        def rest() -> Any:
            try:
                return [(batch[1].tolist(), bits(soft)) for batch, soft in steps]
            finally:
                steps.close()  # type: ignore[attr-defined]

        yield rest


def _recorder(at: Place) -> Any:
    return record(
        f"{at.url}/run-{at.number}",
        run="run-1",
        steps=range(10),
        classes=CLASSES,
        top_k=4,
        examples=EXAMPLES,
        timeout_s=at.timeout_s,
    )


def _recorded(at: Place) -> Any:
    """What stands in the label set that was recorded."""
    with connect(f"{at.server}/run-{at.number}") as labels:
        found = labels.fetch(range(EXAMPLES))
        return {name: array.tobytes() for name, array in found.arrays().items()}


@contextmanager
def beginning_to_record(at: Place) -> Iterator[Act]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(_closing(_recorder(at))).terms.to_json()


@contextmanager
def _closing(recorder: Any) -> Iterator[Any]:
    try:
        yield recorder
    finally:
        recorder.close()


@contextmanager
def recording(at: Place) -> Iterator[Act]:
    """What could not be sent is sent when the network is mended, so that nothing is ever lost."""
    with _closing(_recorder(at)) as recorder:

        def add() -> Any:
            for begin in range(0, EXAMPLES, 20):
                recorder.add(np.arange(begin, begin + 20), LOGITS[begin : begin + 20])
            recorder.flush()
            return _recorded(at)

        yield add


@contextmanager
def finishing(at: Place) -> Iterator[Act]:
    with _closing(_recorder(at)) as recorder:
        recorder.add(np.arange(EXAMPLES), LOGITS)
        recorder.flush()
        yield lambda: (recorder.finish(), _recorded(at))


CALLS: dict[str, Callable[[Place], AbstractContextManager[Act]]] = {
    "describe": describing,
    "fetch": fetching,
    "missing": asking_states,
    "epoch": an_epoch,
    "record": beginning_to_record,
    "add": recording,
    "finish": finishing,
}


class Site:
    """A server, and networks to it; calls what it is told, and counts what came of it."""

    def __init__(self, server: str) -> None:
        self.server = server
        self.expected: dict[str, Any] = {}
        self.found: Counter[str] = Counter()
        self.latest_s = 0.0
        self._made = 0
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._names = self._stack.enter_context(net.names())
        for call in CALLS:
            with self.way() as network, CALLS[call](self.place(network, LONG_S)) as act:
                self.expected[call] = act()

    @contextmanager
    def way(self) -> Iterator[Network]:
        with self._lock:
            self._made += 1
            name = f"way-{self._made}.example"
        network = Network(self.server, name)
        self._names[name] = network
        try:
            yield network
        finally:
            network.stop()

    def place(self, network: Network, timeout_s: float) -> Place:
        return Place(network.url, self.server, timeout_s, int(network.name.partition("-")[2].partition(".")[0]))

    def close(self) -> None:
        self._stack.close()

    def passes(self, failure: Failure, call: str, tries: int) -> None:
        """The call succeeds after so many attempts that failed."""
        with self.way() as network, CALLS[call](self.place(network, LONG_S)) as act:
            network.break_(failure.fault, tries)
            began = time.perf_counter()
            assert act() == self.expected[call]
            assert time.perf_counter() - began < LONG_S
            assert network.asked >= tries
        self._count("right bytes after a retry")

    def never_passes(self, failure: Failure, call: str) -> None:
        """The call fails as the table says; what was to be recorded is there when the network is mended."""
        with self.way() as network, CALLS[call](self.place(network, TIMEOUT_S)) as act:
            network.break_(failure.fault)
            began = time.perf_counter()
            with pytest.raises(failure.error) as told:
                act()
            took_s = time.perf_counter() - began
            assert took_s < TIMEOUT_S + LATE_S, took_s
            assert type(told.value) is failure.error
            if failure.cause is None:
                # An epoch has asked for the batches after it by then.
                assert network.asked <= (3 if call == "epoch" else 1), "it was asked for again"
            else:
                assert isinstance(told.value.__cause__, failure.cause)
                assert network.name in told.value.message
            network.mend()
            if call == "finish":
                assert act() == self.expected[call]
        if call == "add":
            # What was added before the error, all of it; a loop that goes on adds the rest.
            with connect(f"{self.server}/run-{self.place(network, TIMEOUT_S).number}") as labels:
                assert not set(range(20)) & set(labels.missing(range(EXAMPLES)))
        self._count(failure.error.__name__, took_s)

    def _count(self, what: str, took_s: float = 0.0) -> None:
        with self._lock:
            self.found[what] += 1
            self.latest_s = max(self.latest_s, took_s)


@pytest.fixture(scope="module")
def source() -> Reference:
    return reference(2)


@pytest.fixture
def site(source: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """At its end no thread of the client and no socket is left."""
    monkeypatch.setattr(retrying, "FIRST_WAIT_S", 0.01)
    build(tmp_path / "set", source)
    build(tmp_path / "part", source, [0])
    before = _sockets()
    with running(create_app(Catalog(tmp_path, limits=Limits(ids=40)), record=True)) as server:
        here = Site(server)
        yield here
        here.close()
    for thread in threading.enumerate():
        if thread.name.startswith("logitcache"):
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} is left"
    gc.collect()
    assert _sockets() <= before


def _sockets() -> int:
    """Sockets that are open in this process."""
    count = 0
    for entry in os.scandir("/proc/self/fd"):
        try:
            count += str(Path(entry.path).readlink()).startswith("socket:")
        except FileNotFoundError:  # the one that lists them
            continue
    return count


def test_every_failure_that_passes_is_survived_by_every_call(site: Site) -> None:
    cases = [
        (failure, call, tries)
        for failure in FAILURES.values()
        if failure.cause is not None and failure.passes
        for call in CALLS
        for tries in TRIES
        if not _asks_first(failure, call)
    ]
    _together(site.passes, cases)
    print(f"\nfailures that pass: {len(cases)} cases: {dict(site.found)}")


def _asks_first(failure: Failure, call: str) -> bool:
    """The name was never found before, so that it is gone means that it is wrong."""
    return failure.fault is net.no_such_name and call == "record"


def test_every_failure_that_does_not_pass_is_its_error_within_the_deadline_at_every_call(site: Site) -> None:
    cases = [
        (NO_SUCH_HOST if _asks_first(failure, call) else failure, call)
        for failure in FAILURES.values()
        for call in CALLS
    ]
    _together(site.never_passes, cases)
    told = f"the latest after {site.latest_s:.1f} s of {TIMEOUT_S} s"
    print(f"\nfailures that do not pass: {len(cases)} cases: {dict(site.found)}; {told}")


@pytest.mark.parametrize("call", ["fetch", "epoch"])
def test_a_digest_that_changes_on_the_way_is_refused_at_once_by_whoever_is_pinned(site: Site, call: str) -> None:
    with connect(f"{site.server}/set") as labels:
        digest = labels.describe().digest or ""
    with site.way() as network, connect(f"{network.url}/set", digest=digest) as labels:
        loader = DataLoader(with_ids(np.zeros((300, 1), np.float32)), batch_size=50)
        steps = iter(labels.attach(loader, ids=-1, depth=1))
        next(steps)
        network.break_(net.of_another_digest(digest))
        with pytest.raises(DigestChanged, match=digest):
            labels.fetch(IDS) if call == "fetch" else list(steps)
        steps.close()  # type: ignore[attr-defined]


def _together(run: Callable[..., None], cases: list[Any]) -> None:
    """Run cases some at a time, and name those that fail."""
    names = {failure.fault: name for name, failure in FAILURES.items()}
    with ThreadPoolExecutor(16) as pool:
        under_way = [(case, pool.submit(run, *case)) for case in cases]
    errors = [(case, future.exception()) for case, future in under_way]
    wrong = [f"{names[case[0].fault]}, {case[1:]}: {error!r:.400}" for case, error in errors if error is not None]
    assert not wrong, "\n".join(wrong)
