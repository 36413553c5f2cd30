"""What was measured, for people and for programs: tables, a JSON value, a plot.

Figures are medians over the rounds, spreads their quartiles. A ratio is taken within each round, so that what slowed
the whole machine for a while cancels out; its median and quartiles are over the rounds. Knows nothing of how the blocks
were made.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.timing import Block, Blocks
from matplotlib import colormaps
from matplotlib.figure import Figure

Spread = dict[str, float]


def spread(values: Iterable[float]) -> Spread:
    """Median, quartiles and extremes of one value a round."""
    low, q1, median, q3, high = np.quantile(np.fromiter(values, float), (0, 0.25, 0.5, 0.75, 1)).tolist()
    return {"median": median, "q1": q1, "q3": q3, "min": low, "max": high}


def figures(blocks: Blocks, rows_an_id: int = 1) -> dict[str, Any]:
    """By method and batch size: rows a second, and seconds a batch on the clock and on the processors."""
    return {
        name: {size: _figures_of(size * rows_an_id, rounds) for size, rounds in sizes.items()}
        for name, sizes in blocks.items()
    }


def _figures_of(rows: int, rounds: list[Block]) -> dict[str, Any]:
    servers = [block.server_cpu_s for block in rounds if block.server_cpu_s is not None]
    return {
        "rows_per_s": spread(rows / block.wall_s for block in rounds),
        "wall_s": spread(block.wall_s for block in rounds),
        "client_cpu_s": spread(block.client_cpu_s for block in rounds),
        "server_cpu_s": spread(servers) if servers else None,
        "rounds": [asdict(block) for block in rounds],
    }


def ratios(blocks: Blocks, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each pair: how many times the second's rows a second the first reaches, by batch size.

    Rounds in which only one of them took part tell nothing of it.
    """
    return [
        {
            "method": ours,
            "against": peer,
            "rate": {size: spread(_within_rounds(mine, blocks[peer][size])) for size, mine in blocks[ours].items()},
        }
        for ours, peer in pairs
    ]


def _within_rounds(ours: list[Block], theirs: list[Block]) -> Iterator[float]:
    wall_s = {block.round: block.wall_s for block in ours}
    return (block.wall_s / wall_s[block.round] for block in theirs if block.round in wall_s)


def rates_table(found: dict[str, Any]) -> str:
    """A block of lines a batch size, a line a method."""
    heading = ("", "rows/s", "quartiles", "ms a batch", "CPU ms: client", "server")
    lines: list[tuple[str, ...]] = []
    for size in next(iter(found.values())):
        lines.append((f"batches of {size:,}", *heading[1:]))
        lines += [_rates_line(name, sizes[size]) for name, sizes in found.items()]
        lines.append(("",) * len(heading))
    return aligned(lines[:-1])


def _rates_line(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    rate, server = figures["rows_per_s"], figures["server_cpu_s"]
    return (
        f"  {name}",
        f"{rate['median']:,.0f}",
        f"{rate['q1']:,.0f} - {rate['q3']:,.0f}",
        f"{1e3 * figures['wall_s']['median']:.3f}",
        f"{1e3 * figures['client_cpu_s']['median']:.3f}",
        f"{1e3 * server['median']:.3f}" if server else "-",
    )


def ratios_table(found: list[dict[str, Any]]) -> str:
    """A line a pair, a column a batch size: the median ratio of rates and its quartiles."""
    lines = [("rate, median (quartiles)", *(f"batches of {size:,}" for size in found[0]["rate"]))]
    for pair in found:
        cells = (f"{rate['median']:.3g}x ({rate['q1']:.3g} - {rate['q3']:.3g})" for rate in pair["rate"].values())
        lines.append((f"  {pair['method']} against {pair['against']}", *cells))
    return aligned(lines)


def goals_table(found: list[dict[str, Any]]) -> str:
    """A line a pair that has goals, a column a batch size: the median, the goal, and whether it was met."""
    with_goals = [pair for pair in found if pair["goal"]]
    lines = [("goals, set before", *(f"batches of {size:,}" for size in found[0]["rate"]))]
    for pair in with_goals:
        cells = (
            f"{pair['rate'][size]['median']:.3g}x of {goal:g}x: {'met' if pair['met'][size] else 'MISSED'}"
            for size, goal in pair["goal"].items()
        )
        lines.append((f"  {pair['method']} against {pair['against']}", *cells))
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def plot(path: Path, found: dict[str, Any], title: str) -> None:
    """Rows a second of every method at every batch size, on a logarithmic scale; whiskers are quartiles."""
    plot_all(path, [(found, title)])


def plot_all(path: Path, panels: Sequence[tuple[dict[str, Any], str]]) -> None:
    """A panel for each of several sets of figures, one below the other, with their titles."""
    figure = Figure(figsize=(10, 4.5 * len(panels)), layout="constrained")
    names = dict.fromkeys(name for found, _ in panels for name in found)
    colors = {name: colormaps["tab20"](number) for number, name in enumerate(names)}
    for axes, (found, title) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        _panel(axes, found, title, colors)
    figure.savefig(path, dpi=150)


def _panel(axes: Any, found: dict[str, Any], title: str, colors: dict[str, Any]) -> None:
    sizes = list(next(iter(found.values())))
    width = 0.8 / len(found)
    for number, (name, by_size) in enumerate(found.items()):
        rates = [by_size[size]["rows_per_s"] for size in sizes]
        medians = np.array([rate["median"] for rate in rates])
        whiskers = np.abs(np.array([[rate["q1"] for rate in rates], [rate["q3"] for rate in rates]]) - medians)
        places = np.arange(len(sizes)) + (number - (len(found) - 1) / 2) * width
        axes.bar(places, medians, width, yerr=whiskers, label=name, color=colors[name], error_kw={"linewidth": 0.8})
    slowest = min(by_size[size]["rows_per_s"]["q1"] for by_size in found.values() for size in sizes)
    axes.set_xticks(range(len(sizes)), [f"batches of {size:,}" for size in sizes])
    axes.set(yscale="log", ylim=(slowest / 2, None), ylabel="rows a second", title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))


def unused(path: Path) -> Path:
    """This path, or the first of ``NAME-2``, ``NAME-3`` that is not there: figures are never written over others."""
    taken = (path.with_stem(f"{path.stem}-{number}") for number in itertools.count(2))
    path.parent.mkdir(parents=True, exist_ok=True)
    return next(free for free in itertools.chain([path], taken) if not free.exists())
