"""The distillation loss against a dense float64 reference, finite differences, and the cases that make losses NaN."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.client.rows import dense_logits, truncated
from torch import Tensor

from logitcache.client import FetchedLabels, SoftLabelTensors, distillation_loss, kl_divergence
from logitcache.labels.errors import InvalidRequest, ShapeMismatch, UndeclaredTemperature

TEMPERATURES = (0.5, 1.0, 2.0, 4.0)


def labels_of(dense: Any, k: int, **options: Any) -> FetchedLabels:
    return FetchedLabels.of(truncated(dense, k, temperatures=TEMPERATURES, **options))


def student_like(rows: int, classes: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(dense_logits(rows, classes, seed=seed), dtype=dtype, requires_grad=True)


def full_kl(dense: np.ndarray, student: Tensor, temperature: float) -> Tensor:
    """KL over all classes, from the teacher's dense logits."""
    log_t = torch.log_softmax(torch.tensor(dense) / temperature, 1)
    log_p = torch.log_softmax(student / temperature, 1)
    return (log_t.exp() * (log_t - log_p)).sum(1)


def dense_bucket_kl(dense: np.ndarray, student: Tensor, k: int, temperature: float) -> Tensor:
    """KL after both dense distributions were cut to the teacher's top k and one class for the rest."""
    t, p = (torch.softmax(logits / temperature, 1) for logits in (torch.tensor(dense), student))
    order = torch.argsort(torch.tensor(dense), dim=1, descending=True, stable=True)
    t, p = t.gather(1, order), p.gather(1, order)
    t, p = (torch.cat([q[:, :k], q[:, k:].sum(1, keepdim=True)], 1) for q in (t, p))
    return (t * (t.log() - p.log())).sum(1)


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), student, retain_graph=True)[0]


cases = st.tuples(
    st.integers(1, 6), st.integers(2, 40), st.sampled_from(TEMPERATURES), st.integers(0, 10_000), st.data()
)


@given(cases)
@settings(deadline=None, max_examples=60)
def test_the_divergence_and_its_gradient_equal_a_dense_reference(case: Any) -> None:
    rows, classes, temperature, seed, data = case
    k = data.draw(st.integers(1, classes - 1))
    dense, student = dense_logits(rows, classes, seed=seed), student_like(rows, classes, seed + 1)
    found = kl_divergence(student, labels_of(dense, k), temperature=temperature)
    expected = dense_bucket_kl(dense, student, k, temperature)
    # The labels are float32: an error of 1e-7 in a logit, times a log-ratio of some tens.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student), rtol=1e-5, atol=1e-5)


@given(cases)
@settings(deadline=None, max_examples=60)
def test_with_all_classes_stored_it_is_the_full_kl_and_else_a_lower_bound(case: Any) -> None:
    rows, classes, temperature, seed, data = case
    dense, student = dense_logits(rows, classes, seed=seed), student_like(rows, classes, seed + 1)
    full = full_kl(dense, student, temperature)
    found = kl_divergence(student, labels_of(dense, classes), temperature=temperature)
    torch.testing.assert_close(found, full, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient(found, student), gradient(full, student), rtol=1e-5, atol=1e-5)
    k = data.draw(st.integers(1, classes - 1))
    cut = kl_divergence(student, labels_of(dense, k), temperature=temperature)
    assert bool((cut <= full + 1e-5).all())
    assert bool((cut >= -1e-5).all())


