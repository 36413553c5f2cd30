"""The mathematics of a truncated row, against the dense distribution in float64."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.building import Reference, reference

from logitcache.labels.errors import ShapeMismatch, UndeclaredTemperature
from logitcache.labels.soft_labels import RowSpec, SoftLabels, concatenate, splits_of, temperature_name


def rows_of(source: Reference, count: int) -> SoftLabels:
    arrays = source.arrays(range(count))
    scalars = arrays["scalars"]
    return SoftLabels(
        arrays["indices"],
        arrays["logits"],
        scalars[:, 0],
        scalars[:, 1:],
        arrays["fingerprint"][:, 0],
        source.identity.temperatures,
    )


@given(st.integers(0, 2**32), st.sampled_from([0.5, 1.0, 4.0]))
def test_stored_probabilities_and_residual_mass_sum_to_one(seed: int, temperature: float) -> None:
    source = reference(1, short_by=4090, temperatures=(0.5, 1.0, 4.0), seed=seed)
    soft = rows_of(source, 6)
    total = np.exp(soft.log_probs(temperature)).sum(1) + soft.residual_mass(temperature)
    assert np.allclose(total, 1, atol=1e-12)


def test_residual_mass_is_accurate_however_small() -> None:
    source = reference(1, short_by=4090, k=3, classes=4, dtype="float32")
    source.logits[:] = [
        [0, -1, -2, -40],
        [0, -1, -2, -80],
        [0, 0, 0, -20],
        [5, 4, 3, -95],
        [1, 1, 0, -50],
        [0, 0, -9, -9],
    ]
    soft = rows_of(source, 6)
    dense = source.probs(1.0)
    assert np.allclose(soft.residual_mass(1.0), np.sort(dense, 1)[:, 0], rtol=1e-5, atol=0)


def test_with_every_class_stored_nothing_is_left_over() -> None:
    source = reference(1, short_by=4090, k=20, dtype="float32")
    soft = rows_of(source, 6)
    assert np.isneginf(soft.tail_logsumexp).all()
    assert (soft.residual_mass(2.0) == 0).all()
    dense = np.take_along_axis(source.probs(2.0), source.order, 1)
    assert np.allclose(np.exp(soft.log_probs(2.0)), dense, rtol=1e-6)


def test_classes_that_the_teacher_never_predicts_have_probability_zero() -> None:
    source = reference(1, short_by=4090, k=4, classes=5)
    source.logits[:, 2:] = -np.inf
    soft = rows_of(source, 6)
    assert (np.exp(soft.log_probs(1.0))[:, 2:] == 0).all()
    assert np.allclose(np.exp(soft.log_probs(1.0))[:, :2].sum(1), 1)


def test_a_temperature_that_was_not_declared_is_refused_with_those_that_were() -> None:
    soft = rows_of(reference(1, short_by=4090), 6)
    with pytest.raises(UndeclaredTemperature, match=r"3 was not declared .*declared: 1, 2.*--temperature 3"):
        soft.log_probs(3.0)


def test_parts_of_one_label_set_are_put_together_in_order() -> None:
    soft = rows_of(reference(1, short_by=4090), 6)
    whole = concatenate([soft, soft])
    assert np.array_equal(whole.indices, np.concatenate([soft.indices, soft.indices]))
    assert len(whole) == 12
    other = rows_of(reference(1, short_by=4090, temperatures=(1.0, 3.0)), 6)
    with pytest.raises(ShapeMismatch):
        concatenate([soft, other])


def test_temperatures_are_named_exactly() -> None:
    assert [temperature_name(value) for value in (1.0, 2, 0.1, 1 / 3)] == ["1", "2", "0.1", repr(1 / 3)]
    assert RowSpec(1, "uint16", "float16", (1.0, 2.5)).columns == (
        "logit_max",
        "tail_logsumexp@1",
        "tail_logsumexp@2.5",
    )


def test_a_row_of_32_classes_in_float16_takes_four_bytes_a_class_and_twelve_more() -> None:
    spec = RowSpec(32, "uint16", "float16", (1.0, 2.0))
    assert (spec.row_bytes, spec.example_bytes) == (32 * 4 + 3 * 4, 8)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("targets", [False, True])
def test_the_bytes_of_rows_and_examples_are_those_of_their_arrays(*, ragged: bool, targets: bool) -> None:
    spec = RowSpec(5, "uint32", "float16", (1.0,), ragged, targets)
    rows, examples = (70, 9) if ragged else (9, 9)
    fields = spec.fields(rows, examples)
    total = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in fields.values())
    # row_splits has one entry more than examples.
    assert total == rows * spec.row_bytes + examples * spec.example_bytes + 8 * ragged
    assert ("tokens" in fields, "target" in fields) == (ragged, targets)


def ragged_rows(counts: list[int], first: int, digest: str | None = "d") -> SoftLabels:
    rows = sum(counts)
    column = np.arange(first, first + rows)
    return SoftLabels(
        indices=column[:, None].astype(np.uint16),
        logits=np.zeros((rows, 1), np.float16),
        logit_max=column.astype(np.float32),
        tail_logsumexp=np.zeros((rows, 1), np.float32),
        fingerprint=np.arange(len(counts), dtype=np.uint64),
        temperatures=(1.0,),
        digest=digest,
        row_splits=splits_of(np.array(counts)),
        tokens=column.astype(np.uint32),
    )


def test_parts_of_ragged_rows_are_put_together_with_their_splits() -> None:
    whole = concatenate([ragged_rows([2, 0, 3], 0), ragged_rows([4], 5), ragged_rows([1, 1], 9)])
    assert whole.row_splits is not None
    assert whole.row_splits.tolist() == [0, 2, 2, 5, 9, 10, 11]
    assert (whole.examples, len(whole)) == (6, 11)
    assert whole.indices[:, 0].tolist() == list(range(11))
    assert [whole.indices[whole.rows_of(at), 0].tolist() for at in (0, 1, 3)] == [[0, 1], [], [5, 6, 7, 8]]


def test_parts_with_other_fields_or_digests_are_not_put_together() -> None:
    ragged = ragged_rows([2], 0)
    with pytest.raises(ShapeMismatch, match="different label sets"):
        concatenate([ragged, ragged_rows([2], 0, digest="e")])
    with pytest.raises(ShapeMismatch, match="other fields"):
        concatenate([ragged, replace(ragged, tokens=None)])


def test_soft_labels_are_printed_as_shapes_and_not_as_numbers() -> None:
    told = repr(ragged_rows([2, 3], 0))
    assert "2 examples, 5 rows" in told
    assert "indices uint16[5, 1]" in told
    assert len(told) < 400
