"""Peak memory of selecting the top k of a teacher's logits for token data, beside the naive way.

    python benchmarks/selection_memory.py [--batch 8] [--length 2048] [--classes 128256] [--top-k 64] [--out FILE.json]

Each method has a process of its own, which makes logits in place and selects from them: ours in chunks, the naive way
with ``log_softmax`` and ``topk`` of all of them at once, in the logits' dtype and in float32. Told is the
peak of the resident memory above what the process had before the logits were made, as a multiple of the logits' own
size. Where a method would not fit in this machine's memory it is not run, and the result says so.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from logitcache.labels.selection.top_k import select_top_k
from logitcache.labels.soft_labels import RowSpec

TEMPERATURES = (1.0, 2.0)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

NEEDED = {"none": 1.05, "ours": 1.2, "naive": 2.2, "naive, float32": 5.2}
"""About how many times the logits' size a method takes; the last is for bfloat16 logits."""


@dataclass(frozen=True)
class Case:
    """One method over logits of one shape and dtype."""

    method: str
    dtype: str
    batch: int
    length: int
    classes: int
    top_k: int

    @property
    def logits_bytes(self) -> int:
        """Size of the teacher's logits."""
        return self.batch * self.length * self.classes * DTYPES[self.dtype].itemsize

    @property
    def needed_bytes(self) -> float:
        """About what the process will take."""
        return NEEDED[self.method] * self.logits_bytes


def made(case: Case) -> torch.Tensor:
    """Logits (batch, length, classes), drawn in their place, so that making them takes no more than they do."""
    logits = torch.empty(case.batch, case.length, case.classes, dtype=DTYPES[case.dtype])
    return logits.normal_(generator=torch.Generator().manual_seed(0))


def ours(logits: torch.Tensor, case: Case) -> None:
    """The selection as precompute makes it."""
    spec = RowSpec(case.top_k, "uint32", "float16", TEMPERATURES, ragged=True, targets=True)
    targets = np.zeros(case.batch * case.length, np.int32)
    select_top_k(logits, spec, lengths=[case.length] * case.batch, targets=targets).rows()


def naive(logits: torch.Tensor, case: Case) -> None:
    """What one writes first: normalise everything, then take the largest."""
    torch.log_softmax(logits, -1).topk(case.top_k, dim=-1)


def naive_float32(logits: torch.Tensor, case: Case) -> None:
    """The same with float32 probabilities, as frameworks do to keep accuracy."""
    torch.log_softmax(logits.float(), -1).topk(case.top_k, dim=-1)


METHODS: dict[str, Callable[[torch.Tensor, Case], None]] = {
    "none": lambda logits, case: None,
    "ours": ours,
    "naive": naive,
    "naive, float32": naive_float32,
}


def resident_bytes(field: str) -> int:
    """A field of this process's memory, as Linux tells it: ``VmHWM`` is the peak, ``VmRSS`` is now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def measure(case: Case) -> dict[str, float]:
    """Run a case in this process: peak above the start as a multiple of the logits, and seconds of the selection."""
    # Threads and kernels are set up before memory is counted.
    small = Case(case.method, case.dtype, 1, 4, 1000, case.top_k)
    with torch.inference_mode():
        METHODS[case.method](made(small), small)
        before = resident_bytes("VmRSS")
        logits = made(case)
        began = time.perf_counter()
        METHODS[case.method](logits, case)
        seconds = time.perf_counter() - began
    peak = resident_bytes("VmHWM") - before
    return {"peak_bytes": peak, "of_logits": peak / case.logits_bytes, "seconds": seconds}


def in_child(case: Case) -> dict[str, float] | str:
    """Run a case in a process of its own; a text where it does not fit, or was ended for its memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if case.needed_bytes > 0.9 * free:
        return f"not run: it needs about {case.needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    command = [sys.executable, __file__, "--child", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        return f"ended with {done.returncode}: {last[0]}"
    result: dict[str, float] = json.loads(done.stdout)
    return result


@click.command()
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=2048, show_default=True)
@click.option("--classes", default=128_256, show_default=True)
@click.option("--top-k", default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the results as JSON as well.")
@click.option("--child", hidden=True)
def main(batch: int, length: int, classes: int, top_k: int, out: Path | None, child: str | None) -> None:
    """Peak memory of the selection, beside log_softmax and topk."""
    if child:
        print(json.dumps(measure(Case(**json.loads(child)))))
        return
    results = {}
    for dtype in DTYPES:
        for method in METHODS if dtype != "float32" else list(METHODS)[:-1]:
            case = Case(method, dtype, batch, length, classes, top_k)
            found = in_child(case)
            results[f"{method}, {dtype} logits"] = found
            told = found if isinstance(found, str) else f"{found['of_logits']:.3f} x logits, {found['seconds']:.1f} s"
            print(f"{dtype:9} logits of {case.logits_bytes / 1e9:.2f} GB, {method:15} {told}", file=sys.stderr)
    report = {
        "shape": [batch, length, classes],
        "top_k": top_k,
        "temperatures": TEMPERATURES,
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "results": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
