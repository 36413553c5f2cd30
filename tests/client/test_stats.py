"""What is counted, and that counting takes bounded memory."""

from concurrent.futures import ThreadPoolExecutor

from logitcache.client.stats import WAITS_KEPT, Stats, Tally


def test_waits_are_summed_over_all_steps_and_the_median_is_of_the_last_ones() -> None:
    tally = Tally()
    for milliseconds in [1000.0, *[2.0] * WAITS_KEPT]:
        tally.step_waited(milliseconds)
    stats = tally.snapshot()
    assert (stats.steps, stats.waited_ms, stats.waited_ms_max) == (WAITS_KEPT + 1, 1000 + 2 * WAITS_KEPT, 1000)
    assert stats.waited_ms_median == 2.0
    assert stats.waited_ms_mean == stats.waited_ms / stats.steps
    assert len(tally._waits_ms) == WAITS_KEPT


def test_threads_lose_no_count() -> None:
    tally = Tally()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: tally.count(rows=2, retries=1), range(4000)))
    assert (tally.snapshot().rows, tally.snapshot().retries) == (8000, 4000)


def test_a_snapshot_reads_as_a_sentence() -> None:
    assert str(Stats(rows=1500, bytes=2_500_000, requests=3)) == "1,500 rows, 2.5 MB, 3 requests, 0 retries"
    waited = str(Stats(steps=2, waited_ms=3.0, waited_ms_mean=1.5, waited_ms_median=1.5, waited_ms_max=2.0))
    assert waited.endswith("2 steps waited 3.0 ms in all (a step: mean 1.50, median 1.50, max 2.00 ms)")
