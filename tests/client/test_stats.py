"""What is counted, and that counting takes bounded memory."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from logitcache.client.stats import WAITS_KEPT, Stats, Tally
from logitcache.labels.bill import Bill, TeacherTime


def step(waited_ms: float, *, fetched_ms: float = 0.0, label_bytes: int = 0, depth: int = 2) -> dict[str, Any]:
    return {"waited_ms": waited_ms, "fetched_ms": fetched_ms, "label_bytes": label_bytes, "depth": depth}


def test_waits_are_summed_over_all_steps_and_the_median_is_of_the_last_ones() -> None:
    tally = Tally()
    for milliseconds in [1000.0, *[2.0] * WAITS_KEPT]:
        tally.step(**step(milliseconds))
    stats = tally.snapshot()
    assert (stats.steps, stats.waited_ms, stats.waited_ms_max) == (WAITS_KEPT + 1, 1000 + 2 * WAITS_KEPT, 1000)
    assert (stats.waited_ms_median, stats.waited_ms_p99) == (2.0, 2.0)
    assert stats.waited_ms_mean == stats.waited_ms / stats.steps
    assert len(tally._waits_ms) == WAITS_KEPT


@pytest.mark.parametrize(
    ("waits", "p99"), [([5.0], 5.0), ([1.0, 5.0], 5.0), ([*range(1, 101)], 99.0), ([*range(1, 201)], 198.0)]
)
def test_p99_is_a_wait_that_99_of_100_do_not_pass(waits: list[float], p99: float) -> None:
    tally = Tally()
    for milliseconds in reversed(waits):
        tally.step(**step(float(milliseconds)))
    assert tally.snapshot().waited_ms_p99 == p99


def test_hidden_is_what_fetching_took_beyond_the_wait_and_never_below_zero() -> None:
    tally = Tally()
    tally.step(**step(2.0, fetched_ms=12.0, label_bytes=300))
    tally.step(**step(9.0, fetched_ms=4.0, label_bytes=100, depth=3))  # it waited for the fetches before it, too
    stats = tally.snapshot()
    assert (stats.hidden_ms, stats.hidden_ms_mean) == (10.0, 5.0)
    assert (stats.step_bytes_mean, stats.depth) == (200.0, 3)


def test_threads_lose_no_count() -> None:
    tally = Tally()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: tally.count(rows=2, retries=1), range(4000)))
    assert (tally.snapshot().rows, tally.snapshot().retries) == (8000, 4000)


def test_a_snapshot_reads_as_a_sentence() -> None:
    assert str(Stats(rows=1500, bytes=2_500_000, requests=3)) == "1,500 rows, 2.5 MB, 3 requests, 0 retries"
    tally = Tally()
    tally.step(**step(1.0, fetched_ms=21.0, label_bytes=1_000_000))
    tally.step(**step(2.0, fetched_ms=22.0, label_bytes=1_000_000, depth=3))
    assert str(tally.snapshot()).endswith(
        "2 steps of 1.00 MB, fetched 3 ahead: waited 1.50 ms a step (median 1.50, p99 2.00, max 2.00), "
        "hid 20.00 ms a step"
    )


def test_where_the_teachers_time_is_known_the_bill_is_told() -> None:
    tally = Tally()
    for fetch_ms in (1.5, 2.5):
        tally.count(rows=250)
        tally.count(fetch_ms=fetch_ms)
    assert (tally.snapshot().fetch_ms, tally.snapshot().bill) == (4.0, None)
    stats = tally.snapshot(TeacherTime(10.0, 1000, "cpu"))
    assert stats.bill == Bill(TeacherTime(10.0, 1000, "cpu"), 500, 0.004)
    assert str(stats).endswith(str(stats.bill))
