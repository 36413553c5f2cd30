"""A training step with labels fetched over HTTP, beside the same step with labels in memory, and read by workers.

    python benchmarks/step.py [--steps N] [--batch N] [--link RATE --delay-ms MS] [--quick] [--out FILE.json]

A student of linear layers is made as wide as a step of some 70 ms needs on this machine. Three arms take the same
steps, each with a loader of its own over the same dataset, batches drawn anew, and the same `distillation_loss`:

- *attached*: `labels.attach(loader, ids=0, device="cpu")` from a server process, as anyone would write it;
- *memory*: the label set's arrays in memory, gathered by NumPy at the step and converted like any soft labels;
- *workers*: a memmap of each array, read by the loader's workers with the inputs: what people do without a server.

Blocks of steps alternate in ABBA order: each unit draws an order of the arms, and takes it forwards and backwards. Only
blocks of one unit are compared; the interval is a bootstrap over units. Waits for labels are those that `labels.stats`
tells at the end; beside them stands what `attach` adds to a step's time in the loader itself, as seen from outside,
which includes making tensors of the labels. The goals, set before it was measured: the mean step
with attached labels is within 1 % of that with labels in memory, the median wait at most 0.1 ms and its 99th
percentile at most 2 ms. With `--link` the server is behind a link of that rate and round trip; the goals are the same
wherever the rate suffices for a batch a step, which is printed.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `benchmarks` is found when run as a script

from benchmarks.link import FAR, LinkUnavailable, link
from benchmarks.machine import machine
from benchmarks.peers import memmap, write_numpy_files
from benchmarks.report import aligned, unused
from benchmarks.rows import CLASSES, Arrays, Source, write_label_set
from benchmarks.servers import Server, cpu_clock, started

from logitcache.client import Stats, connect
from logitcache.client.losses import distillation_loss
from logitcache.client.tensors import SoftLabelTensors
from logitcache.labels.soft_labels import SoftLabels

STEP_MS = 70.0
FEATURES, INPUTS = 256, 4096
ARMS = ("attached", "memory", "workers")
WITHIN, MEDIAN_MS, P99_MS = 0.01, 0.1, 2.0
RESAMPLES = 10_000
UNCOUNTED_UNITS = 1
PORT = 8787

RATES = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class Inputs(Dataset[Any]):
    """Inputs that cost nothing to make, their class and their id; a whole batch at once. With ``labels``, those too."""

    def __init__(self, rows: int, labels: Path | None = None) -> None:
        self._rows, self._labels = rows, labels
        self._inputs = torch.randn(INPUTS, FEATURES, generator=torch.Generator().manual_seed(0))
        self._fetch: Callable[[np.ndarray], Any] | None = None

    def __len__(self) -> int:
        return self._rows

    def __getitems__(self, ids: list[int]) -> tuple[Any, ...]:
        """A batch: ids (batch,), inputs (batch, features), classes (batch,), and labels by field name."""
        wanted = torch.tensor(ids)
        batch = wanted, self._inputs[wanted % INPUTS], wanted % CLASSES
        if self._labels is None:
            return batch
        if self._fetch is None:  # each worker maps the files for itself
            self._fetch = memmap(self._labels)
        taken = self._fetch(wanted.numpy())
        return *batch, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in taken.items()}


def _as_it_is(batch: Any) -> Any:
    return batch


def soft_labels(arrays: Arrays) -> SoftLabels:
    """Arrays of a batch by field name as soft labels."""
    fields: dict[str, Any] = dict(arrays)
    return SoftLabels(**fields, temperatures=(1.0,))


class Student:
    """A network and its optimizer."""

    def __init__(self, width: int) -> None:
        torch.manual_seed(0)
        sizes = ((FEATURES, width), (width, width), (width, CLASSES))
        first, second, last = (torch.nn.Linear(*size) for size in sizes)
        self._net = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU(), last)
        self._optimizer = torch.optim.SGD(self._net.parameters(), lr=1e-3)

    def step(self, inputs: torch.Tensor, classes: torch.Tensor, soft: SoftLabelTensors) -> None:
        """Forward, loss, backward, update."""
        self._optimizer.zero_grad()
        loss = distillation_loss(self._net(inputs), soft, targets=classes, temperature=1.0, alpha=0.9)
        loss.backward()
        self._optimizer.step()


def calibrated(batch: int, soft: SoftLabelTensors, step_ms: float) -> tuple[Student, int]:
    """A student whose step takes about so long, and its width."""
    inputs, classes = torch.randn(batch, FEATURES), torch.arange(batch) % CLASSES
    width = 512
    for _ in range(6):
        student = Student(width)
        taken = []
        for _ in range(6):
            began = time.perf_counter()
            student.step(inputs, classes, soft)
            taken.append(1000 * (time.perf_counter() - began))
        # Most of the work grows with the width's square; a step too far is taken back by the next. The quickest counts:
        # what else runs now would make the student too small for the rest of the run.
        width = int(np.clip(width * (step_ms / min(taken[1:])) ** 0.6, 64, 16_384))
    return Student(width), width


class Timed:
    """A loader that adds up the milliseconds that its batches took."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader, self.milliseconds = loader, 0.0
        self.workers: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)  # now, and not with the first batch: this forks the workers
        self.workers = workers_of(batches)
        return self._timed(batches)

    def _timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.milliseconds += 1000 * (time.perf_counter() - began)
            if batch is None:
                return
            yield batch


