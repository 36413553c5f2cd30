"""The loss on causal rows: dtypes, chunks, devices, empty batches, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.ragged import CLASSES, Batch, Corpus, gradient
from tests.client.rows import dense_logits
from torch import Tensor

from logitcache.client import distillation_loss, kl_divergence
from logitcache.client.chunks import CHUNK_ELEMENTS, values_in_chunks
from logitcache.labels.errors import InvalidRequest, ShapeMismatch


def test_tensors_of_causal_labels_keep_counts_on_the_cpu_and_all_fields_through_a_move() -> None:
    soft = Corpus.of([4, 3, 6]).labels(4, present=[True, False, True])
    for tensors in (soft.to("cpu"), soft.to("cpu").to("cpu", non_blocking=True)):
        assert (tensors.examples, len(tensors), len(soft)) == (3, 10, 10)
        assert tensors.row_counts is not None
        assert tensors.missing is not None
        assert (tensors.row_counts.tolist(), tensors.missing.tolist()) == ([4, 0, 6], [False, True, False])
        for name, array in soft.arrays().items():
            if name != "fingerprint":
                np.testing.assert_array_equal(getattr(tensors, name).numpy(), array)
    moved = soft.to("meta")
    assert {getattr(moved, name).device.type for name in soft.arrays() if name != "fingerprint"} == {"meta"}


@pytest.mark.parametrize("layout", ["right", "packs"])
def test_half_precision_students_under_autocast_are_computed_in_float32(layout: str) -> None:
    corpus = Corpus.of([4, 3, 6])
    batch, soft = Batch.of(corpus, layout), corpus.labels(4)
    features = torch.randn(*batch.held.shape, 16)
    weights = torch.randn(16, CLASSES, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        student = features @ weights
        inside = replace(batch, student=student).loss(soft, temperature=2.0)
    assert (student.dtype, inside.dtype) == (torch.bfloat16, torch.float32)
    outside = replace(batch, student=student.float()).loss(soft, temperature=2.0)
    assert inside.item() == outside.item()
    found, expected = (torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in (inside, outside))
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7 * float(expected.abs().max()))


@pytest.mark.parametrize("tail", ["bucket", "target", "renormalise"])
def test_gradients_equal_finite_differences_in_a_padded_batch(tail: str) -> None:
    corpus = Corpus.of([3, 1, 2], classes=5)
    batch, soft = Batch.of(corpus, "left", junk=0.0), corpus.labels(2, present=[True, True, False])

    def loss(student: Tensor) -> Tensor:
        options: dict[str, Any] = {"temperature": 2.0, "tail": tail, "label_smoothing": 0.1, "alpha": 0.5}
        return replace(batch, student=student).loss(soft, **options)

    assert torch.autograd.gradcheck(loss, (batch.student,))


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_chunks_of_any_size_give_the_values_and_gradient_of_all_rows_at_once(rows: int) -> None:
    student = torch.tensor(dense_logits(9, 5), requires_grad=True)
    positions, weights = torch.tensor([8, 0, 3, 4, 1, 6, 7]), torch.arange(1.0, 8.0).double()

    def values(logits: Tensor, chunk: slice) -> Tensor:
        assert len(logits) <= rows
        return logits.logsumexp(1) * weights[chunk]

    found = values_in_chunks(student, positions, values, chunk_elements=5 * rows)
    expected = student[positions].logsumexp(1) * weights
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient(found**2, student), gradient(expected**2, student))


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_the_gradient_of_a_gradient_is_that_of_all_rows_at_once(rows: int) -> None:
    student, positions = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), torch.tensor([5, 0, 2])

    def penalty(values: torch.Tensor) -> torch.Tensor:
        first = torch.autograd.grad(values.sum(), student, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), student)[0]

    found = values_in_chunks(student, positions, lambda logits, _: logits.logsumexp(1) ** 2, chunk_elements=5 * rows)
    torch.testing.assert_close(penalty(found), penalty(student[positions].logsumexp(1) ** 2))


@pytest.mark.parametrize("layout", ["right", "left", "rows", "right mask", "packs"])
def test_the_host_never_waits_for_the_device(layout: str) -> None:
    # A meta tensor has no content: whatever would look at it, as waiting for a device does, raises.
    corpus = Corpus.of([4, 3, 6])
    soft = corpus.labels(4, present=None if layout in ("rows", "packs") else [True, True, False]).to("meta")
    batch = Batch.of(corpus, layout)
    student = batch.student.detach().to("meta").requires_grad_()
    given: dict[str, Any] = {**batch.say, "targets": batch.targets.to("meta"), "mask": batch.held.to("meta")}
    loss = distillation_loss(student, soft, **given, tail="target")
    assert gradient(loss, student).shape == student.shape


def test_a_batch_of_several_chunks_is_compared_row_by_row() -> None:
    # The student has classes that the teacher lacks, so few rows are more than a chunk.
    corpus, classes = Corpus.of([12, 1, 9]), 2**20
    assert 22 * classes > CHUNK_ELEMENTS
    soft, student = corpus.labels(4), torch.randn(22, classes, generator=torch.Generator().manual_seed(0))
    found = kl_divergence(student.requires_grad_(), soft)
    rows: dict[str, Any] = {"row_splits": None, "tokens": None, "fingerprint": np.zeros(22, np.uint64)}
    expected = kl_divergence(student, replace(soft, **rows))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student))


def test_a_batch_without_a_single_row_is_zero_and_not_nan() -> None:
    corpus = Corpus.of([3, 2])
    soft = corpus.labels(present=[False, False])
    student = torch.zeros(2, 3, CLASSES, requires_grad=True)
    nothing = distillation_loss(student, soft, attention_mask=torch.zeros(2, 3))
    assert nothing.item() == 0.0
    assert gradient(nothing, student).abs().sum() == 0.0
    nowhere = distillation_loss(torch.zeros(0, CLASSES, requires_grad=True), soft)
    assert (nowhere.item(), nowhere.requires_grad) == (0.0, True)


def test_what_does_not_line_up_is_named_with_both_counts_and_what_to_pass() -> None:
    corpus = Corpus.of([4, 3, 6])
    soft = corpus.labels()
    student, mask = torch.zeros(3, 6, CLASSES), Batch.of(corpus, "right mask").held[:, :6]
    wrong: list[tuple[Tensor, dict[str, Any], str]] = [
        (student, {}, "example 0 of the batch has 4 rows and its line 6 positions: say padding='right'"),
        (student[:, :5], {"padding": "left"}, r"example 2 of the batch has 6 rows and its line 5 .* fetch\(…, rows"),
        (
            student,
            {"attention_mask": mask.roll(1, 0)},
            "example 0 .* 4 rows and its line of attention_mask 6 positions",
        ),
        (student[:2], {"padding": "right"}, "padding='right' needs one line an example, and .* 2 lines for 3 examples"),
        (student[:2], {}, "2 lines for 3 examples, with 12 positions for 13 rows: pass an attention_mask"),
        (student[0], {}, "1 lines for 3 examples, with 6 positions for 13 rows"),
        (student[:2], {"attention_mask": mask[:2]}, "with 7 positions in attention_mask for 13 rows"),
        (student, {"attention_mask": mask[:, 1:]}, r"attention_mask has shape \(3, 5\) and not \(3, 6\)"),
        (student, {"padding": "right", "targets": torch.zeros(3, 5).long()}, r"targets has shape \(3, 5\)"),
        (student, {"padding": "right", "mask": torch.ones(3)}, r"mask has shape \(3,\)"),
        (student[None], {}, r"\(1, 3, 6, 11\) .* are not \(batch, length, classes\) or \(rows, classes\)"),
        (student[..., :10], {"padding": "right"}, "the student has 10 classes and the labels hold class 10"),
    ]
    for logits, options, message in wrong:
        with pytest.raises(ShapeMismatch, match=message):
            distillation_loss(logits, soft, **options)
    with pytest.raises(ShapeMismatch, match="example 1 of the batch has no labels: leave such out of a pack"):
        distillation_loss(student[:2], corpus.labels(present=[True, False, True]))


def test_what_cannot_be_meant_is_refused() -> None:
    corpus = Corpus.of([4, 3, 6])
    student, mask = torch.zeros(3, 6, CLASSES), Batch.of(corpus, "right mask").held[:, :6]
    untargeted = replace(corpus.labels(), target=None, target_logit=None)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (corpus.labels(), {"padding": "up"}, "padding='up' is not known: use 'right' or 'left'"),
        (corpus.labels(), {"padding": "right", "attention_mask": mask}, "give one of them"),
        (corpus.labels(), {"attention_mask": mask.long() * 2}, "other values than 0 and 1"),
        (corpus.labels(), {"padding": "right", "targets": "mine"}, "targets='mine' is not known: .* 'stored'"),
        (untargeted, {"padding": "right", "targets": "stored"}, "made without targets: give them, or precompute"),
        (untargeted, {"padding": "right", "tail": "target"}, "made without targets: use tail='bucket', or precompute"),
    ]
    for soft, options, message in wrong:
        with pytest.raises(InvalidRequest, match=message):
            distillation_loss(student, soft, **options)
