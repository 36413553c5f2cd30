"""Part 2: continual retraining. The data arrives in parts, and after each a model of all data so far is trained.

A replicate is one seed: a seeded shuffle of the training data, cut into parts that are as equal as can be. Each part is
put behind what was there, so an example keeps its place and with it its id. Stage 1, on the first part, is one run with
hard labels, which all arms share; each later stage is one run of each arm, over the data so far, for the task's epochs.
The arms of a stage have the same order of batches and the same draws of dropout, and the same first weights but where
they start warm.
"""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any, Literal

import torch
from benchmarks.sequence import arms
from benchmarks.sequence.intervals import mean_interval, told
from benchmarks.sequence.labelled import SEEN_S, Shop
from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.plan import Plan, TaskPlan
from benchmarks.sequence.tasks import TASKS, Task, begun, part_of
from benchmarks.sequence.training import Trajectory, train
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Dataset

from logitcache.client import Labels

DATA = ("digits", "modules")
"""Tasks whose data arrives in parts."""


@dataclass(frozen=True)
class ContinualArm:
    """One way to train again when data has arrived.

    Attributes:
        name: as it stands in tables.
        warm: begins with the weights of the stage before, of this arm; else from scratch.
        teacher: none, hard labels; stage 1's model, whose label set grows with the data; or the model that this arm, or
            the arm of hard labels, had trained at the stage before, with a label set of all data so far.
    """

    name: str
    warm: bool = False
    teacher: Literal["none", "first", "hard", "own"] = "none"


HARD = ContinualArm("hard labels")

ARMS = (
    HARD,
    ContinualArm("warm start", warm=True),
    ContinualArm("cached KD, appended", teacher="first"),
    ContinualArm("cached KD, relabelled", teacher="hard"),
    ContinualArm("warm start + cached KD", warm=True, teacher="own"),
)


