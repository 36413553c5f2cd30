"""One run: a model trained for so many steps, looked at now and then. Knows nothing of where a step's loss comes from.

Times are wall-clock seconds of the training loop, loading included and evaluation excluded.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]
"""From a model's logits to the loss of a batch."""


@dataclass(frozen=True)
class Quality:
    """On examples that nobody is trained on: mean cross-entropy, accuracy, expected calibration error (15 bins)."""

    loss: float
    accuracy: float
    calibration_error: float


@dataclass(frozen=True)
class Look:
    """What a run had reached after so many steps, and seconds of training."""

    step: int
    seconds: float
    loss: float
    accuracy: float
    calibration_error: float


@dataclass
class Trajectory:
    """A run from beginning to end; ``looks`` begin before the first step."""

    looks: list[Look] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0

    @property
    def final(self) -> Look:
        """The last look."""
        return self.looks[-1]

    def reached(self, loss: float) -> Look | None:
        """The first look at which the loss is no more than this one; None if there is none."""
        return next((look for look in self.looks if look.loss <= loss), None)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Any, Loss]],
    forward: Callable[[nn.Module, Any], Tensor],
    evaluate: Callable[[nn.Module], Quality],
    *,
    look_every: int,
    seed: int,
) -> Trajectory:
    """Take a step for each batch, and look every so many steps, at the beginning and at the end.

    What is drawn from torch's generator on the way, for dropout or augmentation, the seed alone decides; the caller's
    generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return train_on(model, optimizer, batches, forward, evaluate, look_every=look_every)


def train_on(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Any, Loss]],
    forward: Callable[[nn.Module, Any], Tensor],
    evaluate: Callable[[nn.Module], Quality],
    *,
    look_every: int,
) -> Trajectory:
    """The same with whatever state torch's generator has, which is drawn from."""
    run = Trajectory()

    def look() -> None:
        run.looks.append(Look(run.steps, run.seconds, **vars(evaluate(model))))

    look()
    model.train()
    began = time.perf_counter()
    for batch, loss_of in batches:
        loss = loss_of(forward(model, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.steps += 1
        if run.steps % look_every == 0:
            run.seconds += time.perf_counter() - began
            look()
            model.train()
            began = time.perf_counter()
    run.seconds += time.perf_counter() - began
    if run.looks[-1].step != run.steps:
        look()
    model.eval()
    return run


def quality(logits: Tensor, targets: Tensor) -> Quality:
    """Of (rows, classes) logits and (rows,) targets.

    The calibration error is that of Guo et al. (2017, arXiv 1706.04599), equation 5, in 15 bins of equal width.
    """
    log_probs = logits.log_softmax(dim=1)
    confidence, found = log_probs.exp().max(dim=1)
    right = (found == targets).float()
    bins = (confidence * 15).long().clamp(max=14)
    count, sure, correct = (
        torch.zeros(15).index_add_(0, bins, values) for values in (torch.ones_like(right), confidence, right)
    )
    error = float((correct - sure).abs().sum() / count.sum())
    loss = float(torch.nn.functional.nll_loss(log_probs, targets))
    return Quality(loss, float(right.mean()), error)
