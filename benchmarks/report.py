"""What was measured, for people and for programs: tables, a JSON value, a plot.

Figures are medians over the rounds, spreads their quartiles. A ratio is taken within each round, so that what slowed
the whole machine for a while cancels out; its median and quartiles are over the rounds. Knows nothing of how the blocks
were made.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.timing import Block, Blocks
from matplotlib.figure import Figure

Spread = dict[str, float]


def spread(values: Iterable[float]) -> Spread:
    """Median, quartiles and extremes of one value a round."""
    low, q1, median, q3, high = np.quantile(np.fromiter(values, float), (0, 0.25, 0.5, 0.75, 1)).tolist()
    return {"median": median, "q1": q1, "q3": q3, "min": low, "max": high}


def figures(blocks: Blocks) -> dict[str, Any]:
    """By method and batch size: rows a second, and seconds a batch on the clock and on the processors."""
    return {name: {size: _figures_of(size, rounds) for size, rounds in sizes.items()} for name, sizes in blocks.items()}


def _figures_of(size: int, rounds: list[Block]) -> dict[str, Any]:
    servers = [block.server_cpu_s for block in rounds if block.server_cpu_s is not None]
    return {
        "rows_per_s": spread(size / block.wall_s for block in rounds),
        "wall_s": spread(block.wall_s for block in rounds),
        "client_cpu_s": spread(block.client_cpu_s for block in rounds),
        "server_cpu_s": spread(servers) if servers else None,
        "rounds": [asdict(block) for block in rounds],
    }


def ratios(blocks: Blocks, pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """For each pair: how many times the second's rows a second the first reaches, by batch size."""
    return [
        {
            "method": ours,
            "against": peer,
            "rate": {
                size: spread(
                    theirs.wall_s / mine.wall_s for mine, theirs in zip(rounds, blocks[peer][size], strict=True)
                )
                for size, rounds in blocks[ours].items()
            },
        }
        for ours, peer in pairs
    ]


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
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = list(next(iter(found.values())))
    width = 0.8 / len(found)
    for number, (name, by_size) in enumerate(found.items()):
        rates = [by_size[size]["rows_per_s"] for size in sizes]
        medians = np.array([rate["median"] for rate in rates])
        whiskers = np.abs(np.array([[rate["q1"] for rate in rates], [rate["q3"] for rate in rates]]) - medians)
        places = np.arange(len(sizes)) + (number - (len(found) - 1) / 2) * width
        axes.bar(places, medians, width, yerr=whiskers, label=name, error_kw={"linewidth": 0.8})
    axes.set_xticks(range(len(sizes)), [f"batches of {size:,}" for size in sizes])
    axes.set(yscale="log", ylabel="rows a second", title=title)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)
