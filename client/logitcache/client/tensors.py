"""Soft labels as torch tensors: what a loss reads. Knows nothing of fetching."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from logitcache.labels.soft_labels import ARRAYS, SoftLabels

_WIDENED = ("indices", "tokens", "target")


@dataclass(frozen=True)
class SoftLabelTensors:
    """The torch twin of `SoftLabels`, all on one device but for what says so.

    Attributes:
        indices: (rows, k) stored classes. int64, because torch gathers by nothing narrower.
        logits: (rows, k) centred logits in the dtype they are stored in.
        logit_max: (rows,) what was subtracted.
        tail_logsumexp: (rows, T) a column for each declared temperature.
        temperatures: the T declared temperatures.
        largest_index: the largest class among those stored and the targets, or -1 without rows: known on the CPU, so
            that checking a student's number of classes against it does not wait for the device.
        present: (examples,) False where there is no label, or None when there are all.
        row_splits: (examples + 1,) causal only: where the rows of each example begin and end.
        tokens: (rows,) causal only: the token that the teacher had read last when it gave this row.
        target: (rows,) the class that the dataset gave, -1 for none; None if the label set has no targets.
        target_logit: (rows,) the teacher's centred logit of the target, NaN for none.
        row_counts: (examples,) in NumPy, causal only: how many rows each example has.
        missing: (examples,) in NumPy, causal only: True where there is no label.
    """

    indices: Int64[Tensor, "rows k"]
    logits: Float[Tensor, "rows k"]
    logit_max: Float32[Tensor, " rows"]
    tail_logsumexp: Float32[Tensor, "rows temperatures"]
    temperatures: tuple[float, ...]
    largest_index: int
    present: Bool[Tensor, " examples"] | None = None
    row_splits: Int64[Tensor, " splits"] | None = None
    tokens: Int64[Tensor, " rows"] | None = None
    target: Int64[Tensor, " rows"] | None = None
    target_logit: Float32[Tensor, " rows"] | None = None
    row_counts: Int64[np.ndarray, " examples"] | None = None
    missing: Bool[np.ndarray, " examples"] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def examples(self) -> int:
        """How many examples these rows are of."""
        return len(self) if self.row_counts is None else len(self.row_counts)

    @classmethod
    def of(
        cls, soft: SoftLabels, device: torch.device | str | int, *, non_blocking: bool = False
    ) -> "SoftLabelTensors":
        """Transfer soft labels; whole numbers travel as stored (2 or 4 bytes) and are widened on the device."""
        return cls._from(_stored(soft), _known(soft), device, non_blocking=non_blocking)

    @classmethod
    def _from(
        cls, stored: dict[str, Tensor], known: dict[str, Any], device: Any, *, non_blocking: bool
    ) -> "SoftLabelTensors":
        fields = dict(known)
        for name, tensor in stored.items():
            moved = tensor.to(device, non_blocking=non_blocking)
            fields[name] = moved.to(torch.int64) if name in _WIDENED else moved
        return cls(**fields)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "SoftLabelTensors":
        """The same rows on another device; nothing is copied where they are there already."""
        arrays = {name: getattr(self, name, None) for name in ARRAYS}
        moved = {
            name: array.to(device, non_blocking=non_blocking) for name, array in arrays.items() if array is not None
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class StagedLabels:
    """Soft labels prepared for a device in another thread than the one that trains, which then takes them.

    Attributes:
        take: gives the `SoftLabelTensors`. It is to be called in the thread that trains: what it does on a CUDA device
            it issues on the stream that is current there, so that no stream has to wait for another.
        held_bytes: bytes of the tensors that are held until then.
    """

    take: Callable[[], SoftLabelTensors]
    held_bytes: int

    @classmethod
    def of(cls, soft: SoftLabels, device: torch.device) -> "StagedLabels":
        """Do what can be done beforehand: for the CPU all of it, for CUDA the copy into pinned memory.

        Pinned memory comes from torch's allocator, which gives it to others only when the copies out of it are done.
        """
        if device.type == "cpu":
            tensors = SoftLabelTensors.of(soft, device)
            return cls(lambda: tensors, sum(held.nbytes for held in vars(tensors).values() if isinstance(held, Tensor)))
        stored = _stored(soft)
        pinned = device.type == "cuda"
        if pinned:
            with torch.cuda.device(device):  # else this thread would begin to use device 0, too
                stored = {name: tensor.pin_memory() for name, tensor in stored.items()}
        take = partial(SoftLabelTensors._from, stored, _known(soft), device, non_blocking=pinned)
        return cls(take, sum(tensor.nbytes for tensor in stored.values()))


def staging(device: Any) -> Callable[[SoftLabels], StagedLabels]:
    """What makes `StagedLabels` for a device; ``"cuda"`` is the current one of the thread that calls this."""
    where = torch.device(device)
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    return lambda soft: StagedLabels.of(soft, where)


def _stored(soft: SoftLabels) -> dict[str, Tensor]:
    """The arrays on the CPU as they are stored, not copied."""
    arrays = {name: array for name, array in soft.arrays().items() if name != "fingerprint"}
    # torch warns about memory that it could not write to.
    return {name: torch.from_numpy(a if a.flags.writeable else a.copy()) for name, a in arrays.items()}


def _known(soft: SoftLabels) -> dict[str, Any]:
    """What stays on the CPU."""
    named = [array for array in (soft.indices, soft.target) if array is not None and array.size]
    missing = np.zeros(soft.examples, np.bool_) if soft.present is None else ~soft.present
    return {
        "temperatures": soft.temperatures,
        "largest_index": max((int(array.max()) for array in named), default=-1),
        "row_counts": None if soft.row_splits is None else np.diff(soft.row_splits),
        "missing": None if soft.row_splits is None else missing,
    }
