"""Part 5: what a student loses when of each row the k best of 8,192 classes are stored, and not all.

A replicate is one seed of the language: a teacher that was trained with hard labels, a label set of it for each k, and
a student for each k and each way to take what was not stored, all from the same first weights and in the same order of
batches; beside them hard labels, and live distillation over all classes, which is what truncation approximates. With
all classes stored nothing is left over, and the ways coincide: one is run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

from benchmarks.sequence import arms
from benchmarks.sequence.intervals import last, less
from benchmarks.sequence.labelled import Shop
from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.plan import Plan, TaskPlan
from benchmarks.sequence.tasks import LanguageTask, begun
from benchmarks.sequence.training import Trajectory, train_on
from matplotlib.figure import Figure
from torch import nn

from logitcache.client import Labels

TOKENS, QUICK_TOKENS = 24_000, 3_000
"""That are labelled and trained on, half of the search's, and in a smoke run. Rows of all classes are 32 kB each."""

STUDENT_EPOCHS = 2
"""Of a student, at most the plan's, which are run 1's: a replicate is a run for each k and way, and a loss over 8,192
classes is most of a step.
"""

LOOKS = 2
"""At each run, evenly spread, besides the one before it."""

TEACHER_WIDTH = 128
"""Of run 1's model; students have the plan's."""


def units(plan: Plan) -> list[tuple[str, int]]:
    """Task and seed of each replicate."""
    return [("language", seed) for seed in range(plan.truncation_seeds)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One replicate, as JSON values.

    Of each label set its bytes without its indexes, the probability that it retains (mean and least of all rows) and
    the seconds of its precompute; of each student what distilled it, and its looks.
    """
    task, settings = LanguageTask(QUICK_TOKENS if plan.quick else TOKENS), plan.tasks[name]
    data, teacher_seed, student_seed = task.data(), 1000 * seed, 1000 * seed + 1
    student_epochs = min(STUDENT_EPOCHS, settings.epochs)

    def trained(model: nn.Module, batches: Iterator[Any], epochs: int) -> Trajectory:
        look_every = max(1, epochs * len(task.loader(data, 0)) // LOOKS)
        optimizer = task.optimizer(model, 1.0)
        return train_on(model, optimizer, batches, task.forward, task.evaluate, look_every=look_every)

    teacher = begun(task, TEACHER_WIDTH, seed=teacher_seed)
    batches = arms.hard(task, task.loader(data, teacher_seed), settings.epochs)
    first = trained(teacher, batches, settings.epochs)

    def student(arm: str, k: int | None = None, labels: Labels | None = None) -> dict[str, Any]:
        loader = task.loader(data, student_seed)
        batches = _batches(task, settings, arm, loader, student_epochs, teacher, labels)
        found = trained(begun(task, settings.width, seed=student_seed), batches, student_epochs)
        return {"arm": arm, "k": k, **asdict(found)}

    runs = [student("hard"), student("live")]
    label_sets = []
    for kept in plan.kept:
        k = kept or task.classes
        with shop.label(
            f"truncation-{seed}-{k}",
            teacher,
            data,
            top_k=k,
            temperatures=(settings.temperature,),
            targets=True,
        ) as labels:
            runs += [student(tail, k, labels) for tail in (plan.tails if k < task.classes else plan.tails[:1])]
            described = labels.describe()
            label_sets.append(
                {
                    "k": k,
                    "bytes": described.label_bytes,
                    "rows": described.rows,
                    "examples": described.examples,
                    "retained_mass": described.retained_mass,
                    "precompute_s": shop.precompute_s,
                    "fetched_bytes": labels.stats.bytes,
                    "waited_ms": labels.stats.waited_ms,
                }
            )
    return {
        "first": asdict(first),
        "steps": first.steps,
        "tokens": QUICK_TOKENS if plan.quick else TOKENS,
        "student_epochs": student_epochs,
        "label_sets": label_sets,
        "runs": runs,
    }


def _batches(
    task: LanguageTask,
    settings: TaskPlan,
    arm: str,
    loader: Any,
    epochs: int,
    teacher: nn.Module,
    labels: Labels | None,
) -> Iterator[Any]:
    if arm == "hard":
        return arms.hard(task, loader, epochs)
    if labels is None:
        return arms.live(task, loader, epochs, teacher, settings.temperature)
    return arms.cached(task, loader, epochs, labels, settings.temperature, tail=arm)


def tables(found: Replicates) -> dict[str, str]:
    """By task: each k and tail beside live distillation over all classes."""
    return {task: _table([unit["found"] for unit in units]) for task, units in found.items()}


def figures(found: Replicates) -> dict[str, Figure]:
    """By task: final validation loss over k, a line a tail."""
    return {task: _figure([unit["found"] for unit in units]) for task, units in found.items()}


def _table(replicates: Sequence[dict[str, Any]]) -> str:
    headings = [
        "k",
        "tail",
        "loss",
        "less that of live KD",
        "less that of hard labels",
        "calibration error",
        "less that of live KD",
        "of the teacher's probability",
        "labels",
    ]
    rows = []
    for arm, k in dict.fromkeys((run["arm"], run["k"]) for run in replicates[0]["runs"]):
        runs = [_run(replicate, arm, k) for replicate in replicates]
        live, hard = ([_run(replicate, name, None) for replicate in replicates] for name in ("live", "hard"))
        sets = [each for replicate in replicates for each in replicate["label_sets"] if each["k"] == k]
        kept = [next(iter(each["retained_mass"].values()))["mean"] for each in sets]
        rows.append(
            [
                "" if k is None else f"{k:,}",
                {"live": "live KD, all classes", "hard": "hard labels"}.get(arm, arm),
                f"{mean(last(run)['loss'] for run in runs):.4f}",
                less(runs, live, "loss"),
                less(runs, hard, "loss"),
                f"{mean(last(run)['calibration_error'] for run in runs):.4f}",
                less(runs, live, "calibration_error"),
                f"{mean(kept):.3f}" if kept else "",
                f"{mean(each['bytes'] for each in sets) / 1e6:,.1f} MB" if sets else "",
            ]
        )
    return table(headings, rows)


def _run(replicate: dict[str, Any], arm: str, k: int | None) -> dict[str, Any]:
    found: dict[str, Any] = next(run for run in replicate["runs"] if (run["arm"], run["k"]) == (arm, k))
    return found


def _figure(replicates: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for arm in dict.fromkeys(run["arm"] for run in replicates[0]["runs"]):
        kept = sorted({run["k"] for run in replicates[0]["runs"] if run["arm"] == arm and run["k"] is not None})
        if kept:
            axes.plot(
                kept, [mean(last(_run(each, arm, k))["loss"] for each in replicates) for k in kept], "o-", label=arm
            )
        else:
            level = mean(last(_run(each, arm, None))["loss"] for each in replicates)
            axes.axhline(level, linestyle=":", color="black" if arm == "live" else "gray", label=arm)
    axes.set(xlabel="classes stored", ylabel="validation loss, mean of replicates", xscale="log")
    axes.legend(fontsize=8)
    return figure
