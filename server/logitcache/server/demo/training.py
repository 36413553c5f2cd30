"""One small student, trained in three ways that differ only in where the loss gets the teacher from.

The same seed gives the same first weights and the same batches to each way, so two runs differ in the method alone.
Methods take turns epoch by epoch, so that a busy moment of the machine hits them alike. Times are wall-clock times of
the training loop, loading included and evaluation excluded.
Knows nothing of what is learnt, which is a `Task`'s to know, nor of servers or of files.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

ALPHA = 0.9
"""Weight of the teacher in the loss of distillation; the rest is cross-entropy with the targets."""

Loss = Callable[[Tensor], Tensor]
"""From a student's logits to the batch's loss."""

Beginning = tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]
"""First weights, optimizer and batches."""


class Task(Protocol):
    """What a student learns. A batch is whatever the task's loaders give."""

    @property
    def ids(self) -> str | int:
        """Where a batch has its ids."""

    def beginning(self, seed: int) -> Beginning:
        """Where the training of a seed begins: the same each time."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """A student's or a teacher's logits of a batch."""

    def hard_loss(self, logits: Tensor, batch: Any) -> Tensor:
        """Cross-entropy with the batch's targets."""

    def live_loss(self, logits: Tensor, batch: Any, teacher_logits: Tensor) -> Tensor:
        """The loss of distillation in plain PyTorch, from the teacher's logits of all classes."""

    def cached_loss(self, logits: Tensor, batch: Any, soft: Any) -> Tensor:
        """The same from the batch's soft labels."""

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy and cross-entropy on what no student was trained on."""


class Method(Protocol):
    """Where a step's loss comes from. What it tells besides its name grows with every batch taken."""

    @property
    def name(self) -> str:
        """As it stands in tables."""

    @property
    def teacher_s(self) -> float:
        """Seconds spent in the teacher's forward so far."""

    @property
    def waiting_s(self) -> float:
        """Seconds that steps have stood still so far because their labels were not there."""

    @property
    def fetched_bytes(self) -> int:
        """Bytes of soft labels fetched so far."""

    def batches(self, task: Task, loader: DataLoader[Any]) -> Iterator[tuple[Any, Loss]]:
        """Each batch, and the loss to train on."""


class HardLabels:
    """Cross-entropy with the data set's targets; no teacher."""

    name = "hard labels"
    teacher_s = waiting_s = 0.0
    fetched_bytes = 0

    def batches(self, task: Task, loader: DataLoader[Any]) -> Iterator[tuple[Any, Loss]]:
        """See `Method`."""
        for batch in loader:
            yield batch, partial(task.hard_loss, batch=batch)


class LiveTeacher:
    """The teacher's forward in every step and plain PyTorch's own KL divergence: the reference for cached labels."""

    name = "live teacher"
    waiting_s = 0.0
    fetched_bytes = 0

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.teacher_s = 0.0

    def batches(self, task: Task, loader: DataLoader[Any]) -> Iterator[tuple[Any, Loss]]:
        """See `Method`."""
        for batch in loader:
            start = time.perf_counter()
            with torch.inference_mode():
                logits = task.forward(self.teacher, batch)
            self.teacher_s += time.perf_counter() - start
            # A tensor made in inference mode cannot be saved for a backward pass.
            yield batch, partial(task.live_loss, batch=batch, teacher_logits=logits.clone())


class CachedLabels:
    """Soft labels from a label set, prefetched while the student computes."""

    name = "cached labels"
    teacher_s = 0.0

    def __init__(self, labels: Any) -> None:
        self.labels = labels

    @property
    def waiting_s(self) -> float:
        """See `Method`; other methods' steps with the same labels are counted too."""
        return float(self.labels.stats.waited_ms / 1e3)

    @property
    def fetched_bytes(self) -> int:
        """See `Method`; what else was fetched from the same labels is counted too."""
        return int(self.labels.stats.bytes)

    def batches(self, task: Task, loader: DataLoader[Any]) -> Iterator[tuple[Any, Loss]]:
        """See `Method`."""
        for batch, soft in self.labels.attach(loader, ids=task.ids):
            yield batch, partial(task.cached_loss, batch=batch, soft=soft)


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data: means of its steps, mean loss of what was minimised, and the test.

    ``test_loss`` is the cross-entropy with the targets, so it can be compared between all methods; ``training_loss``
    only between methods of one loss.
    """

    step_ms: float
    teacher_ms: float
    waiting_ms: float
    fetched_bytes: float
    training_loss: float
    accuracy: float
    test_loss: float


@dataclass(frozen=True)
class Run:
    """One student's training from one seed."""

    method: str
    seed: int
    epochs: list[Epoch] = field(default_factory=list)


def train(task: Task, methods: Sequence[Method], seed: int, epochs: int) -> list[Run]:
    """Train one student a method from the same beginning, an epoch each in turn."""
    runs = [Run(method.name, seed) for method in methods]
    beginnings = [task.beginning(seed) for _ in methods]
    for _ in range(epochs):
        for method, run, start in zip(methods, runs, beginnings, strict=True):
            run.epochs.append(_train_epoch(task, method, *start))
    return runs


def _train_epoch(
    task: Task, method: Method, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]
) -> Epoch:
    before, start = (method.teacher_s, method.waiting_s, method.fetched_bytes), time.perf_counter()
    losses = [take_step(task, model, optimizer, batch, loss_of) for batch, loss_of in method.batches(task, loader)]
    steps, seconds = len(losses), time.perf_counter() - start
    teacher_s, waiting_s, fetched_bytes = before
    accuracy, test_loss = task.evaluate(model)
    return Epoch(
        step_ms=seconds / steps * 1e3,
        teacher_ms=(method.teacher_s - teacher_s) / steps * 1e3,
        waiting_ms=(method.waiting_s - waiting_s) / steps * 1e3,
        fetched_bytes=(method.fetched_bytes - fetched_bytes) / steps,
        training_loss=float(torch.stack(losses).mean()),
        accuracy=accuracy,
        test_loss=test_loss,
    )


def take_step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, loss_of: Loss) -> Tensor:
    """One step of the optimizer; gives the loss before it."""
    loss = loss_of(task.forward(model, batch))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
