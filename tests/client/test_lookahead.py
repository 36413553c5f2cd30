"""How deep labels are fetched ahead: only waits that asking earlier would have spared make it deeper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.client.lookahead import ANSWERS_KEPT, BUFFER_BYTES, FIRST_DEPTH, MOST_AHEAD, WAIT_MS, Lookahead
from logitcache.labels.errors import InvalidRequest

LONG_MS = 50.0


def step(lookahead: Lookahead, waited_ms: float, *, all_there: bool = True, ahead: int | None = None) -> None:
    """One step, with as many batches asked for as the depth says unless told otherwise."""
    lookahead.step_begins(lookahead.depth if ahead is None else ahead, all_there=all_there)
    lookahead.step_waited(waited_ms)


def test_a_step_that_waited_makes_it_one_deeper_up_to_a_bound() -> None:
    lookahead = Lookahead(None, BUFFER_BYTES)
    depths = []
    for _ in range(MOST_AHEAD + 5):
        depths.append(lookahead.depth)
        step(lookahead, LONG_MS)
    assert depths[:3] == [FIRST_DEPTH, FIRST_DEPTH + 1, FIRST_DEPTH + 2]
    assert max(depths) == depths[-1] == MOST_AHEAD


def test_steps_that_did_not_wait_change_nothing() -> None:
    lookahead = Lookahead(None, BUFFER_BYTES)
    for _ in range(5000):
        step(lookahead, WAIT_MS)
    assert lookahead.depth == FIRST_DEPTH
    step(lookahead, LONG_MS)
    for _ in range(5000):
        step(lookahead, 0.0)
    assert lookahead.depth == FIRST_DEPTH + 1


def test_labels_that_are_slower_than_the_steps_are_not_asked_for_ever_earlier() -> None:
    lookahead = Lookahead(None, BUFFER_BYTES)
    for _ in range(100):
        step(lookahead, LONG_MS, all_there=False)
    assert lookahead.depth == FIRST_DEPTH


def test_waits_for_the_first_batches_change_nothing() -> None:
    lookahead = Lookahead(None, BUFFER_BYTES)
    for ahead in range(FIRST_DEPTH):
        step(lookahead, LONG_MS, ahead=ahead)
    assert lookahead.depth == FIRST_DEPTH


def test_a_slow_answer_counts_once_however_many_steps_wait_behind_it() -> None:
    lookahead = Lookahead(None, BUFFER_BYTES)
    step(lookahead, LONG_MS)
    for _ in range(10):
        step(lookahead, LONG_MS, all_there=False)
    assert lookahead.depth == FIRST_DEPTH + 1


def test_label_bytes_bound_it_by_the_largest_of_the_last_answers() -> None:
    lookahead = Lookahead(None, buffer_bytes=600)
    for _ in range(20):
        lookahead.arrived(100)
        step(lookahead, LONG_MS)
    assert lookahead.depth == 5  # and the labels of the step itself
    lookahead.arrived(150)
    step(lookahead, LONG_MS)
    assert lookahead.depth == 3
    for _ in range(ANSWERS_KEPT):
        lookahead.arrived(100)
        step(lookahead, 0.0)
    assert lookahead.depth == 3
    step(lookahead, LONG_MS)
    assert lookahead.depth == 4


@pytest.mark.parametrize("held_bytes", [600, 601, 10**12])
def test_one_batch_is_fetched_ahead_however_large_it_is(held_bytes: int) -> None:
    lookahead = Lookahead(None, buffer_bytes=600)
    lookahead.arrived(held_bytes)
    step(lookahead, LONG_MS)
    assert lookahead.depth == 1


@given(st.lists(st.tuples(st.integers(0, 2000), st.floats(0, 100), st.booleans(), st.integers(0, 20))))
def test_it_stays_within_its_bounds_and_rises_by_one_at_most(
    steps: list[tuple[int, float, bool, int]],
) -> None:
    lookahead = Lookahead(None, buffer_bytes=6000)
    for held_bytes, waited_ms, all_there, ahead in steps:
        lookahead.arrived(held_bytes)
        before = lookahead.depth
        step(lookahead, waited_ms, all_there=all_there, ahead=ahead)
        assert 1 <= lookahead.depth <= min(MOST_AHEAD, before + 1)
        assert lookahead.depth == 1 or (lookahead.depth + 1) * held_bytes <= 6000


@pytest.mark.parametrize("depth", [0, 1, 7, 100])
def test_a_given_depth_stays(depth: int) -> None:
    lookahead = Lookahead(depth, buffer_bytes=1)
    for _ in range(10):
        lookahead.arrived(10**9)
        lookahead.step_waited(LONG_MS)
    assert (lookahead.depth, lookahead.adapts) == (depth, False)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="depth=-1"):
        Lookahead(-1, BUFFER_BYTES)
    with pytest.raises(InvalidRequest, match="buffer_bytes=0"):
        Lookahead(None, 0)
