"""Rows whose pages are not in memory: a label set, here and over HTTP, beside a memmap with and without reading ahead.

    python benchmarks/cold.py [--rows N] [--batch N] [--rounds N] [--quick] [--out FILE.json]

Before every batch of every method all files are taken out of memory, as `pages` tells, and ``mincore`` is asked whether
they are: a batch before which more than one page in a hundred was there does not count. What is measured is thus a
batch's first reading, in milliseconds and in bytes that the disk was asked for by the process that reads.

The goals, set before it was measured: a label set in this process gives a cold batch at least five times as fast as a
memmap of the same rows with the kernel's reading ahead, and while a server reads cold batches 99 of 100 polls of its
``/healthz``, one each 10 ms, are answered within 50 ms of when they were due. The kernel's reading ahead is a setting
of the device and is recorded: where it is large, so is the memmap's handicap. The memmap with MADV_RANDOM has none.

It needs root, since the server's pages are to be taken out of memory too, and a disk behind TMPDIR.
"""

import http.client
import json
import math
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks.machine import machine
from benchmarks.pages import bytes_read, evict, read_ahead_kib, resident
from benchmarks.peers import NUMPY_FILES, write_numpy_files
from benchmarks.report import aligned, spread, unused
from benchmarks.rows import RECORD, K, Source, write_label_set
from benchmarks.servers import started

from logitcache.client import Labels, connect

PLAIN, RANDOM, LOCAL, HTTP = "memmap", "memmap, MADV_RANDOM", "local", "HTTP"
FASTER = 5.0
POLL_S, ANSWERED_MS = 0.010, 50.0
COLD = 0.01
"""Of a method's pages at most this part may be in memory before a batch that counts."""


@dataclass
class Method:
    """A way to read a batch: the process that reads, the files that it reads, and what each counted batch took."""

    name: str
    fetch: Callable[[np.ndarray], Any]
    pid: int
    files: list[Path]
    seconds: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)


class Poller(threading.Thread):
    """Asks for ``/healthz`` each `POLL_S` while `asking` is set.

    A poll's milliseconds are counted from when it was due, so that one slow answer is not the only one that counts.
    """

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        self.asking, self.stopped = threading.Event(), threading.Event()
        self.milliseconds: list[float] = []

    def run(self) -> None:
        """Until stopped."""
        while not self.stopped.is_set():
            self.asking.wait()
            due = time.perf_counter()
            while self.asking.is_set():
                self._connection.request("GET", "/healthz")
                self._connection.getresponse().read()
                self.milliseconds.append(1000 * (time.perf_counter() - due))
                due += POLL_S
                time.sleep(max(0.0, due - time.perf_counter()))

    @contextmanager
    def polling(self) -> Iterator[None]:
        """Poll meanwhile."""
        self.asking.set()
        try:
            yield
        finally:
            self.asking.clear()

    def stop(self) -> None:
        """End the thread."""
        self.stopped.set()
        self.asking.set()
        self.asking.clear()


