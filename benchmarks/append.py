"""What an append costs: a label set grown by one part in a hundred, while a pinned and an unpinned client read it.

    python benchmarks/append.py [--examples N] [--quick] [--out FILE.json]

The bounds, set before it was measured: the teacher is shown the new examples and no other (but for one batch that tells
how many classes there are in the first run), new files take at most 1.5 times the bytes of one part in a hundred, every
old file keeps its inode and its bytes, both clients read only rows of the generation that they ask for, and labelling
the new examples takes at most three times one part in a hundred of what the old ones took. Reading the old examples
once more, to see that they are those that were labelled, is told apart: it costs a pass over the dataset and no
forward.
"""

import hashlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks.machine import machine
from benchmarks.servers import started

from logitcache.client import connect
from logitcache.server.labelling.precompute import precompute
from logitcache.server.labelling.preparation import Request

FEATURES, CLASSES, WIDTH, K, BATCH = 64, 1000, 1024, 32, 256
GROWTH = 100
"""The dataset grows by one part in so many."""

STEP_S = 0.05
"""Seconds between two fetches of a client: a training step."""

_state: dict[str, Any] = {"shown": 0, "examples": 0}


class Teacher(torch.nn.Module):
    """A network that costs some tens of microseconds an example, and counts what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Linear(*sizes) for sizes in ((FEATURES, WIDTH), (WIDTH, WIDTH), (WIDTH, CLASSES))]
        self.net = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        _state["shown"] += len(inputs)
        logits: torch.Tensor = self.net(inputs)
        return logits


def teacher() -> Teacher:
    """The teacher; a SPEC."""
    return Teacher()


def dataset() -> list[tuple[torch.Tensor, int]]:
    """As many examples as are there now; a SPEC."""
    inputs = torch.randn(_state["examples"], FEATURES, generator=torch.Generator().manual_seed(1))
    return [(row, number % CLASSES) for number, row in enumerate(inputs)]


class Phases:
    """Seconds of each activity of a precompute."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._now, self._began = "preparing", time.perf_counter()

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        """The next activity."""
        self.end()
        self._now = activity.partition(" ")[0]

    def advance(self, rows: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def under_way(self, told: Callable[[], str]) -> None:
        """Nothing."""

    def end(self) -> None:
        """The last activity is over."""
        self.seconds[self._now] = self.seconds.get(self._now, 0.0) + time.perf_counter() - self._began
        self._began = time.perf_counter()


def label(store: Path, examples: int) -> tuple[dict[str, float], int, str]:
    """Run precompute over so many examples: seconds by activity, examples shown to the teacher, the digest."""
    _state.update(shown=0, examples=examples)
    phases = Phases()
    spec = "benchmarks.append:"
    request = Request("set", f"{spec}teacher", f"{spec}dataset", store, K, batch_size=BATCH, rows_per_shard=4096)
    summary = precompute(request, phases)
    phases.end()
    return phases.seconds, _state["shown"], summary.digest


def files_of(path: Path) -> dict[str, tuple[int, str, int]]:
    """Inode, sha256 and bytes on disk of each file that rows depend on."""
    found = {}
    for file in path.rglob("*"):
        inside = file.relative_to(path)
        if file.is_file() and inside.name not in ("zarr.json", "stamps.json", "lock") and inside.parts[0] != "staging":
            status = file.stat()
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            found[str(inside)] = (status.st_ino, digest, 512 * status.st_blocks)
    return found


class Client(threading.Thread):
    """Fetches old examples again and again, and holds each answer to the first one's rows and to its digest."""

    def __init__(self, url: str, examples: int, digest: str | None) -> None:
        super().__init__(daemon=True)
        self._url, self._examples, self._digest = url, examples, digest
        self.stop, self.fetches, self.wrong = threading.Event(), 0, 0
        self.digests: dict[str | None, int] = {}
        self.slowest_ms = 0.0

    def run(self) -> None:
        """Until told to stop."""
        ids = np.random.default_rng(2).integers(self._examples, size=256)
        with connect(self._url, digest=self._digest) as labels:
            first = labels.fetch(ids)
            while not self.stop.is_set():
                began = time.perf_counter()
                soft = labels.fetch(ids)
                self.slowest_ms = max(self.slowest_ms, 1000 * (time.perf_counter() - began))
                same = np.array_equal(soft.logits, first.logits) and np.array_equal(soft.indices, first.indices)
                self.wrong += not same
                self.digests[soft.digest] = self.digests.get(soft.digest, 0) + 1
                self.fetches += 1
                time.sleep(STEP_S)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--examples", default=409_600, show_default=True, type=click.IntRange(min=4096))
@click.option("--quick", is_flag=True, help="That it runs, not what it costs; overrides the size above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
def main(examples: int, quick: bool, out: Path | None) -> None:
    """Label, grow by one part in a hundred, compare; some minutes, and seconds with --quick."""
    # What SPECs name is this module by its name, and not the script.
    from benchmarks import append

    examples = 20_480 if quick else examples
    more = examples // GROWTH
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as folder:
        store = Path(folder) / "store"
        first_s, first_shown, old_digest = append.label(store, examples)
        before = files_of(store / "set")
        ours = ("logitcache.server", "serve", "--store", str(store), "--port", "0")
        with started(*ours, log=Path(folder) / "serve.log") as server:
            clients = [Client(f"{server.url}/set", examples, digest) for digest in (old_digest, None)]
            for client in clients:
                client.start()
            append_s, append_shown, new_digest = append.label(store, examples + more)
            deadline_s = time.monotonic() + 30
            while new_digest not in clients[1].digests and time.monotonic() < deadline_s:
                time.sleep(0.05)
            for client in clients:
                client.stop.set()
                client.join()
        after = files_of(store / "set")
    kept = all(after.get(name) == entry for name, entry in before.items())
    old_bytes = sum(size for _, _, size in before.values())
    new_bytes = sum(size for name, (_, _, size) in after.items() if name not in before)
    pinned, free = clients
    bounds = {
        "the teacher was shown the new examples alone": append_shown == more,
        "every old file kept its inode and bytes": kept,
        "bytes": new_bytes <= 1.5 * old_bytes / GROWTH or quick,
        "labelling": append_s["labelling"] <= 3 * first_s["labelling"] / GROWTH or quick,
        "no client read a wrong row": pinned.wrong == free.wrong == 0,
        "the pinned client stayed": set(pinned.digests) == {old_digest},
        "the other followed": set(free.digests) == {old_digest, new_digest},
    }
    run = {
        "benchmark": "append",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {"examples": examples, "more": more, "k": K, "classes": CLASSES, "batch_size": BATCH},
        "machine": machine(),
        "first": {"seconds": first_s, "shown": first_shown, "bytes": old_bytes},
        "append": {"seconds": append_s, "shown": append_shown, "bytes": new_bytes},
        "clients": {
            name: {"fetches": client.fetches, "wrong": client.wrong, "slowest_ms": client.slowest_ms}
            for name, client in (("pinned", pinned), ("unpinned", free))
        },
        "bounds": bounds,
    }
    print(json.dumps({name: run[name] for name in ("settings", "first", "append", "clients", "bounds")}, indent=1))
    shares = (append_s["labelling"] / first_s["labelling"], new_bytes / old_bytes, append_shown / examples)
    print("of the first run: labelling {:.2%}, bytes {:.2%}, rows {:.2%}".format(*shares))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(run, indent=1) + "\n")
    if not all(bounds.values()):
        sys.exit(f"missed: {[name for name, held in bounds.items() if not held]}")


if __name__ == "__main__":
    main()
