"""Generated classification data and a teacher that counts its calls, for tests of precompute as a whole.

The SPEC callables take their size from environment variables, since a SPEC has no arguments. The first feature of an
example is its ordinal; the teacher appends that and the size of each batch to a file, a line a batch, across processes.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache.server.labelling.preparation import Request

FEATURES = 8
CLASSES = 12


class CountingTeacher(torch.nn.Module):
    """A small network; writes down which examples it labelled if ``WORKLOAD_CALLS`` names a file."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(FEATURES, 32), torch.nn.GELU(), torch.nn.Linear(32, classes))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if path := os.environ.get("WORKLOAD_CALLS"):
            ordinals = inputs[:, 0].to(torch.int64)
            with Path(path).open("a") as file:
                file.write(f"{int(ordinals[0])} {len(ordinals)}\n")
        # The ordinal is a mark and not a feature.
        logits: torch.Tensor = self.net(inputs * torch.tensor([0.0] + [1.0] * (FEATURES - 1)))
        return logits * 3


def teacher() -> CountingTeacher:
    torch.manual_seed(1)
    return CountingTeacher(CLASSES)


class Points(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Random points; the first feature is the ordinal (exact in float32 below 2^24)."""

    def __init__(self, examples: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.inputs = torch.from_numpy(rng.normal(size=(examples, FEATURES)).astype(np.float32))
        self.inputs[:, 0] = torch.arange(examples)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.inputs[index], index % CLASSES


def points() -> Points:
    return Points(int(os.environ["WORKLOAD_EXAMPLES"]), int(os.environ.get("WORKLOAD_SEED", "0")))


@dataclass(frozen=True)
class Workload:
    """A request over the generated data."""

    request: Request

    @property
    def path(self) -> Path:
        return self.request.path

    def with_changes(self, **changes: Any) -> "Workload":
        return Workload(replace(self.request, **changes))


def workload(store: Path, *, name: str = "points", batch_size: int = 512, **options: Any) -> Workload:
    """The request; ``WORKLOAD_EXAMPLES`` must be set."""
    defaults: dict[str, Any] = {"top_k": 4, "temperatures": (2.0,), "rows_per_shard": 4096}
    spec = "tests.e2e.workload:"
    return Workload(
        Request(name, f"{spec}teacher", f"{spec}points", store, batch_size=batch_size, **defaults | options)
    )


def times_labelled(calls: Path, examples: int) -> np.ndarray:
    """How often each example was shown to the teacher, from the file that it wrote."""
    counts = np.zeros(examples, int)
    for line in calls.read_text().splitlines() if calls.exists() else []:
        # A line that a kill cut short belongs to a batch that was not committed.
        if line.count(" ") == 1 and all(line.split(" ")):
            first, count = map(int, line.split(" "))
            counts[first : first + count] += 1
    return counts
