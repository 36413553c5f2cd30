"""Parts 3 and 6: what distilling adds to a step, live and from cached labels; and when a label set has paid for itself.

The student is a convolutional network whose step takes some 35 ms on one core. A teacher of cost m is m networks of the
student's shape, each with weights of its own, whose logits are averaged, one forward after the other: a forward of it
is m of the student's, exactly. Inputs, targets and weights are random: nothing is learnt here. The training process
computes on one thread, the teacher's forwards included; the server is a process of its own on the same machine, and it
and the thread that fetches may use another core.

Steps are timed in blocks that alternate between the arms: each round draws an order of them and takes it forwards and
backwards. Only blocks of one round are compared; intervals are bootstraps over rounds. A schedule is composed: steps
that distil and plain ones (``..., plain``: the same loop where no step is due) are timed apart, and weighted by how
many of each the schedule has in a run of `RUN_STEPS`. "every 4th" is timed as it is, too, as a check of that. Shares
are of the student's own step with hard labels, loading included.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import islice
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from benchmarks.sequence import arms
from benchmarks.sequence.labelled import Shop, live_logits
from benchmarks.sequence.markdown import Replicates
from benchmarks.sequence.overhead_tables import tables
from benchmarks.sequence.plan import CONFIDENCE, SCHEDULES, Plan, schedule
from benchmarks.sequence.tasks import Classified, Split, Task, begun
from benchmarks.sequence.training import Loss, Quality, train_on
from matplotlib.figure import Figure
from torch import Tensor, nn

from logitcache.client import FirstSteps, Labels

__all__ = ["figures", "run", "tables", "units"]

CLASSES, BATCH, TOP_K, TEMPERATURE = 1000, 64, 32, 2.0
CHANNELS, SIDE = 3, 16
"""Of an input."""

WIDTH, QUICK_WIDTH = 48, 4
"""Channels of the student's first layer: 48 are a step of some 35 ms on one quiet core."""

EXAMPLES, QUICK_EXAMPLES = 8192, 512
"""That are labelled and trained on."""

BLOCK, FORWARDS = 8, 2
"""Steps of a block, a multiple of 4 so that each has as many that "every 4th" distils; and forwards of one."""

UNCOUNTED_ROUNDS = 1
"""In which everything warms up."""

RUN_STEPS = 1000
"""Of the run over which schedules are composed."""

RESAMPLES = 10_000
"""Of a bootstrap."""

CROSSING_COSTS, MOST_EPOCHS = (1, 10), 6
"""Teachers with which live and cached are run until cached has cost less in all, and epochs after which to give up."""

MLP_WIDTHS, NARROW = (4, 16, 64, 256), 16
"""Of the small teachers, beside a linear one and the student's own network: MLPs, and a network like the student's."""


