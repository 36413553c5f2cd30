"""The distillation loss on soft labels: ``alpha · T² · KL + (1 - alpha) · CE`` with the cases that a batch can hold.

The divergence itself is in `divergence`. Knows nothing of where soft labels come from, and moves them to the student's
device.
"""

import math
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from logitcache.client.divergence import bucket_divergence, head_divergence
from logitcache.client.tensors import SoftLabelTensors
from logitcache.labels.errors import InvalidRequest, ShapeMismatch
from logitcache.labels.soft_labels import SoftLabels, temperature_column

Soft: TypeAlias = SoftLabels | SoftLabelTensors


def distillation_loss(
    student_logits: Tensor,
    soft: Soft,
    *,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    alpha: float = 0.9,
    tail: str = "bucket",
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
) -> Tensor:
    """``alpha · T² · KL_T(teacher || student) + (1 - alpha) · CE(student, target)`` of each example, reduced.

    T² keeps the soft gradients' size when the temperature changes (Hinton et al. 2015, arXiv 1503.02531, section 2). An
    example without a target has ``T² · KL`` alone, one without labels (``present`` is False) CE alone, one with neither
    nothing, and it is not counted. Computed in float32, under autocast too, or in float64 for a float64 student.

    Args:
        student_logits: (batch, classes), raw. Classes beyond the teacher's count as part of its residual.
        soft: the batch's soft labels, as fetched or as tensors on any device.
        targets: (batch,) class indices; None or ``ignore_index`` where there is none.
        temperature: one that the label set declares.
        alpha: weight of the soft part, in [0, 1].
        tail: ``"bucket"`` compares what is outside the stored k as one class: exact gradient on the stored ones, a
            lower bound of the full KL, and the full KL at k = classes. ``"renormalise"`` forgets what is outside, and
            is biased.
        reduction: ``"mean"`` over the counted examples (0 if there are none), ``"sum"``, or ``"none"`` for (batch,).
        num_items: divides the sum in place of the count, for gradient accumulation; with ``"mean"`` only.
        label_smoothing: of the CE, in [0, 1].
        ignore_index: the target that means none.
        mask: (batch,) bool; examples with False are left out and not counted, whatever their logits are.

    Raises:
        UndeclaredTemperature: no tail was stored for this temperature.
        ShapeMismatch: batch sizes disagree, or the student has no such class as the labels hold.
        InvalidRequest: an argument is out of its bounds.
    """
    _check_options(alpha, reduction, num_items, label_smoothing)
    student_logits = _checked(student_logits, soft, {"targets": targets, "mask": mask})
    if mask is not None:
        mask = mask.to(student_logits.device, torch.bool)
        # Masking the result alone would leave 0 · NaN in the gradient of an example whose logits mean nothing.
        student_logits = student_logits.masked_fill(~mask[:, None], 0.0)
    soft = _moved(soft, student_logits)
    labelled = torch.ones_like(student_logits[:, 0], dtype=torch.bool) if soft.present is None else soft.present
    kl = temperature**2 * _divergence(student_logits, soft, temperature, tail)
    if targets is None:
        per_example, counted = kl, labelled
    else:
        targets = targets.to(student_logits.device, torch.int64)
        if mask is not None:
            targets = targets.masked_fill(~mask, ignore_index)
        _check_targets(targets, student_logits.shape[1], ignore_index)
        has_target = targets != ignore_index
        ce = F.cross_entropy(
            student_logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )
        # kl is 0 where there are no labels and ce where there is no target, so their sum is the one that applies.
        per_example = torch.where(labelled & has_target, alpha * kl + (1 - alpha) * ce, kl + ce)
        counted = labelled | has_target
    if mask is not None:
        counted = counted & mask
        per_example = torch.where(mask, per_example, 0.0)
    return _reduced(per_example, counted, reduction, num_items)


def kl_divergence(
    student_logits: Tensor, soft: Soft, *, temperature: float = 1.0, tail: str = "bucket"
) -> Float[Tensor, " batch"]:
    """KL_T(teacher || student) of each example in nats, without the factor T²; 0 for examples without labels.

    Arguments and errors are those of `distillation_loss`.
    """
    student_logits = _checked(student_logits, soft, {})
    return _divergence(student_logits, _moved(soft, student_logits), temperature, tail)


