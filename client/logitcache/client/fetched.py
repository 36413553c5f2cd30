"""What a fetch returns: soft labels in NumPy that can follow the student to its device.

It imports torch only when asked to, and knows nothing of how they were fetched.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from logitcache.client.extras import import_with_torch
from logitcache.labels.soft_labels import SoftLabels

if TYPE_CHECKING:
    import logitcache.client.tensors


@dataclass(frozen=True, repr=False)
class FetchedLabels(SoftLabels):
    """Soft labels as they arrived; `SoftLabels` tells the arrays."""

    @classmethod
    def of(cls, soft: SoftLabels) -> "FetchedLabels":
        """The same arrays, not copied."""
        fetched = cls.__new__(cls)
        fetched.__dict__.update(soft.__dict__)
        return fetched

    def to(self, device: Any, non_blocking: bool = False) -> "logitcache.client.tensors.SoftLabelTensors":
        """The same rows as torch tensors on ``device``, with int64 indices.

        Raises:
            MissingExtra: torch is not installed.
        """
        tensors = import_with_torch("logitcache.client.tensors")
        return tensors.SoftLabelTensors.of(self, device, non_blocking=non_blocking)  # type: ignore[no-any-return]
