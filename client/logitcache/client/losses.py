"""The distillation loss on soft labels: ``alpha · T² · KL + (1 - alpha) · CE`` with the cases that a batch can hold.

The divergence itself is in `divergence`, which positions are compared in `pairing`. Knows nothing of where soft labels
come from, and moves them to the student's device.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from logitcache.client.chunks import values_in_chunks
from logitcache.client.divergence import bucket_divergence, head_divergence, target_divergence
from logitcache.client.pairing import Pairs, paired
from logitcache.client.tensors import SoftLabelTensors
from logitcache.labels.errors import InvalidRequest
from logitcache.labels.soft_labels import SoftLabels

Soft: TypeAlias = SoftLabels | SoftLabelTensors
ValueOf: TypeAlias = Callable[[Tensor, Pairs], Tensor]
"""From logits (pairs, classes) and what they are compared with to a value each."""


class Compared(NamedTuple):
    """The loss of each pair against one teacher, where it counts, and at which of the student's positions it is.

    Positions are None where they are all, one after the other. What does not count is 0.
    """

    values: Float[Tensor, " pairs"]
    counted: Bool[Tensor, " pairs"]
    positions: Tensor | None


def distillation_loss(
    student_logits: Tensor,
    soft: Soft | Sequence[Soft],
    *,
    targets: Tensor | str | None = None,
    temperature: float = 1.0,
    alpha: float = 0.9,
    tail: str = "bucket",
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    padding: str | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """``alpha · T² · KL_T(teacher || student) + (1 - alpha) · CE(student, target)`` of each position, reduced.

    T² keeps the soft gradients' size when the temperature changes (Hinton et al. 2015, arXiv 1503.02531, section 2). A
    position without a target has ``T² · KL`` alone, one without labels CE alone, one with neither nothing, and it is
    not counted. Computed in float32, under autocast too, or in float64 for a float64 student.

    **Pointwise labels** (one row an example): the student's logits are (batch, classes), and a position is an example.

    **Causal labels** (one row a token): the student's logits are those of a causal model, unshifted, and one of

    - (batch, length, classes), one example a line, padded: say ``padding`` or ``attention_mask``, unless each example
      fills its line;
    - (rows, classes) or (1, rows, classes), the examples one after the other, and nothing else;
    - (packs, length, classes), the examples one after the other in row-major order, with an ``attention_mask`` that is
      1 at their tokens. As many lines as examples are always one example a line.

    The row of token i is compared with the logits at token i, and its target is the label of token i + 1 of the same
    example; an example's last token has none. Positions that are no example's token are never read. An example without
    labels takes CE alone, at the tokens of its line that ``attention_mask`` tells; without one, wherever ``targets``
    has a next label in its line, but for the first with ``padding="left"``: the position before it may be padding. In a
    pack such examples must be left out. Memory beside the logits and their gradient is that of a few rows.

    **Several teachers**: of a sequence of soft labels, those of the same examples by each teacher, the value of a
    position is the mean over the teachers for which it counts, and it is counted once if it counts for any. So the soft
    part is the mean over the teachers, and the CE counts once. Where one teacher lacks an example, its share of the
    mean is the CE alone; without a target the mean is over the others.

    Args:
        student_logits: raw, as above. Classes beyond the teacher's count as part of its residual.
        soft: the batch's soft labels, as fetched or as tensors on any device; or a sequence of them, one a teacher.
        targets: class indices, and -1 or ``ignore_index`` where there is none: (batch,), or unshifted labels in the
            shape of the student's positions, that of the logits without the classes. ``"stored"`` takes the label
            set's own: with ranges of rows it alone knows the token after a range. None means that nothing has one.
        temperature: one that the label set declares.
        alpha: weight of the soft part, in [0, 1].
        tail: ``"bucket"`` compares what is outside the stored k as one class: exact gradient on the stored ones, a
            lower bound of the full KL, and the full KL at k = classes. ``"target"`` takes the stored target out of the
            bucket, a bound at least as tight. ``"renormalise"`` forgets what is outside, and is biased.
        reduction: ``"mean"`` over the counted positions (0 if there are none), ``"sum"``, or ``"none"`` for a value at
            each of the student's positions, 0 where nothing counts.
        num_items: divides the sum in place of the count, for gradient accumulation; with ``"mean"`` only.
        label_smoothing: of the CE, in [0, 1].
        ignore_index: the target that means none.
        mask: bool, in the shape of the student's positions; those with False are left out and not counted, whatever
            their logits are. The position that predicts token i is i - 1.
        padding: causal: the side on which lines are padded, ``"right"`` or ``"left"``; the rest is as long as the
            example's rows.
        attention_mask: causal, in the shape of the student's positions: 1 at the examples' tokens, else 0. It is read
            on the CPU: one that is on a device makes the host wait for it.

    Raises:
        UndeclaredTemperature: no tail was stored for this temperature.
        ShapeMismatch: examples, rows and positions disagree, or the student has no such class as the labels hold.
        InvalidRequest: an argument is out of its bounds, or needs stored targets and there are none.
    """
    _check_options(alpha, reduction, num_items, label_smoothing)
    compared = partial(
        _compared,
        student_logits,
        temperature=temperature,
        alpha=alpha,
        tail=tail,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        targets=targets,
        mask=mask,
        padding=padding,
        attention_mask=attention_mask,
    )
    if isinstance(soft, Sequence):
        values, counted = _mean_of_teachers([compared(each) for each in soft], student_logits)
        positions = None
    else:
        values, counted, positions = compared(soft)
    if reduction == "none":
        return _at_positions(values, student_logits, positions)
    total = values.sum()
    if reduction == "sum":
        return total
    # Counting stays on the device: reading the count would make the host wait for it.
    return total / (counted.sum().clamp(min=1) if num_items is None else num_items)


def _compared(
    student_logits: Tensor,
    soft: Soft,
    *,
    temperature: float,
    alpha: float,
    tail: str,
    label_smoothing: float,
    ignore_index: int,
    **options: Any,
) -> Compared:
    """The loss against one teacher; arguments and errors are those of `distillation_loss`."""
    soft = _moved(soft, student_logits)
    _check_tail(tail, soft)
    pairs, positions = paired(
        student_logits,
        soft,
        temperature=temperature,
        ignore_index=ignore_index,
        **options,
    )

    def loss(logits: Tensor, pairs: Pairs) -> Float[Tensor, " pairs"]:
        if pairs.mask is not None:
            # Masking the result alone would leave 0 · NaN in the gradient of a position whose logits mean nothing.
            logits = logits.masked_fill(~pairs.mask[:, None], 0.0)
        logits = _precise(logits)
        value = temperature**2 * _divergence(logits, pairs, temperature, tail)
        if pairs.targets is not None:
            ce = F.cross_entropy(
                logits, pairs.targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
            )
            has_target = pairs.targets != ignore_index
            has_both = has_target if pairs.labelled is None else has_target & pairs.labelled
            # The divergence is 0 without labels and ce without a target, so their sum is the one that applies.
            value = torch.where(has_both, alpha * value + (1 - alpha) * ce, value + ce)
        return value if pairs.mask is None else torch.where(pairs.mask, value, 0.0)

    return Compared(_values(student_logits, pairs, positions, loss), _counted(pairs, ignore_index), positions)


def _mean_of_teachers(teachers: Sequence[Compared], student: Tensor) -> tuple[Tensor, Tensor]:
    """The mean value of each of the student's positions over the teachers for which it counts, and where there are any.

    Raises:
        InvalidRequest: there is no teacher.
    """
    if not teachers:
        raise InvalidRequest("soft holds the labels of no teacher: give those of at least one")
    values = torch.stack([_at_positions(each.values, student, each.positions) for each in teachers])
    counted = torch.stack([_at_positions(each.counted, student, each.positions) for each in teachers]).sum(0)
    return values.sum(0) / counted.clamp(min=1), counted > 0


def kl_divergence(
    student_logits: Tensor,
    soft: Soft,
    *,
    temperature: float = 1.0,
    tail: str = "bucket",
    padding: str | None = None,
    attention_mask: Tensor | None = None,
) -> Float[Tensor, "*positions"]:
    """KL_T(teacher || student) at each of the student's positions in nats, without the factor T²; 0 without labels.

    Arguments and errors are those of `distillation_loss`.
    """
    soft = _moved(soft, student_logits)
    _check_tail(tail, soft)
    pairs, positions = paired(
        student_logits, soft, temperature=temperature, padding=padding, attention_mask=attention_mask
    )

    def divergence(logits: Tensor, pairs: Pairs) -> Float[Tensor, " pairs"]:
        return _divergence(_precise(logits), pairs, temperature, tail)

    return _at_positions(_values(student_logits, pairs, positions, divergence), student_logits, positions)


def _moved(soft: Soft, student: Tensor) -> SoftLabelTensors:
    if isinstance(soft, SoftLabelTensors):
        return soft.to(student.device)
    return SoftLabelTensors.of(soft, student.device, non_blocking=True)


def _values(student: Tensor, pairs: Pairs, positions: Tensor | None, value: ValueOf) -> Float[Tensor, " pairs"]:
    """The value of each pair; causal ones, of which a batch has thousands, in chunks."""
    if positions is None:
        return value(student, pairs)
    flat = student.reshape(-1, student.shape[-1])
    return values_in_chunks(flat, positions, lambda logits, chunk: value(logits, pairs.at(chunk)))


def _at_positions(values: Tensor, student: Tensor, positions: Tensor | None) -> Shaped[Tensor, "*positions"]:
    if positions is None:
        return values
    shape = student.shape[:-1]
    return values.new_zeros(shape.numel()).index_copy(0, positions, values).reshape(shape)


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _divergence(student: Tensor, pairs: Pairs, temperature: float, tail: str) -> Float[Tensor, " pairs"]:
    logits, tails = pairs.logits.to(student.dtype), pairs.tail.to(student.dtype)
    if tail == "renormalise":
        divergence = head_divergence(student, pairs.indices, logits, temperature)
    elif tail == "target" and pairs.target is not None and pairs.target_logit is not None:
        target_logit = pairs.target_logit.to(student.dtype)
        divergence = target_divergence(student, pairs.indices, logits, tails, pairs.target, target_logit, temperature)
    else:
        divergence = bucket_divergence(student, pairs.indices, logits, tails, temperature)
    return divergence if pairs.labelled is None else torch.where(pairs.labelled, divergence, 0.0)


def _counted(pairs: Pairs, ignore_index: int) -> Bool[Tensor, " pairs"]:
    """Where there are labels or a target, and the mask leaves them in."""
    counted = torch.ones_like(pairs.tail, dtype=torch.bool) if pairs.labelled is None else pairs.labelled
    if pairs.targets is not None:
        counted = counted | (pairs.targets != ignore_index)
    return counted if pairs.mask is None else counted & pairs.mask


def _check_tail(tail: str, soft: SoftLabelTensors) -> None:
    if tail not in ("bucket", "target", "renormalise"):
        raise InvalidRequest(f"tail={tail!r} is not known: use 'bucket', 'target', or 'renormalise' (biased)")
    if tail == "target" and soft.target is None:
        raise InvalidRequest(
            "tail='target' needs the teacher's logits of the targets, and this label set was made without targets: "
            "use tail='bucket', or precompute another label set of a dataset that has them"
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
        raise InvalidRequest(
            f"num_items={num_items} cannot divide a loss: give the number that count: examples, or tokens"
        )
