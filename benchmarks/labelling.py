"""What labelling costs beside its teacher: precompute against the loop that a person would write for the same batches.

    python benchmarks/labelling.py [--tokens] [--teacher-cost 80] [--device cuda] [--quick] [--out FILE.json]

The bare loop stacks the same examples to the same batches and does the forward, ``topk`` and ``logsumexp``; what comes
of it goes into arrays in memory, and nothing is checked or written. Against it stands the labelling of `precompute`,
from the first batch until the label set is sealed, with everything on: checks, fingerprints, targets, tails,
statistics, hashes, files and fsync. Reading the lengths of token sequences comes before and is not counted.

The bounds, set before it was measured: at most 1.05 times the bare loop, in seconds on the clock and on the processors,
as ratios of medians over rounds of bare, precompute, precompute, bare. What precompute's threads were seen doing, in
two more runs in which another thread looks every few milliseconds, is printed too, so that an excess can be found.
"""

import json
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks.machine import machine
from benchmarks.report import spread, unused

from logitcache.server.labelling.precompute import precompute
from logitcache.server.labelling.preparation import Request, prepare
from logitcache.storage import LocalLabelSet

BOUND = 1.05
"""Precompute's seconds over those of the bare loop, at most."""

FEATURES, CLASSES, K = 3072, 1000, 32
VOCABULARY, TOKENS_K = 32_000, 64
SHORTEST, LONGEST = 16, 256
"""Tokens of an example, drawn evenly."""

WIDTH, TOKENS_WIDTH = 1024, 512
ROWS_PER_SHARD = 4096
LOOK_EVERY_S = 0.002


@dataclass(frozen=True)
class Workload:
    """What is labelled: a teacher in eval mode, on its device; a dataset; k; and the batches of precompute."""

    model: torch.nn.Module
    device: str
    dataset: Sequence[Any]
    k: int
    tokens: bool
    batches: Sequence[Sequence[int]]
    rows: int


_now: dict[str, Any] = {}


def teacher() -> torch.nn.Module:
    """The teacher that is measured now; a SPEC."""
    model: torch.nn.Module = _now["teacher"]
    return model


def dataset() -> Sequence[Any]:
    """The dataset that is measured now; a SPEC."""
    examples: Sequence[Any] = _now["dataset"]
    return examples


def make_teacher(tokens: bool, cost: float) -> torch.nn.Module:
    """A network of about so many million multiplications a row: as many hidden layers as that takes."""
    torch.manual_seed(0)
    width, classes = (TOKENS_WIDTH, VOCABULARY) if tokens else (WIDTH, CLASSES)
    first = torch.nn.Embedding(VOCABULARY, width) if tokens else torch.nn.Linear(FEATURES, width)
    ends = width * classes + (0 if tokens else FEATURES * width)
    hidden = max(0, round((cost * 1e6 - ends) / width**2))
    layers = [layer for _ in range(hidden) for layer in (torch.nn.ReLU(), torch.nn.Linear(width, width))]
    return torch.nn.Sequential(first, *layers, torch.nn.ReLU(), torch.nn.Linear(width, classes)).eval()


def make_dataset(tokens: bool, examples: int) -> list[Any]:
    """Examples in memory: inputs the size of a small picture with targets, or token sequences that are their labels."""
    draw = torch.Generator().manual_seed(1)
    if not tokens:
        inputs = torch.randn(examples, FEATURES, generator=draw)
        return [(row, number % CLASSES) for number, row in enumerate(inputs)]
    lengths = torch.randint(SHORTEST, LONGEST + 1, (examples,), generator=draw).tolist()
    sequences = [torch.randint(VOCABULARY, (length,), generator=draw) for length in lengths]
    return [{"input_ids": sequence, "labels": sequence} for sequence in sequences]


def make_workload(tokens: bool, cost: float, examples: int, device: str) -> Workload:
    """The workload, set as what the SPECs name."""
    from benchmarks import labelling

    k = TOKENS_K if tokens else K
    labelling._now.update(teacher=make_teacher(tokens, cost), dataset=make_dataset(tokens, examples))
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(request(Path(folder), k, device))
    batches = list(prepared.batches(range(prepared.layout.shards)))
    return Workload(labelling.teacher(), device, labelling.dataset(), k, tokens, batches, prepared.layout.rows)


