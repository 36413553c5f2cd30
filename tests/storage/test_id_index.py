"""Looking ids up: every one is found, no other is, however the index was put together."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.labels.ids import Keys, text_keys
from logitcache.storage.id_index import IdIndex, key_hashes, repeated


def index_of(keys: Keys, cuts: list[int]) -> IdIndex:
    index = IdIndex()
    edges = sorted({0, *(cut % (len(keys) + 1) for cut in cuts), len(keys)})
    for shard, (begin, end) in enumerate(pairwise(edges)):
        index = index.with_shard(shard, "", keys[begin:end], begin)
    return index


numbers = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 5), min_size=2, max_size=200, unique=True)


@given(numbers, st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_every_number_is_found_at_its_ordinal_and_no_other(ids: list[int], cuts: list[int], compact: bool) -> None:
    inside, outside = np.array(ids[1:], np.int64), np.array(ids[:1], np.int64)
    index = index_of(inside, cuts)
    index = index.compact() if compact else index
    assert index.ordinals(inside).tolist() == list(range(len(inside)))
    assert index.ordinals(outside).tolist() == [-1]
    mixed = np.concatenate([inside[::-1], outside, inside])
    assert index.ordinals(mixed).tolist() == [*reversed(range(len(inside))), -1, *range(len(inside))]


@given(
    st.lists(st.text(min_size=1).filter(lambda text: "\0" not in text and text.isprintable()), min_size=2, unique=True)
)
def test_every_text_is_found_at_its_ordinal_and_no_other(texts: list[str]) -> None:
    keys = text_keys(texts)
    index = index_of(keys[1:], [3])
    assert index.ordinals(keys).tolist() == [-1, *range(len(texts) - 1)]


def test_texts_that_share_half_of_their_hash_are_told_apart() -> None:
    keys = np.array([[1, 7], [2, 7], [3, 7], [9, 8]], np.uint64)
    index = index_of(keys, [])
    assert index.ordinals(keys).tolist() == [0, 1, 2, 3]
    assert index.ordinals(np.array([[4, 7], [1, 8]], np.uint64)).tolist() == [-1, -1]


def test_numbers_with_a_pattern_are_spread_evenly() -> None:
    for keys in (np.arange(100_000), np.arange(100_000) << 40, np.arange(100_000) * 2**20 - 2**62):
        assert len(np.unique(key_hashes(keys))) == len(keys)
        assert index_of(keys, []).segments[0].fullest < 16


def test_an_empty_index_knows_nothing() -> None:
    assert IdIndex().ordinals(np.array([0, 1])).tolist() == [-1, -1]


def test_building_shard_by_shard_keeps_few_segments() -> None:
    keys = np.random.default_rng(0).choice(2**60, 64 * 500, replace=False)
    index = index_of(keys, list(range(0, 64 * 500, 500)))
    assert len(index.commits) == 64
    assert len(index.segments) <= 7
    assert len(index.compact().segments) == 1


@pytest.mark.parametrize("as_texts", [False, True])
def test_repeated_keys_are_found_with_both_places(as_texts: bool) -> None:
    texts = ["a", "b", "c", "b"]
    keys = text_keys(texts) if as_texts else np.array([5, 7, 9, 7])
    assert [tuple(sorted(pair)) for pair in repeated(keys)] == [(1, 3)]
    assert repeated(keys[:3]) == []
