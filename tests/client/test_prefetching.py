"""`attach` while labels are fetched: how far ahead, in which thread, and what is left when an epoch ends early.

The labels come from functions that the tests hold up, let go and watch, so that none depends on how long things take.
"""

import gc
import multiprocessing
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.client.rows import dense_logits, picked, truncated

from logitcache.client import AttachedLoader, FetchedLabels, SoftLabelTensors, background
from logitcache.client.attach import Fetch
from logitcache.client.stats import Tally
from logitcache.labels.errors import InvalidRequest
from logitcache.labels.soft_labels import SoftLabels

ALL = truncated(dense_logits(100, 10), 4)


class Pulled(list[int]):
    """A batch that can be watched being dropped."""


def rows(ids: list[int]) -> FetchedLabels:
    arrays: dict[str, Any] = picked(ALL, ids)
    return FetchedLabels(**arrays, temperatures=ALL.temperatures)


def attached(
    loader: Iterable[Any], fetch: Fetch = rows, tally: Tally | None = None, **options: Any
) -> AttachedLoader[Any]:
    counted = tally or Tally()
    return AttachedLoader(loader, fetch, lambda: counted, ids=lambda batch: batch, **options)


def fetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "logitcache-fetch"]


def assert_belong(batch: list[int], soft: SoftLabels | SoftLabelTensors) -> None:
    assert soft.indices.tolist() == ALL.indices[batch].tolist()