def _divergence(student: Tensor, soft: SoftLabelTensors, temperature: float, tail: str) -> Float[Tensor, " batch"]:
    column = temperature_column(soft.temperatures, temperature)
    indices, logits = soft.indices, soft.logits.to(student.dtype)
    tails = soft.tail_logsumexp[:, column].to(student.dtype)
    if soft.present is not None:
        # Rows without labels hold NaN, which would reach the gradient through a mask on the result alone.
        indices = torch.where(soft.present[:, None], indices, 0)
        logits = torch.where(soft.present[:, None], logits, 0.0)
        tails = torch.where(soft.present, tails, -math.inf)
    if tail == "bucket":
        divergence = bucket_divergence(student, indices, logits, tails, temperature)
    elif tail == "renormalise":
        divergence = head_divergence(student, indices, logits, temperature)
    else:
        raise InvalidRequest(f"tail={tail!r} is not known: use 'bucket', or 'renormalise' (biased)")
    return divergence if soft.present is None else torch.where(soft.present, divergence, 0.0)


def _moved(soft: Soft, student: Tensor) -> SoftLabelTensors:
    if isinstance(soft, SoftLabelTensors):
        return soft.to(student.device)
    return SoftLabelTensors.of(soft, student.device, non_blocking=True)


def _checked(student: Tensor, soft: Soft, others: dict[str, Tensor | None]) -> Tensor:
    """The student's logits in float32 or float64, if all shapes agree."""
    if student.ndim != 2 or not student.is_floating_point():
        raise ShapeMismatch(
            f"student_logits of shape {tuple(student.shape)} and {student.dtype} are not (batch, classes) of floats"
        )
    batch, classes = student.shape
    if batch != len(soft):
        raise ShapeMismatch(
            f"student_logits have {batch:,} rows and the soft labels {len(soft):,}: one an example is needed"
        )
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != (batch,):
            raise ShapeMismatch(f"{name} has shape {tuple(tensor.shape)} and not ({batch},), one an example")
    targets = others.get("targets")
    if targets is not None and (targets.is_floating_point() or targets.dtype == torch.bool):
        raise InvalidRequest(f"targets are {targets.dtype} and not class indices: give whole numbers")
    largest = soft.largest_index if isinstance(soft, SoftLabelTensors) else int(soft.indices.max(initial=0))
    if largest >= classes:
        raise ShapeMismatch(
            f"the student has {classes:,} classes and the labels hold class {largest:,}: "
            "teacher and student must share their classes"
        )
    return student if student.dtype == torch.float64 else student.float()


def _check_targets(targets: Tensor, classes: int, ignore_index: int) -> None:
    """On the CPU, where looking costs nothing: elsewhere it would make the host wait for the device."""
    if targets.device.type != "cpu":
        return
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= classes))]
    if len(wrong):
        raise InvalidRequest(
            f"target {int(wrong[0])} is not one of the student's {classes:,} classes, nor ignore_index={ignore_index}, "
            "which means none"
        )


def _check_options(alpha: float, reduction: str, num_items: object, label_smoothing: float) -> None:
    for name, value in (("alpha", alpha), ("label_smoothing", label_smoothing)):
        if not 0.0 <= value <= 1.0:
            raise InvalidRequest(f"{name}={value!r} is not between 0 and 1")
    if reduction not in ("mean", "sum", "none"):
        raise InvalidRequest(f"reduction={reduction!r} is not known: use 'mean', 'sum' or 'none'")
    if num_items is not None and reduction != "mean":
        raise InvalidRequest(f"num_items divides the sum of reduction='mean'; it means nothing with {reduction!r}")
    if isinstance(num_items, int) and num_items <= 0:
        raise InvalidRequest(f"num_items={num_items} cannot divide a loss: give the number of examples that count")


def _reduced(
    per_example: Float[Tensor, " batch"],
    counted: Bool[Tensor, " batch"],
    reduction: str,
    num_items: int | Tensor | None,
) -> Tensor:
    if reduction == "none":
        return per_example
    total = per_example.sum()
    if reduction == "sum":
        return total
    # Counting stays on the device: reading the count would make the host wait for it.
    return total / (counted.sum().clamp(min=1) if num_items is None else num_items)
