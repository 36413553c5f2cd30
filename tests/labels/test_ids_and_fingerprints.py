"""What a caller hands over: ids that are whole numbers, inputs that have one fingerprint everywhere."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache.labels.errors import InvalidIds
from logitcache.labels.fingerprints import fingerprint, fingerprints
from logitcache.labels.ids import as_ids


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_order_duplicates_and_all_64_bits_are_kept(ids: list[int]) -> None:
    assert as_ids(ids).tolist() == ids
    assert as_ids(torch.tensor(ids)).tolist() == ids


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([3, 1.5], "1.5"),
        ([3, "x"], "'x'"),
        ([0, True], "True"),
        ([2**63], str(2**63)),
        ([1, None], "None"),
        (np.array([2**63], np.uint64), str(2**63)),
        (np.array([True]), "True"),
        (torch.tensor([0.5]), "0.5"),
        ([[1], [2, 3]], "whole numbers"),
    ],
    ids=str,
)
def test_the_id_that_is_wrong_is_named(ids: Any, named: str) -> None:
    with pytest.raises(InvalidIds) as caught:
        as_ids(ids)
    assert named in str(caught.value)


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
