"""Part 1: a hyper-parameter search of which run 1 teaches the others.

A replicate is one seed: run 1 from scratch, and each of the plan's later runs once with each arm, all from the same
first weights and in the same order of batches. So arms differ in the arm alone, and are compared within a replicate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from statistics import mean
from typing import Any

from benchmarks.sequence import arms
from benchmarks.sequence.comparison import HEADINGS, Replicate, compared, of_arm, own_seed, target
from benchmarks.sequence.labelled import Permuted, Shop
from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.plan import Arm, Plan, TaskPlan, schedule
from benchmarks.sequence.tasks import TASKS, Task, begun
from benchmarks.sequence.training import Loss, Trajectory, train
from matplotlib.figure import Figure
from torch import nn

from logitcache.client import Labels

Batches = Iterator[tuple[Any, Loss]]


def units(plan: Plan) -> list[tuple[str, int]]:
    """Task and seed of each replicate."""
    return [(name, seed) for name, task in plan.tasks.items() for seed in range(task.seeds)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One replicate, as JSON values."""
    task, settings = TASKS[name](), plan.tasks[name]
    data = task.data()
    steps = settings.epochs * len(task.loader(data, 0))
    look_every = max(1, steps // settings.evaluations)

    def trained(model: nn.Module, rate: float, batches: Batches, number: int) -> Trajectory:
        optimizer = task.optimizer(model, rate)
        its_seed = own_seed(seed, number)  # the same in all arms
        return train(model, optimizer, batches, task.forward, task.evaluate, look_every=look_every, seed=its_seed)

    teacher = begun(task, settings.width, seed=own_seed(seed, 0))
    first = trained(teacher, 1.0, arms.hard(task, task.loader(data, own_seed(seed, 0)), settings.epochs), 0)
    kept = {key: value.clone() for key, value in teacher.state_dict().items()}
    label = {"top_k": settings.top_k, "temperatures": (settings.temperature,)}
    labels = shop.label(f"search-{name}-{seed}", teacher, data, **label)
    precompute_s = shop.precompute_s
    wanted = {arm.source for arm in settings.arms}
    control = None
    if "shuffled" in wanted:
        control = shop.label(f"search-{name}-{seed}-shuffled", teacher, Permuted(data, seed), **label)
    runs = []
    for number, later in enumerate(settings.search, start=1):
        for arm in settings.arms:
            if arm.source == "warm" and later.width != settings.width:
                continue
            model = begun(task, later.width, seed=own_seed(seed, number))
            if arm.source == "warm":
                model.load_state_dict(kept)
            loader = task.loader(data, own_seed(seed, number))
            batches = _batches(task, settings, arm, loader, teacher, labels, control, steps, own_seed(seed, number))
            found = trained(model, later.rate, batches, number)
            runs.append({"run": number, **asdict(later), "arm": arm.name, **asdict(found)})
    stats = {"fetched_bytes": labels.stats.bytes, "waited_ms": labels.stats.waited_ms}
    for each in (labels, control):
        if each is not None:
            each.close()
    return {"first": asdict(first), "precompute_s": precompute_s, "steps": steps, "runs": runs, **stats}


def _batches(
    task: Task,
    settings: TaskPlan,
    arm: Arm,
    loader: Any,
    teacher: nn.Module,
    labels: Labels,
    control: Labels | None,
    steps: int,
    seed: int,
) -> Batches:
    when = schedule(arm.schedule, steps, seed)
    if arm.source == "live":
        return arms.live(task, loader, settings.epochs, teacher, settings.temperature, when)
    if arm.source == "cached":
        return arms.cached(task, loader, settings.epochs, labels, settings.temperature, when)
    if arm.source == "shuffled":
        assert control is not None
        # Their inputs are those of other examples: what a comparison would refuse is what is wanted here.
        return arms.cached(task, loader, settings.epochs, control, settings.temperature, when, inputs=None)
    if arm.source == "smooth":
        return arms.smooth(task, loader, settings.epochs)
    return arms.hard(task, loader, settings.epochs)


def tables(found: Replicates) -> dict[str, str]:
    """By task: each arm beside hard labels, paired by replicate over the runs that both have."""
    return {task: _table([unit["found"] for unit in units]) for task, units in found.items()}


def figures(found: Replicates) -> dict[str, Figure]:
    """By task: the mean validation loss of the later runs, over their steps."""
    return {task: _figure([unit["found"] for unit in units]) for task, units in found.items()}


def _arms(replicates: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(run["arm"] for run in replicates[0]["runs"]))


def _table(replicates: Sequence[dict[str, Any]]) -> str:
    def before(replicate: Replicate, arm: str) -> float:
        labelled = arm.startswith(("cached", "shuffled"))
        spent: float = replicate["first"]["seconds"] + (replicate["precompute_s"] if labelled else 0.0)
        return spent

    rows = [[arm, *compared(replicates, arm, partial(before, arm=arm))] for arm in _arms(replicates)]
    return table(["arm", *HEADINGS], rows)


def _figure(replicates: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for arm in _arms(replicates):
        runs = [run for replicate in replicates for run in of_arm(replicate, arm).values()]
        looks = [[look["loss"] for look in run["looks"]] for run in runs]
        steps = [look["step"] for look in runs[0]["looks"]]
        axes.plot(steps, [mean(column) for column in zip(*looks, strict=True)], label=arm)
    axes.axhline(mean(target(replicate) for replicate in replicates), color="black", linestyle=":", label="run 1")
    axes.set(xlabel="steps", ylabel="validation loss, mean of the later runs", yscale="log")
    axes.legend(fontsize=7)
    return figure
