"""Teachers and a dataset as a user has them beside a configuration file; copied there by `job_site`.

Files in the working folder tell a teacher what to do when it comes to the second shard: while ``hold-NAME`` is there it
waits, and says so with ``held-NAME``. ``examples`` holds the dataset's size.
"""

import ctypes
import os
import resource
import signal
import time
from pathlib import Path

import torch

FEATURES, CLASSES = 6, 11
LATE = 4096
"""First example of the second shard."""


class Teacher(torch.nn.Module):
    """Labels like all others of its kind, whatever its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(FEATURES, CLASSES)
        self.name = name

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if float(inputs[:, 0].max()) >= LATE:
            self.at_the_second_shard()
        logits: torch.Tensor = self.net(inputs / LATE)
        return logits

    def at_the_second_shard(self) -> None:
        """What it does depends on its name, not on its class: that belongs to a teacher's identity."""
        hold = Path(f"hold-{self.name}")
        if self.name == "raising":
            raise RuntimeError("the teacher's own trouble")
        if self.name == "greedy" and hold.exists():
            # As the system does when memory runs out. The first shard is being committed until then.
            while not Path("label-sets/greedy/commits/0.json").exists():
                time.sleep(0.005)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.name == "segfault" and hold.exists():
            ctypes.string_at(0)
        if self.name == "abort":
            os.abort()
        if self.name == "exits":
            os._exit(3)
        if self.name == "hungry":
            resource.setrlimit(resource.RLIMIT_AS, (0, resource.RLIM_INFINITY))
            try:
                bytearray(1 << 30)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if self.name == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hold.exists():
            Path(f"held-{self.name}").touch()
        while hold.exists():
            time.sleep(0.005)


def one() -> Teacher:
    return Teacher("one")


def two() -> Teacher:
    return Teacher("two")


def stubborn() -> Teacher:
    return Teacher("stubborn")


def greedy() -> Teacher:
    return Teacher("greedy")


def raising() -> Teacher:
    return Teacher("raising")


def segfault() -> Teacher:
    return Teacher("segfault")


def abort() -> Teacher:
    return Teacher("abort")


def exits() -> Teacher:
    return Teacher("exits")


def hungry() -> Teacher:
    return Teacher("hungry")


class Points(torch.utils.data.Dataset[torch.Tensor]):
    """The first feature is the ordinal."""

    def __init__(self) -> None:
        self.examples = int(Path("examples").read_text())

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.arange(index, index + FEATURES, dtype=torch.float32)


def points() -> Points:
    return Points()
