"""How many rows a second a run can record, durable at once: over HTTP into a server, beside SQLite and LMDB.

    python benchmarks/recording.py [--rows N] [--rounds N] [--quick] [--out FILE.json]

Rows are the top 10 of 100 classes with tails at T = 1 and 2, given once each in random order in batches of 1,024; the
store is new each time. The goal, set before it was measured: at least 200,000 rows a second from the first batch until
the last one is durable, both of logits as a training loop has them and of rows. Sealing is told apart.

| method | what it is |
| --- | --- |
| logitcache, logits | `recorder.add` of logits: it selects, and sends behind the loop what has come together |
| logitcache, rows | `recorder.add_rows` of rows that are selected already, as the peers get them |
| logitcache, awaited | the same with a `flush` after each batch, so that it is durable before the next is given |
| SQLite | rows as blobs appended to a table without an index, WAL, synchronous=FULL, a transaction a batch |
| LMDB | rows under 8-byte integer keys, sorted within the batch, a transaction and a sync a batch |

The peers run in this process, without HTTP and without checks of what they are given; their records are packed before.
That SQLite finds no row by its id spares it an index.
"""

import json
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import lmdb
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks.machine import machine
from benchmarks.report import spread
from benchmarks.servers import cpu_clock, started

from logitcache.client import Recorder, connect, record
from logitcache.labels.label_set import row_spec
from logitcache.labels.selection.top_k import select_top_k
from logitcache.labels.soft_labels import SoftLabels

CLASSES, K, TEMPERATURES, BATCH = 100, 10, (2.0,), 1024
POOL = 65_536
"""So many different rows; an example has that of its ordinal modulo these."""

GOAL = 200_000
"""Rows a second."""

RECORD = np.dtype(
    [
        ("fingerprint", "<u8"),
        ("scalars", "<f4", (3,)),
        ("indices", "<u2", (K,)),
        ("logits", "<f2", (K,)),
    ]
)
"""One row as raw bytes, for the peers."""


@dataclass(frozen=True)
class Given:
    """What is recorded: logits (`POOL`, classes), the rows selected of them, and packed as records."""

    logits: torch.Tensor
    soft: SoftLabels
    records: np.ndarray

    @classmethod
    def drawn(cls, seed: int) -> "Given":
        """Logits of a classifier that is sure of some examples and not of others."""
        logits = torch.randn(POOL, CLASSES, generator=torch.Generator().manual_seed(seed)) * 4
        with tempfile.TemporaryDirectory() as folder, closing(begun(f"{folder}/spec", 1)) as recorder:
            spec = row_spec(recorder.terms.identity)
        rows = select_top_k(logits, spec).rows()
        scalars: dict[str, Any] = {name: rows.scalars[:, column] for name, column in spec.scalars.items()}
        fingerprint = np.zeros(POOL, np.uint64)
        soft = SoftLabels(rows.indices, rows.logits, fingerprint=fingerprint, temperatures=spec.temperatures, **scalars)
        records = np.zeros(POOL, RECORD)
        records["scalars"], records["indices"], records["logits"] = rows.scalars, rows.indices, rows.logits
        return cls(logits, soft, records)

    def rows(self, which: np.ndarray) -> SoftLabels:
        """Selected rows of some."""
        return replace(self.soft, **{name: array[which] for name, array in self.soft.arrays().items()})


def begun(target: str, rows: int) -> Recorder:
    """A recorder of so many examples."""
    return record(
        target,
        run="benchmark",
        steps=range(1, 2),
        classes=CLASSES,
        top_k=K,
        temperatures=TEMPERATURES,
        examples=rows,
    )


Times = dict[str, float]
"""Seconds by what they were spent on."""


def ours(folder: Path, given: Given, batches: list[np.ndarray], way: str) -> tuple[Times, str]:
    """Record over HTTP into a server process of its own; seconds and the digest."""
    rows = sum(map(len, batches))
    command = ("logitcache.server", "serve", "--store", str(folder / "store"), "--port", "0", "--record")
    with started(*command, log=folder / "serve.log") as server, begun(f"{server.url}/run", rows) as recorder:
        server_s, client_s = cpu_clock(server.pid), time.process_time()
        server_began_s, began = server_s(), time.perf_counter()
        for ids in batches:
            which = ids % POOL
            if way == "logits":
                recorder.add(ids, given.logits[torch.from_numpy(which)], step=1)
            else:
                recorder.add_rows(ids, given.rows(which), step=1)
                if way == "awaited":
                    recorder.flush()
        recorder.flush()
        durable = time.perf_counter()
        spent = {"server_cpu": server_s() - server_began_s, "client_cpu": time.process_time() - client_s}
        digest = recorder.finish()
        sealed = time.perf_counter()
        assert digest is not None
        with connect(f"{server.url}/run", digest=digest) as labels:
            for ids in batches[:3] + batches[-3:]:
                check(labels.fetch(ids), given.rows(ids % POOL))
    return {"recording": durable - began, "sealing": sealed - durable} | spent, digest


def check(found: SoftLabels, expected: SoftLabels) -> None:
    """Refuse rows that come back and are not those that were given.

    Raises:
        ValueError: they are others.
    """
    for name in ("indices", "logits", "logit_max", "tail_logsumexp"):
        if getattr(found, name).tobytes() != getattr(expected, name).tobytes():
            raise ValueError(f"other {name} come back than were given")


def packed(given: Given, ids: np.ndarray) -> list[bytes]:
    """Records of some rows; ``tolist`` of a void view makes the bytes in one call."""
    found: list[bytes] = given.records[ids % POOL].view(f"V{RECORD.itemsize}").tolist()
    return found