class Images(Classified):
    """Random images of 1,000 random classes."""

    name = "overhead"

    def __init__(self, examples: int, width: int) -> None:
        super().__init__(partial(_images, examples), classes=CLASSES, batch=BATCH, rate=0.001)
        self.width = width

    def model(self, width: int) -> nn.Module:
        """See `Task`."""
        return nn.Sequential(
            nn.Conv2d(CHANNELS, width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (SIDE // 4) ** 2, CLASSES),
        )


@lru_cache(maxsize=1)
def _images(examples: int) -> Split:
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(examples, CHANNELS, SIDE, SIDE, generator=draw)
    pairs = inputs, torch.randint(CLASSES, (examples,), generator=draw)
    return Split(train=pairs, held_out=pairs)  # which nobody looks at


class Copies(nn.Module):
    """The mean logits of several networks, one forward after the other."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, classes) logits."""
        first, *others = self.networks
        total: Tensor = first(inputs)
        for network in others:
            total = total + network(inputs)
        return total / len(self.networks)


class Timed(Protocol):
    """Something that is timed in blocks."""

    def block(self) -> float:
        """Run one block; mean milliseconds of a step of it."""


class Student:
    """A model that is trained on batches as long as it is asked to."""

    def __init__(self, task: Images, batches: Iterator[tuple[Any, Loss]]) -> None:
        self._task, self._batches = task, batches
        self._model = begun(task, task.width, seed=0)
        self._optimizer = task.optimizer(self._model, 1.0)

    def train(self, steps: int) -> float:
        """Take so many steps; seconds that they took, loading included."""
        some = islice(self._batches, steps)
        run = train_on(self._model, self._optimizer, some, self._task.forward, _not_looked_at, look_every=steps + 1)
        if run.steps != steps:
            raise RuntimeError(f"{run.steps} steps of {steps}: the batches ended")
        return run.seconds

    def block(self) -> float:
        """See `Timed`."""
        return 1000 * self.train(BLOCK) / BLOCK


class Forwards:
    """The forward of a teacher on one batch, as live distillation computes it."""

    def __init__(self, task: Task, teacher: nn.Module, batch: Any) -> None:
        self._task, self._teacher, self._batch = task, teacher.eval(), batch

    def block(self) -> float:
        """See `Timed`."""
        began = perf_counter()
        for _ in range(FORWARDS):
            live_logits(self._task, self._teacher, self._batch)
        return 1000 * (perf_counter() - began) / FORWARDS


def _not_looked_at(_model: nn.Module) -> Quality:
    return Quality(math.nan, math.nan, math.nan)


class _Setting:
    """What the arms of a unit have in common: task, data, order of batches, and number of steps."""

    def __init__(self, plan: Plan) -> None:
        self.task = Images(QUICK_EXAMPLES if plan.quick else EXAMPLES, QUICK_WIDTH if plan.quick else WIDTH)
        self.data = self.task.data()
        self.epoch = len(self._loader())
        self.rounds = -(-plan.overhead_steps // (2 * BLOCK))
        steps = max(2 * BLOCK * (UNCOUNTED_ROUNDS + self.rounds), MOST_EPOCHS * self.epoch)
        self._epochs = -(-steps // self.epoch)

    def _loader(self) -> Any:
        return self.task.loader(self.data, 0)

    def hard(self) -> Student:
        return Student(self.task, arms.hard(self.task, self._loader(), self._epochs))

    def live(self, teacher: nn.Module, when: Any = None) -> Student:
        batches = arms.live(self.task, self._loader(), self._epochs, teacher, TEMPERATURE, when)
        return Student(self.task, batches)

    def cached(self, labels: Labels, when: Any = None) -> Student:
        batches = arms.cached(self.task, self._loader(), self._epochs, labels, TEMPERATURE, when)
        return Student(self.task, batches)

    def forwards(self, teacher: nn.Module) -> Forwards:
        return Forwards(self.task, teacher, next(iter(self._loader())))

    def student(self, seed: int) -> nn.Module:
        return begun(self.task, self.task.width, seed)

    def told(self) -> dict[str, Any]:
        return {
            "student": {"width": self.task.width, "parameters": sum(p.numel() for p in self.student(0).parameters())},
            "classes": CLASSES,
            "batch": BATCH,
            "top_k": TOP_K,
            "temperature": TEMPERATURE,
            "examples": len(self.data),  # type: ignore[arg-type]
            "steps_an_epoch": self.epoch,
            "block_steps": BLOCK,
            "forwards_a_block": FORWARDS,
            "rounds": self.rounds,
            "uncounted_rounds": UNCOUNTED_ROUNDS,
            "torch_threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)),
        }


def units(plan: Plan) -> list[tuple[str, int]]:
    """A unit for each teacher's cost, which stands in the place of the seed; and one for the crossover."""
    return [*(("overhead", cost) for cost in plan.teacher_costs), ("crossover", 0)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One unit, as JSON values: the raw mean milliseconds of a step of each block, and what follows from them."""
    with _one_thread():
        return _crossover(plan, shop) if name == "crossover" else _overhead(plan, seed, shop)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _overhead(plan: Plan, cost: int, shop: Shop) -> dict[str, Any]:
    setting, rng = _Setting(plan), np.random.default_rng(cost)
    teacher = Copies([setting.student(seed=number) for number in range(1, cost + 1)]).eval()
    name = f"overhead-{cost}"
    labels = shop.label(name, teacher, setting.data, top_k=TOP_K, temperatures=(TEMPERATURE,))
    precompute_s = shop.precompute_s
    crossing = None
    if cost in CROSSING_COSTS:
        with shop.connect(name) as counted:
            crossing = _crossing(setting, teacher, counted, precompute_s)
    once, fourth = FirstSteps(1), schedule("every 4th", RUN_STEPS, 0)  # the only step of the former is in no block
    with labels:
        timed: dict[str, Timed] = {
            "hard": setting.hard(),
            "live": setting.live(teacher),
            "live, plain": setting.live(teacher, once),
            "live, every 4th": setting.live(teacher, fourth),
            "cached": setting.cached(labels),
            "cached, plain": setting.cached(labels, once),
            "cached, every 4th": setting.cached(labels, fourth),
            "forward: teacher": setting.forwards(teacher),
            "forward: student": setting.forwards(setting.student(0)),
        }
        rounds = alternated(timed, setting.rounds, rng)
        stats = labels.stats
    step_ms = by_round(rounds)
    return {
        "cost": cost,
        "settings": setting.told(),
        "precompute": _precompute(precompute_s, labels, step_ms, len(setting.data)),  # type: ignore[arg-type]
        "forward_ms": {who: estimate(step_ms[f"forward: {who}"], rng) for who in ("teacher", "student")},
        "arms": {arm: overhead(step_ms[arm], step_ms["hard"], rng) for arm in timed if "forward" not in arm},
        "schedules": {source: _composed(step_ms, source, rng) for source in ("live", "cached")},
        "break_even": _break_even(precompute_s, step_ms, setting.epoch, rng),
        "crossing": crossing,
        "labels": {
            "bytes_a_step": stats.step_bytes_mean,
            "waited_ms_mean": stats.waited_ms_mean,
            "waited_ms_p99": stats.waited_ms_p99,
            "depth": stats.depth,
        },
        "raw": rounds,
    }


def alternated(timed: Mapping[str, Timed], rounds: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """In each round the order that was drawn, and the milliseconds a step of both blocks of each."""
    found = []
    for _ in range(UNCOUNTED_ROUNDS + rounds):
        order = rng.permutation(list(timed)).tolist()
        taken: dict[str, list[float]] = {name: [] for name in timed}
        for name in (*order, *reversed(order)):
            taken[name].append(timed[name].block())
        found.append({"order": order, "block_ms": taken})
    return found[UNCOUNTED_ROUNDS:]


def by_round(rounds: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Mean milliseconds a step of each arm, float64 (rounds,)."""
    return {arm: np.array([np.mean(one["block_ms"][arm]) for one in rounds]) for arm in rounds[0]["block_ms"]}


def _resampled(rounds: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(rounds, size=(RESAMPLES, rounds))


def _interval(value: float, drawn: np.ndarray) -> dict[str, float]:
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (outside, 1 - outside)).tolist()
    return {"mean": float(value), "low": low, "high": high}


def estimate(values: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """A mean over rounds, with the interval of its bootstrap."""
    return _interval(values.mean(), values[_resampled(len(values), rng)].mean(1))


def overhead(arm: np.ndarray, hard: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Of an arm: milliseconds of a step, those beyond hard labels' of the same round, also as a share of these."""
    beyond, drawn = arm - hard, _resampled(len(hard), rng)
    share = _interval(beyond.mean() / hard.mean(), beyond[drawn].mean(1) / hard[drawn].mean(1))
    return {"step_ms": float(arm.mean()), "overhead_ms": estimate(beyond, rng), "share": share}


def _composed(step_ms: Mapping[str, np.ndarray], source: str, rng: np.random.Generator) -> dict[str, Any]:
    """Overhead under each schedule; what that saves of the one at every step, by arithmetic alone and as composed."""
    always, plain, hard = step_ms[source], step_ms[f"{source}, plain"], step_ms["hard"]
    found = {}
    for name in SCHEDULES:
        when = schedule(name, RUN_STEPS, 0)
        assert when is not None
        distils = sum(when(step) > 0 for step in range(RUN_STEPS)) / RUN_STEPS
        arm = distils * always + (1 - distils) * plain
        drawn = _resampled(len(hard), rng)
        of_always, saved = (always - hard)[drawn].mean(1), (always - arm)[drawn].mean(1)
        found[name] = overhead(arm, hard, rng) | {
            "steps_that_distil": distils,
            "saved_by_arithmetic": 1 - distils,
            "saved": _interval((always - arm).mean() / (always - hard).mean(), saved / of_always),
        }
    return found


def _precompute(seconds: float, labels: Labels, step_ms: Mapping[str, np.ndarray], examples: int) -> dict[str, Any]:
    bill = labels.stats.bill
    return {
        "seconds": seconds,
        "ms_an_example": 1000 * seconds / examples,
        "teacher_s": None if bill is None else bill.teacher.seconds,
        "live_forward_ms_an_example": float(step_ms["forward: teacher"].mean() / BATCH),
    }


def _break_even(
    precompute_s: float, step_ms: Mapping[str, np.ndarray], steps_an_epoch: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Steps and epochs after which cached has cost less than live: precompute / (live step - cached step).

    None is never. The interval is that of the steps alone; precompute is measured once.
    """
    saved = estimate(step_ms["live"] - step_ms["cached"], rng)

    def epochs(saved_ms: float) -> float | None:
        return 1000 * precompute_s / saved_ms / steps_an_epoch if saved_ms > 0 else None

    found = {"mean": epochs(saved["mean"]), "low": epochs(saved["high"]), "high": epochs(saved["low"])}
    steps = None if found["mean"] is None else found["mean"] * steps_an_epoch
    return {"precompute_s": precompute_s, "saved_ms_a_step": saved, "steps": steps, "epochs": found}


def _crossing(setting: _Setting, teacher: nn.Module, labels: Labels, precompute_s: float) -> dict[str, Any]:
    """Run live and cached, epochs in turn, until cached has cost less in all, its precompute counted; and the bill.

    Where it crosses is told in whole epochs, and between two of them as if each were even; None is never, in so many.
    """
    students = {"live": setting.live(teacher), "cached": setting.cached(labels)}
    spent = {"live": 0.0, "cached": precompute_s}
    epochs: list[dict[str, Any]] = []
    ahead, crossed = precompute_s, None  # by how much cached has cost more
    while crossed is None and len(epochs) < MOST_EPOCHS:
        order = ("live", "cached") if len(epochs) % 2 == 0 else ("cached", "live")
        seconds = {name: students[name].train(setting.epoch) for name in order}
        spent = {name: spent[name] + seconds[name] for name in spent}
        now = spent["cached"] - spent["live"]
        if now < 0:
            crossed = len(epochs) + ahead / (ahead - now)
        ahead = now
        epochs.append({"seconds": seconds, "spent_s": spent, "bill": _bill(labels)})
    return {"epochs": epochs, "crossed_in_epoch": None if crossed is None else len(epochs), "crossed_after": crossed}


def _bill(labels: Labels) -> dict[str, Any] | None:
    bill = labels.stats.bill
    if bill is None:
        return None
    epochs = bill.epochs_to_pay
    return {
        "teacher_s": bill.teacher.seconds,
        "served": bill.served,
        "saved_s": bill.saved_s,
        "fetch_s": bill.fetch_s,
        "epochs_to_pay": None if epochs == math.inf else epochs,
        "is_paid": bill.is_paid,
        "told": str(bill),
    }


def _crossover(plan: Plan, shop: Shop) -> dict[str, Any]:
    """Live overhead with teachers so small that fetching may cost more, beside the overhead of cached labels."""
    setting, rng = _Setting(plan), np.random.default_rng(0)
    student = setting.student(seed=1)
    narrow = begun(setting.task, NARROW, seed=1)
    teachers = _small_teachers() | {f"convolution of width {NARROW}": narrow, "the student's network": student}
    # What is fetched is as large whoever made it.
    with shop.label("crossover", student, setting.data, top_k=TOP_K, temperatures=(TEMPERATURE,)) as labels:
        timed: dict[str, Timed] = {"hard": setting.hard(), "cached": setting.cached(labels)}
        for name, teacher in teachers.items():
            timed[f"live: {name}"] = setting.live(teacher.eval())
            timed[f"forward: {name}"] = setting.forwards(teacher)
        timed["forward: student"] = setting.forwards(setting.student(0))
        rounds = alternated(timed, setting.rounds, rng)
    step_ms = by_round(rounds)
    hard, student_ms = step_ms["hard"], step_ms["forward: student"]
    measured = {
        name: overhead(step_ms[f"live: {name}"], hard, rng)
        | {
            "forward_ms": estimate(step_ms[f"forward: {name}"], rng),
            "student_forwards": float(step_ms[f"forward: {name}"].mean() / student_ms.mean()),
            "live_beyond_cached_ms": estimate(step_ms[f"live: {name}"] - step_ms["cached"], rng),
        }
        for name in teachers
    }
    return {
        "settings": setting.told(),
        "student_forward_ms": estimate(student_ms, rng),
        "cached": overhead(step_ms["cached"], hard, rng),
        "teachers": measured,
        "crossover": _where_lines_cross(step_ms, list(teachers), rng),
        "raw": rounds,
    }


def _small_teachers() -> dict[str, nn.Module]:
    inputs = CHANNELS * SIDE * SIDE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mlps = {
            f"MLP of width {width}": nn.Sequential(
                nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, CLASSES)
            )
            for width in MLP_WIDTHS
        }
        return {"linear": nn.Sequential(nn.Flatten(), nn.Linear(inputs, CLASSES)), **mlps}


def _where_lines_cross(
    step_ms: Mapping[str, np.ndarray], teachers: Sequence[str], rng: np.random.Generator
) -> dict[str, Any]:
    """A teacher's forward at which live and cached overhead are equal: least squares of overhead against forward.

    Below 0 means that cached labels are cheaper than a teacher that costs nothing: its loss over all classes remains.
    """
    rounds = len(step_ms["hard"])
    live = np.stack([step_ms[f"live: {name}"] - step_ms["hard"] for name in teachers])
    forward = np.stack([step_ms[f"forward: {name}"] for name in teachers])
    cached = step_ms["cached"] - step_ms["hard"]

    def lines(drawn: np.ndarray) -> tuple[np.ndarray, ...]:
        x, y = forward[:, drawn].mean(2), live[:, drawn].mean(2)  # (teachers, resamples)
        from_x, from_y = x - x.mean(0), y - y.mean(0)
        slope = (from_x * from_y).sum(0) / (from_x**2).sum(0)
        intercept = y.mean(0) - slope * x.mean(0)
        at = (cached[drawn].mean(1) - intercept) / slope
        return slope, intercept, at, at / step_ms["forward: student"][drawn].mean(1)

    found = lines(np.arange(rounds)[None])
    bootstraps = lines(_resampled(rounds, rng))
    names = ("overhead_ms_a_forward_ms", "overhead_ms_beside_the_forward", "forward_ms", "student_forwards")
    return {name: _interval(value[0], drawn) for name, value, drawn in zip(names, found, bootstraps, strict=True)}


def figures(found: Replicates) -> dict[str, Figure]:
    """None: the tables say it all."""
    return {}
