"""Soft labels as torch tensors: what a loss reads. Knows nothing of fetching."""

from dataclasses import dataclass, replace

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

        def moved(name: str, array: np.ndarray) -> Tensor:
            # torch warns about memory that it could not write to.
            array = array if array.flags.writeable else array.copy()
            tensor = torch.from_numpy(array).to(device, non_blocking=non_blocking)
            return tensor.to(torch.int64) if name in _WIDENED else tensor

        arrays = {name: array for name, array in soft.arrays().items() if name != "fingerprint"}
        return cls(
            **{name: moved(name, array) for name, array in arrays.items()},
            temperatures=soft.temperatures,
            largest_index=_largest_index(soft),
            row_counts=None if soft.row_splits is None else np.diff(soft.row_splits),
            missing=None if soft.row_splits is None else _missing(soft),
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "SoftLabelTensors":
        """The same rows on another device; nothing is copied where they are there already."""
        arrays = {name: getattr(self, name, None) for name in ARRAYS}
        moved = {
            name: array.to(device, non_blocking=non_blocking) for name, array in arrays.items() if array is not None
        }
        return replace(self, **moved)


def _largest_index(soft: SoftLabels) -> int:
    named = [array for array in (soft.indices, soft.target) if array is not None and array.size]
    return max((int(array.max()) for array in named), default=-1)


def _missing(soft: SoftLabels) -> Bool[np.ndarray, " examples"]:
    return np.zeros(soft.examples, np.bool_) if soft.present is None else ~soft.present
