"""The selection, against a dense computation in float64 that shares nothing with it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache.labels.selection.top_k import Rows, faulty_rows, select_top_k
from logitcache.labels.soft_labels import RowSpec, SoftLabels

TEMPERATURES = (0.5, 1.0, 4.0)


def spec(k: int, dtype: str = "float32", classes: int = 20, targets: bool = False) -> RowSpec:
    return RowSpec(k, "uint16" if classes <= 65_536 else "uint32", dtype, TEMPERATURES, targets=targets)


def as_soft_labels(rows: Rows) -> SoftLabels:
    count = len(rows.indices)
    scalars = rows.scalars
    return SoftLabels(
        rows.indices, rows.logits, scalars[:, 0], scalars[:, 1:4], np.zeros(count, np.uint64), TEMPERATURES
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
    soft = as_soft_labels(select_top_k(logits, spec(k)).rows())
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
    soft = as_soft_labels(select_top_k(logits, spec(3, "float16")).rows())
    expected = float(torch.softmax(logits.double(), 1)[0, 3:].sum())
    assert expected < 1e-12
    assert soft.residual_mass(1.0)[0] == pytest.approx(expected, rel=1e-3)


def test_finite_logits_beyond_the_range_of_float16_stay_finite_and_minus_infinity_stays() -> None:
    rows = select_top_k(torch.tensor([[0.0, -1e5, -torch.inf, -70_000.0]]), spec(4, "float16")).rows()
    assert rows.logits.tolist() == [[0.0, -65504.0, -65504.0, -np.inf]]
    assert rows.indices.tolist() == [[0, 3, 1, 2]]
    assert np.isneginf(rows.scalars[:, 1:]).all()


@pytest.mark.parametrize(("classes", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_the_last_class_is_stored_unsigned_in_the_narrowest_type_that_holds_it(classes: int, dtype: type) -> None:
    logits = torch.zeros(1, classes)
    logits[0, -1] = 5.0
    rows = select_top_k(logits, spec(1, "float16", classes)).rows()
    assert rows.indices.dtype == dtype
    assert rows.indices.tolist() == [[classes - 1]]


def test_logits_are_sorted_and_begin_with_zero() -> None:
    rows = select_top_k(torch.randn(50, 20), spec(7, "float16")).rows()
    assert (rows.logits[:, 0] == 0).all()
    assert (np.diff(rows.logits.astype(np.float32), axis=1) <= 0).all()


def test_rows_that_are_no_distribution_are_named_with_the_reason() -> None:
    logits = torch.zeros(5, 4)
    logits[1, 2], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, :3] = -torch.inf
    assert faulty_rows(select_top_k(logits, spec(2)).rows()) == {1: "NaN", 2: "+inf", 3: "-inf for every class"}
    logits[1, 0] = torch.inf
    assert faulty_rows(select_top_k(logits, spec(2)).rows())[1] == "NaN"


def test_chunks_of_any_size_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(7, 5, 40_000, generator=generator) * 4
    lengths = [5, 1, 3, 5, 1, 2, 4]
    targets = np.arange(sum(lengths), dtype=np.int32) - 1
    asked = spec(9, "float16", 40_000, targets=True)
    whole = select_top_k(logits, asked, lengths=lengths, targets=targets).rows()
    for rows in (1, 2, 3, 4, 20):
        parts = select_top_k(logits, asked, lengths=lengths, targets=targets, chunk_bytes=rows * 2 * 4 * 40_000).rows()
        for name in ("indices", "logits", "scalars"):
            assert getattr(parts, name).tobytes() == getattr(whole, name).tobytes(), f"{rows} rows a chunk: {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_rows_of_token_data_are_those_of_each_row_alone_and_padding_is_not_read(dtype: torch.dtype) -> None:
    logits = (torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    lengths = np.array([2, 4, 1])
    for example, length in enumerate(lengths):
        logits[example, length:] = torch.nan
    real = torch.cat([logits[example, :length] for example, length in enumerate(lengths)])
    together, alone = select_top_k(logits, spec(5), lengths=lengths).rows(), select_top_k(real, spec(5)).rows()
    assert faulty_rows(together) == {}
    assert together.scalars.tobytes() == alone.scalars.tobytes()
    assert together.logits.tobytes() == alone.logits.tobytes()
    assert np.array_equal(together.indices, alone.indices)


def test_logits_in_any_memory_layout_give_the_same_rows() -> None:
    logits = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(1))
    turned = logits.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not turned.is_contiguous()
    one, other = (select_top_k(each, spec(5), lengths=[4, 4, 3]).rows() for each in (logits, turned))
    assert one.scalars.tobytes() == other.scalars.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_the_logit_of_a_target_is_centred_and_unrounded_stored_among_the_k_or_not(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.1, 4.3, 2.7, -torch.inf]]).to(dtype).repeat(5, 1)
    targets = np.array([0, 1, 2, 3, -1], np.int32)
    found = select_top_k(logits, spec(1, "float16", 4, targets=True), targets=targets).rows().scalars[:, -1]
    wide = logits[0].double()
    assert np.allclose(found[:3], (wide[:3] - 4.3).numpy(), rtol=0, atol=0.01 if dtype == torch.float16 else 1e-6)
    assert np.isneginf(found[3])
    assert np.isnan(found[4])


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(5, 20, dtype=torch.float32)
    before = logits.clone()
    select_top_k(logits, spec(3)).rows()
    assert torch.equal(logits, before)


@pytest.mark.gpu
def test_a_gpu_selects_what_a_cpu_does_however_many_selections_are_under_way() -> None:
    draw = torch.Generator().manual_seed(0)
    asked = spec(5, "float32", 5000, targets=True)
    parts = [torch.randn(4, 30, 5000, generator=draw) for _ in range(8)]
    lengths, targets = [30, 1, 17, 8], np.arange(56, dtype=np.int32) - 1
    under_way = [
        select_top_k(part.cuda(), asked, lengths=lengths, targets=targets, chunk_bytes=1 << 20) for part in parts
    ]
    for part, selection in zip(parts, under_way, strict=True):
        here, there = select_top_k(part, asked, lengths=lengths, targets=targets).rows(), selection.rows()
        assert np.array_equal(there.indices, here.indices)
        assert np.array_equal(there.logits, here.logits)
        assert np.allclose(there.scalars, here.scalars, rtol=1e-5, equal_nan=True)
