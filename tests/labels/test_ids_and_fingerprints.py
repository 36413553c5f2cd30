"""What a caller hands over: ids that are whole numbers or texts, inputs that have one fingerprint everywhere."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from logitcache.labels.errors import InvalidIds
from logitcache.labels.fingerprints import fingerprint, fingerprints, token_fingerprint
from logitcache.labels.ids import Ids, as_ids, check_kind


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_order_duplicates_and_all_64_bits_are_kept(ids: list[int]) -> None:
    assert as_ids(ids).keys.tolist() == ids
    assert as_ids(torch.tensor(ids)).keys.tolist() == ids


class Subclass(np.ndarray):
    """An array that is more than one."""


@pytest.mark.parametrize(
    "ids",
    [
        np.array([1, -2, 3], ">i8"),
        np.array([1, 9, -2, 9, 3])[::2],
        np.array([3, -2, 1])[::-1],
        np.array([1, -2, 3]).view(Subclass),
        np.frombuffer(np.array([1, -2, 3]).tobytes(), np.int64),
        np.frombuffer(b"x" + np.array([1, -2, 3]).tobytes(), np.int64, offset=1),
        np.array([1, -2, 3], np.int8),
    ],
    ids=["big-endian", "strided", "backwards", "subclass", "read-only", "unaligned", "narrow"],
)
def test_arrays_of_any_layout_become_the_same_keys(ids: np.ndarray) -> None:
    keys = as_ids(ids).keys
    assert (keys.tolist(), keys.dtype, keys.flags.c_contiguous) == ([1, -2, 3], np.dtype(np.int64), True)
    assert type(keys) is np.ndarray


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([3, 1.5], "1.5"),
        ([3, "x"], "'x'"),
        ([0, True], "True"),
        ([0, np.True_], "True"),
        ([2**63], str(2**63)),
        ([1, None], "None"),
        (np.array([2**63], np.uint64), str(2**63)),
        (np.array([True]), "True"),
        (torch.tensor([0.5]), "0.5"),
        (np.array([3], "m8[s]"), "timedelta64"),
        (np.array([3], "M8[s]"), "datetime64"),
        ([[1], [2, 3]], "whole numbers"),
        (["x", 3], "3"),
        (["x", ""], "empty"),
        (["x", "a\0b"], "NUL"),
        (["x", "\ud800"], "surrogate"),
        (["x", "😀" * 1024 + "y"], "4,097 bytes"),
        (["x", b"y"], "bytes"),
    ],
    ids=str,
)
def test_the_id_that_is_wrong_is_named(ids: Any, named: str) -> None:
    with pytest.raises(InvalidIds) as caught:
        as_ids(ids)
    assert named in str(caught.value)


@pytest.mark.parametrize("long", ["x" * 60_000, b"x" * 60_000])
def test_a_long_text_among_numbers_takes_no_memory_for_each_of_them(long: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidIds, match="'xxx"):
            as_ids([*range(8000), long])
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@given(st.integers(0, 2**32), st.sampled_from(["float32", "float64", "uint8", "int64", "float16"]))
def test_a_tensor_and_its_array_have_one_fingerprint(seed: int, dtype: str) -> None:
    array = np.random.default_rng(seed).integers(0, 100, (2, 3)).astype(dtype)
    assert fingerprint(array) == fingerprint(torch.from_numpy(array)) == fingerprint(np.asfortranarray(array))


def test_fingerprints_tell_value_dtype_and_shape_apart() -> None:
    base = np.arange(6, dtype=np.float32)
    others = [base + np.float32(1e-6) * (base == 3), base.astype(np.float64), base.reshape(2, 3), base[::-1], base[:5]]
    assert len({fingerprint(array) for array in [base, *others]}) == 6
    assert fingerprint(torch.ones(3, dtype=torch.bfloat16)) != fingerprint(torch.ones(3))


def test_a_stacked_batch_has_the_fingerprints_of_its_items() -> None:
    items = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    expected = [fingerprint(item) for item in items]
    assert fingerprints(torch.stack(items)).tolist() == expected
    assert fingerprints(items).tolist() == expected


def test_a_fingerprint_is_the_same_in_every_version() -> None:
    assert fingerprint(np.arange(4, dtype=np.float32)) == 0x14F3BB3377AEFB8E
    assert fingerprint(np.zeros((0, 3), np.uint8)) == 0x3BEC2828FBB5FFE2


def test_what_is_no_array_of_numbers_has_no_fingerprint() -> None:
    with pytest.raises(TypeError, match="numbers"):
        fingerprint(np.array(["text"]))


texts = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1)


@given(texts)
def test_texts_have_the_keys_of_their_utf8_bytes_and_are_named_as_given(given_texts: list[str]) -> None:
    ids = as_ids(given_texts)
    assert ids.are_texts
    expected = [xxhash.xxh3_128_intdigest(text.encode()) for text in given_texts]
    assert [(high << 64) | low for high, low in ids.keys.tolist()] == expected
    assert ids.at(slice(None)) == list(dict.fromkeys(given_texts))
    assert np.array_equal(as_ids(np.array(given_texts, object)).keys, ids.keys)


@pytest.mark.parametrize("text", ["a/b/../c", "😀" * 1024, "-x", " ", "é", "e\u0301", "\n\t\x7f", "12"])
def test_unusual_texts_are_ids_of_their_own(text: str) -> None:
    ids = as_ids([text, "other"])
    assert ids.at([0]) == [text]
    assert not np.array_equal(ids.keys[0], ids.keys[1])


def test_normal_forms_and_numbers_in_texts_are_other_ids() -> None:
    keys = as_ids(["é", "e\u0301", "12", "012"]).keys
    assert len({tuple(key) for key in keys.tolist()}) == 4


def test_keys_alone_are_named_by_their_hash() -> None:
    known = as_ids(["a", "b"])
    assert Ids(known.keys).at([1]) == [xxhash.xxh3_128_hexdigest(b"b")]


def test_a_part_of_ids_keeps_its_texts() -> None:
    assert as_ids(["a", "b", "c"])[1:].at([0, 1]) == ["b", "c"]


@pytest.mark.parametrize(("ids", "kind"), [(["a"], "integer"), (["a"], "ordinal"), ([1], "text")])
def test_ids_of_the_other_kind_are_refused(ids: Any, kind: Any) -> None:
    with pytest.raises(InvalidIds, match=r"'set' are (texts|whole numbers), these are (texts|whole numbers)"):
        check_kind(as_ids(ids), kind, "set")


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.sampled_from(["int32", "int64", "uint32"]))
def test_a_token_fingerprint_does_not_depend_on_the_dtype_that_held_the_tokens(tokens: list[int], dtype: str) -> None:
    if max(tokens) <= np.iinfo(dtype).max:
        plain = token_fingerprint(np.array(tokens, np.uint32))
        assert token_fingerprint(np.array(tokens, dtype).astype(np.uint32)) == plain
        assert token_fingerprint(np.array([*tokens, 0], np.uint32)) != plain
