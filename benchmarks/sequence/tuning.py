"""Part 9, before its search: which weight and temperature serve each teacher best.

A replicate is one seed: each teacher is trained with hard labels, and for each weight and temperature a student of the
task's width and rate is distilled from it live, all from the same first weights and in the same order of batches; one
has hard labels. `chosen` gives what the plan then has as its `CHOSEN`.
"""

from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from benchmarks.sequence import arms
from benchmarks.sequence.comparison import own_seed
from benchmarks.sequence.intervals import last
from benchmarks.sequence.labelled import Shop
from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.plan import TUNING_FROM, Plan, TaskPlan, TeacherPlan
from benchmarks.sequence.tasks import TASKS, Task, begun, with_more_text
from benchmarks.sequence.training import Trajectory, train
from matplotlib.figure import Figure
from torch import nn


def units(plan: Plan) -> list[tuple[str, int]]:
    """Task and seed of each replicate."""
    return [(name, TUNING_FROM + seed) for name, tuned in plan.tuned.items() for seed in range(tuned.tuning_seeds)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One replicate, as JSON values: ``teachers``, their trajectories by name, and those of the students."""
    task, settings, tuned = TASKS[name](), plan.tasks[name], plan.tuned[name]
    data = task.data()
    steps = settings.epochs * len(task.loader(data, 0))
    its_seed = own_seed(seed, 1)

    def student(batches: Any) -> dict[str, Any]:
        model = begun(task, settings.width, its_seed)
        optimizer = task.optimizer(model, 1.0)
        return asdict(
            train(model, optimizer, batches, task.forward, task.evaluate, look_every=max(1, steps // 4), seed=its_seed)
        )

    hard = student(arms.hard(task, task.loader(data, its_seed), settings.epochs))
    teachers, runs = {}, []
    for each in tuned.teachers:
        teacher, trajectory = trained_teacher(task, settings, each, seed)
        teachers[each.name] = asdict(trajectory)
        for temperature in tuned.temperatures:
            for alpha in tuned.alphas:
                loader = task.loader(data, its_seed)
                batches = arms.live(task, loader, settings.epochs, teacher, temperature, alpha=alpha)
                runs.append(
                    {"teacher": each.name, "alpha": alpha, "temperature": temperature, **student(batches)},
                )
    return {"hard": hard, "teachers": teachers, "runs": runs}


def trained_teacher(task: Task, settings: TaskPlan, teacher: TeacherPlan, seed: int) -> tuple[nn.Module, Trajectory]:
    """A teacher of a replicate and how it came about. Run 1 is begun and shown its batches as in the first search."""
    its_task = with_more_text(task, teacher.tokens)
    its_seed, epochs = own_seed(seed, 0), max(1, round(teacher.epochs * settings.epochs))
    model = begun(its_task, teacher.width * settings.width, its_seed)
    loader = its_task.loader(its_task.data(), its_seed)
    trajectory = train(
        model,
        its_task.optimizer(model, 1.0),
        arms.hard(its_task, loader, epochs),
        its_task.forward,
        its_task.evaluate,
        look_every=max(1, epochs * len(loader) // settings.evaluations),
        seed=its_seed,
    )
    return model, trajectory


def chosen(replicates: Sequence[dict[str, Any]], teacher: str) -> tuple[float, float]:
    """Weight and temperature with the lowest final validation loss, mean of the replicates; of equals the first."""
    losses = mean_losses(replicates, teacher)
    return min(losses, key=lambda pair: losses[pair])


def mean_losses(replicates: Sequence[dict[str, Any]], teacher: str) -> dict[tuple[float, float], float]:
    """Final validation loss by weight and temperature."""
    runs = [run for replicate in replicates for run in replicate["runs"] if run["teacher"] == teacher]
    pairs = dict.fromkeys((run["alpha"], run["temperature"]) for run in runs)
    return {
        pair: mean(last(run)["loss"] for run in runs if (run["alpha"], run["temperature"]) == pair) for pair in pairs
    }


def tables(found: Replicates) -> dict[str, str]:
    """By task: mean final validation loss of each weight and temperature, and what was chosen."""
    return {task: _table([unit["found"] for unit in units]) for task, units in found.items()}


def figures(found: Replicates) -> dict[str, Figure]:
    """None: the table says it all."""
    return {}


def _table(replicates: Sequence[dict[str, Any]]) -> str:
    rows = []
    alphas: list[float] = []
    for teacher in replicates[0]["teachers"]:
        losses, best = mean_losses(replicates, teacher), chosen(replicates, teacher)
        own = mean(last(each["teachers"][teacher])["loss"] for each in replicates)
        alphas = sorted({alpha for alpha, _ in losses})
        for temperature in sorted({temperature for _, temperature in losses}):
            cells = [
                f"**{losses[pair]:.4f}**" if pair == best else f"{losses[pair]:.4f}"
                for pair in ((alpha, temperature) for alpha in alphas)
            ]
            rows.append([teacher, f"{own:.4f}", f"{temperature:g}", *cells])
    hard = mean(last(each["hard"])["loss"] for each in replicates)
    headings = ["teacher", "its own loss", "temperature", *(f"weight {alpha:g}" for alpha in alphas)]
    return f"{table(headings, rows)}\n\nWith hard labels {hard:.4f}."
