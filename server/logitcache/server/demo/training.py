"""One small student, trained in three ways that differ only in where the loss gets the teacher from.

The same seed gives the same first weights and the same batches to each way, so two runs differ in the method alone.
Methods take turns epoch by epoch, so that a busy moment of the machine hits them alike. Times are wall-clock times of
the training loop, loading included and evaluation excluded.
Knows nothing of servers or of files.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from logitcache.client import distillation_loss, with_ids
from logitcache.server.demo.digits import BATCH, CLASSES, Digits

TEMPERATURE = 2.0
ALPHA = 0.9
LEARNING_RATE = 0.01

Loss = Callable[[Tensor], Tensor]
"""From a student's logits, (batch, classes), to the batch's loss."""


class Method(Protocol):
    """Where a step's loss comes from. ``teacher_s`` and ``waiting_s`` grow with every batch taken."""

    @property
    def name(self) -> str:
        """As it stands in tables."""

    @property
    def teacher_s(self) -> float:
        """Seconds spent in the teacher's forward so far."""

    @property
    def waiting_s(self) -> float:
        """Seconds that steps have stood still so far because their labels were not there."""

    def batches(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor, Loss]]:
        """Images, targets and the loss to train on, batch by batch."""


class HardLabels:
    """Cross-entropy with the data set's targets; no teacher."""

    name = "hard labels"
    teacher_s = waiting_s = 0.0

    def batches(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor, Loss]]:
        """See `Method`."""
        for images, targets, _ in loader:
            yield images, targets, partial(F.cross_entropy, target=targets)


class LiveTeacher:
    """The teacher's forward in every step and plain PyTorch's own KL divergence: the reference for cached labels."""

    name = "live teacher"
    waiting_s = 0.0

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.teacher_s = 0.0

    def batches(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor, Loss]]:
        """See `Method`."""
        for images, targets, _ in loader:
            start = time.perf_counter()
            with torch.inference_mode():
                logits = self.teacher(images)
            self.teacher_s += time.perf_counter() - start
            # A tensor made in inference mode cannot be saved for a backward pass.
            yield images, targets, partial(dense_distillation_loss, teacher_logits=logits.clone(), targets=targets)


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

    def batches(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor, Loss]]:
        """See `Method`."""
        for (images, targets, _), soft in self.labels.attach(loader, ids=-1):
            loss = partial(distillation_loss, soft=soft, targets=targets, temperature=TEMPERATURE, alpha=ALPHA)
            yield images, targets, loss


def dense_distillation_loss(student_logits: Tensor, *, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """``alpha T² KL(teacher || student) + (1 - alpha) CE``, all classes, mean of the batch (Hinton et al. 2015)."""
    divergence = F.kl_div(
        F.log_softmax(student_logits / TEMPERATURE, dim=1),
        F.log_softmax(teacher_logits / TEMPERATURE, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return ALPHA * TEMPERATURE**2 * divergence + (1 - ALPHA) * F.cross_entropy(student_logits, targets)


@dataclass(frozen=True)
class Epoch:
    """One pass over the training digits: mean milliseconds of its steps, mean loss of what was minimised, and the test.

    ``test_loss`` is the cross-entropy with the targets, so it can be compared between all methods; ``training_loss``
    only between methods of one loss.
    """

    step_ms: float
    teacher_ms: float
    waiting_ms: float
    training_loss: float
    accuracy: float
    test_loss: float


@dataclass(frozen=True)
class Run:
    """One student's training from one seed."""

    method: str
    seed: int
    epochs: list[Epoch] = field(default_factory=list)


def student() -> nn.Module:
    """A convolutional network of 6,090 parameters: (batch, 1, 8, 8) images to (batch, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, CLASSES),
    )


def beginning(seed: int, data: Digits) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """First weights, optimizer and batch order of a seed; batches are images, targets and ids."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = student()
    order = torch.Generator().manual_seed(seed)
    numbered = cast("Dataset[Any]", with_ids(data))
    loader = DataLoader(numbered, batch_size=BATCH, shuffle=True, generator=order)
    return model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), loader


def train(methods: Sequence[Method], seed: int, data: Digits, held_out: Digits, epochs: int) -> list[Run]:
    """Train one student a method from the same beginning, an epoch each in turn."""
    runs = [Run(method.name, seed) for method in methods]
    beginnings = [beginning(seed, data) for _ in methods]
    for _ in range(epochs):
        for method, run, start in zip(methods, runs, beginnings, strict=True):
            run.epochs.append(_train_epoch(method, *start, held_out))
    return runs


def _train_epoch(
    method: Method, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any], held_out: Digits
) -> Epoch:
    teacher_s, waiting_s, start = method.teacher_s, method.waiting_s, time.perf_counter()
    losses = [take_step(model, optimizer, images, loss_of) for images, _, loss_of in method.batches(loader)]
    step_ms = (time.perf_counter() - start) / len(losses) * 1e3
    accuracy, test_loss = evaluate(model, held_out)
    return Epoch(
        step_ms=step_ms,
        teacher_ms=(method.teacher_s - teacher_s) / len(losses) * 1e3,
        waiting_ms=(method.waiting_s - waiting_s) / len(losses) * 1e3,
        training_loss=float(torch.stack(losses).mean()),
        accuracy=accuracy,
        test_loss=test_loss,
    )


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, loss_of: Loss) -> Tensor:
    """One step of the optimizer; gives the loss before it."""
    loss = loss_of(model(images))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def evaluate(model: nn.Module, held_out: Digits) -> tuple[float, float]:
    """Accuracy and cross-entropy on digits that no student was trained on."""
    with torch.inference_mode():
        logits = model(held_out.images)
        right = (logits.argmax(dim=1) == held_out.targets).float().mean()
        return float(right), float(F.cross_entropy(logits, held_out.targets))
