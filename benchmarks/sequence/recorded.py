"""Part 7: labels that a run records in its last epoch, against a precompute by its final weights.

A replicate is one seed: run 1 with hard labels, whose last epoch is run twice from the same state, with recording and
without; who is first alternates with the seed. Then its final weights label the same examples in a pass of their own,
and a student is distilled from each label set, beside one with hard labels, all from the same first weights and in the
same order of batches.

Recorded rows are of weights that move, and under dropout where the model has any. They go into a folder of the store
that the server serves, from this process: a log on the disk, and at the end the label set.
"""

import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from benchmarks.sequence import arms
from benchmarks.sequence.entropy import CLASSIFIED, distilled, entropies, logits_of, look_every
from benchmarks.sequence.intervals import less
from benchmarks.sequence.labelled import Shop
from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.plan import Plan, TaskPlan
from benchmarks.sequence.tasks import TASKS, Task, begun, digest_of
from benchmarks.sequence.training import Trajectory, train_on
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import Dataset

from logitcache.client import Recorder, record

TEMPERATURE = 2.0
"""At which the two label sets are compared."""


def units(plan: Plan) -> list[tuple[str, int]]:
    """Task and seed of each replicate."""
    return [(name, seed) for name in CLASSIFIED for seed in range(plan.recording_seeds)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One replicate, as JSON values.

    ``recording_s`` tells how long it took to begin, the last epoch without and with it, and to seal; ``precompute_s``
    is from nothing to sealed. ``same_weights`` tells whether recording left the run as it was.
    """
    task, settings = TASKS[name](), plan.tasks[name]
    data = task.data()
    options = {"top_k": settings.top_k, "temperatures": (settings.temperature,)}
    prefix = f"recorded-{name}-{seed}"
    before = _Before(task, settings, data, 1000 * seed)
    plain = [before.last_epoch(None)] if seed % 2 == 0 else []

    began = time.perf_counter()
    recorder = _recorder(shop.store / prefix, prefix, task, before, settings)
    begin_s = time.perf_counter() - began
    epoch, model, given = before.last_epoch(recorder)
    began = time.perf_counter()
    digest = recorder.finish()
    recorder.close()
    seal_s = time.perf_counter() - began

    without, other, _ = plain[0] if plain else before.last_epoch(None)
    recorded = shop.connect(prefix)
    if recorded.describe().digest != digest:
        raise RuntimeError(f"{prefix} is served with another digest than it was sealed with")
    precomputed = shop.label(f"{prefix}-precomputed", model, data, **options)
    precompute_s = shop.precompute_s
    final = logits_of(task, model, data, range(len(given)))
    runs = {
        arm: asdict(distilled(task, settings, data, labels, 1000 * seed + 1))
        for arm, labels in {"hard": None, "recorded": recorded, "precomputed": precomputed}.items()
    }
    for labels in (recorded, precomputed):
        labels.close()
    return {
        "first": {"opening": asdict(before.opening), "last": asdict(without), "last recorded": asdict(epoch)},
        "same_weights": digest_of(model) == digest_of(other),
        "recording_s": {"begin": begin_s, "without": without.seconds, "with": epoch.seconds, "seal": seal_s},
        "precompute_s": precompute_s,
        "agreement": _agreement(final, given),
        "entropy": {"recorded": entropies(given), "precomputed": entropies(final)},
        "runs": runs,
    }


class _Before:
    """Run 1 until its last epoch, which can be run from there several times: the same each time."""

    def __init__(self, task: Task, settings: TaskPlan, data: Dataset[Any], seed: int) -> None:
        self._task, self._settings, self._data, self._seed = task, settings, data, seed
        self._model = begun(task, settings.width, seed)
        self._optimizer = task.optimizer(self._model, 1.0)
        self._loader = task.loader(data, seed)
        self.examples, self.epoch_steps = len(data), len(self._loader)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            batches = arms.hard(task, self._loader, settings.epochs - 1)
            self.opening = self._train(self._model, self._optimizer, batches)
            self._chance = torch.get_rng_state()

    def last_epoch(self, recorder: Recorder | None) -> tuple[Trajectory, nn.Module, Tensor]:
        """It, the model after it, and the logits that the model gave on the way: (examples, classes)."""
        task = self._task
        model = deepcopy(self._model)
        optimizer = task.optimizer(model, 1.0)
        optimizer.load_state_dict(deepcopy(self._optimizer.state_dict()))
        loader = task.loader(self._data, self._seed)
        given: list[tuple[Tensor, Tensor]] = []
        loader.generator.set_state(self._loader.generator.get_state())
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._chance)
            found = self._train(model, optimizer, _recorded(arms.hard(task, loader, 1), recorder, given))
        ids, logits = (torch.cat(each) for each in zip(*given, strict=True))
        return found, model, logits[ids.argsort()]

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Any]) -> Trajectory:
        task, every = self._task, look_every(self._task, self._settings, self._data)
        return train_on(model, optimizer, batches, task.forward, task.evaluate, look_every=every)


def _recorder(folder: Path, run: str, task: Task, before: _Before, settings: TaskPlan) -> Recorder:
    steps = range(before.opening.steps, before.opening.steps + before.epoch_steps)
    return record(
        folder,
        run=run,
        steps=steps,
        classes=task.classes,
        top_k=settings.top_k,
        temperatures=(settings.temperature,),
        targets=True,
        examples=before.examples,
    )


def _recorded(batches: Iterator[Any], recorder: Recorder | None, given: list[tuple[Tensor, Tensor]]) -> Iterator[Any]:
    """The same batches and losses; logits are recorded and, with a recorder or without, kept with their ids."""
    for batch, loss_of in batches:

        def taken(logits: Tensor, batch: Any = batch, loss_of: Any = loss_of) -> Tensor:
            inputs, targets, ids = batch
            given.append((ids, logits.detach()))
            if recorder is not None:
                recorder.add(ids, logits, inputs=inputs, targets=targets)
            loss: Tensor = loss_of(logits)
            return loss

        yield batch, taken


def _agreement(precomputed: Tensor, recorded: Tensor) -> dict[str, float]:
    """Of the distributions that two label sets hold the top k of, over all classes: mean divergences in nats at
    `TEMPERATURE`, and the share of examples with one most likely class.
    """
    one, other = ((logits.double() / TEMPERATURE).log_softmax(dim=1) for logits in (precomputed, recorded))
    return {
        "kl_precomputed_recorded": _divergence(one, other),
        "kl_recorded_precomputed": _divergence(other, one),
        "same_argmax": float((precomputed.argmax(dim=1) == recorded.argmax(dim=1)).double().mean()),
    }


def _divergence(log_p: Tensor, log_q: Tensor) -> float:
    return float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())


def tables(found: Replicates) -> dict[str, str]:
    """By task: students of recorded and of precomputed labels, what each cost, and how far they are apart."""
    return {task: _table([unit["found"] for unit in units]) for task, units in found.items()}


def figures(found: Replicates) -> dict[str, Figure]:
    """None: the table says it all."""
    return {}


def _table(replicates: Sequence[dict[str, Any]]) -> str:
    headings = [
        "labels",
        "loss, less that of hard labels",
        "accuracy, less that of hard labels",
        "entropy at T = 1, nats",
        "cost, s",
    ]
    costs = {
        "recorded": [
            each["recording_s"]["begin"]
            + each["recording_s"]["with"]
            - each["recording_s"]["without"]
            + each["recording_s"]["seal"]
            for each in replicates
        ],
        "precomputed": [each["precompute_s"] for each in replicates],
    }
    rows = []
    for arm, spent in costs.items():
        of_arm, hard = ([each["runs"][name] for each in replicates] for name in (arm, "hard"))
        rows.append(
            [
                {"recorded": "recorded in the last epoch", "precomputed": "precomputed by the final weights"}[arm],
                less(of_arm, hard, "loss"),
                less(of_arm, hard, "accuracy"),
                f"{mean(next(iter(each['entropy'][arm].values()))['mean'] for each in replicates):.3f}",
                f"{mean(spent):.2f}",
            ]
        )
    seal = mean(each["recording_s"]["seal"] for each in replicates)
    apart = mean(each["agreement"]["kl_precomputed_recorded"] for each in replicates)
    same = mean(each["agreement"]["same_argmax"] for each in replicates)
    sentence = (
        f"Of the cost of recording, {seal:.2f} s are sealing. The two label sets are {apart:.3f} nats apart at T = 2 "
        f"(mean KL), and {same:.1%} of examples have the same most likely class in both."
    )
    return f"{table(headings, rows)}\n\n{sentence}"