class Arm:
    """One way to get labels: batches with them, without an end."""

    def __init__(self, batches: Iterator[Any], loader: Timed) -> None:
        self._batches, self._loader = batches, loader

    def run(self, student: Student, steps: int, server: int) -> dict[str, Any]:
        """So many steps: milliseconds of each, of its wait for a batch with labels, and of that beyond the loader's;
        processor seconds in all, those of the loader's workers included.
        """
        clocks = [time.process_time, *(cpu_clock(worker) for worker in self._loader.workers), cpu_clock(server)]
        before = [clock() for clock in clocks]
        waits, beyond, whole = [], [], []
        for _ in range(steps):
            loading, began = self._loader.milliseconds, time.perf_counter()
            inputs, classes, soft = next(self._batches)
            waits.append(1000 * (time.perf_counter() - began))
            beyond.append(waits[-1] - (self._loader.milliseconds - loading))
            student.step(inputs, classes, soft)
            whole.append(1000 * (time.perf_counter() - began))
        *training, serving = (clock() - was for clock, was in zip(clocks, before, strict=True))
        spent = {"cpu_s": sum(training), "server_cpu_s": serving}
        return {"step_ms": whole, "next_ms": waits, "beyond_loader_ms": beyond} | spent


def loader_of(dataset: Inputs, batch: int, steps: int, workers: int) -> DataLoader[Any]:
    """Random batches, more than will be asked for."""
    sampler = RandomSampler(dataset, replacement=True, num_samples=batch * steps)
    return DataLoader(dataset, batch, sampler=sampler, num_workers=workers, collate_fn=_as_it_is)


def workers_of(iterator: Any) -> list[int]:
    """Process ids of a DataLoader's workers."""
    return [worker.pid for worker in getattr(iterator, "_workers", [])]


