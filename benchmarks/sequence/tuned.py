"""Part 9: the search again, on fresh seeds, with teachers that are better than run 1 and with KD tuned for each.

As part 1, but that several teachers distil. Run 1 is trained in any case, since its quality is what later runs are to
reach; a teacher that is not run 1 is paid for in its place.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks.sequence import arms
from benchmarks.sequence.comparison import HARD, HEADINGS, Replicate, compared, own_seed, sequence
from benchmarks.sequence.labelled import Shop
from benchmarks.sequence.markdown import Replicates, table
from benchmarks.sequence.plan import CHOSEN, TUNED_FROM, Arm, Plan, RunSettings, schedule
from benchmarks.sequence.tasks import TASKS, begun
from benchmarks.sequence.training import train
from benchmarks.sequence.tuning import trained_teacher
from matplotlib.figure import Figure
from torch import nn

WARM = Arm("warm").name


def units(plan: Plan) -> list[tuple[str, int]]:
    """Task and seed of each replicate."""
    chosen = [name for name in plan.tuned if plan.quick or name in CHOSEN]
    return [(name, TUNED_FROM + seed) for name in chosen for seed in range(plan.tuned[name].seeds)]


def run(plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
    """One replicate, as JSON values: run 1, each teacher with its seconds and those of its labels, and the runs."""
    task, settings, tuned = TASKS[name](), plan.tasks[name], plan.tuned[name]
    data = task.data()
    steps = settings.epochs * len(task.loader(data, 0))
    runs: list[dict[str, Any]] = []

    def add(later: RunSettings, number: int, arm: str, batches: Any, before: nn.Module | None = None) -> None:
        its_seed = own_seed(seed, number)
        model = begun(task, later.width, its_seed)
        if before is not None:
            model.load_state_dict(before.state_dict())
        optimizer, look_every = task.optimizer(model, later.rate), max(1, steps // settings.evaluations)
        found = train(model, optimizer, batches, task.forward, task.evaluate, look_every=look_every, seed=its_seed)
        runs.append({"run": number, **asdict(later), "arm": arm, **asdict(found)})

    teachers: dict[str, dict[str, Any]] = {}
    later_runs = list(enumerate(settings.search, start=1))
    for place, each in enumerate(tuned.teachers):
        teacher, trajectory = trained_teacher(task, settings, each, seed)
        alpha, temperature = (tuned.alphas[0], tuned.temperatures[0]) if plan.quick else CHOSEN[name][each.name]
        options = {"top_k": settings.top_k, "temperatures": (temperature,)}
        labels = shop.label(f"tuned-{name}-{seed}-{place}", teacher, data, **options)
        own = {"alpha": alpha, "temperature": temperature, "precompute_s": shop.precompute_s}
        teachers[each.name] = own | asdict(trajectory)
        for number, later in later_runs:
            loader = partial(task.loader, data, own_seed(seed, number))
            if not place:
                add(later, number, HARD, arms.hard(task, loader(), settings.epochs))
                if later.width == settings.width:
                    add(later, number, WARM, arms.hard(task, loader(), settings.epochs), teacher)
            for arm in tuned.arms:
                when = schedule(arm.schedule, steps, own_seed(seed, number))
                told = f"{each.name}: {arm.name}"
                if arm.source == "live":
                    batches = arms.live(task, loader(), settings.epochs, teacher, temperature, when, alpha=alpha)
                else:
                    batches = arms.cached(task, loader(), settings.epochs, labels, temperature, when, alpha=alpha)
                add(later, number, told, batches)
        labels.close()
    return {"first": teachers[tuned.teachers[0].name], "teachers": teachers, "steps": steps, "runs": runs}


def tables(found: Replicates) -> dict[str, str]:
    """By task: each arm of each teacher beside hard labels."""
    return {task: _table([unit["found"] for unit in units]) for task, units in found.items()}


def figures(found: Replicates) -> dict[str, Figure]:
    """None: the table says it all."""
    return {}


def _table(replicates: Sequence[dict[str, Any]]) -> str:
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in replicates[0]["runs"]):
        teacher, _, rest = arm.partition(": ")
        own = replicates[0]["teachers"][teacher] if rest else None
        how = f"{own['alpha']:g}, {own['temperature']:g}" if own else ""
        labelling = partial(_labelling, arm=arm)
        cells = compared(replicates, arm, partial(_before, teacher=teacher, arm=arm))
        rows.append([arm, how, *cells, sequence(replicates, arm, labelling, run_1=False)])
    return table(["arm", "weight, temperature", *HEADINGS, "the same, the teacher given"], rows)


def _before(replicate: Replicate, teacher: str, arm: str) -> float:
    """Seconds of what the later runs build on, this teacher or run 1 where none has this name, and of its labels."""
    seconds: float = replicate["teachers"].get(teacher, replicate["first"])["seconds"]
    return seconds + _labelling(replicate, arm)


def _labelling(replicate: Replicate, arm: str) -> float:
    """Seconds of the labels of an arm; 0 where it has none."""
    teacher, _, rest = arm.partition(": ")
    seconds: float = replicate["teachers"][teacher]["precompute_s"] if rest.startswith("cached") else 0.0
    return seconds