def in_sqlite(folder: Path, given: Given, batches: list[np.ndarray]) -> Times:
    """Append to a table, a transaction a batch."""
    with closing(sqlite3.connect(folder / "rows.sqlite", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE rows (id INTEGER NOT NULL, step INTEGER NOT NULL, row BLOB NOT NULL)")
        began = time.perf_counter()
        for ids in batches:
            values = zip(ids.tolist(), [1] * len(ids), packed(given, ids), strict=True)
            database.execute("BEGIN")
            database.executemany("INSERT INTO rows VALUES (?, ?, ?)", values)
            database.execute("COMMIT")
        durable = time.perf_counter()
        for ids in (batches[0], batches[-1]):
            first = database.execute("SELECT row FROM rows WHERE id = ?", (int(ids[0]),)).fetchall()
            if first != [(packed(given, ids)[0],)]:
                raise ValueError("SQLite gives another row than was given")
    return {"recording": durable - began}


def in_lmdb(folder: Path, given: Given, batches: list[np.ndarray]) -> Times:
    """Put under the ids, a transaction and a sync a batch."""
    rows = sum(map(len, batches))
    map_bytes = 4 * rows * RECORD.itemsize + (256 << 20)
    with lmdb.open(str(folder / "rows.lmdb"), subdir=False, map_size=map_bytes, max_dbs=1) as environment:
        database = environment.open_db(b"rows", integerkey=True)
        began = time.perf_counter()
        for ids in batches:
            ordered = np.sort(ids)
            keys = ordered.astype(np.uint64).view("V8").tolist()
            with environment.begin(db=database, write=True) as transaction:
                transaction.cursor().putmulti(zip(keys, packed(given, ordered), strict=True))
        durable = time.perf_counter()
        with environment.begin(db=database) as transaction:
            for ids in (batches[0], batches[-1]):
                if transaction.get(ids[:1].astype(np.uint64).tobytes()) != packed(given, ids)[0]:
                    raise ValueError("LMDB gives another row than was given")
    return {"recording": durable - began}


def rounds_of(rounds: int, rows: int, seed: int) -> Iterator[dict[str, Times]]:
    """What each method took, round by round; whose turn is first rotates.

    Raises:
        ValueError: rows come back that were not given, or our digests differ.
    """
    given, digests = Given.drawn(seed), set()

    def recorded(way: str) -> Callable[[Path, list[np.ndarray]], Times]:
        def run(folder: Path, batches: list[np.ndarray]) -> Times:
            seconds, digest = ours(folder, given, batches, way)
            digests.add(digest)
            return seconds

        return run

    methods: dict[str, Callable[[Path, list[np.ndarray]], Times]] = {
        **{f"logitcache, {way}": recorded(way) for way in ("logits", "rows", "awaited")},
        "SQLite": lambda folder, batches: in_sqlite(folder, given, batches),
        "LMDB": lambda folder, batches: in_lmdb(folder, given, batches),
    }
    for number in range(rounds):
        order = np.random.default_rng((seed, number)).permutation(rows)
        batches = [order[begin : begin + BATCH] for begin in range(0, rows, BATCH)]
        names = [*methods][number % len(methods) :] + [*methods][: number % len(methods)]
        found = {}
        for name in names:
            with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as folder:
                found[name] = methods[name](Path(folder), batches)
        yield {name: found[name] for name in methods}
    if len(digests) != 1:
        raise ValueError(f"the same rows in other orders are sealed to {len(digests)} digests")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", default=1_000_000, show_default=True, type=click.IntRange(min=BATCH))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=1, show_default=True, type=click.IntRange(min=0))
@click.option("--quick", is_flag=True, help="That it runs, not how fast; overrides the sizes above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
def main(rows: int, rounds: int, seed: int, quick: bool, out: Path | None) -> None:
    """Record the same rows everywhere and compare; some two minutes, and seconds with --quick."""
    rows, rounds = (20_000, 1) if quick else (rows, rounds)
    before = machine()
    found = []
    for number, times in enumerate(rounds_of(rounds, rows, seed)):
        click.echo(f"round {number + 1} of {rounds}", err=True)
        found.append(times)
    methods: dict[str, dict[str, Any]] = {
        name: {
            "rows_per_s": spread(rows / times[name]["recording"] for times in found),
            "seconds": {kind: spread(times[name][kind] for times in found) for kind in found[0][name]},
        }
        for name in found[0]
    }
    median = {name: figures["rows_per_s"]["median"] for name, figures in methods.items()}
    goals = {
        f"{way} are recorded at {GOAL:,} rows/s": median[f"logitcache, {way}"] >= GOAL for way in ("logits", "rows")
    }
    run = {
        "benchmark": "recording",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {"rows": rows, "rounds": rounds, "seed": seed, "batch": BATCH, "classes": CLASSES, "k": K},
        "machine": before | {"sqlite": sqlite3.sqlite_version},
        "methods": methods,
        "goals": goals,
    }
    print(f"{rows:,} rows in random order, batches of {BATCH:,}; medians of {rounds} rounds")
    print(f"{'method':<22}{'rows/s':>12}{'of SQLite':>11}{'of LMDB':>9}{'sealing s':>11}")
    for name, figures in methods.items():
        sealing = figures["seconds"].get("sealing", {}).get("median")
        told = "-" if sealing is None else f"{sealing:.2f}"
        of_peers = (median[name] / median[peer] for peer in ("SQLite", "LMDB"))
        print(f"{name:<22}{median[name]:>12,.0f}{next(of_peers):>11.2f}{next(of_peers):>9.2f}{told:>11}")
    for goal, met in goals.items():
        print(f"{goal}: {'met' if met else 'missed'}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
