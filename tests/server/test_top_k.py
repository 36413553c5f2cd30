"""The selection, against a dense computation in float64 that shares nothing with it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache.labels.soft_labels import RowSpec, SoftLabels
from logitcache.server.top_k import Rows, faulty_rows, select_top_k

TEMPERATURES = (0.5, 1.0, 4.0)


def spec(k: int, dtype: str = "float32", classes: int = 20) -> RowSpec:
    return RowSpec(k, "uint16" if classes <= 65_536 else "uint32", dtype, TEMPERATURES)


def as_soft_labels(rows: Rows) -> SoftLabels:
    count = len(rows.indices)
    scalars = rows.scalars
    return SoftLabels(
        rows.indices, rows.logits, scalars[:, 0], scalars[:, 1:], np.zeros(count, np.uint64), TEMPERATURES
    )


@given(
    st.integers(0, 2**32),
    st.integers(1, 20),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.floats(0.1, 20),
)
def test_stored_classes_probabilities_and_residual_equal_the_dense_ones(
    seed: int, k: int, dtype: torch.dtype, scale: float
) -> None:
    logits = (torch.randn(6, 20, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    soft = as_soft_labels(select_top_k(logits, spec(k)))
    dense = logits.double()
    chosen = torch.from_numpy(soft.indices.astype(np.int64))
    # Ties may fall either way; the values may not.
    assert torch.equal(dense.gather(1, chosen), dense.topk(k).values)
    assert all(len(set(row)) == k for row in soft.indices.tolist())
    assert np.allclose(soft.logit_max, dense.amax(1), rtol=1e-6)
    for temperature in TEMPERATURES:
        log_probs = torch.log_softmax(dense / temperature, 1)
        assert np.allclose(soft.log_probs(temperature), log_probs.gather(1, chosen), atol=2e-5, rtol=1e-5)
        rest = log_probs.exp().scatter(1, chosen, 0.0).sum(1).numpy()
        assert np.allclose(soft.residual_mass(temperature), rest, rtol=2e-4, atol=1e-300)
        if k == 20:
            assert (soft.residual_mass(temperature) == 0).all()


def test_a_residual_of_1e_12_is_kept_to_three_digits_in_float16() -> None:
    logits = torch.tensor([[3.0, 3.0, 3.0, 3.0 - 27.6, 3.0 - 40.0]])
    soft = as_soft_labels(select_top_k(logits, spec(3, "float16")))
    expected = float(torch.softmax(logits.double(), 1)[0, 3:].sum())
    assert expected < 1e-12
    assert soft.residual_mass(1.0)[0] == pytest.approx(expected, rel=1e-3)


def test_finite_logits_beyond_the_range_of_float16_stay_finite_and_minus_infinity_stays() -> None:
    rows = select_top_k(torch.tensor([[0.0, -1e5, -torch.inf, -70_000.0]]), spec(4, "float16"))
    assert rows.logits.tolist() == [[0.0, -65504.0, -65504.0, -np.inf]]
    assert rows.indices.tolist() == [[0, 3, 1, 2]]
    assert np.isneginf(rows.scalars[:, 1:]).all()


@pytest.mark.parametrize(("classes", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_last_class_is_stored_unsigned_in_the_narrowest_type_that_holds_it(classes: int, dtype: type) -> None:
    logits = torch.zeros(1, classes)
    logits[0, -1] = 5.0
    rows = select_top_k(logits, spec(1, "float16", classes))
    assert rows.indices.dtype == dtype
    assert rows.indices.tolist() == [[classes - 1]]


def test_logits_are_sorted_and_begin_with_zero() -> None:
    rows = select_top_k(torch.randn(50, 20), spec(7, "float16"))
    assert (rows.logits[:, 0] == 0).all()
    assert (np.diff(rows.logits.astype(np.float32), axis=1) <= 0).all()


def test_rows_that_are_no_distribution_are_named_with_the_reason() -> None:
    logits = torch.zeros(5, 4)
    logits[1, 2], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, :3] = -torch.inf
    assert faulty_rows(logits) == {1: "NaN", 2: "+inf", 3: "-inf for every class"}
    logits[1, 0] = torch.inf
    assert faulty_rows(logits)[1] == "NaN"
