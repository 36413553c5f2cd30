"""Gathering rows by their numbers, and sequences run by run: the same bytes either way, in new arrays or given ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.labels import wire
from logitcache.labels.soft_labels import RowSpec
from logitcache.storage.gather import LONG_RUN, gather_rows, gather_runs

ROWS, K = 500, 3

ROW_FIELDS = {"indices", "logits", "logit_max", "tail_logsumexp", "tokens", "target", "target_logit"}


def spec_of(*, targets: bool, ragged: bool = True) -> RowSpec:
    return RowSpec(K, "uint16", "float16", (1.0, 2.0), ragged=ragged, targets=targets)


def stored_rows(spec: RowSpec) -> dict[str, np.ndarray]:
    """Stored arrays no two numbers of which are equal within a column."""
    rng = np.random.default_rng(0)
    return {
        "indices": rng.permutation(ROWS * K).reshape(ROWS, K).astype(np.uint16),
        "logits": -rng.permutation(ROWS * K).reshape(ROWS, K).astype(np.float16),
        "scalars": rng.normal(size=(ROWS, len(spec.columns))).astype(np.float32),
        "tokens": rng.permutation(ROWS).astype(np.uint32),
        "target": rng.permutation(ROWS).astype(np.int32),
    }


def expected(stored: dict[str, np.ndarray], spec: RowSpec, rows: list[int]) -> dict[str, np.ndarray]:
    fields = {name: stored[name][rows] for name in ("indices", "logits")}
    fields |= {"logit_max": stored["scalars"][rows, 0], "tail_logsumexp": stored["scalars"][rows, 1:3]}
    if spec.ragged:
        fields["tokens"] = stored["tokens"][rows]
    if spec.targets:
        fields |= {"target": stored["target"][rows], "target_logit": stored["scalars"][rows, 3]}
    return fields


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert np.array_equal(found[name], array), name


Runs = list[tuple[int, int]]

some_runs = st.lists(
    st.tuples(st.integers(0, ROWS), st.integers(0, 3 * LONG_RUN)).map(lambda run: (run[0], min(run[1], ROWS - run[0]))),
    min_size=1,
    max_size=8,
)
"""First row and number of rows of each example: short and long ones, none, and up to the last row."""


@given(runs=some_runs, targets=st.booleans(), given_arrays=st.booleans())
def test_runs_are_their_rows_whatever_their_lengths(runs: Runs, targets: bool, given_arrays: bool) -> None:
    spec = spec_of(targets=targets)
    stored = stored_rows(spec)
    first, counts = np.array(runs, np.int64).T
    splits = np.concatenate([[0], np.cumsum(counts)])
    rows = [row for start, count in runs for row in range(start, start + count)]
    into = None
    if given_arrays:
        _, into = wire.allocate(spec.fields(len(rows), len(runs)), {})
    found = gather_runs(stored, spec, first, splits, into)
    assert found.keys() <= ROW_FIELDS
    assert_same(found, expected(stored, spec, rows))
    if into is not None:
        assert all(found[name] is into[name] for name in found)


@pytest.mark.parametrize("length", [LONG_RUN - 1, LONG_RUN])
def test_runs_around_the_length_from_which_they_are_copied_apart_are_the_same(length: int) -> None:
    spec = spec_of(targets=True)
    stored = stored_rows(spec)
    first = np.array([ROWS - length, 0, 7])
    rows = [row for start in first.tolist() for row in range(start, start + length)]
    assert_same(gather_runs(stored, spec, first, np.arange(4) * length), expected(stored, spec, rows))


@pytest.mark.parametrize("targets", [False, True])
def test_single_rows_come_in_the_order_asked_for(targets: bool) -> None:
    spec = spec_of(targets=targets, ragged=False)
    stored = stored_rows(spec)
    rows = [ROWS - 1, 3, 3, 0]
    assert_same(gather_rows(stored, spec, np.array(rows)), expected(stored, spec, rows))


def test_what_is_gathered_is_a_copy() -> None:
    spec = spec_of(targets=True)
    stored = stored_rows(spec)
    for first, splits in (([5], [0, 4]), ([5], [0, 4 * LONG_RUN])):
        found = gather_runs(stored, spec, np.array(first), np.array(splits))
        assert not any(np.shares_memory(array, own) for array in found.values() for own in stored.values())
