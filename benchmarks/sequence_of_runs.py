"""What cached labels save in a sequence of runs: every experiment of `docs/sequences-of-runs.md`, in one command.

    python benchmarks/sequence_of_runs.py [--out FOLDER] [--part PART]… [--jobs N] [--quick]

What is run was written down before: `benchmarks/sequence/plan.py` has tasks, arms, seeds and targets. Each replicate is
a file in the folder, and is not run again while that is there: stopped, the same line goes on. Tables and figures are
made from these files alone, by `--report`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks.machine import machine
from benchmarks.sequence.labelled import shop
from benchmarks.sequence.parts import ALONE, PARTS
from benchmarks.sequence.plan import FULL, QUICK, Plan
from benchmarks.sequence.tasks import make_small

ENVIRONMENT = {
    # One thread each, in every library: two replicates at once must not wait for each other.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Memory of logits is kept and not given back at each step: faulting it in anew was a tenth of a language step.
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
"""Of each replicate's process."""

RESULTS = Path(__file__).resolve().parent / "results" / "sequence-of-runs"


def units(plan: Plan, parts: tuple[str, ...]) -> Iterator[tuple[str, str, int]]:
    """Part, task and seed of all that is to be run: what must not share the machine comes last."""
    for part in sorted(parts, key=lambda name: name in ALONE):
        yield from ((part, name, seed) for name, seed in PARTS[part].units(plan))


def file_of(out: Path, unit: tuple[str, str, int]) -> Path:
    """Where a replicate is kept."""
    return out / f"{'-'.join(map(str, unit))}.json"


def commit() -> str:
    """The commit that is run, with a plus where its code differs from it; the page, which this command writes, does not
    count.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno", "--", ":/", ":!/docs", ":!/benchmarks/results"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() + "+" * bool(changed.stdout.strip())


def run_unit(plan: Plan, unit: tuple[str, str, int], out: Path) -> float:
    """Run one replicate in this process, and keep it; gives the seconds that it took."""
    part, name, seed = unit
    torch.set_num_threads(1)
    if plan.quick:
        make_small()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sequence-") as folder, shop(Path(folder)) as open_shop:
        found: dict[str, Any] = PARTS[part].run(plan, name, seed, open_shop)
    seconds = time.perf_counter() - began
    told = {"part": part, "task": name, "seed": seed, "quick": plan.quick, "commit": commit(), "seconds": seconds}
    path = file_of(out, unit)
    staged = path.with_suffix(f".{os.getpid()}")
    staged.write_text(json.dumps(told | {"machine": machine(), "found": found}, separators=(",", ":")) + "\n")
    staged.rename(path)
    return seconds


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results.")
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Only this part; may be repeated.")
@click.option("--jobs", default=2, show_default=True, help="Replicates at once; what is timed closely runs alone.")
@click.option("--quick", is_flag=True, help="A smoke run, whose figures mean nothing.")
@click.option("--report", "only_report", is_flag=True, help="Run nothing: tables and figures of what is there.")
@click.option("--unit", nargs=3, type=(str, str, int), hidden=True)
def main(
    out: Path,
    parts: tuple[str, ...],
    jobs: int,
    quick: bool,
    only_report: bool,
    unit: tuple[str, str, int] | None,
) -> None:
    """Run what is not there yet, and make the tables and figures anew."""
    from benchmarks.sequence import report

    plan = QUICK if quick else FULL
    out.mkdir(parents=True, exist_ok=True)
    if unit is not None:
        run_unit(plan, unit, out)
        return
    if not only_report:
        _run_all(plan, parts or tuple(PARTS), jobs, out)
    report.write(plan, out)
    click.echo(f"tables and figures are in {out}")


def _run_all(plan: Plan, parts: tuple[str, ...], jobs: int, out: Path) -> None:
    missing = [unit for unit in units(plan, parts) if not file_of(out, unit).exists()]
    click.echo(f"{len(missing)} replicates to run")
    if plan.quick:
        for unit in missing:
            click.echo(f"{' '.join(map(str, unit))}: {run_unit(plan, unit, out):.0f} s")
        return
    together = [unit for unit in missing if unit[0] not in ALONE]
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(jobs))
        for unit, seconds in zip(
            together, threads.map(lambda unit: _in_a_process(plan, unit, out), together), strict=True
        ):
            click.echo(f"{' '.join(map(str, unit))}: {seconds:.0f} s")
    for unit in missing:
        if unit[0] in ALONE:
            click.echo(f"{' '.join(map(str, unit))}: {_in_a_process(plan, unit, out):.0f} s")


def _in_a_process(plan: Plan, unit: tuple[str, str, int], out: Path) -> float:
    """A replicate in a process of its own: each begins with nothing in memory."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--out", str(out), "--unit", *map(str, unit)]
    environment = os.environ | ENVIRONMENT
    done = subprocess.run(
        [*command, *(["--quick"] if plan.quick else [])], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise click.ClickException(f"{' '.join(map(str, unit))}: {done.stderr.strip()[-2000:]}")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
