"""A teacher and a dataset that a test makes itself and names by SPEC; token sequences, and models that read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache.server.labelling.precompute import Summary, precompute
from logitcache.server.labelling.preparation import Request
from logitcache.server.progress import Reporter

VOCABULARY = 50
FEATURES, CLASSES = 3, 6

_given: dict[str, Any] = {}


def teacher() -> Any:
    made = _given["teacher"]
    if made is not None:
        return made
    return Recurrent() if isinstance(_given["dataset"][0], dict) and "input_ids" in _given["dataset"][0] else Linear()


def dataset() -> Any:
    return _given["dataset"]


def request_of(store: Path, dataset: Any, teacher: Any = None, **options: Any) -> Request:
    """A request for these items and this teacher, until the next one is made.

    A list is a dataset; the teacher is by default a small one that fits it.
    """
    _given.update(dataset=dataset, teacher=teacher)
    asked: dict[str, Any] = {"top_k": 5, "temperatures": (2.0,), "device": "cpu", "rows_per_shard": 4096} | options
    spec = "tests.server.given"
    return Request("set", f"{spec}:teacher", f"{spec}:dataset", store, **asked)


def run(store: Path, dataset: Any, teacher: Any = None, reporter: Reporter | None = None, **options: Any) -> Summary:
    return precompute(request_of(store, dataset, teacher, **options), reporter)


class Linear(torch.nn.Module):
    """Notes which examples it was shown: the first feature is the ordinal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = torch.nn.Linear(FEATURES, CLASSES)
        self.shown: list[int] = []

    def forward(self, inputs: torch.Tensor) -> Any:
        self.shown += inputs[:, 0].long().tolist()
        return self.net(inputs * torch.tensor([0.0, 1.0, 1.0]))


class Recurrent(torch.nn.Module):
    """A causal model: the logits of a position depend on every token up to it, and on none after it."""

    def __init__(self, vocabulary: int = VOCABULARY, hidden: int = 16) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = torch.nn.Embedding(vocabulary, hidden)
        self.recurrence = torch.nn.GRU(hidden, hidden, batch_first=True)
        self.head = torch.nn.Linear(hidden, vocabulary)
        with torch.no_grad():
            self.head.weight.mul_(8)
        self.shown: list[tuple[int, int]] = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.shown.append((input_ids.shape[0], input_ids.shape[1]))
        logits: torch.Tensor = self.head(self.recurrence(self.embedding(input_ids))[0])
        return logits


def sequences(lengths: Sequence[int], vocabulary: int = VOCABULARY, seed: int = 0) -> list[np.ndarray]:
    """Random tokens of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, length) for length in lengths]


def plain_rows(model: torch.nn.Module, tokens: Any) -> torch.Tensor:
    """(length, classes) logits of a plain forward of one sequence, without any padding."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.as_tensor(np.asarray(tokens, np.int64))[None])[0]
    return logits
