"""What a loss compares: each of the student's positions that takes part, with its soft labels, target and mask.

Pointwise, example i is position i. Causal rows are put where `alignment` says they belong. Knows nothing of losses.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from logitcache.client.alignment import Places, places_of
from logitcache.client.tensors import SoftLabelTensors
from logitcache.labels.errors import InvalidRequest, ShapeMismatch
from logitcache.labels.soft_labels import temperature_column


@dataclass(frozen=True)
class Pairs:
    """Of each position that takes part: what the teacher said, what is to be predicted, and whether it counts.

    Attributes:
        indices, logits: (pairs, k) stored classes, and their centred logits as stored.
        tail: (pairs,) log-sum-exp over all others at the loss's temperature.
        target, target_logit: (pairs,) those of the label set, -1 and NaN for none; None if it has none.
        labelled: (pairs,) where there are soft labels; None if everywhere. Elsewhere the fields above are finite.
        targets: (pairs,) classes for the cross-entropy, ``ignore_index`` for none; None without.
        mask: (pairs,) False where the position is left out; None if nowhere.
    """

    indices: Int64[Tensor, "pairs k"]
    logits: Float[Tensor, "pairs k"]
    tail: Float[Tensor, " pairs"]
    target: Int64[Tensor, " pairs"] | None = None
    target_logit: Float[Tensor, " pairs"] | None = None
    labelled: Bool[Tensor, " pairs"] | None = None
    targets: Int64[Tensor, " pairs"] | None = None
    mask: Bool[Tensor, " pairs"] | None = None

    def at(self, places: slice | Tensor) -> "Pairs":
        """Some of them."""
        return Pairs(**{name: array[places] for name, array in vars(self).items() if array is not None})


def paired(
    student: Tensor,
    soft: SoftLabelTensors,
    *,
    temperature: float,
    targets: Tensor | str | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    padding: str | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Pairs, Int64[Tensor, " pairs"] | None]:
    """Pairs, and which of the student's positions each is, in row-major order; None for pointwise labels: all of them.

    ``soft`` is on the student's device. The arguments and errors are those of `losses.distillation_loss`.
    """
    _check(student, soft, {"targets": targets, "mask": mask, "attention_mask": attention_mask}, padding)
    pairs, places = _soft_pairs(soft, temperature), _places(student, soft, padding, attention_mask)
    positions = None if places is None else _moved(places.positions, student.device)
    if places is not None and places.rows is not None:
        pairs = _ordered(pairs, _moved(places.rows, student.device))
    pairs = _finite(pairs)
    if mask is not None:
        mask = mask.to(student.device, torch.bool)
        pairs = replace(pairs, mask=mask if positions is None else mask.reshape(-1)[positions])
    if targets is None:
        return pairs, positions
    if isinstance(targets, str):
        chosen = _stored_targets(pairs, targets, ignore_index)
    else:
        chosen = targets.to(student.device, torch.int64)
        # What a dataset may give for none, and what label sets store for it.
        chosen = chosen.masked_fill(chosen == -1, ignore_index)
        if places is not None:
            chosen = _next_targets(chosen, places, soft.missing if padding == "left" else None, ignore_index)
    if pairs.mask is not None:
        chosen = chosen.masked_fill(~pairs.mask, ignore_index)
    _check_targets(chosen, student.shape[-1], ignore_index)
    return replace(pairs, targets=chosen), positions


def _places(
    student: Tensor, soft: SoftLabelTensors, padding: str | None, attention_mask: Tensor | None
) -> Places | None:
    """Where causal rows are; None for pointwise ones."""
    if soft.row_counts is None or soft.missing is None:
        return None
    shape = (student.shape[0] if student.ndim == 3 else 1, student.shape[-2])
    held = None if attention_mask is None else _as_held(attention_mask, shape)
    return places_of(shape, soft.row_counts, soft.missing, padding=padding, attention_mask=held)


def _soft_pairs(soft: SoftLabelTensors, temperature: float) -> Pairs:
    tail = soft.tail_logsumexp[:, temperature_column(soft.temperatures, temperature)]
    labelled = soft.present if soft.row_splits is None else None
    return Pairs(soft.indices, soft.logits, tail, soft.target, soft.target_logit, labelled)


def _ordered(pairs: Pairs, rows: Int64[Tensor, " pairs"]) -> Pairs:
    """Pairs of these rows, -1 being a row without labels: one is appended, since there may be no other."""
    arrays = {name: array for name, array in vars(pairs).items() if array is not None}
    longer = {name: torch.cat([array, array.new_zeros(1, *array.shape[1:])]) for name, array in arrays.items()}
    return replace(Pairs(**longer).at(rows), labelled=rows >= 0)


def _finite(pairs: Pairs) -> Pairs:
    """Rows without labels hold NaN, which would reach the gradient through a mask on the result alone."""
    labelled = pairs.labelled
    if labelled is None:
        return pairs
    return replace(
        pairs,
        indices=torch.where(labelled[:, None], pairs.indices, 0),
        logits=torch.where(labelled[:, None], pairs.logits, 0.0),
        tail=torch.where(labelled, pairs.tail, -torch.inf),
        target=None if pairs.target is None else torch.where(labelled, pairs.target, -1),
    )


def _stored_targets(pairs: Pairs, targets: str, ignore_index: int) -> Int64[Tensor, " pairs"]:
    if targets != "stored":
        raise InvalidRequest(f"targets={targets!r} is not known: give class indices, or 'stored' for the label set's")
    if pairs.target is None:
        raise InvalidRequest(
            "targets='stored', and this label set was made without targets: give them, or precompute another label set "
            "of a dataset that has them"
        )
    return torch.where(pairs.target < 0, ignore_index, pairs.target)


def _next_targets(
    labels: Int64[Tensor, "*positions"],
    places: Places,
    unsure: Bool[np.ndarray, " lines"] | None,
    ignore_index: int,
) -> Int64[Tensor, " pairs"]:
    """The label of each place's next token in the same example.

    In ``unsure`` lines it is not known where the left padding ends, so the first label there is no target: the position
    before it may be padding.
    """
    if unsure is not None and unsure.any():
        lines, labels = _moved(np.flatnonzero(unsure), labels.device), labels.reshape(-1, labels.shape[-1])
        first = (labels[lines] != ignore_index).int().argmax(1)
        labels = labels.index_put((lines, first), labels.new_full((), ignore_index))
    following = _moved(places.following, labels.device)
    return torch.where(following < 0, ignore_index, labels.reshape(-1)[following.clamp(min=0)])


def _moved(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _as_held(attention_mask: Tensor, shape: tuple[int, int]) -> Bool[np.ndarray, "lines length"]:
    values = attention_mask.detach().cpu()
    held = values != 0
    if not bool((values == held).all()):
        raise InvalidRequest("attention_mask holds other values than 0 and 1: it must be 1 where a token is, else 0")
    return np.asarray(held.reshape(shape).numpy())


def _check(
    student: Tensor, soft: SoftLabelTensors, others: dict[str, Tensor | str | None], padding: str | None
) -> None:
    pointwise = soft.row_splits is None
    axes = "(batch, classes)" if pointwise else "(batch, length, classes) or (rows, classes)"
    if student.ndim not in ((2,) if pointwise else (2, 3)) or not student.is_floating_point():
        raise ShapeMismatch(
            f"student_logits of shape {tuple(student.shape)} and {student.dtype} are not {axes} of floats"
        )
    if pointwise and student.shape[0] != len(soft):
        raise ShapeMismatch(
            f"student_logits have {student.shape[0]:,} rows and the soft labels {len(soft):,}: one an example is needed"
        )
    if pointwise and (padding is not None or others["attention_mask"] is not None):
        raise InvalidRequest("padding and attention_mask are for causal labels: these have one row an example")
    shape = tuple(student.shape[:-1])
    for name, tensor in others.items():
        if isinstance(tensor, Tensor) and tuple(tensor.shape) != shape:
            each = "one an example" if pointwise else "one for each of the student's positions"
            raise ShapeMismatch(f"{name} has shape {tuple(tensor.shape)} and not {shape}, {each}")
    targets = others["targets"]
    if isinstance(targets, Tensor) and (targets.is_floating_point() or targets.dtype == torch.bool):
        raise InvalidRequest(f"targets are {targets.dtype} and not class indices: give whole numbers")
    classes = student.shape[-1]
    if soft.largest_index >= classes:
        raise ShapeMismatch(
            f"the student has {classes:,} classes and the labels hold class {soft.largest_index:,}: "
            "teacher and student must share their classes"
        )


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
