"""Batches of causal examples in every layout of a student's logits, and plain distillation to compare with."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.client.rows import causal, dense_logits
from torch import Tensor

from logitcache.client import FetchedLabels, SoftLabelTensors, distillation_loss
from logitcache.labels.soft_labels import SoftLabels

CLASSES = 11
IGNORED = -100
LAYOUTS = ("right", "left", "right mask", "left mask", "rows", "one line", "packs")


@dataclass(frozen=True)
class Corpus:
    """Examples of tokens, the teacher's dense logits of each, and a student's."""

    tokens: list[np.ndarray]
    teacher: list[np.ndarray]
    student: list[np.ndarray]

    @classmethod
    def of(cls, lengths: list[int], *, classes: int = CLASSES, seed: int = 0) -> "Corpus":
        draw = np.random.default_rng(seed)
        return cls(
            [draw.integers(0, classes, length) for length in lengths],
            [dense_logits(length, classes, seed=seed + 10 + i) for i, length in enumerate(lengths)],
            [dense_logits(length, classes, seed=seed + 90 + i) for i, length in enumerate(lengths)],
        )

    @property
    def lengths(self) -> list[int]:
        return [len(tokens) for tokens in self.tokens]

    def labels(self, k: int = CLASSES, **options: Any) -> FetchedLabels:
        return FetchedLabels.of(causal(self.teacher, self.tokens, k, temperatures=(1.0, 2.0), **options))

    def expected(
        self, students: list[Tensor] | None = None, *, alpha: float = 0.9, temperature: float = 1.0, present: Any = None
    ) -> list[Tensor]:
        """Plain dense distillation: of each example a value a token."""
        students = students or self.students()
        return [
            dense_loss(students[i], self.teacher[i], self.tokens[i], alpha, temperature, present is None or present[i])
            for i in range(len(students))
        ]

    def students(self) -> list[Tensor]:
        return [torch.tensor(logits, requires_grad=True) for logits in self.student]


def dense_loss(
    student: Tensor, teacher: np.ndarray, tokens: np.ndarray, alpha: float, temperature: float, labelled: bool = True
) -> Tensor:
    log_t = torch.log_softmax(torch.tensor(teacher) / temperature, 1)
    kl = temperature**2 * (log_t.exp() * (log_t - torch.log_softmax(student / temperature, 1))).sum(1)
    ce = F.cross_entropy(student[:-1], torch.tensor(tokens[1:]), reduction="none")
    if not labelled:
        return torch.cat([ce, ce.new_zeros(1)])
    return torch.cat([alpha * kl[:-1] + (1 - alpha) * ce, kl[-1:]])


@dataclass(frozen=True)
class Batch:
    """One layout of a corpus: the student's logits, labels, what to say about them, and where tokens are."""

    student: Tensor
    targets: Tensor
    say: dict[str, Any]
    held: Tensor

    @classmethod
    def of(cls, corpus: Corpus, layout: str, *, junk: float = math.nan) -> "Batch":
        """``junk`` are the logits at positions that are no token; labels there are a class that would count."""
        lengths = corpus.lengths
        if layout in ("rows", "one line"):
            held = torch.ones((1, sum(lengths)), dtype=torch.bool)
        elif layout == "packs":
            # One line more than examples, and padding in the midst of an example.
            held = torch.ones((len(lengths) + 1, -(-sum(lengths) // (len(lengths) + 1)) + 1), dtype=torch.bool)
            spare = held.numel() - sum(lengths)
            held.view(-1)[torch.randperm(held.numel(), generator=torch.Generator().manual_seed(1))[:spare]] = False
        else:
            columns = torch.arange(max(lengths) + 2)
            counts = torch.tensor(lengths)[:, None]
            held = columns >= len(columns) - counts if layout.startswith("left") else columns < counts
        student = torch.full((*held.shape, corpus.student[0].shape[1]), junk, dtype=torch.float64)
        student[held] = torch.tensor(np.concatenate(corpus.student))
        targets = torch.full(held.shape, 3)
        targets[held] = torch.tensor(np.concatenate(corpus.tokens))
        if layout == "rows":
            student, targets, held = student[0], targets[0], held[0]
        say: dict[str, Any] = {"padding": layout} if layout in ("right", "left") else {}
        if layout not in ("right", "left", "rows", "one line"):
            say = {"attention_mask": held.long()}
        return cls(student.requires_grad_(), targets, say, held)

    def loss(self, soft: SoftLabels | SoftLabelTensors, **options: Any) -> Tensor:
        return distillation_loss(self.student, soft, **{"targets": self.targets, **self.say, **options})

    def at_positions(self, values: list[Tensor]) -> Tensor:
        return torch.zeros(self.held.shape, dtype=torch.float64).masked_scatter(self.held, torch.cat(values).detach())


def gradient(loss: Tensor, student: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), student, retain_graph=True)[0]
