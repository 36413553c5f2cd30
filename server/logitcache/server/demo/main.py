"""The demo from beginning to end: label the digits once, serve the labels, and train one student in three ways.

It goes the way that a user goes: the function behind ``logitcache precompute``, a ``logitcache serve`` process, and the
client. What it writes lies under one folder; the label set there is made anew each time, so that its cost is measured.
"""

import os
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from logitcache.client import connect
from logitcache.labels.errors import StoreNotWritable, WrongLabels
from logitcache.server.demo import digits, report
from logitcache.server.demo.agreement import Agreement, compare_every_step
from logitcache.server.demo.local_server import serving
from logitcache.server.demo.training import (
    ALPHA,
    TEMPERATURE,
    CachedLabels,
    HardLabels,
    LiveTeacher,
    Method,
    Run,
    evaluate,
    train,
)
from logitcache.server.precompute import precompute
from logitcache.server.preparation import Request
from logitcache.server.progress import reporter

NAME = "digits"
EPOCHS, QUICK_EPOCHS = 16, 2


def run(out: Path, seeds: int = 3, quick: bool = False) -> None:
    """Run the demo: a table on stdout; under ``out`` the plot, all figures as JSON, the label set and the server's log.

    Args:
        out: a folder, made if need be. ``out/demo-label-sets`` is replaced.
        seeds: how many students each method trains.
        quick: a few epochs instead of enough to converge.

    Raises:
        StoreNotWritable: ``out`` cannot be made or written into.
        WrongLabels: cached and live loss were further apart than rounding to float16 allows.
        LogitcacheError: precomputing, serving or fetching failed.
    """
    began = time.perf_counter()
    console = Console() if Console().is_terminal else Console(width=110)
    torch.set_num_threads(min(4, len(os.sched_getaffinity(0))))
    _make_folder(out)
    epochs = QUICK_EPOCHS if quick else EPOCHS
    teacher_figures = _introduce_teacher(console)
    store = out / "demo-label-sets"
    precompute_s = _label(store, console)
    with serving(store, out / "server.log") as url, closing(connect(f"{url}/{NAME}")) as labels:
        console.print(f"Serving them at {url}, in a process of its own; training {3 * seeds} students …")
        runs = _train_all(labels, seeds, epochs, console)
        agreement = compare_every_step(labels, digits.teacher(), digits.train_set(), epochs)
        traffic = str(labels.stats)
    steps_an_epoch = -(-len(digits.train_set()) // digits.BATCH)
    figures = {
        "teacher": teacher_figures,
        "settings": _settings(seeds, epochs, steps_an_epoch),
        "precompute_s": precompute_s,
        "agreement": vars(agreement) | {"holds": agreement.holds},
        "whole_demo_s": time.perf_counter() - began,
    }
    report.write_json(out / "digits.json", runs, figures)
    report.plot(out / "digits.png", runs, steps_an_epoch)
    console.print(report.table(report.summarise(runs)))
    _conclude(console, runs, agreement, traffic, out, figures)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "digits.json").unlink(missing_ok=True)
    except OSError as error:
        raise StoreNotWritable(f"cannot write into {out}: {error.strerror}; name another folder with --out") from None


def _introduce_teacher(console: Console) -> dict[str, Any]:
    teacher = digits.teacher()
    parameters = sum(weight.numel() for weight in teacher.parameters())
    accuracy, _ = evaluate(teacher, digits.test_set())
    console.print(f"Teacher: {parameters:,} parameters, {accuracy:.1%} of {len(digits.test_set())} test digits right")
    return {"parameters": parameters, "accuracy": accuracy}


def _label(store: Path, console: Console) -> float:
    """Precompute the label set into an empty store; gives the seconds that it took."""
    shutil.rmtree(store, ignore_errors=True)
    store.mkdir()
    start = time.perf_counter()
    request = Request(
        name=NAME,
        teacher=f"{digits.__name__}:teacher",
        dataset=f"{digits.__name__}:train_set",
        store=store,
        top_k=digits.CLASSES,
        temperatures=(TEMPERATURE,),
        batch_size=digits.BATCH,
        device="cpu",
    )
    with reporter() as watcher:
        summary = precompute(request, watcher)
    seconds = time.perf_counter() - start
    console.print(str(summary), highlight=False)
    return seconds


def _train_all(labels: Any, seeds: int, epochs: int, console: Console) -> list[Run]:
    """Every method from every seed."""
    methods: tuple[Method, ...] = (HardLabels(), LiveTeacher(digits.teacher()), CachedLabels(labels))
    data, held_out = digits.train_set(), digits.test_set()
    runs: list[Run] = []
    for seed in range(seeds):
        runs += train(methods, seed, data, held_out, epochs)
        console.print(f"  seed {seed + 1} of {seeds}: {', '.join(f'{run.method} trained' for run in runs[-3:])}")
    return runs


def _settings(seeds: int, epochs: int, steps_an_epoch: int) -> dict[str, Any]:
    return {
        "seeds": seeds,
        "epochs": epochs,
        "steps_an_epoch": steps_an_epoch,
        "batch_size": digits.BATCH,
        "temperature": TEMPERATURE,
        "alpha": ALPHA,
        "top_k": digits.CLASSES,
        "threads": torch.get_num_threads(),
    }


def _conclude(
    console: Console, runs: list[Run], agreement: Agreement, traffic: str, out: Path, figures: dict[str, Any]
) -> None:
    hard, live, cached = (summary.step_ms for summary in report.summarise(runs))
    console.print(
        f"Over hard labels, distillation adds {live - hard:.2f} ms to a step with the live teacher and "
        f"{cached - hard:.2f} ms with cached labels. Precomputing took {figures['precompute_s']:.1f} s, paid once.\n"
        f"Cached and live loss, same weights and batch, {agreement.steps} steps: apart by at most "
        f"{agreement.largest_difference:.1e}, where float16 allows {agreement.allowed_there:.1e}; "
        f"closest to the bound: {agreement.closest_to_allowed:.0%} of it.\n"
        f"Fetched: {traffic}\n"
        f"Plot: {out / 'digits.png'}, figures: {out / 'digits.json'}; all of it in {figures['whole_demo_s']:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    if not agreement.holds:
        raise WrongLabels(
            f"cached and live loss differ by {agreement.closest_to_allowed:.1f} times what float16 explains: "
            f"these are not this teacher's labels; the figures are in {out / 'digits.json'}"
        )
