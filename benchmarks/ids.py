"""What ids of a dataset's own cost: the same rows under ordinals, whole numbers and texts, here and over HTTP.

    python benchmarks/ids.py [--examples N] [--rounds N] [--quick] [--out FILE.json]

The bound, set before it was measured: texts are fetched at no less than half the rate of whole numbers, and whole
numbers at no less than half the rate of ordinals, at a million examples. Texts are given as a list of str, as a
DataLoader collates them, so that hashing them counts. How to read the figures stands in README.md beside this file.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks import report
from benchmarks.machine import machine
from benchmarks.rows import Source, write_label_set
from benchmarks.servers import started
from benchmarks.timing import Method, Schedule, measure, warm_up

from logitcache.client import connect
from logitcache.labels.ids import IdKind

BATCH_SIZES = (256, 1024, 4096)
BOUND = 0.5
PAIRS = tuple(
    (f"{place}, {kind}s", f"{place}, {other}s")
    for place in ("local", "HTTP")
    for kind, other in (("text", "integer"), ("integer", "ordinal"))
)


@contextmanager
def opened(folder: Path, examples: int) -> Iterator[list[Method]]:
    """A method for each kind of ids and each place, over label sets with the same rows."""
    sources = [Source(examples, kind) for kind in get_args(IdKind)]
    paths = [write_label_set(folder / "store" / source.ids, source) for source in sources]
    with ExitStack() as stack:
        ours = ("logitcache.server", "serve", "--store", str(folder / "store"), "--port", "0")
        server = stack.enter_context(started(*ours, log=folder / "serve.log"))
        methods = []
        for source, path in zip(sources, paths, strict=True):
            local = stack.enter_context(connect(path))
            remote = stack.enter_context(connect(f"{server.url}/{path.name}"))
            methods.append(Method(f"local, {source.ids}s", local.fetch, prepare=source.given))
            methods.append(Method(f"HTTP, {source.ids}s", remote.fetch, server.pid, prepare=source.given))
        yield methods


def check(methods: list[Method], examples: int, rng: np.random.Generator) -> None:
    """Every method gives the same rows for the same examples.

    Raises:
        ValueError: one does not.
    """
    ordinals = np.concatenate([[0, examples - 1, 0], rng.integers(examples, size=2000)])
    expected = methods[0].fetch(methods[0].prepare(ordinals))
    for method in methods[1:]:
        found = method.fetch(method.prepare(ordinals))
        if not (
            np.array_equal(found.fingerprint, expected.fingerprint) and np.array_equal(found.logits, expected.logits)
        ):
            raise ValueError(f"{method.name} gives other rows: its figures would mean nothing")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--examples", default=1_000_000, show_default=True, type=click.IntRange(min=4096))
@click.option("--rounds", default=25, show_default=True, type=click.IntRange(min=1), help="Rounds that count.")
@click.option("--block-ms", default=100.0, show_default=True, type=click.FloatRange(min=1), help="Length of a block.")
@click.option("--quick", is_flag=True, help="That it runs, not how fast; overrides the sizes above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
def main(examples: int, rounds: int, block_ms: float, quick: bool, out: Path | None) -> None:
    """Compare kinds of ids; a minute or two, and seconds with --quick."""
    if quick:
        examples, rounds, block_ms = 20_000, 3, 5.0
    entropy = np.random.SeedSequence().entropy
    rng = np.random.default_rng(entropy)
    settings = {"examples": examples, "rounds": rounds, "block_ms": block_ms, "entropy": str(entropy)}
    run: dict[str, Any] = {
        "benchmark": "ids",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings | {"batch_sizes": BATCH_SIZES, "bound": BOUND},
        "machine": machine(),
    }
    print(json.dumps(run["settings"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as folder, opened(Path(folder), examples) as methods:
        check(methods, examples, rng)
        warm_up(methods, examples, 16, BATCH_SIZES[-1])
        blocks = measure(methods, examples, Schedule(BATCH_SIZES, rounds, block_ms / 1000), rng, lambda _round: None)
    run["methods"], run["ratios"] = report.figures(blocks), report.ratios(blocks, PAIRS)
    worst = min(rate["median"] for pair in run["ratios"] for rate in pair["rate"].values())
    print(f"\n{report.rates_table(run['methods'])}\n\n{report.ratios_table(run['ratios'])}")
    print(f"\nleast ratio {worst:.2f}, bound {BOUND}: {'held' if worst >= BOUND else 'MISSED'}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
