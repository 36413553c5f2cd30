"""How fast `logitcache verify` hashes a label set, beside reading it and beside `sha256sum`, cold and in memory.

    python benchmarks/verify.py [--rows N] [--rounds N] [--quick] [--out FILE.json]

In each round every method takes the same files once with nothing of them in memory and once with all of it there, in
an order that is rotated from round to round; ratios are taken within rounds. The peers: reading the files and nothing
else, in as many threads (no hash is faster), and `sha256sum` of coreutils in as many processes, the largest file first.

The goals, set before it was measured: cold, verifying takes at most 1.15 times what the slower of these two takes, the
disk or the processors; in memory it takes no longer than `sha256sum`; and two threads are 1.7 times as fast as one
where there are two processors. It needs root, to take files out of memory that others may hold, and a disk behind
TMPDIR.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks.machine import machine
from benchmarks.pages import evict, resident
from benchmarks.report import aligned, spread, unused
from benchmarks.rows import RECORD, Source, write_label_set

from logitcache.storage import LocalLabelSet

BLOCK_BYTES = 1 << 20
COLD_TIMES, FASTER_WITH_TWO = 1.15, 1.7

VERIFY, ONE, READ, SHA256SUM = "verify", "verify, 1 thread", "read", "sha256sum"


def read(files: list[Path], threads: int) -> None:
    """Read all files, in so many threads, and nothing else."""

    def one(file: Path) -> None:
        handle = os.open(file, os.O_RDONLY)
        offset, into = 0, bytearray(BLOCK_BYTES)
        while count := os.preadv(handle, [into], offset):
            offset += count
        os.close(handle)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, files))


def sha256sum(files: list[Path], processes: int) -> None:
    """Hash all files with coreutils, in so many processes."""
    names = "\0".join(map(str, files)).encode()
    command = ["xargs", "-0", "-n", "1", "-P", str(processes), "sha256sum"]
    subprocess.run(command, input=names, check=True, stdout=subprocess.DEVNULL)


def verify(path: Path, threads: int) -> None:
    """What the command does, once the label set is open."""
    label_set = LocalLabelSet(path)
    assert all(report.ok for report in label_set.verify_all(threads=threads))
    label_set.close()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", default=16_000_000, show_default=True, help="Rows of the label set, 144 bytes each.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--quick", is_flag=True, help="A smoke run: 200,000 rows, 1 round; its figures mean nothing.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
def main(rows: int, rounds: int, quick: bool, out: Path | None) -> None:
    """Measure and print."""
    if quick:
        rows, rounds = 200_000, 1
    threads = min(os.cpu_count() or 1, 8)
    with tempfile.TemporaryDirectory() as folder:
        path = write_label_set(Path(folder) / "store" / "set", Source(rows))
        # Opening it hashes what is not known to be sound: not what is measured here. Files so young are not remembered.
        time.sleep(2.5)
        verify(path, threads)
        files = sorted((file for file in path.rglob("c.*")), key=lambda file: -file.stat().st_size)
        subprocess.run(["sync"], check=True)
        methods: dict[str, Callable[[], None]] = {
            VERIFY: partial(verify, path, threads),
            ONE: partial(verify, path, 1),
            READ: partial(read, files, threads),
            SHA256SUM: partial(sha256sum, files, threads),
        }
        seconds: dict[str, dict[str, list[float]]] = {}
        for state in ("cold", "warm"):
            seconds[state] = {name: [] for name in methods}
        found_cold = 0.0
        for number in range(rounds):
            names = [*methods][number % len(methods) :] + [*methods][: number % len(methods)]
            for state, times in seconds.items():
                for name in names:
                    if state == "cold":
                        evict(files, os.getpid())
                        found_cold = max(found_cold, resident(files))
                    else:
                        read(files, threads)
                    began = time.perf_counter()
                    methods[name]()
                    times[name].append(time.perf_counter() - began)
        size = sum(file.stat().st_size for file in files)
    result = figures(seconds, size) | {"threads": threads, "rows": rows, "rounds": rounds, "machine": machine()}
    result |= {"benchmark": "verify", "in_memory_before_cold": found_cold, "goals": goals(result["times"], threads)}
    result["when"] = datetime.now(UTC).isoformat(timespec="seconds")
    rates = result["bytes_per_s"]
    lines = [[name, *(f"{rates[state][name]['median'] / 1e9:.2f}" for state in seconds)] for name in methods]
    click.echo(aligned([["", "cold, GB/s", "in memory, GB/s"], *lines]))
    for told, ratio in result["times"].items():
        click.echo(f"{told}: {ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})")
    for goal, met in result["goals"].items():
        click.echo(f"{'met' if met else 'MISSED'}: {goal}")
    if out is not None:
        free = unused(out)
        free.write_text(json.dumps(result, indent=1) + "\n")
        click.echo(f"written: {free}")


def figures(seconds: dict[str, dict[str, list[float]]], size: int) -> dict[str, Any]:
    """Rates and ratios of the rounds."""
    cold, warm = seconds["cold"], seconds["warm"]
    slower = [max(pair) for pair in zip(cold[READ], cold[SHA256SUM], strict=True)]

    def times(ours: list[float], peers: list[float]) -> dict[str, float]:
        return spread(mine / peer for mine, peer in zip(ours, peers, strict=True))

    return {
        "bytes": size,
        "record_bytes": RECORD.itemsize,
        "bytes_per_s": {
            state: {name: spread(size / each for each in every) for name, every in methods.items()}
            for state, methods in seconds.items()
        },
        "times": {
            "cold, of the slower of reading and sha256sum": times(cold[VERIFY], slower),
            "in memory, of sha256sum": times(warm[VERIFY], warm[SHA256SUM]),
            "in memory, one thread of all": times(warm[ONE], warm[VERIFY]),
        },
    }


def goals(times: dict[str, dict[str, float]], threads: int) -> dict[str, bool]:
    """Which of the goals were met; that of two threads where there are as many processors."""
    cold, warm, one = (each["median"] for each in times.values())
    met = {
        f"cold, at most {COLD_TIMES} times the slower of reading and sha256sum": cold <= COLD_TIMES,
        "in memory, no longer than sha256sum": warm <= 1.0,
    }
    if threads == 2:
        met[f"two threads {FASTER_WITH_TWO} times as fast as one"] = one >= FASTER_WITH_TWO
    return met


if __name__ == "__main__":
    main()
