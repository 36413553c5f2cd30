"""Part 4: augmentation, with labels of one view, of several, of the image as it is, and of a live teacher.

A replicate is one seed: run 1, wider than the others and trained with hard labels, is the teacher; then a student for
each arm and length of training. All are shown digits that are shifted and noisy, drawn anew each epoch but where an arm
says otherwise; arms of a length have the same first weights and order of batches, and those that draw anew see bit by
bit the same. What is held out is not augmented. Times contain the augmentation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.sequence import arms
from benchmarks.sequence.intervals import last, less
from benchmarks.sequence.labelled import Shop
from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.plan import Plan, TaskPlan
from benchmarks.sequence.tasks import DigitsTask, begun
from benchmarks.sequence.training import Loss, Trajectory, train
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from logitcache.client import Labels, with_views

SHIFT = 1
"""Pixels that an image is shifted by at most, up or down and left or right; zeros take the place of what is missing."""

NOISE = 0.1
"""Standard deviation of what is added to each pixel, which is between 0 and 1."""

TEACHER_WIDTH = 32
"""Of run 1's model; students have the task's width, the half of it. Its run is as long as the longest of theirs."""

HARD, FIXED, LIVE = "hard labels", "fixed labels", "live teacher"
"""Arms besides those of `views_arm`. Fixed labels are of the image as it is, and the student sees it augmented: what it
sees is not what was labelled."""


def views_arm(views: int) -> str:
    """The arm whose student sees so many views of an example, one an epoch and in turn, with the labels of each."""
    return "1 view" if views == 1 else f"{views} views"


class Augmented(Dataset[tuple[Tensor, int]]):
    """Shifted and noisy each time that it is read, with draws of torch's generator."""

    def __init__(self, data: Dataset[tuple[Tensor, int]]) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, target = self._data[index]
        height, width = image.shape[-2:]
        top, left = torch.randint(0, 2 * SHIFT + 1, (2,)).tolist()
        shifted = F.pad(image, (SHIFT,) * 4)[..., top : top + height, left : left + width]
        return shifted + NOISE * torch.randn(shifted.shape), target


