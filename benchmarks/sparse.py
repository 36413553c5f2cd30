"""A thousand million rows against four million: opening, memory and a batch's time, over the same number of pages.

    python benchmarks/sparse.py [--rows N] [--small N] [--groups N] [--rounds N] [--quick] [--out FILE.json]

Both label sets are made of holes: every chunk file has its full length and takes no disk, every row is zeros, and every
commit has the right hash of such a file, so that what is measured is the number of shards and rows and nothing about
their bytes. Reading a hole fills a page of the page cache as reading data does. Commits, the generation and the stamps
are written by the project's own code; the ids are zeros too, which nothing reads where ids are ordinals. Each label set
is opened in a process of its own, and a memmap of each array as one file of holes beside it: what a batch of the large
one costs more there is the price of wider page tables, and nothing that a reader could save.

The goals, set before it was measured: the large label set is open within a second; the memory that no file is behind is
at most a tenth more than that of the process with the small one; and a batch of 1,024 ids takes at most 1.2 times as
long, where the ids of both are drawn from the same number of pages, all of which are mapped before.

Opening is told in three parts: `connect(...).open()`, which reads commits, generation and statistics; the first batch
after it, which maps the shards that it needs; and how long it is until all shards are mapped. The files were made just
before, so that their names and inodes are in the kernel's memory: after a reboot it takes longer.
"""

import hashlib
import json
import math
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks.machine import machine
from benchmarks.pages import anonymous_bytes
from benchmarks.peers import NUMPY_FILES
from benchmarks.report import aligned, spread, unused
from benchmarks.rows import RECORD, K, Source

from logitcache.client import connect
from logitcache.labels.identity import canonical_json
from logitcache.labels.soft_labels import SoftLabels
from logitcache.storage.admission import RACY_NS, Stamps, opened
from logitcache.storage.files import Files
from logitcache.storage.layout import Layout
from logitcache.storage.places import Places
from logitcache.storage.records import Commit, Generation, Part
from logitcache.storage.statistics import retained_mass
from logitcache.storage.writer import LabelSetWriter

GROUP = 512
"""Rows that end with whole pages in every array: ids are drawn from groups of so many rows."""

BATCH = 1024
OPEN_S, MEMORY, SLOWER = 1.0, 1.1, 1.2


def write(path: Path, layout: Layout) -> None:
    """A sealed label set of zeros, its files holes, with stamps that say that they hashed right."""
    path.parent.mkdir(exist_ok=True)
    LabelSetWriter(path, layout).close()  # folders and metadata
    places = Places(path)
    parts = {name: _zeros(layout.chunk_bytes(array)) for name, array in layout.arrays.items()}
    statistics = canonical_json({"retained_mass": retained_mass(_zero_rows(layout))})
    hashes = []
    for shard in range(layout.shards):
        for name, part in parts.items():
            with places.part(layout, name, shard).open("xb") as file:
                file.truncate(part.bytes)
        commit, record = Commit.of(layout, shard, parts)
        places.commit(shard).write_bytes(record)
        (places.statistics / f"{shard}.json").write_bytes(statistics)
        hashes.append(commit.sha256)
    _, record = Generation.of(layout.identity, 1, layout.examples, hashes)
    (places.generations / "1.json").write_bytes(record)
    time.sleep(2 * RACY_NS / 1e9)  # stamps of files that were changed just now are not kept
    stamps = Stamps(places.stamps)
    for shard in range(layout.shards):
        commit = Commit.read(places.commit(shard), layout, shard)
        with opened(places, layout, commit) as files:
            stamps.remember(files, commit)
    stamps.save(Files())


def write_files(folder: Path, layout: Layout) -> None:
    """Each array that a batch reads as one file of holes."""
    folder.mkdir()
    for name in NUMPY_FILES:
        with (folder / name).open("xb") as file:
            file.truncate(layout.rows * layout.arrays[name].row_bytes)


def mapped(folder: Path, layout: Layout) -> Callable[[np.ndarray], Any]:
    """Rows by one ``take`` from each of these files."""
    stored = []
    for name in NUMPY_FILES:
        array = layout.arrays[name]
        with (folder / name).open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        mapping.madvise(mmap.MADV_RANDOM)
        stored.append(np.frombuffer(mapping, array.dtype).reshape(-1, *array.row_shape))
    return lambda ids: [array.take(ids, axis=0) for array in stored]


