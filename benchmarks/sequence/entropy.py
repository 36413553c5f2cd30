"""Part 8: how soft labels are on examples that their teacher was trained on, and what makes them softer.

A replicate is one seed: run 1 with hard labels, and three label sets of its training examples: by its final weights, by
its weights at `EARLY` of the run, and made in folds, so that a model that never saw an example labels it. A student is
distilled from each and one has hard labels, all from the same first weights and in the same order of batches.

Entropies are those of the distributions of which the label sets hold the top k, over all classes, in nats.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
from benchmarks.sequence import arms
from benchmarks.sequence.intervals import less
from benchmarks.sequence.labelled import Shop, live_logits
from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.plan import Plan, TaskPlan
from benchmarks.sequence.tasks import TASKS, Task, begun, part_of
from benchmarks.sequence.training import Trajectory, train
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from logitcache.client import Labels, record

CLASSIFIED = ("digits", "modules")
"""Tasks of which an example has one row."""

EARLY = 0.3
"""Share of run 1 after which the earlier checkpoint is taken, to the nearest whole epoch."""

TEMPERATURES = (1.0, 2.0)
"""At which entropies are told."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the examples' entropies."""


def units(plan: Plan) -> list[tuple[str, int]]:
    """Task and seed of each replicate."""
    return [(name, seed) for name in CLASSIFIED for seed in range(plan.entropy_seeds)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One replicate, as JSON values.

    ``label_s`` are the seconds that each label set took from nothing to sealed. ``folds`` are the runs of the folds'
    models, as long as run 1 in epochs: their seconds are a cost of that label set alone, as the earlier checkpoint
    costs nothing that run 1 did not. They see fewer examples than run 1, and so take fewer steps: how soft their labels
    are of examples that they were trained on is told beside, as ``folds, seen``.
    """
    task, settings = TASKS[name](), plan.tasks[name]
    data = task.data()
    everything = range(len(data))  # type: ignore[arg-type]
    model, first, early = _run_1(task, settings, data, 1000 * seed)
    entropy = {
        "seen": entropies(logits_of(task, model, data, everything)),
        "held out": entropies(_held_out(task, model)),
    }
    quality = {"final": asdict(task.evaluate(model))}

    prefix = f"entropy-{name}-{seed}"
    options = {"top_k": settings.top_k, "temperatures": (settings.temperature,)}
    label_sets, label_s = {"final": shop.label(f"{prefix}-final", model, data, **options)}, {"final": shop.precompute_s}

    earlier = begun(task, settings.width, 1000 * seed)
    earlier.load_state_dict(early)
    label_sets["early"] = shop.label(f"{prefix}-early", earlier, data, **options)
    label_s["early"] = shop.precompute_s
    entropy["early"] = entropies(logits_of(task, earlier, data, everything))
    quality["early"] = asdict(task.evaluate(earlier))

    parts = folds(len(everything), plan.folds, seed)
    fold_models, fold_runs = _models_of_folds(task, settings, data, parts, seed)
    began = time.perf_counter()
    unseen = _record_folds(task, settings, data, parts, fold_models, shop, f"{prefix}-folds")
    label_s["folds"] = time.perf_counter() - began
    label_sets["folds"] = shop.connect(f"{prefix}-folds")
    entropy["folds"] = entropies(unseen)
    entropy["folds, seen"] = entropies(
        torch.cat([logits_of(task, each, data, part) for each, part in zip(fold_models, others(parts), strict=True)])
    )

    runs = {
        arm: asdict(distilled(task, settings, data, labels, 1000 * seed + 1))
        for arm, labels in {"hard": None, **label_sets}.items()
    }
    for labels in label_sets.values():
        labels.close()
    return {
        "first": asdict(first),
        "entropy": entropy,
        "quality": quality,
        "label_s": label_s,
        "folds": [asdict(each) for each in fold_runs],
        "runs": runs,
    }


def distilled(task: Task, settings: TaskPlan, data: Dataset[Any], labels: Labels | None, seed: int) -> Trajectory:
    """A student of the plan's width from these labels, or from hard ones; arms of one seed differ in them alone."""
    loader = task.loader(data, seed)
    batches = (
        arms.hard(task, loader, settings.epochs)
        if labels is None
        else arms.cached(task, loader, settings.epochs, labels, settings.temperature)
    )
    return trained(task, begun(task, settings.width, seed), batches, look_every(task, settings, data), seed)


def look_every(task: Task, settings: TaskPlan, data: Dataset[Any]) -> int:
    """Steps between two looks at a run over all of the data."""
    return max(1, settings.epochs * len(task.loader(data, 0)) // settings.evaluations)


def trained(task: Task, model: nn.Module, batches: Iterator[Any], look_every: int, seed: int) -> Trajectory:
    """A run with the task's own rate."""
    optimizer = task.optimizer(model, 1.0)
    return train(model, optimizer, batches, task.forward, task.evaluate, look_every=look_every, seed=seed)


def entropies(logits: Tensor) -> dict[str, Any]:
    """Of (rows, classes) logits at each of `TEMPERATURES`: their mean over the rows, and `QUANTILES`, in nats."""
    told = {}
    for temperature in TEMPERATURES:
        log_probs = (logits.double() / temperature).log_softmax(dim=1)
        each = torch.special.entr(log_probs.exp()).sum(dim=1)
        quantiles = each.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        told[f"{temperature:g}"] = {
            "mean": float(each.mean()),
            "quantiles": {f"{share:g}": value for share, value in zip(QUANTILES, quantiles, strict=True)},
        }
    return told


def logits_of(task: Task, model: nn.Module, data: Dataset[Any], ordinals: Any) -> Tensor:
    """(ordinals, classes) in eval mode."""
    return live_logits(task, model.eval(), shown(data, ordinals))


def shown(data: Dataset[Any], ordinals: Any) -> Any:
    """These examples as one batch."""
    return next(iter(DataLoader(part_of(data, ordinals), batch_size=len(ordinals))))


def folds(examples: int, count: int, seed: int) -> list[list[int]]:
    """Ordinals of each of so many parts of about the same size, by lot."""
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(1000 * seed)).tolist()
    return [order[fold::count] for fold in range(count)]


def others(parts: list[list[int]]) -> list[list[int]]:
    """For each part the ordinals of all others."""
    return [[one for other, part in enumerate(parts) if other != fold for one in part] for fold in range(len(parts))]


def _run_1(
    task: Task, settings: TaskPlan, data: Dataset[Any], seed: int
) -> tuple[nn.Module, Trajectory, dict[str, Tensor]]:
    """The model of run 1, how it went, and its weights at `EARLY`."""
    model, loader = begun(task, settings.width, seed), task.loader(data, seed)
    early: dict[str, Tensor] = {}
    batches = arms.hard(task, loader, settings.epochs)
    batches = _copied_at(round(EARLY * settings.epochs) * len(loader), model, early, batches)
    return model, trained(task, model, batches, look_every(task, settings, data), seed), early


def _copied_at(step: int, model: nn.Module, copy: dict[str, Tensor], batches: Iterator[Any]) -> Iterator[Any]:
    """The same batches; the weights are copied after so many steps."""
    for taken, batch in enumerate(batches):
        if taken == step:
            copy.update({key: value.clone() for key, value in model.state_dict().items()})
        yield batch


def _held_out(task: Task, model: nn.Module) -> Tensor:
    """Logits of the held-out examples, which a task shows to nobody but the model that it evaluates."""
    given: list[Tensor] = []
    hook = model.register_forward_hook(lambda _model, _inputs, logits: given.append(logits))
    task.evaluate(model)
    hook.remove()
    return torch.cat(given)


def _models_of_folds(
    task: Task, settings: TaskPlan, data: Dataset[Any], parts: list[list[int]], seed: int
) -> tuple[list[nn.Module], list[Trajectory]]:
    """For each part a model of run 1's width that is trained on the others, for as many epochs as run 1."""
    models, runs = [], []
    for fold, ordinals in enumerate(others(parts)):
        own_seed, shown_to_it = 1000 * seed + 100 + fold, part_of(data, ordinals)
        model = begun(task, settings.width, own_seed)
        batches = arms.hard(task, task.loader(shown_to_it, own_seed), settings.epochs)
        runs.append(trained(task, model, batches, look_every(task, settings, shown_to_it), own_seed))
        models.append(model)
    return models, runs


def _record_folds(
    task: Task,
    settings: TaskPlan,
    data: Dataset[Any],
    parts: list[list[int]],
    models: list[nn.Module],
    shop: Shop,
    name: str,
) -> Tensor:
    """Record for each example the logits of the model that never saw it, and give them: (examples, classes)."""
    logits = torch.empty(sum(map(len, parts)), task.classes)
    with record(
        shop.store / name,
        run=name,
        steps=range(len(parts)),
        mode="eval",
        weights="that of the fold which was not trained on",
        classes=task.classes,
        top_k=settings.top_k,
        temperatures=(settings.temperature,),
        targets=True,
        examples=len(logits),
    ) as recorder:
        for fold, (ordinals, model) in enumerate(zip(parts, models, strict=True)):
            batch = shown(data, ordinals)
            given = live_logits(task, model.eval(), batch)
            recorder.add(ordinals, given, step=fold, inputs=batch[0], targets=batch[1])
            logits[ordinals] = given
    return logits


_WORDS = {
    "final": "run 1's final weights",
    "early": "its checkpoint at 30 %",
    "folds": "folds: models that never saw the example",
}


def tables(found: Replicates) -> dict[str, str]:
    """By task: how soft labels are, and what students make of them."""
    return {
        task: f"{_entropies([unit['found'] for unit in units])}\n\n{_students([unit['found'] for unit in units])}"
        for task, units in found.items()
    }


def figures(found: Replicates) -> dict[str, Figure]:
    """None: the tables say it all."""
    return {}


def _entropies(replicates: Sequence[dict[str, Any]]) -> str:
    words = {
        "seen": "run 1, of the examples that it was trained on",
        "held out": "run 1, of held-out examples",
        "early": "its checkpoint at 30 %, of training examples",
        "folds": "folds, each example by a model that never saw it",
        "folds, seen": "the same models, of examples that they saw",
    }
    temperatures = list(replicates[0]["entropy"]["seen"])
    rows = [
        [told_as, *(f"{mean(each['entropy'][name][at]['mean'] for each in replicates):.3f}" for at in temperatures)]
        for name, told_as in words.items()
    ]
    return table(["labels", *(f"mean entropy, nats, {at}" for at in temperatures)], rows)


def _students(replicates: Sequence[dict[str, Any]]) -> str:
    headings = ["student of", "loss, less that of hard labels", "accuracy, less that of hard labels", "labels, s"]
    rows = []
    for arm, told_as in _WORDS.items():
        of_arm, hard = ([each["runs"][name] for each in replicates] for name in (arm, "hard"))
        spent = [
            each["label_s"][arm] + (sum(run["seconds"] for run in each["folds"]) if arm == "folds" else 0.0)
            for each in replicates
        ]
        rows.append(
            [
                told_as,
                less(of_arm, hard, "loss"),
                less(of_arm, hard, "accuracy"),
                f"{mean(spent):.2f}",
            ]
        )
    return table(headings, rows)