def units(plan: Plan) -> list[tuple[str, int]]:
    """Task and seed of each replicate."""
    return [("digits", seed) for seed in range(plan.views_seeds)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One replicate, as JSON values: ``first``, the teacher's trajectory, and ``runs``, those of the students.

    ``label_sets`` tells by arm the seconds of precompute and the bytes of the labels, which all lengths share.
    """
    task, settings = DigitsTask(), plan.tasks[name]
    plain = task.data()
    data = Augmented(plain)
    first_seed, longest = 1000 * seed, max(plan.view_epochs)
    batches = arms.hard(task, task.loader(data, first_seed), longest)
    teacher, first = _trained(task, settings, TEACHER_WIDTH, batches, longest, first_seed)
    label_sets: dict[str, Labels] = {}
    costs: dict[str, dict[str, Any]] = {}
    for views in (0, *plan.views):
        arm = views_arm(views) if views else FIXED
        replayed = {"views": views, "seed": seed + 1} if views else {}
        labels = shop.label(
            f"views-{seed}-{views}",
            teacher,
            data if views else plain,
            top_k=settings.top_k,
            temperatures=(settings.temperature,),
            **replayed,
        )
        label_sets[arm] = labels
        costs[arm] = {"precompute_s": shop.precompute_s, "label_bytes": labels.describe().label_bytes}
    runs = []
    for number, epochs in enumerate(plan.view_epochs, start=1):
        for arm in (HARD, *label_sets, LIVE):
            student_seed = first_seed + number
            batches = _batches(task, settings, arm, data, teacher, label_sets.get(arm), epochs, student_seed)
            _, found = _trained(task, settings, settings.width, batches, epochs, student_seed)
            runs.append({"epochs": epochs, "arm": arm, **asdict(found)})
    for arm, labels in label_sets.items():
        costs[arm] |= {"fetched_bytes": labels.stats.bytes, "waited_ms": labels.stats.waited_ms}
        labels.close()
    return {"first": asdict(first), "first_epochs": longest, "label_sets": costs, "runs": runs}


def _batches(
    task: DigitsTask,
    settings: TaskPlan,
    arm: str,
    data: Augmented,
    teacher: nn.Module,
    labels: Labels | None,
    epochs: int,
    seed: int,
) -> Iterator[tuple[Any, Loss]]:
    loader = task.loader(data, seed)
    if labels is None:
        if arm == LIVE:
            return arms.live(task, loader, epochs, teacher, settings.temperature)
        return arms.hard(task, loader, epochs)
    if arm == FIXED:
        return arms.cached(task, loader, epochs, labels, settings.temperature, inputs=None)
    return _replayed(task, settings, data, labels, epochs, seed)


def _replayed(
    task: DigitsTask, settings: TaskPlan, data: Augmented, labels: Labels, epochs: int, seed: int
) -> Iterator[tuple[Any, Loss]]:
    """The views that were labelled, the first again after the last."""
    viewed = with_views(data, labels.describe().identity)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(viewed, batch_size=task.batch, shuffle=True, generator=order)
    for epoch in range(epochs):
        viewed.set_epoch(epoch)
        yield from arms.cached(task, loader, 1, labels, settings.temperature)


def _trained(
    task: DigitsTask, settings: TaskPlan, width: int, batches: Iterator[tuple[Any, Loss]], epochs: int, seed: int
) -> tuple[nn.Module, Trajectory]:
    """A model from a seed's first weights; what is drawn anew is drawn from this seed, too."""
    model = begun(task, width, seed)
    steps = epochs * len(task.loader(task.data(), seed))
    found = train(
        model,
        task.optimizer(model, 1.0),
        batches,
        task.forward,
        task.evaluate,
        look_every=max(1, steps // settings.evaluations),
        seed=seed,
    )
    return model, found


def tables(found: Replicates) -> dict[str, str]:
    """By task: each arm at each length beside hard labels, and what its labels took."""
    return {task: _table([unit["found"] for unit in units]) for task, units in found.items()}


def figures(found: Replicates) -> dict[str, Figure]:
    """None: the table says it all."""
    return {}


def _table(replicates: Sequence[dict[str, Any]]) -> str:
    headings = [
        "epochs",
        "arm",
        "loss",
        "less that of hard labels",
        "less that of the live teacher",
        "accuracy, less that of hard labels",
        "training, s",
        "labelling, s",
        "labels",
    ]
    rows = []
    for epochs, arm in dict.fromkeys((run["epochs"], run["arm"]) for run in replicates[0]["runs"]):
        of_arm, hard, live = ([_run(replicate, epochs, name) for replicate in replicates] for name in (arm, HARD, LIVE))
        sets = [replicate["label_sets"].get(arm) for replicate in replicates]
        rows.append(
            [
                str(epochs),
                arm,
                f"{mean(last(run)['loss'] for run in of_arm):.4f}",
                less(of_arm, hard, "loss"),
                less(of_arm, live, "loss"),
                less(of_arm, hard, "accuracy"),
                f"{mean(_run(replicate, epochs, arm)['seconds'] for replicate in replicates):.1f}",
                *(
                    ["", ""]
                    if sets[0] is None
                    else [
                        f"{mean(each['precompute_s'] for each in sets if each):.1f}",
                        f"{mean(each['label_bytes'] for each in sets if each) / 1e6:.2f} MB",
                    ]
                ),
            ]
        )
    return table(headings, rows)


def _run(replicate: dict[str, Any], epochs: int, arm: str) -> dict[str, Any]:
    found: dict[str, Any] = next(run for run in replicate["runs"] if (run["epochs"], run["arm"]) == (epochs, arm))
    return found
