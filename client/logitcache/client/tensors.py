"""Soft labels as torch tensors: what a loss reads. Knows nothing of fetching."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from logitcache.labels.soft_labels import SoftLabels


@dataclass(frozen=True)
class SoftLabelTensors:
    """The torch twin of `SoftLabels`, all on one device.

    Attributes:
        indices: (rows, k) stored classes. int64, because torch gathers by nothing narrower.
        logits: (rows, k) centred logits in the dtype they are stored in.
        logit_max: (rows,) what was subtracted.
        tail_logsumexp: (rows, T) a column for each declared temperature.
        temperatures: the T declared temperatures.
        largest_index: the largest stored class, or -1 without rows: known on the CPU, so that checking a student's
            number of classes against it does not wait for the device.
        present: (rows,) False where there is no label, or None when there are all.
    """

    indices: Int64[Tensor, "rows k"]
    logits: Float[Tensor, "rows k"]
    logit_max: Float32[Tensor, " rows"]
    tail_logsumexp: Float32[Tensor, "rows temperatures"]
    temperatures: tuple[float, ...]
    largest_index: int
    present: Bool[Tensor, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @classmethod
    def of(
        cls, soft: SoftLabels, device: torch.device | str | int, *, non_blocking: bool = False
    ) -> "SoftLabelTensors":
        """Transfer soft labels; the indices travel as stored (2 or 4 bytes) and are widened on the device."""

        def moved(array: np.ndarray) -> Tensor:
            array = (
                array if array.flags.writeable else array.copy()
            )  # torch warns about memory that it could not write to
            return torch.from_numpy(array).to(device, non_blocking=non_blocking)

        return cls(
            indices=moved(soft.indices).to(torch.int64),
            logits=moved(soft.logits),
            logit_max=moved(soft.logit_max),
            tail_logsumexp=moved(soft.tail_logsumexp),
            temperatures=soft.temperatures,
            largest_index=int(soft.indices.max(initial=0)) if soft.indices.size else -1,
            present=None if soft.present is None else moved(soft.present),
        )

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "SoftLabelTensors":
        """The same rows on another device; nothing is copied where they are there already."""
        names = ("indices", "logits", "logit_max", "tail_logsumexp", "present")
        arrays = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: array.to(device, non_blocking=non_blocking) for name, array in arrays.items()})
