"""Rows a second of a label set, here and over HTTP, beside what people use instead, in one run.

    python benchmarks/fetch.py [--only local|http|sequences] [--quick] [--out FILE.json] [--plot FILE.png]

Everything is made in a temporary folder, checked to give the same rows, and measured with a warm page cache. The goals
are in `goals`; how to read the figures stands in README.md beside this file.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks import report, rows, sequences
from benchmarks.goals import PAIRS, Pair, Part, judged, methods_of
from benchmarks.machine import machine
from benchmarks.methods import opened_rows, opened_sequences
from benchmarks.programs import NEEDED
from benchmarks.rows import Arrays, Source
from benchmarks.sequences import Sequences
from benchmarks.timing import Method, Schedule, measure, warm_up

BATCH_SIZES = (256, 1024, 4096)

WARMING_STEP = 16
"""Every store has at least this many rows a 4 KiB page, so fetching each 16th row touches every page."""

CHECKED_IDS = 32
"""How many ids each method is checked with at least, in batches of the largest size."""

SEQUENCES, TOKENS = 512, 2048


@dataclass(frozen=True)
class Subject:
    """What is fetched: some of so many ``ids``, each of ``rows_an_id`` rows."""

    told: str
    ids: int
    rows_an_id: int
    batch_sizes: tuple[int, ...]
    warming_step: int
    opened: Callable[[Path, Collection[str]], AbstractContextManager[list[Method]]]
    expected: Callable[[np.ndarray], Arrays]


def single_rows(count: int) -> Subject:
    """Rows of a pointwise label set."""
    source = Source(count)
    return Subject(
        told=f"{count:,} rows of k = {rows.K} ({rows.RECORD.itemsize} bytes)",
        ids=count,
        rows_an_id=1,
        batch_sizes=BATCH_SIZES,
        warming_step=WARMING_STEP,
        opened=lambda folder, wanted: opened_rows(folder, source, wanted),
        expected=source.arrays,
    )


def whole_sequences(count: int, tokens: int) -> Subject:
    """Sequences of a causal label set, all of one length."""
    source, batch = Sequences(count, tokens), sequences.BATCH
    size = f"{batch * tokens * source.row_bytes / 1e6:.1f} MB a batch of {batch}"
    return Subject(
        told=f"{count:,} sequences of {tokens:,} tokens, k = {sequences.K} ({size})",
        ids=count,
        rows_an_id=tokens,
        batch_sizes=(batch,),
        warming_step=1,
        opened=lambda folder, wanted: opened_sequences(folder, source, wanted),
        expected=source.arrays,
    )


def check(methods: Sequence[Method], subject: Subject, rng: np.random.Generator) -> None:
    """Every method gives the very rows that were stored: first and last ones, duplicates and any order.

    Raises:
        ValueError: one does not.
    """
    size = subject.batch_sizes[-1]
    expected: dict[bytes, Arrays] = {}
    for _ in range(max(1, CHECKED_IDS // size)):
        ids = np.concatenate([[0, subject.ids - 1, 0], rng.integers(subject.ids, size=size - 3)])
        for method in methods:
            asked = method.prepare(ids)
            key = asked.tobytes()
            if key not in expected:
                expected[key] = subject.expected(asked)
            _check_batch(method, method.fetch(asked), expected[key])


def _check_batch(method: Method, given: Any, expected: Arrays) -> None:
    for name, wanted in expected.items():
        found = given[name] if isinstance(given, dict | np.ndarray) else getattr(given, name)
        # What lies in a file sequence after sequence has an axis for them.
        if found.dtype != wanted.dtype or not np.array_equal(found.reshape(wanted.shape), wanted):
            raise ValueError(f"{method.name} gives other {name} than were stored: its figures would mean nothing")


def measured(
    subject: Subject, pairs: Sequence[Pair], wanted: Sequence[str], schedule: Schedule, rng: np.random.Generator
) -> dict[str, Any]:
    """Write, check, warm and measure the wanted methods; prints the figures and gives them."""
    print(f"\n{subject.told}", flush=True)
    began = time.perf_counter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="logitcache-bench-")))
        methods = stack.enter_context(subject.opened(folder, wanted))
        written = time.perf_counter()
        check(methods, subject, rng)
        warm_up(methods, subject.ids, subject.warming_step, subject.batch_sizes[-1])
        warm = time.perf_counter()
        print(f"written in {written - began:.0f} s, checked and warmed in {warm - written:.0f} s", flush=True)
        blocks = measure(methods, subject.ids, schedule, rng, on_round=_progress(schedule.rounds))
    there = [pair for pair in pairs if pair.method in blocks and pair.against in blocks]
    ratios = report.ratios(blocks, [(pair.method, pair.against) for pair in there])
    figures: dict[str, Any] = {"methods": report.figures(blocks, subject.rows_an_id), "ratios": judged(ratios, there)}
    print(f"\n{report.rates_table(figures['methods'])}\n\n{report.ratios_table(ratios)}")
    print(f"\n{report.goals_table(figures['ratios'])}", flush=True)
    return {"subject": subject.told} | figures


def _progress(rounds: int) -> Callable[[int], None]:
    def on_round(round: int) -> None:
        if sys.stderr.isatty():
            print(f"\rround {round + 1} of {rounds}", end="" if round + 1 < rounds else "\n", file=sys.stderr)

    return on_round


def told(run: dict[str, Any]) -> str:
    """Settings and machine as three lines."""
    settings, here = run["settings"], run["machine"]
    libraries = ", ".join(f"{name} {number}" for name, number in (here["libraries"] | run["programs"]).items())
    accelerated = ", ".join(f"{'with' if here[name] else 'without'} {name}" for name in ("uvloop", "httptools"))
    return (
        f"warm; {settings['rounds']} rounds; random ids from entropy {settings['entropy']}\n"
        f"{here['cpu']}, {here['cores']} cores, {here['kernel']}, load average before: {here['load_average_before']}\n"
        f"Python {here['python']}, {libraries}, {accelerated}"
    )


def installed(wanted: Sequence[str]) -> list[str]:
    """The wanted methods but for those that need a program which is not here; says so and how to get it."""
    missing = {name: program for name, program in NEEDED.items() if name in wanted and program.path is None}
    for name, program in missing.items():
        print(f"{name} is left out: {program.advice}")
    return [name for name in wanted if name not in missing]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, type=click.Choice(get_args(Part)), help="Only this part; may be repeated.")
@click.option("--rows", "count", default=4_000_000, show_default=True, type=click.IntRange(min=4096), help="Rows.")
@click.option("--rounds", default=25, show_default=True, type=click.IntRange(min=1), help="Rounds that count.")
@click.option("--block-ms", default=100.0, show_default=True, type=click.FloatRange(min=1), help="Length of a block.")
@click.option("--quick", is_flag=True, help="That it runs, not how fast; overrides the sizes.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the rates as PNG.")
def main(
    only: tuple[Part, ...],
    count: int,
    rounds: int,
    block_ms: float,
    quick: bool,
    out: Path | None,
    plot: Path | None,
) -> None:
    """Compare fetching from a label set with its peers; some minutes, and seconds with --quick.

    What --out and --plot name is never written over: a number is added.
    """
    sequence_count, tokens = SEQUENCES, TOKENS
    if quick:
        count, sequence_count, tokens, rounds, block_ms = 20_000, 16, 128, 3, 5.0
    parts: tuple[Part, ...] = only or get_args(Part)
    subjects = {
        "rows": (single_rows(count), [pair for part in ("local", "http") if part in parts for pair in PAIRS[part]]),
        "sequences": (
            whole_sequences(sequence_count, tokens),
            list(PAIRS["sequences"] if "sequences" in parts else ()),
        ),
    }
    wanted = installed(methods_of(pair for _, pairs in subjects.values() for pair in pairs))
    entropy = np.random.SeedSequence().entropy
    run: dict[str, Any] = {
        "benchmark": "fetch",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {"parts": parts, "rounds": rounds, "block_ms": block_ms, "entropy": str(entropy)},
        "machine": machine(),
        "programs": {program.name: program.version for name, program in NEEDED.items() if name in wanted},
    }
    print(told(run), flush=True)
    rng = np.random.default_rng(entropy)
    for name, (subject, pairs) in subjects.items():
        if pairs:
            schedule = Schedule(subject.batch_sizes, rounds, block_ms / 1000)
            run[name] = measured(subject, pairs, wanted, schedule, rng)
    if out is not None:
        (path := report.unused(out)).write_text(json.dumps(run, indent=1) + "\n")
        print(f"\nwritten: {path}")
    if plot is not None:
        measured_ones = [run[name] for name in subjects if name in run]
        cores = run["machine"]["cores"]
        panels = [(one["methods"], f"{one['subject']}, random ids, {cores} cores") for one in measured_ones]
        report.plot_all(path := report.unused(plot), panels)
        print(f"drawn: {path}")


if __name__ == "__main__":
    main()