class Clock:
    """Time that passes only where a fetch holds up the step that waits for it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.step = 0  # that the main thread is at, told by the test
        self._read = threading.Condition()
        self._waits_at = -1

    def __call__(self) -> float:
        if threading.current_thread() is threading.main_thread():
            with self._read:
                self._waits_at = self.step
                self._read.notify_all()
        return self.now_s

    def let_go(self) -> None:
        """Hold no step up any more."""
        self.step = 1000
        self()

    def hold_up(self, step: int) -> None:
        """In the fetch of this step: come 50 ms after the main thread began to wait for it."""
        with self._read:
            assert self._read.wait_for(lambda: self._waits_at >= step, timeout=60)
            self.now_s += 0.05


def reaches(depth_reached: int, tally: Tally, late: Callable[[int], bool], **options: Any) -> bool:
    """Whether 300 steps lead to fetching so far ahead, where the late answers are 50 ms late."""
    clock = Clock()

    def fetch(ids: list[int]) -> FetchedLabels:
        if late(ids[0]):
            clock.hold_up(ids[0])
        return rows([ids[0] % 100])

    epoch = iter(attached(([index] for index in range(300)), fetch, tally, clock=clock, **options))
    for clock.step, _ in enumerate(epoch, start=1):  # the step that comes next
        if tally.snapshot().depth == depth_reached:
            clock.let_go()
            epoch.close()  # type: ignore[attr-defined]
            return True
        time.sleep(0.0005)  # a step's computing: the thread may run out of work
    return False


def test_it_fetches_further_ahead_where_steps_wait_for_answers_that_are_late_now_and_then() -> None:
    tally = Tally()
    assert reaches(4, tally, lambda index: index % 5 == 4)
    stats = tally.snapshot()
    assert stats.waited_ms >= 100  # two late answers at least
    assert stats.waited_ms_max == pytest.approx(50)


def test_it_fetches_no_further_ahead_where_no_step_waits() -> None:
    tally = Tally()
    assert not reaches(3, tally, lambda index: False)
    assert (tally.snapshot().depth, tally.snapshot().waited_ms) == (2, 0)


def test_a_given_depth_stays_however_long_steps_wait() -> None:
    tally = Tally()
    assert not reaches(3, tally, lambda index: index % 5 == 4, depth=2)
    assert tally.snapshot().waited_ms >= 1000


def pulled_ahead(sizes: list[int], buffer_rows: int) -> list[int]:
    """At each step, the batches that are held or under way beyond it, where batches have so many rows."""
    pulled: list[int] = []

    def batches() -> Iterator[list[int]]:
        for size in sizes:
            pulled.append(size)
            yield [0] * size

    row = sum(array.nbytes for array in rows([0]).arrays().values())
    loader = attached(batches(), buffer_bytes=buffer_rows * row, clock=lambda: 0.0)
    return [len(pulled) - 1 - step for step, _ in enumerate(loader)]


def test_labels_held_and_under_way_stay_within_the_buffer() -> None:
    assert pulled_ahead([10] * 12, buffer_rows=30) == [1] + [2] * 9 + [1, 0]
    assert pulled_ahead([10] * 12, buffer_rows=29) == [1] * 11 + [0]
    assert pulled_ahead([10] * 12, buffer_rows=1) == [1] * 11 + [0]


def test_answers_that_become_large_are_fetched_less_far_ahead() -> None:
    ahead = pulled_ahead([1] * 10 + [20] * 20, buffer_rows=40)
    assert ahead[1:8] == [2] * 7
    assert ahead[11:29] == [1] * 18  # known at the latest when the first of them, batch 10, was delivered


@given(
    batches=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), max_size=25),
    delays=st.lists(st.sampled_from([0.0, 0.0002, 0.002]), min_size=1, max_size=25),
    computing=st.lists(st.sampled_from([0.0, 0.0005]), min_size=1, max_size=25),
    depth=st.sampled_from([None, None, 0, 1, 3, 30]),
    buffer_bytes=st.sampled_from([1, 200, 2**28]),
    device=st.sampled_from([None, "cpu"]),
)
def test_neither_depth_nor_delays_change_the_order_or_the_labels(
    batches: list[list[int]],
    delays: list[float],
    computing: list[float],
    depth: int | None,
    buffer_bytes: int,
    device: str | None,
) -> None:
    numbered = list(enumerate(batches))
    given = iter(range(len(batches)))

    def fetch(ids: list[int]) -> FetchedLabels:
        time.sleep(delays[next(given) % len(delays)])
        return rows(ids)

    loader = AttachedLoader(numbered, fetch, Tally, ids=1, depth=depth, buffer_bytes=buffer_bytes, device=device)
    seen = []
    for (number, ids), soft in loader:
        assert_belong(ids, soft)
        seen.append(number)
        time.sleep(computing[number % len(computing)])
    assert seen == [*range(len(batches))]


def test_the_first_labels_are_delivered_while_those_of_the_second_batch_are_under_way() -> None:
    let_go = threading.Event()

    def fetch(ids: list[int]) -> FetchedLabels:
        assert ids == [0] or let_go.wait(60)
        return rows(ids)

    epoch = iter(attached([[0], [1], [2]], fetch, depth=9))
    assert next(epoch)[0] == [0]
    let_go.set()
    assert [batch for batch, _ in epoch] == [[1], [2]]


def test_labels_are_fetched_and_made_tensors_in_the_background_one_batch_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: dict[str, list[threading.Thread]] = {"fetch": [], "convert": []}
    convert = SoftLabelTensors.of

    def fetch(ids: list[int]) -> FetchedLabels:
        threads["fetch"].append(threading.current_thread())
        return rows(ids)

    def of(*arguments: Any, **options: Any) -> SoftLabelTensors:
        threads["convert"].append(threading.current_thread())
        return convert(*arguments, **options)

    monkeypatch.setattr(SoftLabelTensors, "of", of)
    for batch, soft in attached([[0], [1], [2], [3]], fetch, device="cpu"):
        assert isinstance(soft, SoftLabelTensors)
        assert_belong(batch, soft)
    for found in threads.values():
        assert len(found) == 4
        assert len(set(found)) == 1
        assert threading.main_thread() not in found


def test_a_device_that_a_copy_leads_to_gets_its_labels() -> None:
    for batch, soft in attached([[0, 1], [2]], device="meta"):
        assert soft.indices.device == torch.device("meta")
        assert len(soft) == len(batch)


def test_an_error_in_making_tensors_is_raised_at_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = SoftLabelTensors.of

    def of(soft: SoftLabels, device: Any) -> SoftLabelTensors:
        if len(soft) == 2:
            raise MemoryError("no room for two")
        return convert(soft, device)

    monkeypatch.setattr(SoftLabelTensors, "of", of)
    epoch = iter(attached([[0], [1], [2, 3], [4]], device="cpu"))
    assert [next(epoch)[0], next(epoch)[0]] == [[0], [1]]
    with pytest.raises(MemoryError, match="no room for two"):
        next(epoch)
    assert fetch_threads() == []


class Stuck:
    """Fetches the first batches, one unless told otherwise, and then hangs until it is let go."""

    def __init__(self) -> None:
        self.good = 1
        self.begun, self.let_go = threading.Event(), threading.Event()
        self.asked: list[int] = []

    def __call__(self, ids: list[int]) -> FetchedLabels:
        self.asked.append(ids[0])
        if len(self.asked) > self.good:
            self.begun.set()
            assert self.let_go.wait(60)
        return rows(ids)

    def end(self) -> None:
        self.let_go.set()
        for thread in fetch_threads():
            thread.join()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuck]:
    monkeypatch.setattr(background, "GRACE_S", 0.0)
    fetch = Stuck()
    yield fetch
    fetch.end()
    assert fetch_threads() == []


def test_leaving_an_epoch_drops_its_batches_and_asks_for_no_more_though_a_fetch_hangs(stuck: Stuck) -> None:
    watched: list[weakref.ref[Pulled]] = []

    def pull(index: int) -> Pulled:
        batch = Pulled([index])
        watched.append(weakref.ref(batch))
        return batch

    stuck.good = 3
    epoch = iter(attached(map(pull, range(10)), stuck, depth=5))
    for _ in range(3):
        next(epoch)
    assert stuck.begun.wait(60)
    assert len(watched) == 6
    epoch.close()  # type: ignore[attr-defined]
    gc.collect()
    assert [index for index, batch in enumerate(watched) if batch() is not None] == [3]  # the one under way
    stuck.end()
    assert stuck.asked == [0, 1, 2, 3]
    gc.collect()
    assert all(batch() is None for batch in watched)


@pytest.mark.parametrize("leave", ["break", "raise", "delete"])
def test_every_way_to_leave_an_epoch_returns_though_a_fetch_hangs(stuck: Stuck, leave: str) -> None:
    loader = attached([[0], [1], [2]], stuck)
    if leave == "delete":
        epoch = iter(loader)
        next(epoch)
        del epoch
    else:
        with suppress(ZeroDivisionError):
            for _ in loader:
                if leave == "break":
                    break
                raise ZeroDivisionError
    gc.collect()
    stuck.end()
    assert 2 not in stuck.asked


def test_ctrl_c_while_a_step_waits_ends_the_epoch(stuck: Stuck) -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupted(ids: list[int]) -> FetchedLabels:
        signal.pthread_kill(main, signal.SIGINT)
        stuck.begun.set()
        assert stuck.let_go.wait(60)
        return rows(ids)

    epoch = iter(attached([[0], [1], [2]], interrupted))
    with pytest.raises(KeyboardInterrupt):
        next(epoch)
    stuck.end()
    assert list(epoch) == []


def test_ctrl_c_in_the_loader_is_not_kept_for_later() -> None:
    def batches() -> Iterator[list[int]]:
        yield [0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(iter(attached(batches())))
    assert fetch_threads() == []


def goes_on(epoch: Iterator[Any], loader: AttachedLoader[Any], answer: Any) -> None:
    """In a fork: what the epoch that it inherited says, and an epoch of its own."""
    try:
        next(epoch)
    except InvalidRequest as error:
        answer.send(str(error))
    answer.send([batch for batch, _ in loader])


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_refuses_the_epoch_it_inherited_and_begins_its_own_while_the_parent_goes_on() -> None:
    loader = attached([[0], [1], [2], [3]])
    epoch = iter(loader)
    next(epoch)
    context = multiprocessing.get_context("fork")
    receive, answer = context.Pipe(duplex=False)
    forked = context.Process(target=goes_on, args=(epoch, loader, answer))
    forked.start()
    assert receive.poll(60)
    assert "begun in another process" in receive.recv()
    assert receive.poll(60)
    assert receive.recv() == [[0], [1], [2], [3]]
    forked.join()
    assert forked.exitcode == 0
    assert [batch for batch, _ in epoch] == [[1], [2], [3]]


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_with_a_given_depth_random_draws_of_loader_and_step_interleave_the_same_in_each_run(depth: int) -> None:
    def run(seed: int) -> list[float]:
        torch.manual_seed(seed)
        draws = []
        batches = ([int(torch.randint(100, ()))] for _ in range(8))
        for batch, soft in attached(batches, depth=depth):
            assert_belong(batch, soft)
            draws += [batch[0], float(torch.rand(()))]
        return draws

    assert run(3) == run(3) != run(4)
