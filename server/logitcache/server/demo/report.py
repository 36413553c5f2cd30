"""What the demo found, for people and for programs: a table, a plot and a JSON file.

Accuracies and losses are means over the seeds after the last epoch, spreads sample standard deviations over the seeds.
Milliseconds are medians, over all seeds and all epochs but each run's first, of an epoch's mean step. Knows nothing of
how the runs were made.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from logitcache.server.demo.training import Run

COLOURS = ("tab:gray", "tab:orange", "tab:blue")


@dataclass(frozen=True)
class Summary:
    """The runs of one method, as the module says; the spread of a single seed is None."""

    method: str
    accuracy: float
    accuracy_spread: float | None
    test_loss: float
    training_loss: float
    step_ms: float
    teacher_ms: float
    waiting_ms: float

    @property
    def computing_ms(self) -> float:
        """The rest of a step: loading, the student, and what fetching in the background takes from it on few cores."""
        return max(0.0, self.step_ms - self.teacher_ms - self.waiting_ms)


def summarise(runs: Iterable[Run]) -> list[Summary]:
    """One summary a method, in the order in which methods first appear."""
    return [_summary(method, group) for method, group in _by_method(runs).items()]


def _summary(method: str, runs: list[Run]) -> Summary:
    last = [run.epochs[-1] for run in runs]
    accuracies = [epoch.accuracy for epoch in last]
    timed = [epoch for run in runs for epoch in run.epochs[1:]]
    return Summary(
        method=method,
        accuracy=mean(accuracies),
        accuracy_spread=stdev(accuracies) if len(runs) > 1 else None,
        test_loss=mean(epoch.test_loss for epoch in last),
        training_loss=mean(epoch.training_loss for epoch in last),
        step_ms=median(epoch.step_ms for epoch in timed),
        teacher_ms=median(epoch.teacher_ms for epoch in timed),
        waiting_ms=median(epoch.waiting_ms for epoch in timed),
    )


def _by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def table(summaries: list[Summary]) -> Table:
    """The table that the demo prints; test loss is the cross-entropy, training loss what the method minimises."""
    result = Table(title="The same student, the same seeds, three sources of labels")
    result.add_column("")
    for heading in ("test accuracy", "test loss", "training loss", "ms a step", "of it teacher", "of it waiting"):
        result.add_column(heading, justify="right")
    for summary in summaries:
        spread = "" if summary.accuracy_spread is None else f" ± {summary.accuracy_spread:.1%}"
        result.add_row(
            summary.method,
            f"{summary.accuracy:.1%}{spread}",
            f"{summary.test_loss:.4f}",
            f"{summary.training_loss:.4f}",
            f"{summary.step_ms:.2f}",
            f"{summary.teacher_ms:.2f}",
            f"{summary.waiting_ms:.2f}",
        )
    return result


def write_json(path: Path, runs: list[Run], figures: dict[str, Any]) -> None:
    """Every figure that was printed, and every run behind it."""
    methods = [asdict(summary) | {"computing_ms": summary.computing_ms} for summary in summarise(runs)]
    content = {**figures, "methods": methods, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(path: Path, runs: list[Run], steps_an_epoch: int) -> None:
    """Accuracy over steps with its spread, and where the time of a step goes."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    accuracy, time = figure.subplots(1, 2, width_ratios=(3, 2))
    for colour, (method, group) in zip(COLOURS, _by_method(runs).items(), strict=False):
        _draw_accuracy(accuracy, method, group, steps_an_epoch, colour)
    accuracy.set(xlabel="steps", ylabel="accuracy on the test digits (%)", title="What the student learns")
    accuracy.set_ylim(80, 100)
    accuracy.grid(alpha=0.3)
    accuracy.legend(loc="lower right")
    _draw_time(time, summarise(runs))
    figure.savefig(path, dpi=150)


def _draw_accuracy(axes: Axes, method: str, runs: list[Run], steps_an_epoch: int, colour: str) -> None:
    percent = 100 * np.array([[epoch.accuracy for epoch in run.epochs] for run in runs])  # (seeds, epochs)
    steps = steps_an_epoch * np.arange(1, percent.shape[1] + 1)
    centre = percent.mean(axis=0)
    spread = percent.std(axis=0, ddof=1) if len(runs) > 1 else np.zeros_like(centre)
    # Live and cached coincide; the dashes let the one below show through.
    axes.plot(steps, centre, color=colour, label=method, linestyle="--" if "cached" in method else "-")
    axes.fill_between(steps, centre - spread, centre + spread, color=colour, alpha=0.15, linewidth=0)


def _draw_time(axes: Axes, summaries: list[Summary]) -> None:
    methods = [summary.method for summary in summaries]
    parts = {
        "student, loading, fetching": ([summary.computing_ms for summary in summaries], "tab:gray"),
        "teacher": ([summary.teacher_ms for summary in summaries], "tab:orange"),
        "waiting for labels": ([summary.waiting_ms for summary in summaries], "tab:red"),
    }
    bottom = np.zeros(len(methods))
    for label, (heights, colour) in parts.items():
        axes.bar(methods, heights, bottom=bottom, label=label, color=colour, width=0.6)
        bottom += heights
    for place, height in enumerate(bottom):
        axes.annotate(f"{height:.1f}", (place, height), ha="center", va="bottom")
    axes.set(ylabel="milliseconds a step", title="What a step costs", ylim=(0, 1.45 * bottom.max()))
    axes.legend(loc="upper left")
