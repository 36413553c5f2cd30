"""What a part of the demo found, for people and for programs: a table, a plot and a JSON file.

Accuracies and losses are means over the seeds after the last epoch, spreads sample standard deviations over the seeds.
Milliseconds are medians, over all seeds and all epochs but each run's first, of an epoch's mean step. Knows nothing of
how the runs were made.
"""

import json
import math
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
class Words:
    """How a part calls what it measures.

    Attributes:
        accuracy: heading of the accuracy.
        loss: heading of the cross-entropy with the targets.
        perplexity: whether ``exp(loss)`` is told in the place of the training loss.
        lowest_percent: where the accuracy's axis begins, None for where the curves do.
        held_out: what accuracy and loss are of.
    """

    accuracy: str
    loss: str
    perplexity: bool
    lowest_percent: int | None
    held_out: str


@dataclass(frozen=True)
class Summary:
    """The runs of one method, as the module says; the spread of a single seed is None.

    ``seconds`` and ``teacher_s`` are means of a whole run, ``fetched_bytes`` of a step.
    """

    method: str
    accuracy: float
    accuracy_spread: float | None
    test_loss: float
    training_loss: float
    step_ms: float
    teacher_ms: float
    waiting_ms: float
    fetched_bytes: float
    seconds: float
    teacher_s: float

    @property
    def perplexity(self) -> float:
        """``exp`` of the test loss."""
        return math.exp(self.test_loss)

    @property
    def computing_ms(self) -> float:
        """The rest of a step: loading, the student, and what fetching in the background takes from it on few cores."""
        return max(0.0, self.step_ms - self.teacher_ms - self.waiting_ms)


def summarise(runs: Iterable[Run], steps_an_epoch: int) -> list[Summary]:
    """One summary a method, in the order in which methods first appear."""
    return [_summary(method, group, steps_an_epoch) for method, group in _by_method(runs).items()]


def _summary(method: str, runs: list[Run], steps_an_epoch: int) -> Summary:
    last = [run.epochs[-1] for run in runs]
    accuracies = [epoch.accuracy for epoch in last]
    timed = [epoch for run in runs for epoch in run.epochs[1:]]
    all_epochs = [epoch for run in runs for epoch in run.epochs]
    seconds_a_ms = steps_an_epoch / 1e3 / len(runs)
    return Summary(
        method=method,
        accuracy=mean(accuracies),
        accuracy_spread=stdev(accuracies) if len(runs) > 1 else None,
        test_loss=mean(epoch.test_loss for epoch in last),
        training_loss=mean(epoch.training_loss for epoch in last),
        step_ms=median(epoch.step_ms for epoch in timed),
        teacher_ms=median(epoch.teacher_ms for epoch in timed),
        waiting_ms=median(epoch.waiting_ms for epoch in timed),
        fetched_bytes=mean(epoch.fetched_bytes for epoch in all_epochs),
        seconds=sum(epoch.step_ms for epoch in all_epochs) * seconds_a_ms,
        teacher_s=sum(epoch.teacher_ms for epoch in all_epochs) * seconds_a_ms,
    )


def _by_method(runs: Iterable[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


TITLE = "The same student, the same seeds, three sources of labels"


def columns(summaries: list[Summary], words: Words) -> dict[str, list[str]]:
    """The table that the demo prints, column by column; training loss is what the method minimises."""
    spreads = ["" if one.accuracy_spread is None else f" ± {one.accuracy_spread:.1%}" for one in summaries]
    return {
        "": [one.method for one in summaries],
        words.accuracy: [f"{one.accuracy:.1%}{spread}" for one, spread in zip(summaries, spreads, strict=True)],
        words.loss: [f"{one.test_loss:.4f}" for one in summaries],
        **_third(summaries, words),
        "ms a step": [f"{one.step_ms:.2f}" for one in summaries],
        "of it teacher": [f"{one.teacher_ms:.2f}" for one in summaries],
        "of it waiting": [f"{one.waiting_ms:.2f}" for one in summaries],
        "kB a step": [f"{one.fetched_bytes / 1e3:.1f}" for one in summaries],
    }


def _third(summaries: list[Summary], words: Words) -> dict[str, list[str]]:
    if words.perplexity:
        return {"perplexity": [f"{one.perplexity:.1f}" for one in summaries]}
    return {"training loss": [f"{one.training_loss:.4f}" for one in summaries]}


def table(cells: dict[str, list[str]]) -> Table:
    """The columns for a terminal."""
    result = Table(title=TITLE)
    for heading in cells:
        # Left to itself, a narrow table breaks words.
        result.add_column(
            "\n".join(heading.rsplit(" ", 1)), justify="right" if heading else "left", no_wrap=not heading
        )
    for row in zip(*cells.values(), strict=True):
        result.add_row(*row)
    return result


def write_markdown(path: Path, cells: dict[str, list[str]], told: str) -> None:
    """The columns as Markdown, and what was printed below them."""
    rows = [list(cells), ["---"] + ["---:"] * (len(cells) - 1), *zip(*cells.values(), strict=True)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    path.write_text("\n".join([f"# {TITLE}", "", *lines, "", told]) + "\n")


def write_json(path: Path, runs: list[Run], summaries: list[Summary], figures: dict[str, Any]) -> None:
    """Every figure that was printed, and every run behind it."""
    derived = ("computing_ms", "perplexity")
    methods = [asdict(one) | {name: getattr(one, name) for name in derived} for one in summaries]
    content = {**figures, "methods": methods, "runs": [asdict(run) for run in runs]}
    path.write_text(json.dumps(content, indent=2) + "\n")


def plot(path: Path, runs: list[Run], summaries: list[Summary], steps_an_epoch: int, words: Words) -> None:
    """Accuracy over steps with its spread, and where the time of a step goes."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    accuracy, time = figure.subplots(1, 2, width_ratios=(3, 2))
    for colour, (method, group) in zip(COLOURS, _by_method(runs).items(), strict=False):
        _draw_accuracy(accuracy, method, group, steps_an_epoch, colour)
    accuracy.set(xlabel="steps", ylabel=f"accuracy on {words.held_out} (%)", title="What the student learns")
    if words.lowest_percent is not None:
        accuracy.set_ylim(words.lowest_percent, 100)
    accuracy.grid(alpha=0.3)
    accuracy.legend(loc="lower right")
    _draw_time(time, summaries)
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
