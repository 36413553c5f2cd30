"""Proof at every step of a run that cached labels give the live teacher's loss, up to the rounding of float16.

Both losses are taken of the same student weights on the same batch. The live one is plain PyTorch on the teacher's
dense logits; the cached one is `logitcache.client.distillation_loss` on rows that came over HTTP.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitcache.server.demo.digits_task import TEMPERATURE, DigitsTask
from logitcache.server.demo.training import ALPHA, take_step

ROUNDING = 2.0**-11
"""Largest relative error of a number rounded to float16."""

SMALLEST = 2.0**-25
"""Largest absolute error of a number too small for the full precision of float16."""

FLOAT32_ROUNDINGS = 4
"""Roundings to float32 by which the two computations of the loss may differ, each of the largest logit's size."""


@dataclass(frozen=True)
class Agreement:
    """How far cached and live loss were apart over a run, beside what was allowed at each step."""

    steps: int
    largest_difference: float
    allowed_there: float
    closest_to_allowed: float

    @property
    def holds(self) -> bool:
        """The bound was kept at every step."""
        return self.closest_to_allowed <= 1.0

    def __str__(self) -> str:
        return (
            f"Cached and live loss, same weights and batch, {self.steps} steps: apart by at most "
            f"{self.largest_difference:.1e}, where float16 allows {self.allowed_there:.1e}; "
            f"closest to the bound: {self.closest_to_allowed:.0%} of it."
        )


def allowed_difference(student_logits: Tensor, teacher_logits: Tensor) -> float:
    """The most that float16 labels may change the distillation loss of this batch.

    A stored logit z is centred, so rounding moves it by at most ``d = 2^-11 |z| + 2^-25``. The derivative of
    ``KL(p || q)`` by one of the teacher's logits is ``p (log(p / q) - KL) / T``, so to first order the loss moves by at
    most ``alpha T² mean_rows sum_classes p |log(p / q) - KL| d / T``. The second order is smaller, as d / T is far
    below 1: the bound is twice the first. On top come the roundings of two computations in float32, where each
    log-probability is a difference of logits and rounded in proportion to the largest of them.
    """
    z = teacher_logits.double() - teacher_logits.double().amax(dim=1, keepdim=True)
    p = F.log_softmax(z / TEMPERATURE, dim=1)
    q = F.log_softmax(student_logits.double() / TEMPERATURE, dim=1)
    divergence = (p.exp() * (p - q)).sum(dim=1, keepdim=True)
    moved = (ROUNDING * z.abs() + SMALLEST) / TEMPERATURE
    first_order = (p.exp() * (p - q - divergence).abs() * moved).sum(dim=1).mean()
    largest = (student_logits.abs().amax(dim=1) + teacher_logits.abs().amax(dim=1)).mean() / TEMPERATURE
    float32 = FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps * largest
    return float(ALPHA * TEMPERATURE**2 * (2 * first_order + float32))


def compare_every_step(labels: Any, teacher: nn.Module, task: DigitsTask, epochs: int) -> Agreement:
    """Train a student on cached labels, computing the live loss of the same weights and batch at every step as well."""
    model, optimizer, loader = task.beginning(0)
    differences, allowances = [], []
    for _ in range(epochs):
        for batch, soft in labels.attach(loader, ids=task.ids):
            with torch.no_grad():
                student_logits, teacher_logits = task.forward(model, batch), task.forward(teacher, batch)
                live = task.live_loss(student_logits, batch, teacher_logits)
                allowances.append(allowed_difference(student_logits, teacher_logits))
            loss = take_step(task, model, optimizer, batch, partial(task.cached_loss, batch=batch, soft=soft))
            differences.append(abs(float(loss) - float(live)))
    worst = max(range(len(differences)), key=differences.__getitem__)
    closest = max(difference / allowed for difference, allowed in zip(differences, allowances, strict=True))
    return Agreement(len(differences), differences[worst], allowances[worst], closest)
