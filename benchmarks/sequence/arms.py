"""The batches of a run and their losses, by where labels come from. Knows nothing of what is learnt."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.sequence.labelled import live_logits
from benchmarks.sequence.plan import ALPHA, SMOOTHING
from benchmarks.sequence.tasks import Task
from benchmarks.sequence.training import Loss
from torch import nn
from torch.utils.data import DataLoader

from logitcache.client import Labels, Schedule


def hard(task: Task, loader: DataLoader[Any], epochs: int, *, smoothing: float = 0.0) -> Iterator[tuple[Any, Loss]]:
    """Each batch, and the cross-entropy with its targets."""
    for _ in range(epochs):
        for batch in loader:
            yield batch, partial(task.hard, batch=batch, smoothing=smoothing)


def smooth(task: Task, loader: DataLoader[Any], epochs: int) -> Iterator[tuple[Any, Loss]]:
    """The same with `SMOOTHING`."""
    return hard(task, loader, epochs, smoothing=SMOOTHING)


def live(
    task: Task,
    loader: DataLoader[Any],
    epochs: int,
    teacher: nn.Module,
    temperature: float,
    schedule: Schedule | None = None,
    *,
    alpha: float = ALPHA,
) -> Iterator[tuple[Any, Loss]]:
    """The teacher's forward at each step that distils, and its divergence over all classes."""
    step = 0
    for _ in range(epochs):
        for batch in loader:
            weight = 1.0 if schedule is None else schedule(step)
            step += 1
            if not weight:
                yield batch, partial(task.hard, batch=batch, smoothing=0.0)
                continue
            logits = live_logits(task, teacher, batch)
            yield (
                batch,
                partial(task.live, batch=batch, teacher=logits, temperature=temperature, alpha=weight * alpha),
            )


def cached(
    task: Task,
    loader: DataLoader[Any],
    epochs: int,
    labels: Labels,
    temperature: float,
    schedule: Schedule | None = None,
    tail: str = "bucket",
    *,
    alpha: float = ALPHA,
    **attach: Any,
) -> Iterator[tuple[Any, Loss]]:
    """Soft labels at each step that distils, fetched ahead over HTTP; ``attach`` are further arguments of it."""
    attached = labels.attach(loader, **{"ids": task.ids, "schedule": schedule, **attach})
    step = 0
    for _ in range(epochs):
        for batch, soft in attached:
            weight = 1.0 if schedule is None else schedule(step)
            step += 1
            if soft is None:
                yield batch, partial(task.hard, batch=batch, smoothing=0.0)
                continue
            yield (
                batch,
                partial(task.cached, batch=batch, soft=soft, temperature=temperature, alpha=weight * alpha, tail=tail),
            )