def _zeros(size: int) -> Part:
    state, block = hashlib.sha256(), bytes(1 << 20)
    for begin in range(0, size, len(block)):
        state.update(block[: size - begin])
    return Part(size, state.hexdigest())


def _zero_rows(layout: Layout) -> SoftLabels:
    """One row as all of them are."""
    spec = layout.row_spec
    arrays: dict[str, Any] = {name: np.zeros(shape, dtype) for name, (dtype, shape) in spec.fields(1, 1).items()}
    return SoftLabels(**arrays, temperatures=spec.temperatures)


@dataclass(frozen=True)
class Child:
    """A process that has opened a label set, and what it told of it."""

    process: "subprocess.Popen[str]"
    told: dict[str, Any]

    def batches(self, count: int) -> dict[str, Any]:
        """Have it fetch so many batches: seconds a batch, those of a memmap, and its memory afterwards."""
        return _asked(self.process, str(count))


@contextmanager
def child(path: Path, groups: int, seed: int) -> Iterator[Child]:
    """Open a label set in a process of its own."""
    command = [sys.executable, __file__, "--child", str(path), "--groups", str(groups), "--seed", str(seed)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Child(process, _asked(process, ""))
    finally:
        process.terminate()
        process.wait()


def _asked(process: "subprocess.Popen[str]", line: str) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("the process that reads a label set ended")
    told: dict[str, Any] = json.loads(answer)
    return told


def run_child(path: Path, groups: int, seed: int) -> None:
    """Open, tell what it took, then fetch as many batches as each line on stdin says."""
    sys.stdin.readline()
    rng = np.random.default_rng(seed)
    anonymous = anonymous_bytes()
    began = time.perf_counter()
    labels = connect(path).open()
    open_s = time.perf_counter() - began
    described = labels.describe()
    chosen = GROUP * rng.choice(described.examples // GROUP, min(groups, described.examples // GROUP), replace=False)
    labels.fetch(_ids(chosen, rng))
    first_batch_s = time.perf_counter() - began
    while (shards := labels.describe().shards).verified < shards.total:
        time.sleep(0.005)
    all_mapped_s = time.perf_counter() - began
    memmap = mapped(path.parent.parent / f"{path.name}-files", Source(described.examples).layout)
    # A row of each page of each array: that of the logits has 64 rows, and the others have as many or more.
    for begin in np.array_split(chosen, math.ceil(len(chosen) / BATCH)):
        for row in range(0, GROUP, 64):
            labels.fetch(begin + row)
            memmap(begin + row)
    told = {
        "rows": described.examples,
        "shards": shards.total,
        "groups": len(chosen),
        "open_s": open_s,
        "first_batch_s": first_batch_s,
        "all_mapped_s": all_mapped_s,
        "anonymous_before_bytes": anonymous,
        "mappings": _mappings(),
    }
    print(json.dumps(told), flush=True)
    for line in sys.stdin:
        batches = [_ids(chosen, rng) for _ in range(int(line))]
        told = {"batch_s": _timed(labels.fetch, batches), "memmap_batch_s": _timed(memmap, batches)}
        print(json.dumps(told | {"anonymous_bytes": anonymous_bytes()}), flush=True)


def _mappings() -> int:
    with Path("/proc/self/maps").open() as lines:  # as a whole it would be memory of ours
        return sum(1 for _ in lines)


def _timed(fetch: Callable[[np.ndarray], Any], batches: list[np.ndarray]) -> float:
    """Seconds a batch."""
    began = time.perf_counter()
    for ids in batches:
        fetch(ids)
    return (time.perf_counter() - began) / len(batches)


def _ids(chosen: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A batch of random rows of these groups."""
    ids: np.ndarray = rng.choice(chosen, BATCH) + rng.integers(GROUP, size=BATCH)
    return ids


def disk_bytes(path: Path) -> int:
    """What a label set takes on disk."""
    return sum(512 * file.stat().st_blocks for file in path.rglob("*"))


def figures(
    children: dict[str, Child], rounds: list[dict[str, dict[str, Any]]], sets: dict[str, Path]
) -> dict[str, Any]:
    """By label set: what opening took, memory at the end, milliseconds a batch."""
    return {
        name: each.told
        | {
            "anonymous_bytes": rounds[-1][name]["anonymous_bytes"],
            "batch_ms": spread(1000 * round[name]["batch_s"] for round in rounds),
            "memmap_batch_ms": spread(1000 * round[name]["memmap_batch_s"] for round in rounds),
            "disk_bytes": disk_bytes(sets[name]),
        }
        for name, each in children.items()
    }


def told(found: dict[str, Any]) -> str:
    """A line a figure, a column a label set."""
    rows: list[tuple[str, ...]] = [("", *(f"{each['rows']:,} rows" for each in found.values()))]
    counts = ("shards", "mappings", "groups", "open_s", "first_batch_s", "all_mapped_s")
    rows += [(name, *(f"{each[name]:,.4g}" for each in found.values())) for name in counts]
    sizes = ("anonymous_before_bytes", "anonymous_bytes", "disk_bytes")
    rows += [(n.replace("bytes", "MB"), *(f"{each[n] / 1e6:,.1f}" for each in found.values())) for n in sizes]
    times = ("batch_ms", "memmap_batch_ms")
    rows += [(name, *(f"{each[name]['median']:.3f}" for each in found.values())) for name in times]
    return aligned(rows)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", default=1_000_000_000, show_default=True, type=click.IntRange(min=4096), help="The large one.")
@click.option("--small", default=4_000_000, show_default=True, type=click.IntRange(min=4096), help="The small one.")
@click.option("--groups", default=4000, show_default=True, type=click.IntRange(min=1), help=f"Of {GROUP} rows.")
@click.option("--rounds", default=25, show_default=True, type=click.IntRange(min=1), help="Rounds that count.")
@click.option("--quick", is_flag=True, help="That it runs, not how fast; overrides the sizes above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
@click.option("--child", "opens", type=click.Path(path_type=Path), hidden=True)
@click.option("--seed", type=int, hidden=True)
def main(
    rows: int,
    small: int,
    groups: int,
    rounds: int,
    quick: bool,
    out: Path | None,
    opens: Path | None,
    seed: int | None,
) -> None:
    """Compare a very large label set with a small one; a minute or two, and seconds with --quick."""
    if opens is not None:
        run_child(opens, groups, seed or 0)
        return
    count = 200
    if quick:
        rows, small, groups, rounds, count = 10_000_000, 400_000, 50, 2, 10
    entropy = np.random.SeedSequence().entropy
    layouts = {"large": Source(rows).layout, "small": Source(small).layout}
    settings = {"rows": rows, "small": small, "k": K, "row_bytes": RECORD.itemsize, "batch": BATCH}
    run: dict[str, Any] = {
        "benchmark": "sparse",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings
        | {
            "groups": groups,
            "group_rows": GROUP,
            "rounds": rounds,
            "batches_a_round": count,
            "entropy": str(entropy),
            "rows_per_shard": {name: layout.rows_per_shard for name, layout in layouts.items()},
            "max_map_count": int(Path("/proc/sys/vm/max_map_count").read_text()),
        },
        "machine": machine(),
    }
    print(json.dumps(run["settings"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as folder, ExitStack() as stack:
        sets = {name: Path(folder) / "store" / name for name in layouts}
        for name, layout in layouts.items():
            write(sets[name], layout)
            write_files(Path(folder) / f"{name}-files", layout)
        os.sync()  # so that no process waits for another's writing
        seeds = np.random.SeedSequence(entropy).generate_state(len(sets)).tolist()
        children = {
            name: stack.enter_context(child(path, groups, seed))
            for (name, path), seed in zip(sets.items(), seeds, strict=True)
        }
        measured: list[dict[str, dict[str, Any]]] = []
        for round in range(rounds + 1):
            order = list(children)[:: 1 if round % 2 else -1]
            measured.append({name: children[name].batches(count) for name in order})
        run["rounds"] = measured[1:]  # the first one warms up
        found = run["figures"] = figures(children, run["rounds"], sets)
    large, other = found["large"], found["small"]
    run["ratios"] = {
        name: spread(each["large"][f"{name}_s"] / each["small"][f"{name}_s"] for each in run["rounds"])
        for name in ("batch", "memmap_batch")
    }
    slower = run["ratios"]["batch"]["median"]
    memory = run["ratios"]["anonymous"] = large["anonymous_bytes"] / other["anonymous_bytes"]
    run["goals"] = {
        f"open within {OPEN_S:g} s": large["open_s"] <= OPEN_S,
        f"anonymous memory within {MEMORY:g} times": memory <= MEMORY,
        f"batches within {SLOWER:g} times": slower <= SLOWER,
    }
    print(f"\n{told(found)}\n\nlarge against small: {json.dumps(run['ratios'])}\n{json.dumps(run['goals'])}")
    if out is not None:
        (path := unused(out)).write_text(json.dumps(run, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