def units(plan: Plan) -> list[tuple[str, int]]:
    """Task and seed of each replicate."""
    return [(name, seed) for name in DATA if name in plan.tasks for seed in range(plan.continual_seeds)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One replicate, as JSON values: ``examples`` so far by stage, ``first`` and ``runs``, the trajectories.

    A run's ``precompute_s`` are the seconds of its labels, 0 without. ``first_precompute_s`` are those of the first
    part's labels, which those of the later parts are appended to: the arm of appended labels pays them once. An arm may
    need a model that it does not train itself, the hard arm's of the stage before: ``teacher_s`` is what it cost.
    ``labelled`` counts the examples that the teacher was shown: of a new label set one batch twice, for the number of
    classes.
    """
    task, settings = TASKS[name](), plan.tasks[name]
    stages = _stages(task, settings, plan.parts_of_data, seed)
    teacher, first = stages[0].trained()
    options = {"top_k": settings.top_k, "temperatures": (settings.temperature,)}
    appended = f"continual-{name}-{seed}-appended"
    shop.label(appended, teacher, stages[0].data, **options).close()
    first_precompute_s = shop.precompute_s
    models, hard_s = dict.fromkeys(ARMS, teacher), 0.0
    runs: list[dict[str, Any]] = []
    for stage in stages[1:]:
        trained: dict[ContinualArm, nn.Module] = {}
        found: dict[ContinualArm, Trajectory] = {}
        for arm in ARMS:
            before = models[arm] if arm.warm else None
            costs: dict[str, Any] = {"precompute_s": 0.0, "teacher_s": hard_s if arm.teacher == "hard" else 0.0}
            if arm.teacher == "none":
                trained[arm], found[arm] = stage.trained(before)
            else:
                teachers = {"first": teacher, "hard": models[HARD], "own": models[arm]}
                own = f"continual-{name}-{seed}-{stage.number}-{arm.teacher}"
                labels_of = appended if arm.teacher == "first" else own
                labels, shown = _labels(shop, labels_of, teachers[arm.teacher], stage.data, options)
                with closing(labels):
                    costs |= {"precompute_s": shop.precompute_s, **shown}
                    if arm.teacher == "first":
                        _check_appended(labels, stages, stage.number, shown["labelled"])
                    trained[arm], found[arm] = stage.trained(before, labels)
                    costs |= {"fetched_bytes": labels.stats.bytes, "waited_ms": labels.stats.waited_ms}
            runs.append({"stage": stage.number, "arm": arm.name, **costs, **asdict(found[arm])})
        models, hard_s = trained, found[HARD].seconds
    return {
        "examples": [stage.examples for stage in stages],
        "first": asdict(first),
        "first_precompute_s": first_precompute_s,
        "runs": runs,
    }


@dataclass(frozen=True)
class _Stage:
    """The data so far, and how a model of it is trained; ``seed`` is that of first weights, order and dropout."""

    task: Task
    settings: TaskPlan
    number: int
    data: Dataset[Any]
    examples: int
    seed: int

    def trained(self, before: nn.Module | None = None, labels: Labels | None = None) -> tuple[nn.Module, Trajectory]:
        """A model and how it came about, from the weights of the one before if there is one."""
        task, settings = self.task, self.settings
        model = begun(task, settings.width, self.seed)
        if before is not None:
            model.load_state_dict(before.state_dict())
        loader = task.loader(self.data, self.seed)
        if labels is None:
            batches = arms.hard(task, loader, settings.epochs)
        else:
            batches = arms.cached(task, loader, settings.epochs, labels, settings.temperature)
        found = train(
            model,
            task.optimizer(model, 1.0),
            batches,
            task.forward,
            task.evaluate,
            look_every=max(1, settings.epochs * len(loader) // settings.evaluations),
            seed=self.seed,
        )
        return model, found


def _stages(task: Task, settings: TaskPlan, parts: int, seed: int) -> list[_Stage]:
    data = task.data()
    count = len(data)  # type: ignore[arg-type]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    ends = [count * number // parts for number in range(1, parts + 1)]
    return [
        _Stage(task, settings, number, part_of(data, order[:end]), end, 1000 * seed + number)
        for number, end in enumerate(ends, start=1)
    ]


def _labels(
    shop: Shop, name: str, teacher: nn.Module, data: Dataset[Any], options: dict[str, Any]
) -> tuple[Labels, dict[str, Any]]:
    """Labels of all of the data, and how many examples the teacher was shown for them."""
    shown = 0

    def count(_module: nn.Module, inputs: tuple[Any, ...], _logits: Any) -> None:
        nonlocal shown
        shown += len(inputs[0])

    counting = teacher.register_forward_hook(count)
    labels = shop.label(name, teacher, data, **options)
    counting.remove()
    return labels, {"labelled": shown}


def _check_appended(labels: Labels, stages: Sequence[_Stage], number: int, shown: int) -> None:
    """That a label set grew as it should: a generation a stage, all of them different, and only new examples labelled.

    The server looks at its store twice a second, so it is waited for.
    """
    wanted = [stage.examples for stage in stages[:number]]
    until = time.monotonic() + SEEN_S
    generations = labels.describe().generations
    while [one.examples for one in generations] != wanted:
        if time.monotonic() > until:
            raise RuntimeError(f"generations of {[one.examples for one in generations]} examples, not of {wanted}")
        time.sleep(0.05)
        generations = labels.describe().generations
    if len({one.digest for one in generations}) != number:
        raise RuntimeError("a label set grew, and its digest stayed")
    if shown != wanted[-1] - wanted[-2]:
        raise RuntimeError(f"the teacher was shown {shown:,} examples, and {wanted[-1] - wanted[-2]:,} are new")


def tables(found: Replicates) -> dict[str, str]:
    """By task: each arm at the last stage beside hard labels, and what all stages together took."""
    return {task: _table([unit["found"] for unit in units]) for task, units in found.items()}


def figures(found: Replicates) -> dict[str, Figure]:
    """By task: the final validation loss of each stage."""
    return {task: _figure([unit["found"] for unit in units]) for task, units in found.items()}


def _finals(replicate: dict[str, Any], arm: str) -> dict[int, dict[str, Any]]:
    return {run["stage"]: run for run in replicate["runs"] if run["arm"] == arm}


def _table(replicates: Sequence[dict[str, Any]]) -> str:
    headings = [
        "arm",
        "loss at the last stage, less that of hard labels",
        "accuracy, less that of hard labels",
        "loss, mean of stages 2 to 5, less that of hard labels",
        "training, s",
        "labelling, s",
        "a teacher of its own, s",
    ]
    rows = []
    for arm in ARMS:
        pairs = [(_finals(replicate, arm.name), _finals(replicate, HARD.name)) for replicate in replicates]
        last = max(pairs[0][0])

        def less(measure: str, stages: Sequence[int], pairs: Any = pairs) -> str:
            differences = [
                mean(one[at]["looks"][-1][measure] - other[at]["looks"][-1][measure] for at in stages)
                for one, other in pairs
            ]
            return told(mean_interval(differences), 4)

        def spent(name: str, pairs: Any = pairs) -> str:
            return f"{mean(sum(run[name] for run in one.values()) for one, _ in pairs):.2f}"

        rows.append(
            [
                arm.name,
                less("loss", [last]),
                less("accuracy", [last]),
                less("loss", sorted(pairs[0][0])),
                spent("seconds"),
                spent("precompute_s"),
                spent("teacher_s"),
            ]
        )
    return table(headings, rows)


def _figure(replicates: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for arm in ARMS:
        stages = [_finals(replicate, arm.name) for replicate in replicates]
        means = [mean(of[at]["looks"][-1]["loss"] for of in stages) for at in sorted(stages[0])]
        axes.plot(sorted(stages[0]), means, marker="o", label=arm.name)
    axes.set(xlabel="parts of the data that have arrived", ylabel="validation loss, mean of replicates")
    axes.legend(fontsize=8)
    return figure
