"""The arithmetic of a label set: which shard, which slot, and what growing leaves alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.labels.errors import DatasetFault, InvalidRequest
from logitcache.labels.identity import Identity, TeacherId
from logitcache.storage.layout import Layout
from logitcache.storage.packing import default_rows_per_shard

POINTWISE = Identity(TeacherId("t", "w"), 2, 10, (1.0,), "float16")
CAUSAL = Identity(TeacherId("t", "w"), 2, 10, (1.0,), "float16", "causal")

lengths = st.lists(st.integers(1, 4096) | st.integers(1, 20), min_size=1, max_size=300).map(np.array)


def plain_packing(counts: list[int], rows: int, examples: int) -> list[list[int]]:
    """Shards as lists of row counts: the rule, a line at a time."""
    shards: list[list[int]] = [[]]
    for count in counts:
        if sum(shards[-1]) + count > rows or len(shards[-1]) == examples:
            shards.append([])
        shards[-1].append(count)
    return shards


@given(lengths, lengths)
def test_a_shard_closes_when_the_next_example_would_overflow_it(begun: np.ndarray, more: np.ndarray) -> None:
    layout = Layout.causal(CAUSAL, begun, 4096)
    shards = plain_packing(begun.tolist(), 4096, layout.examples_per_shard)
    assert layout.shard_examples == tuple(map(len, shards))
    assert layout.shard_rows == tuple(map(sum, shards))
    grown = layout.grown(more)
    assert grown.extends(layout)
    assert grown.first(layout.shards) == layout
    appended = plain_packing(more.tolist(), 4096, layout.examples_per_shard)
    assert grown.shard_rows[layout.shards :] == tuple(map(sum, appended))


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=5))
def test_an_examples_slot_is_in_its_shard_at_its_place(parts: list[int]) -> None:
    layout = Layout.pointwise(POINTWISE, parts[0], 4096)
    for part in parts[1:]:
        layout = layout.grown(part)
    assert layout.examples == sum(parts)
    expected = [shard * 4096 + place for shard in range(layout.shards) for place in range(len(layout.span(shard)))]
    assert layout.example_slots(np.arange(layout.examples)).tolist() == expected
    assert [ordinal for shard in range(layout.shards) for ordinal in layout.span(shard)] == list(range(sum(parts)))


def test_arrays_end_with_the_last_slot_that_is_used() -> None:
    layout = Layout.pointwise(POINTWISE, 5000, 4096).grown(10)
    assert layout.shard_examples == (4096, 904, 10)
    assert layout.array_shape(layout.arrays["logits"]) == (2 * 4096 + 10, 2)
    ragged = Layout.causal(CAUSAL, np.array([4000, 90, 50]), 4096)
    assert ragged.shard_rows == (4090, 50)
    assert ragged.array_shape(ragged.arrays["tokens"]) == (4096 + 50,)
    assert ragged.array_shape(ragged.arrays["ids"]) == (4096 + 1,)


def test_an_example_longer_than_a_shard_is_named_with_the_size_that_would_hold_it() -> None:
    with pytest.raises(DatasetFault, match=r"example 1 has 4,097 rows, a shard has 4,096 .* --rows-per-shard 8192"):
        Layout.causal(CAUSAL, np.array([3, 4097]), 4096)
    with pytest.raises(
        DatasetFault, match=r"example 3 has 5,000 rows.* another name with --rows-per-shard 8192 or more"
    ):
        Layout.causal(CAUSAL, np.array([3, 4096]), 4096).grown(np.array([1, 5000]))


def test_an_append_that_would_make_too_many_shards_is_refused() -> None:
    layout = Layout.pointwise(POINTWISE, 5999 * 4096, 4096).grown(1)
    with pytest.raises(InvalidRequest, match="append less often, or label all under another name"):
        layout.grown(1)
    with pytest.raises(InvalidRequest, match=r"map: use a larger --rows-per-shard \(262,144 is"):
        Layout.pointwise(POINTWISE, 6001 * 4096, 4096)


def test_the_default_shard_holds_the_longest_example() -> None:
    assert default_rows_per_shard(100_000, 100_000) == 25 * 4096
    assert Layout.causal(CAUSAL, np.array([100_000, 1]), default_rows_per_shard(100_001, 100_000)).shards == 1


def test_the_default_shard_holds_batches_of_the_longest_examples_to_choose_from() -> None:
    assert default_rows_per_shard(1_000_000, 2048) == 64 * 2048
    assert default_rows_per_shard(50_000, 2048) == 13 * 4096
    assert default_rows_per_shard(10**9, 8192) == 64 * 8192


def test_the_default_shard_is_about_a_sixteenth_of_the_rows_within_bounds() -> None:
    found = {rows: default_rows_per_shard(rows) for rows in (0, 1, 500_000, 1_281_167, 4_000_000, 10**9, 2 * 10**9)}
    assert found == {
        0: 32_768,
        1: 32_768,
        500_000: 32_768,
        1_281_167: 65_536,
        4_000_000: 262_144,
        10**9: 262_144,
        2 * 10**9: 123 * 4096,
    }


def test_a_shard_of_short_examples_closes_when_its_example_slots_are_used() -> None:
    """Example slots are those that the fullest shard needed when the label set was begun."""
    layout = Layout.causal(CAUSAL, np.array([100, 100]), 8192)
    assert layout.examples_per_shard == 4096
    assert layout.grown(np.ones(5000, int)).shard_examples == (2, 4096, 904)
