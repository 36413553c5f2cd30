"""The demo from beginning to end: label data once, serve the labels, and train one student in three ways.

It goes the way that a user goes: the function behind ``logitcache precompute``, a ``logitcache serve`` process, and the
client. What it writes lies under one folder; the label sets there are made anew each time, so that their cost is
measured.
"""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from logitcache.client import connect
from logitcache.labels.errors import StoreNotWritable, WrongLabels
from logitcache.server.demo import report
from logitcache.server.demo.local_server import serving
from logitcache.server.demo.parts import PARTS, Agreement, Part
from logitcache.server.demo.training import ALPHA, CachedLabels, HardLabels, LiveTeacher, Method, Run, train
from logitcache.server.labelling.precompute import precompute
from logitcache.server.labelling.preparation import Request
from logitcache.server.progress import reporter

STORE = "demo-label-sets"


def run(out: Path, seeds: int = 3, quick: bool = False, only: str | None = None) -> None:
    """Run the demo: tables on stdout; under ``out`` tables, plots, all figures as JSON, label sets and servers' logs.

    Args:
        out: a folder, made if need be. The label sets in ``out/demo-label-sets`` are replaced.
        seeds: how many students each method trains.
        quick: less of everything.
        only: one of `PARTS`; None runs all, one after the other.

    Raises:
        StoreNotWritable: ``out`` cannot be made or written into.
        WrongLabels: cached labels were further from the live teacher than rounding to float16 allows.
        LogitcacheError: precomputing, serving or fetching failed.
    """
    parts = tuple(PARTS) if only is None else (only,)
    console = Console() if Console().is_terminal else Console(width=110)
    torch.set_num_threads(min(4, len(os.sched_getaffinity(0))))
    _make_folder(out, parts)
    for name in parts:
        _run_part(name, out, seeds, quick, console)


def _make_folder(out: Path, parts: Sequence[str]) -> None:
    try:
        (out / STORE).mkdir(parents=True, exist_ok=True)
        for name in parts:
            (out / f"{name}.json").unlink(missing_ok=True)
    except OSError as error:
        raise StoreNotWritable(f"cannot write into {out}: {error.strerror}; name another folder with --out") from None


def _run_part(name: str, out: Path, seeds: int, quick: bool, console: Console) -> None:
    began = time.perf_counter()
    part = PARTS[name](quick)
    console.print(f"\n{part.subject}", style="bold")
    teacher = part.make_teacher()
    teacher_figures = _introduce(part, teacher, console)
    precompute_s = _label(part, out / STORE, console)
    with serving(out / STORE, out / f"{name}-server.log") as url, closing(connect(f"{url}/{name}")) as labels:
        console.print(f"Serving them at {url}, in a process of its own; training {3 * seeds} students …")
        runs = _train_all(part, labels, teacher, seeds, console)
        agreements = part.compare(labels, teacher)
        traffic = str(labels.stats)
    figures = {
        "teacher": teacher_figures,
        "settings": _settings(part, seeds),
        "precompute_s": precompute_s,
        **{key: vars(found) | {"holds": found.holds} for key, found in agreements.items()},
        "whole_part_s": time.perf_counter() - began,
    }
    _report(part, out, runs, figures, [*map(str, agreements.values()), f"Fetched: {traffic}"], console)
    _refuse_wrong(agreements, out / f"{name}.json")


def _introduce(part: Part, teacher: nn.Module, console: Console) -> dict[str, Any]:
    parameters = sum(weight.numel() for weight in teacher.parameters())
    accuracy, loss = part.task.evaluate(teacher)
    console.print(f"Teacher: {parameters:,} parameters, {accuracy:.1%} of {part.words.held_out} right")
    return {"parameters": parameters, "accuracy": accuracy, "test_loss": loss}


def _label(part: Part, store: Path, console: Console) -> float:
    """Precompute the part's label set anew; gives the seconds that it took."""
    shutil.rmtree(store / part.name, ignore_errors=True)
    start = time.perf_counter()
    request = Request(
        name=part.name,
        teacher=part.teacher,
        dataset=part.dataset,
        store=store,
        top_k=part.top_k,
        temperatures=part.temperatures,
        batch_size=part.batch_size,
        device="cpu",
    )
    with reporter() as watcher:
        summary = precompute(request, watcher)
    seconds = time.perf_counter() - start
    console.print(str(summary), highlight=False)
    return seconds


def _train_all(part: Part, labels: Any, teacher: nn.Module, seeds: int, console: Console) -> list[Run]:
    """Every method from every seed."""
    methods: tuple[Method, ...] = (HardLabels(), LiveTeacher(teacher), CachedLabels(labels))
    runs: list[Run] = []
    for seed in range(seeds):
        runs += train(part.task, methods, seed, part.epochs)
        console.print(f"  seed {seed + 1} of {seeds}: {', '.join(f'{run.method} trained' for run in runs[-3:])}")
    return runs


def _settings(part: Part, seeds: int) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "epochs": part.epochs,
        "steps_an_epoch": part.steps_an_epoch,
        "batch_size": part.batch_size,
        "temperature": part.temperature,
        "alpha": ALPHA,
        "top_k": part.top_k,
        "threads": torch.get_num_threads(),
    }


def _report(part: Part, out: Path, runs: list[Run], figures: dict[str, Any], told: list[str], console: Console) -> None:
    """Print and write what was found; ``told`` are sentences to tell beside what all parts have."""
    summaries = report.summarise(runs, part.steps_an_epoch)
    hard, live, cached = summaries
    sentences = [
        f"Over hard labels, distillation adds {live.step_ms - hard.step_ms:.2f} ms to a step with the live teacher and "
        f"{cached.step_ms - hard.step_ms:.2f} ms with cached labels. The live teacher's forward took "
        f"{live.teacher_s:.1f} s of each run's {live.seconds:.1f} s; precomputing took "
        f"{figures['precompute_s']:.1f} s, paid once.",
        *told,
        *filter(None, [part.promise]),
    ]
    cells, plot = report.columns(summaries, part.words), out / f"{part.name}.png"
    report.write_json(out / f"{part.name}.json", runs, summaries, figures)
    report.write_markdown(out / f"{part.name}.md", cells, "\n".join(sentences))
    report.plot(plot, runs, summaries, part.steps_an_epoch, part.words)
    console.print(report.table(cells))
    files = f"Plot: {plot}, figures: {plot.with_suffix('.json')}; all of it in {figures['whole_part_s']:.0f} s\n"
    console.print("\n".join([*sentences, files]), highlight=False, soft_wrap=True)


def _refuse_wrong(agreements: dict[str, Agreement], figures: Path) -> None:
    for found in agreements.values():
        if not found.holds:
            raise WrongLabels(
                f"cached labels are {found.closest_to_allowed:.1f} times as far from the live teacher as float16 "
                f"explains: these are not this teacher's labels; the figures are in {figures}"
            )
