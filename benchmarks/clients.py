"""One client process against eight at once on one server: is each of them served, and does the server lose by it?

    python benchmarks/clients.py [--rows N] [--clients N] [--batch N] [--rounds N] [--quick] [--out FILE.json]

Each client is a process of its own with its own `connect(URL)`; all of them stay connected. In every round first one of
them fetches for some seconds, another one in each round, and then all of them together for as long, or the other way
round. The goals, set before it was measured: in the median round the slowest client reaches at least the mean of the
eight divided by 1.5, and all together fetch at least as many rows a second as the single one did.
"""

import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script


from benchmarks.machine import machine
from benchmarks.report import aligned, spread, unused
from benchmarks.rows import RECORD, K, Source, write_label_set
from benchmarks.servers import cpu_clock, started

from logitcache.client import connect

SLOWEST, TOGETHER = 1.5, 1.0
AHEAD_S = 0.1
"""How long after it was told a client begins: all of them have been told by then."""


def client(told: Connection, url: str, rows: int, batch: int, seed: int) -> None:
    """Fetch from one moment of the monotonic clock to another, whenever told so; a process's main function.

    Answers with the milliseconds of each batch that ended in time.
    """
    rng = np.random.default_rng(seed)
    with connect(url) as labels:
        labels.fetch(rng.integers(rows, size=batch))
        told.send("ready")
        while (span := told.recv()) is not None:
            begin, end = span
            milliseconds = []
            time.sleep(max(0.0, begin - time.monotonic()))
            while (began := time.monotonic()) < end:
                labels.fetch(rng.integers(rows, size=batch))
                if (ended := time.monotonic()) <= end:
                    milliseconds.append(1000 * (ended - began))
            told.send(milliseconds)


@contextmanager
def clients(count: int, url: str, rows: int, batch: int, seeds: list[int]) -> Iterator[list[Connection]]:
    """So many client processes, connected and warm, until the context ends."""
    spawn = multiprocessing.get_context("spawn")  # as a job starts them: each imports and connects by itself
    connections, processes = [], []
    for number in range(count):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=client, args=(theirs, url, rows, batch, seeds[number]), daemon=True)
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    try:
        for connection in connections:
            connection.recv()
        yield connections
        for connection in connections:
            connection.send(None)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()


def fetch_together(some: list[Connection], seconds: float, server: int) -> dict[str, Any]:
    """Batches of each client within the same seconds, and what the server's processor time was meanwhile."""
    begin = time.monotonic() + AHEAD_S
    cpu_s = cpu_clock(server)
    began_s = cpu_s()
    for connection in some:
        connection.send((begin, begin + seconds))
    batches = [connection.recv() for connection in some]
    return {
        "batches": [len(each) for each in batches],
        "p99_ms": [float(np.quantile(each, 0.99)) if each else None for each in batches],
        "server_cpu_s": cpu_s() - began_s,
    }


def figures(rounds: list[dict[str, Any]], batch: int, seconds: float) -> dict[str, Any]:
    """Rows a second of the single client and of all, how far behind the slowest is, by round and over the rounds."""
    single = [batch * sum(each["one"]["batches"]) / seconds for each in rounds]
    together = [batch * sum(each["all"]["batches"]) / seconds for each in rounds]
    behind = [np.mean(each["all"]["batches"]) / max(0.5, min(each["all"]["batches"])) for each in rounds]
    return {
        "one_rows_per_s": spread(single),
        "all_rows_per_s": spread(together),
        "all_against_one": spread(b / max(a, 1.0) for a, b in zip(single, together, strict=True)),
        "mean_against_slowest": spread(behind),
        "one_p99_ms": spread(each["one"]["p99_ms"][0] or float("nan") for each in rounds),
        "slowest_p99_ms": spread(max(value or float("nan") for value in each["all"]["p99_ms"]) for each in rounds),
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", default=400_000, show_default=True, type=click.IntRange(min=4096), help="Rows that are stored.")
@click.option("--clients", "count", default=8, show_default=True, type=click.IntRange(min=2), help="Client processes.")
@click.option("--batch", default=1024, show_default=True, type=click.IntRange(min=1), help="Rows a batch.")
@click.option("--rounds", default=10, show_default=True, type=click.IntRange(min=1), help="Rounds that count.")
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(min=0.1), help="Length of each part.")
@click.option("--quick", is_flag=True, help="That it runs, not how fast; overrides the sizes above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
def main(rows: int, count: int, batch: int, rounds: int, seconds: float, quick: bool, out: Path | None) -> None:
    """Compare one client with several at once; a minute or two, and seconds with --quick."""
    if quick:
        rows, count, batch, rounds, seconds = 20_000, 2, 256, 2, 0.3
    seeds = np.random.SeedSequence().generate_state(count).tolist()
    settings = {"rows": rows, "k": K, "row_bytes": RECORD.itemsize, "clients": count, "batch": batch}
    run: dict[str, Any] = {
        "benchmark": "clients",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings | {"rounds": rounds, "seconds": seconds, "seeds": seeds},
        "machine": machine(),
    }
    print(json.dumps(run["settings"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as folder, ExitStack() as stack:
        label_set = write_label_set(Path(folder) / "store" / "rows", Source(rows))
        ours = ("logitcache.server", "serve", "--store", str(label_set.parent), "--port", "0")
        server = stack.enter_context(started(*ours, log=Path(folder) / "serve.log"))
        url = f"{server.url}/{label_set.name}"
        connections = stack.enter_context(clients(count, url, rows, batch, seeds))
        measured: list[dict[str, Any]] = []
        for round in range(rounds + 1):
            parts = {"one": [connections[round % count]], "all": connections}
            names = ("one", "all") if round % 2 else ("all", "one")
            measured.append({name: fetch_together(parts[name], seconds, server.pid) for name in names})
    run["rounds"] = measured[1:]  # the first one warms up
    found = figures(run["rounds"], batch, seconds)
    run["figures"] = found
    run["goals"] = {
        f"slowest within {SLOWEST:g} times of the mean": found["mean_against_slowest"]["median"] <= SLOWEST,
        "together at least a single client's rows": found["all_against_one"]["median"] >= TOGETHER,
    }
    lines = [("", "median", "quartiles")]
    for name, value in found.items():
        lines.append((name, f"{value['median']:,.4g}", f"{value['q1']:,.4g} - {value['q3']:,.4g}"))
    print(f"\n{aligned(lines)}\n\n{json.dumps(run['goals'])}")
    if out is not None:
        (path := unused(out)).write_text(json.dumps(run, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