def interval(attached: np.ndarray, memory: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Ratio of the mean steps, and where 95 % of its bootstrap over units lie; arguments are a mean a unit."""
    drawn = rng.integers(len(attached), size=(RESAMPLES, len(attached)))
    ratios = attached[drawn].mean(1) / memory[drawn].mean(1)
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    return {"ratio": float(attached.mean() / memory.mean()), "low": low, "high": high}


def _spread(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("median", "p99", "max"), np.quantile(values, (0.5, 0.99, 1)).tolist(), strict=True))


def figures(units: list[dict[str, list[dict[str, Any]]]], stats: Stats, seed: int) -> dict[str, Any]:
    """What was found, by arm; ``stats`` are those of all steps with attached labels, the first ones included."""
    rng = np.random.default_rng(seed)
    means = {arm: np.array([np.mean([b["step_ms"] for b in unit[arm]]) for unit in units]) for arm in ARMS}
    arms = {}
    for arm in ARMS:
        blocks = [block for unit in units for block in unit[arm]]
        taken = np.concatenate([block["step_ms"] for block in blocks])
        count = len(taken)
        arms[arm] = {
            "steps": count,
            "mean_ms": float(taken.mean()),
            "median_ms": float(np.median(taken)),
            "next_ms": _spread(np.concatenate([block["next_ms"] for block in blocks])),
            "beyond_loader_ms": _spread(np.concatenate([block["beyond_loader_ms"] for block in blocks])),
            "cpu_ms": 1000 * sum(block["cpu_s"] for block in blocks) / count,
            "server_cpu_ms": 1000 * sum(block["server_cpu_s"] for block in blocks) / count,
        }
    median, p99, most = stats.waited_ms_median, stats.waited_ms_p99, stats.waited_ms_max
    against = {arm: interval(means["attached"], means[arm], rng) for arm in ("memory", "workers")}
    return {
        "arms": arms,
        "attached_against": against,
        "wait_ms": {"median": median, "p99": p99, "max": most, "steps": stats.steps},
        "goals": {
            f"mean step within {WITHIN:.0%} of memory": against["memory"]["ratio"] <= 1 + WITHIN,
            f"median wait at most {MEDIAN_MS} ms": median <= MEDIAN_MS,
            f"p99 of waits at most {P99_MS} ms": p99 <= P99_MS,
        },
    }


def told(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [("arm", "steps", "mean ms", "median", "next(): median", "p99", "max", "CPU ms a step", "of the server")]
    for name, arm in found["arms"].items():
        following = [f"{arm['next_ms'][which]:.3f}" for which in ("median", "p99", "max")]
        steps = (f"{arm['steps']:,}", f"{arm['mean_ms']:.2f}", f"{arm['median_ms']:.2f}")
        lines.append((name, *steps, *following, f"{arm['cpu_ms']:.2f}", f"{arm['server_cpu_ms']:.2f}"))
    text = aligned(lines)
    for arm, ratio in found["attached_against"].items():
        text += f"\nattached against {arm}: {ratio['ratio']:.4f} (95 %: {ratio['low']:.4f} to {ratio['high']:.4f})"
    wait = found["wait_ms"]
    text += f"\nwaits for labels: median {wait['median']:.3f}, p99 {wait['p99']:.3f}, max {wait['max']:.3f} ms"
    for name, arm in found["arms"].items():
        beyond = ", ".join(f"{which} {value:.3f}" for which, value in arm["beyond_loader_ms"].items())
        text += f"\n  next() beyond the loader's own, {name}: {beyond} ms"
    return text + "".join(f"\n  {goal}: {'met' if met else 'MISSED'}" for goal, met in found["goals"].items())


def parse_rate(text: str) -> float:
    """Bits a second out of a rate such as ``1Gbit``.

    Raises:
        click.BadParameter: it is none.
    """
    number = text.rstrip("bitkmgBITKMG")
    try:
        return float(number) * RATES[text[len(number) :].lower()]
    except (ValueError, KeyError):
        raise click.BadParameter(f"{text!r} is no rate; write 1Gbit or 10Mbit") from None


def served(stack: ExitStack, folder: Path, bits_per_s: float | None, delay_ms: float) -> Server:
    """The server, behind a link if there is to be one."""
    ours = ("logitcache.server", "serve", "--store", str(folder / "store"))
    log = folder / "serve.log"
    if bits_per_s is None:
        return stack.enter_context(started(*ours, "--port", "0", log=log))
    try:
        made = stack.enter_context(link(bits_per_s, delay_ms / 1000))
    except LinkUnavailable as error:
        raise click.ClickException(str(error)) from None
    outside = (*ours, "--host", FAR, "--port", str(PORT), "--auth", "none")
    return stack.enter_context(started("benchmarks.link", "inside", made.namespace, *outside, log=log))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rows", default=400_000, show_default=True, type=click.IntRange(min=4096), help="Rows that are stored.")
@click.option("--batch", default=256, show_default=True, type=click.IntRange(min=1), help="Examples a step.")
@click.option("--steps", default=2000, show_default=True, type=click.IntRange(min=1), help="Of each arm, at least.")
@click.option("--block", default=20, show_default=True, type=click.IntRange(min=1), help="Steps of a block.")
@click.option("--step-ms", default=STEP_MS, show_default=True, type=click.FloatRange(min=0.1), help="Aimed at.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(min=0), help="Of each arm's loader.")
@click.option("--link", "rate", metavar="RATE", help="Put the server behind a link of this rate, such as 1Gbit.")
@click.option("--delay-ms", default=2.0, show_default=True, type=click.FloatRange(min=0), help="Its round trip.")
@click.option("--quick", is_flag=True, help="That it runs, not how fast; overrides the sizes above.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write every figure as JSON.")
def main(
    rows: int,
    batch: int,
    steps: int,
    block: int,
    step_ms: float,
    workers: int,
    rate: str | None,
    delay_ms: float,
    quick: bool,
    out: Path | None,
) -> None:
    """Compare training steps; some eight minutes, and seconds with --quick."""
    if quick:
        rows, batch, steps, block, step_ms = 8192, 64, 8, 4, 2.0
    source, seed = Source(rows), int(np.random.SeedSequence().generate_state(1)[0])
    here = machine()
    torch.manual_seed(seed)
    bits_per_s = None if rate is None else parse_rate(rate)
    with tempfile.TemporaryDirectory(prefix="logitcache-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        label_set = write_label_set(folder / "store" / "rows", source)
        files = write_numpy_files(folder / "files", source)
        in_memory = {path.stem: np.load(path) for path in files.glob("*.npy")}
        server = served(stack, folder, bits_per_s, delay_ms)
        labels = stack.enter_context(connect(f"{server.url}/{label_set.name}"))
        while (shards := labels.describe().shards).verified < shards.total:
            time.sleep(0.1)

        def from_memory(ids: torch.Tensor) -> SoftLabelTensors:
            taken = {name: array.take(ids.numpy(), 0) for name, array in in_memory.items()}
            scalars = taken.pop("scalars")
            fields = {"logit_max": scalars[:, 0], "tail_logsumexp": scalars[:, 1:]}
            taken["fingerprint"] = taken["fingerprint"][:, 0]
            return SoftLabelTensors.of(soft_labels(taken | fields), "cpu")

        student, width = calibrated(batch, from_memory(torch.arange(batch) % rows), step_ms)
        units_wanted = -(-steps // (2 * block)) + UNCOUNTED_UNITS
        total = 2 * block * units_wanted + 64
        plain, mapped = Inputs(rows), Inputs(rows, files)
        loaders = [Timed(loader_of(dataset, batch, total, workers)) for dataset in (plain, plain, mapped)]
        attached = labels.attach(loaders[0], ids=0, device="cpu")
        of_attached, of_memory, of_workers = iter(attached), iter(loaders[1]), iter(loaders[2])
        batches: tuple[Iterator[Any], ...] = (
            ((inputs, classes, soft) for (_, inputs, classes), soft in of_attached),
            ((inputs, classes, from_memory(ids)) for ids, inputs, classes in of_memory),
            (
                (x, y, SoftLabelTensors.of(soft_labels({n: t.numpy() for n, t in arrays.items()}), "cpu"))
                for _, x, y, arrays in of_workers
            ),
        )
        arms = {name: Arm(each, loader) for name, each, loader in zip(ARMS, batches, loaders, strict=True)}
        orders: list[list[str]] = []
        rng = np.random.default_rng(seed)
        units: list[dict[str, list[dict[str, Any]]]] = []
        for number in range(units_wanted):
            unit: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
            orders.append(rng.permutation(ARMS).tolist())
            for arm in (*orders[-1], *reversed(orders[-1])):
                unit[arm].append(arms[arm].run(student, block, server.pid))
            units.append(unit)
            if sys.stderr.isatty():
                print(f"\runit {number + 1} of {units_wanted}", end="", file=sys.stderr)
        stats = labels.stats
    found = figures(units[UNCOUNTED_UNITS:], stats, seed)
    settings: dict[str, Any] = {
        "rows": rows, "batch": batch, "block": block, "workers": workers, "width": width, "seed": seed,
        "orders": orders, "link": rate, "delay_ms": None if rate is None else delay_ms,
        "bytes_a_step": stats.step_bytes_mean, "depth": stats.depth,
    }  # fmt: skip
    print(told(found))
    if bits_per_s is not None:
        on_link_ms = 1000 * (8 * stats.step_bytes_mean + 8 * 1500) / bits_per_s + delay_ms
        mean_ms = found["arms"]["memory"]["mean_ms"]
        word = "suffices" if on_link_ms < mean_ms else "does not suffice"
        print(f"a batch takes about {on_link_ms:.1f} ms on the link, a step {mean_ms:.1f} ms: the rate {word}")
        settings["link_ms_a_step"] = on_link_ms
    if out is not None:
        run: dict[str, Any] = {
            "benchmark": "step",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings,
        }
        run |= {"machine": here} | found | {"units": units}
        (path := unused(out)).write_text(json.dumps(run, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