def test_the_gradient_on_stored_classes_is_that_of_the_full_kl() -> None:
    dense, student = dense_logits(8, 30), student_like(8, 30)
    soft = labels_of(dense, 5)
    found = gradient(kl_divergence(student, soft, temperature=2.0), student)
    full = gradient(full_kl(dense, student, 2.0), student)
    stored = torch.tensor(soft.indices.astype(np.int64))
    torch.testing.assert_close(found.gather(1, stored), full.gather(1, stored), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_gradients_equal_finite_differences(tail: str, k: int) -> None:
    soft, targets = labels_of(dense_logits(4, 7), k), torch.tensor([0, 3, -100, 6])

    def loss(student: Tensor) -> Tensor:
        return distillation_loss(student, soft, targets=targets, temperature=2.0, tail=tail, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, (student_like(4, 7),))


def test_a_tiny_residual_keeps_its_gradient_in_float32() -> None:
    # The student leaves e^-30 outside its first class: 1 - p rounds to 0, a log-sum-exp over the rest does not.
    dense = np.array([[0.0, -2.0, -2.0]])
    student = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    loss = kl_divergence(student, labels_of(dense, 1))
    expected = dense_bucket_kl(dense, student.double(), 1, 1.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    assert gradient(loss, student)[0, 1] < -0.05


def test_the_loss_weighs_kl_by_alpha_and_t_squared_and_ce_by_the_rest() -> None:
    dense, student = dense_logits(5, 9), student_like(5, 9)
    soft, targets = labels_of(dense, 4), torch.tensor([0, 1, 2, 3, 4])
    kl = kl_divergence(student, soft, temperature=4.0)
    ce = F.cross_entropy(student, targets, reduction="none", label_smoothing=0.2)
    found = distillation_loss(student, soft, targets=targets, temperature=4.0, alpha=0.3, label_smoothing=0.2)
    torch.testing.assert_close(found, (0.3 * 16 * kl + 0.7 * ce).mean())


def mixed_batch() -> tuple[Tensor, FetchedLabels, Tensor]:
    """Rows with target and labels, labels alone, target alone, neither; what is absent is NaN."""
    soft = labels_of(dense_logits(4, 6), 3)
    present = np.array([True, True, False, False])
    logits, tails, largest = soft.logits.copy(), soft.tail_logsumexp.copy(), soft.logit_max.copy()
    logits[~present] = tails[~present] = largest[~present] = np.nan
    soft = replace(soft, logits=logits, tail_logsumexp=tails, logit_max=largest, present=present)
    return student_like(4, 6), soft, torch.tensor([2, -100, 5, -100])


def test_each_example_gets_the_terms_that_it_has() -> None:
    student, soft, targets = mixed_batch()
    kl = kl_divergence(student, soft, temperature=2.0)
    assert kl[2:].tolist() == [0.0, 0.0]
    ce = F.cross_entropy(student, targets, reduction="none")
    expected = torch.stack([0.9 * 4 * kl[0] + 0.1 * ce[0], 4 * kl[1], ce[2], torch.zeros(()).double()])

    def loss(**options: Any) -> Tensor:
        return distillation_loss(student, soft, targets=targets, temperature=2.0, **options)

    torch.testing.assert_close(loss(reduction="none"), expected)
    torch.testing.assert_close(loss(reduction="sum"), expected.sum())
    torch.testing.assert_close(loss(), expected.sum() / 3)
    torch.testing.assert_close(loss(num_items=12), expected.sum() / 12)
    torch.testing.assert_close(loss(num_items=torch.tensor(12)), expected.sum() / 12)
    found = gradient(loss(), student)
    assert bool(torch.isfinite(found).all())
    assert found[3].tolist() == [0.0] * 6


def test_masked_examples_do_not_count_whatever_their_logits_are() -> None:
    student, soft, targets = mixed_batch()
    mask = torch.tensor([True, False, True, True])
    expected = distillation_loss(student, soft, targets=targets, reduction="none")
    broken = student.detach().clone()
    broken[1] = math.nan
    broken.requires_grad_()
    found = distillation_loss(broken, soft, targets=targets, mask=mask)
    torch.testing.assert_close(found, (expected[0] + expected[2]) / 2)
    assert bool(torch.isfinite(gradient(found, broken)).all())


def test_a_batch_without_anything_to_learn_from_is_zero_and_not_nan() -> None:
    student, soft, _ = mixed_batch()
    loss = distillation_loss(student, soft, mask=torch.tensor([False, False, True, True]))
    assert loss.item() == 0.0
    assert gradient(loss, student).abs().max() == 0.0


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("padded_student", [False, True])
def test_padded_vocabularies_give_no_nan(tail: str, padded_student: bool) -> None:
    # Classes 4 and 5 are padding: -inf for the teacher, and for a student that has the same.
    dense = dense_logits(3, 6)
    dense[:, 4:] = -np.inf
    student = student_like(3, 6).detach()
    if padded_student:
        student[:, 4:] = -math.inf
    student.requires_grad_()
    for k in (3, 4, 5, 6):
        soft = labels_of(dense, k)
        loss = distillation_loss(student, soft, targets=torch.tensor([0, 1, 2]), temperature=2.0, tail=tail)
        assert math.isfinite(loss.item())
        assert bool(torch.isfinite(gradient(loss, student)).all())
        if tail == "bucket" and k >= 4:
            real = full_kl(dense[:, :4], student[:, :4], 1.0) if padded_student else None
            if real is not None:
                torch.testing.assert_close(kl_divergence(student, soft), real, rtol=1e-5, atol=1e-5)


def test_rows_without_residual_beside_rows_with_one_give_no_nan() -> None:
    dense = dense_logits(2, 5)
    dense[0, 2:] = -np.inf
    student = student_like(2, 5)
    loss = kl_divergence(student, labels_of(dense, 2))
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(gradient(loss, student)).all())


def test_a_student_with_more_classes_than_the_teacher_pays_for_them() -> None:
    dense, student = dense_logits(3, 5), student_like(3, 7)
    padded = np.concatenate([dense, np.full((3, 2), -40.0)], 1)
    found = kl_divergence(student, labels_of(dense, 5))
    torch.testing.assert_close(found, full_kl(padded, student, 1.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_students_are_computed_in_float32(dtype: torch.dtype) -> None:
    soft, targets = labels_of(dense_logits(4, 50), 8), torch.tensor([1, 2, 3, 4])
    student = student_like(4, 50).detach().to(dtype)
    found = distillation_loss(student, soft, targets=targets, temperature=2.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distillation_loss(student.float(), soft, targets=targets, temperature=2.0))


def test_autocast_changes_nothing_in_the_loss() -> None:
    soft, features = labels_of(dense_logits(4, 50), 8), torch.randn(4, 16)
    weights = torch.randn(16, 50, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        student = features @ weights
        inside = distillation_loss(student, soft, targets=torch.tensor([1, 2, 3, 4]), temperature=2.0)
    assert student.dtype == torch.bfloat16
    outside = distillation_loss(student, soft, targets=torch.tensor([1, 2, 3, 4]), temperature=2.0)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_float16_labels_stay_within_their_rounding() -> None:
    # Centred logits here are above -32: half a unit in the last place is 2^-7 at most.
    dense, student = dense_logits(64, 100), student_like(64, 100)
    rounded = kl_divergence(student, labels_of(dense, 100, dtype="float16"))
    torch.testing.assert_close(rounded, full_kl(dense, student, 1.0), rtol=0, atol=2**-7)


def test_renormalising_forgets_what_is_outside_the_stored_classes() -> None:
    dense, student = dense_logits(3, 8), student_like(3, 8)
    soft = labels_of(dense, 3)
    stored = torch.tensor(soft.indices.astype(np.int64))
    expected = full_kl(np.take_along_axis(dense, soft.indices.astype(int), 1), student.gather(1, stored), 2.0)
    found = kl_divergence(student, soft, temperature=2.0, tail="renormalise")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def with_targets(dense: np.ndarray, k: int, seed: int = 5, **options: Any) -> FetchedLabels:
    """Labels of which some have no target."""
    targets = np.random.default_rng(seed).integers(-1, dense.shape[1], len(dense))
    return labels_of(dense, k, target=targets, **options)


def dense_target_kl(dense: np.ndarray, student: Tensor, soft: FetchedLabels, temperature: float) -> Tensor:
    """KL after both dense distributions were cut to the stored classes, the target and one class for the rest."""
    t, p = (torch.softmax(logits / temperature, 1) for logits in (torch.tensor(dense), student))
    assert soft.target is not None
    values = []
    for t_row, p_row, stored, target in zip(t, p, soft.indices.astype(int), soft.target.tolist(), strict=True):
        apart = sorted({*stored.tolist(), *([target] if target >= 0 else [])})
        rest = [index for index in range(len(t_row)) if index not in apart]
        cut_t, cut_p = (torch.cat([q[apart], q[rest].sum(0, keepdim=True)[: len(rest)]]) for q in (t_row, p_row))
        held = cut_t > 0
        values.append((cut_t[held] * (cut_t[held].log() - cut_p[held].log())).sum())
    return torch.stack(values)


@given(cases)
@settings(deadline=None, max_examples=60)
def test_with_the_target_apart_it_is_between_the_bucket_and_the_full_kl(case: Any) -> None:
    rows, classes, temperature, seed, data = case
    dense, student = dense_logits(rows, classes, seed=seed), student_like(rows, classes, seed + 1)
    soft = with_targets(dense, data.draw(st.integers(1, classes)), seed)
    bucket, found = (kl_divergence(student, soft, temperature=temperature, tail=tail) for tail in ("bucket", "target"))
    assert bool((bucket <= found + 1e-5).all())
    assert bool((found <= full_kl(dense, student, temperature) + 1e-5).all())
    expected = dense_target_kl(dense, student, soft, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student), rtol=1e-5, atol=2e-5)


def test_the_target_taken_apart_tightens_the_bound_where_it_is_outside_the_stored_classes() -> None:
    dense, student = dense_logits(6, 20), student_like(6, 20)
    least, most = dense.argmin(1), dense.argmax(1)
    for target, tighter in ((least, True), (most, False)):
        soft = labels_of(dense, 4, target=target)
        bucket, found = (kl_divergence(student, soft, tail=tail) for tail in ("bucket", "target"))
        assert bool((found > bucket).all()) == tighter
        if not tighter:
            torch.testing.assert_close(found, bucket)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_a_target_that_is_all_of_the_residual_leaves_no_bucket(temperature: float, scale: float) -> None:
    # The student has no class for a remainder that only rounding left: facing it, the loss would be infinite.
    dense = dense_logits(200, 5, scale=scale)
    soft = FetchedLabels.of(truncated(dense, 4, temperatures=(0.7, 1.0, 3.0), target=dense.argmin(1)))
    for dtype in (torch.float32, torch.float64):
        student = student_like(200, 5, dtype=dtype)
        found = kl_divergence(student, soft, temperature=temperature, tail="target")
        expected = full_kl(dense, student, temperature)
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)
        assert bool(torch.isfinite(gradient(found, student)).all())


@pytest.mark.parametrize("student_is_padded", [False, True])
def test_a_target_of_the_padded_vocabulary_gives_no_nan(student_is_padded: bool) -> None:
    dense, student = dense_logits(3, 6), student_like(3, 6).detach()
    dense[:, 4:] = -np.inf
    if student_is_padded:
        student[:, 4:] = -math.inf
    student.requires_grad_()
    for k in (2, 4, 5):
        soft = labels_of(dense, k, target=[5, 5, 4])
        assert soft.target_logit is not None
        assert np.isneginf(soft.target_logit).all()
        found = kl_divergence(student, soft, temperature=2.0, tail="target")
        torch.testing.assert_close(found, dense_target_kl(dense, student, soft, 2.0), rtol=1e-5, atol=1e-5)
        assert bool(torch.isfinite(gradient(found, student)).all())


def test_gradients_with_the_target_apart_equal_finite_differences() -> None:
    dense = dense_logits(5, 7)
    for k in (1, 3, 6, 7):
        soft = labels_of(dense, k, target=[0, -1, 3, 6, 2])

        def loss(student: Tensor, soft: FetchedLabels = soft) -> Tensor:
            return distillation_loss(student, soft, targets="stored", temperature=2.0, tail="target")

        assert torch.autograd.gradcheck(loss, (student_like(5, 7),))


def test_the_target_is_apart_from_float16_labels_within_their_rounding() -> None:
    dense, student = dense_logits(64, 100), student_like(64, 100)
    soft = with_targets(dense, 10, dtype="float16")
    found = kl_divergence(student, soft, tail="target")
    torch.testing.assert_close(found, dense_target_kl(dense, student, soft, 1.0), rtol=0, atol=2**-6)


def test_stored_targets_are_the_targets_unless_there_are_no_labels() -> None:
    student, soft, _ = mixed_batch()
    soft = replace(soft, target=np.array([2, -1, 5, 4], np.int32), target_logit=np.full(4, np.nan, np.float32))
    found = distillation_loss(student, soft, targets="stored", reduction="none")
    given = distillation_loss(student, soft, targets=torch.tensor([2, -100, -100, -100]), reduction="none")
    torch.testing.assert_close(found, given)


def test_tensors_and_arrays_give_the_same_loss() -> None:
    student, soft, targets = mixed_batch()
    tensors = soft.to("cpu")
    assert isinstance(tensors, SoftLabelTensors)
    assert tensors.indices.dtype == torch.int64
    assert (len(tensors), tensors.largest_index) == (4, int(soft.indices.max()))
    assert tensors.logits.dtype == torch.float32
    first, second = (distillation_loss(student, rows, targets=targets) for rows in (soft, tensors.to("cpu")))
    assert first.item() == second.item()


def test_wide_indices_and_read_only_arrays_become_tensors() -> None:
    soft = labels_of(dense_logits(2, 5), 3)
    indices = soft.indices.astype(np.uint32) + 100_000
    indices.flags.writeable = False
    assert replace(soft, indices=indices).to("cpu").indices.tolist() == indices.tolist()


def test_what_cannot_be_right_is_named() -> None:
    student, soft, targets = student_like(3, 6), labels_of(dense_logits(3, 6), 3), torch.tensor([1, 2, 3])
    with pytest.raises(UndeclaredTemperature, match=r"temperature 3 .*declared: 0\.5, 1, 2, 4"):
        distillation_loss(student, soft, temperature=3.0)
    with pytest.raises(ShapeMismatch, match="2 rows and the soft labels 3"):
        distillation_loss(student[:2], soft)
    largest = int(soft.indices.max())
    with pytest.raises(ShapeMismatch, match=f"has {largest} classes and the labels hold class {largest}"):
        distillation_loss(student[:, :largest], soft.to("cpu"))
    with pytest.raises(ShapeMismatch, match="has 6 classes and the labels hold class 7"):
        distillation_loss(student, replace(soft, target=np.array([7, -1, 0], np.int32)), targets="stored")
    with pytest.raises(ShapeMismatch, match=r"\(3, 2, 6\)"):
        distillation_loss(student[:, None].expand(3, 2, 6), soft)
    for name in ("targets", "mask"):
        short: dict[str, Any] = {name: targets[:2]}
        with pytest.raises(ShapeMismatch, match=name):
            distillation_loss(student, soft, **short)
    wrong: list[dict[str, Any]] = [
        {"alpha": 1.5},
        {"label_smoothing": -0.1},
        {"tail": "target"},
        {"targets": "stored"},
        {"padding": "right"},
        {"attention_mask": torch.ones(3)},
        {"reduction": "avg"},
        {"num_items": 0},
        {"num_items": 3, "reduction": "sum"},
        {"targets": targets.float()},
    ]
    for options in wrong:
        with pytest.raises(InvalidRequest, match=next(iter(options)).removesuffix("s")):
            distillation_loss(student, soft, **options)


def test_a_target_that_is_no_class_is_refused_unless_its_example_is_masked() -> None:
    dense = dense_logits(3, 5)
    student, targets = student_like(3, 5), torch.tensor([1, 99, -1])
    with pytest.raises(InvalidRequest, match="target 99 is not one of the student's 5 classes"):
        distillation_loss(student, labels_of(dense, 5), targets=targets)
    masked = distillation_loss(student, labels_of(dense, 5), targets=targets, mask=torch.tensor([True, False, False]))
    alone = distillation_loss(student[:1], labels_of(dense[:1], 5), targets=targets[:1])
    assert torch.allclose(masked, alone)


def test_a_target_of_minus_one_is_none_as_datasets_and_label_sets_write_it() -> None:
    soft, student = labels_of(dense_logits(4, 9), 3), student_like(4, 9)
    one, other = (torch.tensor([1, none, 2, none]) for none in (-1, -100))
    assert torch.equal(distillation_loss(student, soft, targets=one), distillation_loss(student, soft, targets=other))