def request(store: Path, k: int, device: str) -> Request:
    """A precompute of the workload."""
    spec = "benchmarks.labelling:"
    return Request("set", f"{spec}teacher", f"{spec}dataset", store, k, rows_per_shard=ROWS_PER_SHARD, device=device)


@dataclass(frozen=True)
class Bare:
    """What the bare loop keeps of each row, in the order of its batches."""

    indices: np.ndarray
    logits: np.ndarray
    logsumexp: np.ndarray


def bare(work: Workload) -> Bare:
    """The loop that a person would write."""
    kept = Bare(
        np.empty((work.rows, work.k), np.uint16), np.empty((work.rows, work.k), np.float16), np.empty(work.rows, "f4")
    )
    done = 0
    for ordinals in work.batches:
        with torch.inference_mode():
            if work.tokens:
                sequences = [work.dataset[ordinal]["input_ids"] for ordinal in ordinals]
                lengths = torch.tensor([len(sequence) for sequence in sequences])
                inputs = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
                real = torch.arange(inputs.shape[1]) < lengths[:, None]
            else:
                inputs = torch.stack([work.dataset[ordinal][0] for ordinal in ordinals])
                real = torch.ones(len(inputs), dtype=torch.bool)
            logits = _forward(work, inputs)
            values, indices = logits.topk(work.k)
            total = logits.logsumexp(-1)
            rows = slice(done, done + int(real.sum()))
            kept.indices[rows] = indices.cpu()[real].numpy()
            kept.logits[rows] = values.cpu()[real].numpy()
            kept.logsumexp[rows] = total.cpu()[real].numpy()
            done = rows.stop
    return kept


