"""Tensors between the host and the teacher's device, copied while the device computes where it can do both.

CUDA does so for pinned memory alone. Everywhere else the same calls copy at once. It knows no teacher and no rows.
"""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; neither what is computed there now nor this copy is waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Landing:
    """Host tensors that a device's results are copied into, part by part, and are whole after `wait`."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        # Asleep while it waits: a commit may need the processor.
        self._copied = torch.cuda.Event(blocking=True) if self._cuda else None

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A host tensor to copy into."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._cuda)

    def copy(self, source: torch.Tensor, into: torch.Tensor) -> None:
        """Begin to copy, after what was asked of the device before."""
        into.copy_(source, non_blocking=self._cuda)

    def close(self) -> None:
        """All copies were asked for."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """Return when all copies are done."""
        if self._copied is not None:
            self._copied.synchronize()