def mapped(folder: Path, *, random: bool) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Rows by one ``take`` from each mapped file."""
    stored = {}
    for name in NUMPY_FILES:
        array: Any = np.load(folder / f"{name}.npy", mmap_mode="r")
        if random:
            array._mmap.madvise(mmap.MADV_RANDOM)
        stored[name] = np.asarray(array)
    return lambda ids: {name: array.take(ids, axis=0) for name, array in stored.items()}


def wait_until_verified(labels: Labels) -> None:
    """Return when every shard is mapped, so that no batch has to wait for that."""
    while (shards := labels.describe().shards).verified < shards.total:
        time.sleep(0.05)


def check(methods: list[Method], rows: int, rng: np.random.Generator) -> None:
    """Every method gives the same rows.

    Raises:
        ValueError: one does not.
    """
    ids = rng.integers(rows, size=1000)
    expected = methods[0].fetch(ids)
    for method in methods:
        found = method.fetch(ids)
        for name in ("indices", "logits"):
            array = found[name] if isinstance(found, dict) else getattr(found, name)
            if not np.array_equal(array, expected[name]):
                raise ValueError(f"{method.name} gives other {name}: its figures would mean nothing")


def measure(methods: list[Method], poller: Poller, rows: int, batch: int, rounds: int, rng: np.random.Generator) -> int:
    """Read a batch by every method in each round, each of them cold; how many were not, and do not count."""
    warm = 0
    files = sorted({path for method in methods for path in method.files})
    server = next(method.pid for method in methods if method.name == HTTP)
    for round in range(rounds):
        first = round % len(methods)
        for method in (*methods[first:], *methods[:first]):
            ids = rng.integers(rows, size=batch)
            evict(files, server)
            share = resident(method.files)
            read, began = bytes_read(method.pid), time.perf_counter()
            if method.name == HTTP:
                with poller.polling():
                    method.fetch(ids)
            else:
                method.fetch(ids)
            seconds, read = time.perf_counter() - began, bytes_read(method.pid) - read
            method.resident.append(share)
            if share > COLD:
                warm += 1
            else:
                method.seconds.append(seconds)
                method.bytes.append(read)
    return warm


def figures(methods: list[Method]) -> dict[str, Any]:
    """By method: milliseconds and bytes of a batch, and what was in memory before it."""
    return {
        method.name: {
            "batch_ms": spread(1000 * value for value in method.seconds),
            "read_bytes": spread(method.bytes),
            "resident": max(method.resident),
            "counted": len(method.seconds),
            "seconds": method.seconds,
        }
        for method in methods
    }


def told(found: dict[str, Any]) -> str:
    """A line a method."""
    plain = found[PLAIN]["batch_ms"]["median"]
    lines = [("a cold batch", "ms (quartiles)", "MB read", "at most resident", f"times as fast as {PLAIN}")]
    for name, each in found.items():
        ms = each["batch_ms"]
        lines.append(
            (
                f"  {name}",
                f"{ms['median']:.1f} ({ms['q1']:.1f} - {ms['q3']:.1f})",
                f"{each['read_bytes']['median'] / 1e6:.2f}",
                f"{each['resident']:.2%}",
                f"{plain / ms['median']:.2f}",
            )
        )
    return aligned(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--rows", default=20_000_000, show_default=True, type=click.IntRange(min=4096), help="Rows stored, twice."
)
@click.option("--batch", default=1024, show_default=True, type=click.IntRange(min=1), help="Rows a batch.")
@click.option("--rounds", default=60, show_default=True, type=click.IntRange(min=1), help="Batches of every method.")
@click.option("--quick", is_flag=True, help="That it runs, cold or not; overrides the sizes above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
def main(rows: int, batch: int, rounds: int, quick: bool, out: Path | None) -> None:
    """Compare reading cold rows; some minutes and 300 bytes of disk a row, and seconds with --quick."""
    if quick:
        rows, batch, rounds = 200_000, 256, 2
    source, entropy = Source(rows), np.random.SeedSequence().entropy
    rng = np.random.default_rng(entropy)
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as name, ExitStack() as stack:
        folder = Path(name).resolve()
        settings = {
            "rows": rows,
            "k": K,
            "row_bytes": RECORD.itemsize,
            "batch": batch,
            "rounds": rounds,
            "entropy": str(entropy),
            "read_ahead_kib": read_ahead_kib(folder),
        }
        run: dict[str, Any] = {
            "benchmark": "cold",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings,
            "machine": machine(),
        }
        print(json.dumps(settings), flush=True)
        label_set = write_label_set(folder / "store" / "rows", source)
        arrays = write_numpy_files(folder / "files", source)
        plain_files, our_files = sorted(arrays.iterdir()), sorted(label_set.glob("*/c.*"))
        os.sync()
        ours = ("logitcache.server", "serve", "--store", str(label_set.parent), "--port", "0")
        server = stack.enter_context(started(*ours, log=folder / "serve.log"))
        local = stack.enter_context(connect(label_set))
        remote = stack.enter_context(connect(f"{server.url}/{label_set.name}"))
        methods = [
            Method(PLAIN, mapped(arrays, random=False), os.getpid(), plain_files),
            Method(RANDOM, mapped(arrays, random=True), os.getpid(), plain_files),
            Method(LOCAL, local.fetch, os.getpid(), our_files),
            Method(HTTP, remote.fetch, server.pid, our_files),
        ]
        for labels in (local, remote):
            wait_until_verified(labels)
        check(methods, rows, rng)
        poller = Poller(server.url)
        poller.start()
        warm = measure(methods, poller, rows, batch, rounds, rng)
        poller.stop()
    if warm and not quick:
        sys.exit(f"{warm} of {4 * rounds} batches were not cold: put TMPDIR on a disk, and leave the files alone")
    if not all(method.seconds for method in methods):
        print("the files could not be taken out of memory: there are no figures")
        run |= {"methods": {method.name: None for method in methods}, "warm_batches": warm}
    else:
        run |= {"methods": figures(methods), "warm_batches": warm} | _goals(methods, poller)
        print(f"\n{told(run['methods'])}\n\n{json.dumps(run['healthz'])}\n{json.dumps(run['goals'])}")
    if out is not None:
        (path := unused(out)).write_text(json.dumps(run, indent=1) + "\n")
        print(f"written: {path}")


def _goals(methods: list[Method], poller: Poller) -> dict[str, Any]:
    plain, _, local, _ = (float(np.median(method.seconds)) for method in methods)
    p50, p99, longest = np.quantile(poller.milliseconds, (0.5, 0.99, 1)).tolist()
    return {
        "healthz": {"polls": len(poller.milliseconds), "p50_ms": p50, "p99_ms": p99, "max_ms": longest},
        "goals": {
            f"local {FASTER:g} times as fast as a memmap": plain / local >= FASTER,
            f"99 of 100 polls within {ANSWERED_MS:g} ms": p99 <= ANSWERED_MS and math.isfinite(p99),
        },
    }


if __name__ == "__main__":
    main()