def _forward(work: Workload, inputs: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = work.model(inputs.to(work.device))
    return logits


class Clock:
    """A reporter that starts when labelling begins; seconds until now, on the clock and on the processors."""

    def __init__(self) -> None:
        self._began = self._cpu_began = 0.0
        self._start()

    def _start(self) -> None:
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        """Start anew."""
        self._start()

    def advance(self, rows: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def under_way(self, told: Callable[[], str]) -> None:
        """Nothing."""

    def read(self) -> dict[str, float]:
        """Seconds."""
        return {"wall_s": time.perf_counter() - self._began, "cpu_s": time.process_time() - self._cpu_began}


def run_bare(work: Workload) -> dict[str, float]:
    """Time the bare loop."""
    clock = Clock()
    bare(work)
    return clock.read()


def run_precompute(work: Workload) -> dict[str, float]:
    """Time a precompute's labelling, into a store of its own."""
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as folder:
        clock = Clock()
        precompute(request(Path(folder) / "store", work.k, work.device), clock)
        return clock.read()


def check_same(work: Workload) -> None:
    """Both ways give the same rows, or nothing here is worth measuring."""
    kept = bare(work)
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as folder:
        precompute(request(Path(folder) / "store", work.k, work.device))
        with closing(LocalLabelSet(Path(folder) / "store" / "set")) as labels:
            ordinals = [ordinal for batch in work.batches for ordinal in batch]
            soft = labels.fetch(np.array(ordinals))
    raw = soft.logits.astype(np.float32) + soft.logit_max[:, None]
    total = soft.log_normalizer() + soft.logit_max
    # Equal logits may be taken in either order.
    if np.mean(soft.indices != kept.indices) > 1e-3 or not np.allclose(raw, kept.logits, atol=1e-2):
        sys.exit("precompute stored other rows than the bare loop kept")
    if not np.allclose(total, kept.logsumexp, atol=1e-2):
        sys.exit("precompute stored other normalisers than the bare loop kept")


def seen(what: Callable[[], Any]) -> list[dict[str, Any]]:
    """Run it, and tell about how many seconds each thread was seen in each function of ours, or of the bare loop."""
    found: defaultdict[tuple[str, str], float] = defaultdict(float)
    over, names = threading.Event(), {}

    def look() -> None:
        before = time.perf_counter()
        while not over.wait(LOOK_EVERY_S):
            now = time.perf_counter()
            names.update({thread.ident: thread.name.partition("_")[0] for thread in threading.enumerate()})
            for thread, frame in sys._current_frames().items():
                if thread != threading.get_ident() and (place := _place(frame)):
                    found[names.get(thread, "?"), place] += now - before
            before = now

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        what()
    finally:
        over.set()
        watcher.join()
    longest = sorted(found.items(), key=lambda entry: -entry[1])
    return [{"thread": thread, "in": place, "s": round(s, 3)} for (thread, place), s in longest]


def _place(frame: FrameType | None) -> str:
    """Module and function of the innermost frame that is ours; empty where none is."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("logitcache.") or module == "benchmarks.labelling":
            return f"{module.removeprefix('logitcache.').removeprefix('server.labelling.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return ""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--tokens", is_flag=True, help="Token sequences of varying lengths, a row a token.")
@click.option("--teacher-cost", default=80.0, show_default=True, help="Million multiplications a row, about.")
@click.option("--examples", type=click.IntRange(min=16), help="[default: 16384, or 128 token sequences]")
@click.option("--device", default="cpu", show_default=True, help="The teacher's.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--quick", is_flag=True, help="That it runs, not what it costs; overrides the sizes above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
def main(
    tokens: bool, teacher_cost: float, examples: int | None, device: str, rounds: int, quick: bool, out: Path | None
) -> None:
    """Label the same examples both ways, in turn; about a minute or two, and seconds with --quick."""
    # What SPECs name is this module by its name, and not the script.
    from benchmarks import labelling

    examples = examples or (128 if tokens else 16_384)
    if quick:
        examples, rounds, teacher_cost = (24 if tokens else 5000), 1, 0.0
    work = labelling.make_workload(tokens, teacher_cost, examples, device)
    labelling.check_same(work)
    ways = {"bare": labelling.run_bare, "precompute": labelling.run_precompute}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    began = machine()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for name in ("bare", "precompute", "precompute", "bare"):
            taken[name].append(ways[name](work))
    found = {name: {clock: spread(one[clock] for one in runs) for clock in runs[0]} for name, runs in taken.items()}
    ratios = {clock: found["precompute"][clock]["median"] / found["bare"][clock]["median"] for clock in found["bare"]}
    run: dict[str, Any] = {
        "benchmark": "labelling",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {
            "tokens": tokens,
            "teacher_cost": teacher_cost,
            "examples": examples,
            "rows": work.rows,
            "batches": len(work.batches),
            "k": work.k,
            "device": device,
            "rounds": rounds,
        },
        "machine": began | {"torch": str(torch.__version__), "threads": torch.get_num_threads()},
        "found": found,
        "ratios": ratios,
        "bounds": {clock: ratio <= BOUND or quick for clock, ratio in ratios.items()},
        "seen": {name: labelling.seen(partial(way, work)) for name, way in ways.items()},
    }
    for name, figures in found.items():
        wall, cpu = figures["wall_s"], figures["cpu_s"]
        print(
            f"{name:12} {wall['median']:7.3f} s ({wall['q1']:.3f} - {wall['q3']:.3f}), on the processors "
            f"{cpu['median']:7.3f} s ({cpu['q1']:.3f} - {cpu['q3']:.3f}); "
            f"{1e3 * wall['median'] / work.rows:.3f} ms a row"
        )
    print(f"precompute over bare: {ratios['wall_s']:.3f} on the clock, {ratios['cpu_s']:.3f} on the processors")
    for name, places in run["seen"].items():
        print(f"\n{name}, seen:")
        for place in places[:20]:
            print(f"  {place['s']:7.3f} s  {place['thread']:12} {place['in']}")
    if out is not None:
        (path := unused(out)).write_text(json.dumps(run, indent=1) + "\n")
        print(f"written: {path}")
    if not all(run["bounds"].values()):
        sys.exit(f"missed: more than {BOUND}")


if __name__ == "__main__":
    main()
