"""Tensors between the host and the teacher's device, copied while the device computes where it can do both.

CUDA does so for pinned memory alone. Everywhere else the same calls copy at once. How long a device takes is told, too,
without waiting for it. It knows no teacher and no rows.
"""

import time

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


class Stopwatch:
    """Time that a device takes for what is asked of it from now until `stop`.

    Of a CUDA device it is its own, from when it comes to the first of it until it has done the last: what it does while
    the host reads the next batch counts, what it does for the batch before does not. Elsewhere calls return when their
    work is done, and it is the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._began, self._first = time.perf_counter(), _passed(device)
        self._last: torch.cuda.Event | None = None
        self._host_s = 0.0

    def stop(self, device: torch.device) -> None:
        """All of it was asked for. The result is on ``device``; on another CUDA device than was begun with, whose clock
        is another, it is waited for.
        """
        last = _passed(device)
        if last is not None and (self._first is None or self._first.device != last.device):
            last.synchronize()
            last = None
        self._last, self._host_s = last, time.perf_counter() - self._began

    @property
    def seconds(self) -> float:
        """From start to stop; waits until the device has done it."""
        if self._first is None or self._last is None:
            return self._host_s
        self._last.synchronize()
        return float(self._first.elapsed_time(self._last)) / 1000


def _passed(device: torch.device) -> torch.cuda.Event | None:
    """An event that a CUDA device notes the time at when it has done what was asked of it before."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True, blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event
