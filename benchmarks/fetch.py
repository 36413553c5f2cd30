"""Rows a second of a local label set and of one over HTTP, beside a memmap, LMDB and a JSON endpoint, in one run.

    python benchmarks/fetch.py [--rows N] [--rounds N] [--quick] [--out FILE.json] [--plot FILE.png]

Everything is made in a temporary folder, checked to give the same rows, and measured with a warm page cache. How to
read the figures stands in README.md beside this file.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks import peers, report
from benchmarks.machine import machine
from benchmarks.rows import CLASSES, FIELDS, RECORD, K, Source, write_label_set
from benchmarks.servers import started
from benchmarks.timing import Method, Schedule, measure, warm_up

from logitcache.client import connect

BATCH_SIZES = (256, 1024, 4096)
PAIRS = (
    ("local", "memmap"),
    ("local", "LMDB"),
    ("HTTP", "LMDB"),
    ("HTTP", "JSON"),
    ("HTTP", "JSON, flat"),
)
"""Of which methods ratios are printed: the first against the second."""

WARMING_STEP = 16
"""Every store has at least this many rows a 4 KiB page, so fetching each 16th row touches every page."""


@contextmanager
def opened(folder: Path, source: Source) -> Iterator[list[Method]]:
    """Every method, ready to fetch, its server running; what they store is written into ``folder`` first."""
    label_set = write_label_set(folder / "store" / "rows", source)
    files = peers.write_numpy_files(folder / "files", source)
    database = peers.write_lmdb(folder / "rows.lmdb", source)
    ours = ("logitcache.server", "serve", "--store", str(label_set.parent), "--port", "0")
    theirs = ("benchmarks.json_endpoint", str(files))
    with ExitStack() as stack:
        server = stack.enter_context(started(*ours, log=folder / "serve.log"))
        endpoint = stack.enter_context(started(*theirs, log=folder / "endpoint.log"))
        local = stack.enter_context(connect(label_set))
        remote = stack.enter_context(connect(f"{server.url}/{label_set.name}"))
        client = stack.enter_context(httpx.Client(base_url=endpoint.url, timeout=60, trust_env=False))
        yield [
            Method("memmap", peers.memmap(files)),
            Method("local", local.fetch),
            Method("LMDB", peers.open_lmdb(database)),
            Method("HTTP", remote.fetch, server.pid),
            Method("JSON", peers.json_endpoint(client, "/nested"), endpoint.pid),
            Method("JSON, flat", peers.json_endpoint(client, "/flat"), endpoint.pid),
        ]


def check(methods: Sequence[Method], source: Source, rng: np.random.Generator) -> None:
    """Every method gives the very rows that were stored: first and last ones, duplicates and any order.

    Raises:
        ValueError: one does not.
    """
    edges = np.array([0, source.rows - 1, 0])
    ids = np.concatenate([edges, rng.integers(source.rows, size=BATCH_SIZES[-1] - len(edges))])
    expected = source.records(ids)
    for method in methods:
        rows = method.fetch(ids)
        for name in FIELDS:
            found = rows[name] if isinstance(rows, dict | np.ndarray) else getattr(rows, name)
            if found.dtype != expected[name].dtype or not np.array_equal(found, expected[name]):
                raise ValueError(f"{method.name} gives other {name} than were stored: its figures would mean nothing")


def told(run: dict[str, Any]) -> str:
    """Settings and machine as three lines."""
    settings, here = run["settings"], run["machine"]
    libraries = ", ".join(f"{name} {number}" for name, number in here["libraries"].items())
    accelerated = ", ".join(f"{'with' if here[name] else 'without'} {name}" for name in ("uvloop", "httptools"))
    return (
        f"{settings['rows']:,} rows of k = {K} ({RECORD.itemsize} bytes), warm; {settings['rounds']} rounds; "
        f"random ids from entropy {settings['entropy']}\n"
        f"{here['cpu']}, {here['cores']} cores, {here['kernel']}, load average before: {here['load_average_before']}\n"
        f"Python {here['python']}, {libraries}, {accelerated}"
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", default=400_000, show_default=True, type=click.IntRange(min=4096), help="Rows that are stored.")
@click.option("--rounds", default=25, show_default=True, type=click.IntRange(min=1), help="Rounds that count.")
@click.option("--block-ms", default=100.0, show_default=True, type=click.FloatRange(min=1), help="Length of a block.")
@click.option("--quick", is_flag=True, help="That it runs, not how fast; overrides the sizes above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the rates as PNG.")
def main(rows: int, rounds: int, block_ms: float, quick: bool, out: Path | None, plot: Path | None) -> None:
    """Compare fetching from a label set with its peers; a minute or two, and seconds with --quick."""
    if quick:
        rows, rounds, block_ms = 20_000, 3, 5.0
    for path in filter(None, (out, plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    source, schedule = Source(rows), Schedule(BATCH_SIZES, rounds, block_ms / 1000)
    entropy = np.random.SeedSequence().entropy
    rng = np.random.default_rng(entropy)
    run: dict[str, Any] = {
        "benchmark": "fetch",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            "rows": rows,
            "k": K,
            "classes": CLASSES,
            "row_bytes": RECORD.itemsize,
            "batch_sizes": BATCH_SIZES,
            "rounds": rounds,
            "block_ms": block_ms,
            "entropy": str(entropy),
        },
        "machine": machine(),
    }
    print(told(run), flush=True)
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as folder, opened(Path(folder), source) as methods:
        check(methods, source, rng)
        warm_up(methods, rows, WARMING_STEP, BATCH_SIZES[-1])
        blocks = measure(methods, rows, schedule, rng, on_round=_progress(rounds))
    run["methods"], run["ratios"] = report.figures(blocks), report.ratios(blocks, PAIRS)
    print(f"\n{report.rates_table(run['methods'])}\n\n{report.ratios_table(run['ratios'])}")
    if out is not None:
        out.write_text(json.dumps(run, indent=1) + "\n")
    if plot is not None:
        report.plot(plot, run["methods"], f"{rows:,} rows, k = {K}, random ids, {run['machine']['cores']} cores")


def _progress(rounds: int) -> Callable[[int], None]:
    def on_round(round: int) -> None:
        if sys.stderr.isatty():
            print(f"\rround {round + 1} of {rounds}", end="" if round + 1 < rounds else "\n", file=sys.stderr)

    return on_round


if __name__ == "__main__":
    main()
