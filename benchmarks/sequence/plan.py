"""What is run, written down before it is run: tasks, arms, seeds, targets, and what is compared with what.

A change of these is a change of the experiment; results name the commit that they were made at.
"""

from dataclasses import dataclass, replace
from typing import Literal

from logitcache.client import Decay, EveryNth, FirstSteps, Schedule, WithProbability

ALPHA = 0.9
"""Weight of the divergence in the loss of distillation; the rest is cross-entropy with the targets."""

SMOOTHING = 0.1
"""Probability that label smoothing takes from the target."""

TARGET = 1.0
"""What later runs are to reach, in run 1's final validation loss. A run that never does is censored."""

CONFIDENCE = 0.95
"""Of intervals: Student's t over the replicates' paired differences."""

Source = Literal["hard", "smooth", "warm", "live", "cached", "shuffled"]
"""Where a step's loss comes from: targets, smoothed targets, targets from run 1's weights on, run 1's model run live or
its cached labels, or labels that belong to other examples."""


@dataclass(frozen=True)
class Arm:
    """One way to train a run; ``schedule`` is one of `SCHEDULES`."""

    source: Source
    schedule: str = "always"

    @property
    def name(self) -> str:
        """As it stands in tables."""
        words = {
            "hard": "hard labels",
            "smooth": "label smoothing",
            "warm": "warm start",
            "live": "live KD",
            "cached": "cached KD",
            "shuffled": "shuffled labels (control)",
        }[self.source]
        return words if self.schedule == "always" else f"{words}, {self.schedule}"


SCHEDULES = ("first 30 %", "every 4th", "by lot 25 %", "decay")
"""When to distil, besides at every step."""


def schedule(name: str, steps: int, seed: int) -> Schedule | None:
    """A schedule for a run of so many steps; None distils at every one."""
    made: dict[str, Schedule | None] = {
        "always": None,
        "first 30 %": FirstSteps.fraction(0.3, of=steps),
        "every 4th": EveryNth(4),
        "by lot 25 %": WithProbability(0.25, seed=seed),
        "decay": Decay(steps),
    }
    return made[name]


ALL_ARMS = (
    Arm("hard"),
    Arm("smooth"),
    Arm("warm"),
    Arm("live"),
    Arm("cached"),
    *(Arm("live", name) for name in SCHEDULES),
    *(Arm("cached", name) for name in SCHEDULES),
    Arm("shuffled"),
)

LANGUAGE_ARMS = (Arm("hard"), Arm("warm"), Arm("live"), Arm("cached"))


@dataclass(frozen=True)
class RunSettings:
    """A run of the search: learning rate as a multiple of the task's, and the width of the model."""

    rate: float
    width: int


@dataclass(frozen=True)
class TaskPlan:
    """How one task is run.

    Attributes:
        seeds: replicates of the whole sequence, each with a run 1, data order and weights of its own.
        epochs: of a run.
        evaluations: of a run, evenly spread.
        width: of run 1's model.
        temperature: of the divergence.
        top_k: classes stored.
        search: the runs after run 1.
        arms: ways to train them.
    """

    seeds: int
    epochs: int
    evaluations: int
    width: int
    temperature: float
    top_k: int
    search: tuple[RunSettings, ...]
    arms: tuple[Arm, ...]


_DIGITS = TaskPlan(
    seeds=8,
    epochs=20,
    evaluations=20,
    width=16,
    temperature=2.0,
    top_k=10,
    search=tuple(RunSettings(rate, width) for width in (16, 32) for rate in (0.25, 0.5, 1.0, 2.0)),
    arms=ALL_ARMS,
)

_MODULES = TaskPlan(
    seeds=8,
    epochs=8,
    evaluations=16,
    width=64,
    temperature=2.0,
    top_k=12,
    search=tuple(RunSettings(rate, width) for width in (64, 128) for rate in (0.25, 0.5, 1.0, 2.0)),
    arms=ALL_ARMS,
)

_LANGUAGE = TaskPlan(
    seeds=3,
    epochs=8,
    evaluations=8,
    width=96,
    temperature=1.0,
    top_k=50,
    search=(RunSettings(0.5, 96), RunSettings(1.0, 96), RunSettings(1.0, 128)),
    arms=LANGUAGE_ARMS,
)


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher of the second experiment: its model's width, the epochs of its run, and the tokens it is trained on.

    ``width`` and ``epochs`` are multiples of the task's, ``tokens`` of the language's: students are shown the task's
    data in any case.
    """

    name: str
    width: int = 1
    epochs: float = 1
    tokens: int = 1


_TEACHERS = (TeacherPlan("run 1"), TeacherPlan("wide", width=4), TeacherPlan("wide and long", width=4, epochs=3))

_LANGUAGE_TEACHERS = (TeacherPlan("run 1"), TeacherPlan("wide, more text", width=2, epochs=0.5, tokens=4))


@dataclass(frozen=True)
class TunedPlan:
    """The second experiment on a search, written down after the first had been seen: KD is given its best chance.

    First weight and temperature are tuned: a student of the task's width and rate is distilled live with each, by each
    teacher, and of each teacher those with the lowest final validation loss are taken, as a mean over the tuning's
    seeds. Then the search is run with them, on seeds that no one has seen.

    Attributes:
        teachers: that distil. One that is not run 1 costs all that its training took.
        alphas, temperatures: that are tried, each with each.
        tuning_seeds, seeds: replicates of the tuning, and of the search. They begin at `TUNING_FROM` and `TUNED_FROM`.
        arms: of each teacher; warm start is of run 1 alone.
    """

    teachers: tuple[TeacherPlan, ...]
    alphas: tuple[float, ...]
    temperatures: tuple[float, ...]
    tuning_seeds: int
    seeds: int
    arms: tuple[Arm, ...]


TUNING_FROM, TUNED_FROM = 100, 10

_TUNED = TunedPlan(
    _TEACHERS,
    alphas=(0.1, 0.3, 0.5, 0.7, 0.9),
    temperatures=(1.0, 2.0, 4.0),
    tuning_seeds=2,
    seeds=8,
    arms=(Arm("live"), Arm("cached"), Arm("cached", "first 30 %")),
)

_LANGUAGE_TUNED = TunedPlan(
    _LANGUAGE_TEACHERS,
    alphas=(0.3, 0.6, 0.9),
    temperatures=(1.0, 2.0),
    tuning_seeds=1,
    seeds=3,
    arms=(Arm("cached"), Arm("cached", "first 30 %")),
)

CHOSEN: dict[str, dict[str, tuple[float, float]]] = {
    "digits": {"run 1": (0.1, 2.0), "wide": (0.3, 4.0), "wide and long": (0.5, 4.0)},
    "modules": {"run 1": (0.1, 1.0), "wide": (0.7, 1.0), "wide and long": (0.9, 1.0)},
    "language": {"run 1": (0.6, 1.0), "wide, more text": (0.9, 1.0)},
}
"""Weight and temperature by task and teacher, as the tuning gave them. A task that is not there is not run."""


@dataclass(frozen=True)
class Plan:
    """All of it.

    Attributes:
        tasks: by name.
        tuned: the second experiment, by name of the task.
        parts_of_data: that arrive one after the other, in continual retraining.
        continual_seeds, views_seeds, truncation_seeds, recording_seeds, entropy_seeds: replicates of each part.
        teacher_costs: cost of a teacher's forward, in forwards of the student.
        overhead_steps: timed of each arm and teacher.
        views: stored of each example.
        view_epochs: lengths of training under augmentation.
        kept: classes stored, in the part on truncation; 0 is all.
        tails: how the loss takes what was not stored.
        folds: in which held-out labels are made.
        quick: a smoke run, whose figures mean nothing.
    """

    tasks: dict[str, TaskPlan]
    tuned: dict[str, TunedPlan]
    parts_of_data: int = 5
    continual_seeds: int = 8
    teacher_costs: tuple[int, ...] = (1, 3, 10, 30)
    overhead_steps: int = 240
    views: tuple[int, ...] = (1, 4, 16)
    view_epochs: tuple[int, ...] = (20, 60)
    views_seeds: int = 5
    kept: tuple[int, ...] = (1, 4, 12, 50, 0)
    tails: tuple[str, ...] = ("bucket", "renormalise", "target")
    truncation_seeds: int = 3
    recording_seeds: int = 8
    entropy_seeds: int = 8
    folds: int = 2
    quick: bool = False


FULL = Plan(
    {"digits": _DIGITS, "modules": _MODULES, "language": _LANGUAGE},
    {"digits": _TUNED, "modules": _TUNED, "language": _LANGUAGE_TUNED},
)

_FEW_ARMS = (Arm("hard"), Arm("warm"), Arm("live"), Arm("cached"), Arm("cached", "every 4th"), Arm("shuffled"))

_QUICK_TUNED = replace(_TUNED, alphas=(0.5,), temperatures=(2.0,), tuning_seeds=1, seeds=1)

QUICK = Plan(
    {
        "digits": replace(_DIGITS, seeds=2, epochs=2, evaluations=2, search=_DIGITS.search[:2], arms=_FEW_ARMS),
        "modules": replace(_MODULES, seeds=1, epochs=1, evaluations=2, search=_MODULES.search[:1], arms=_FEW_ARMS),
        "language": replace(_LANGUAGE, seeds=1, epochs=1, evaluations=1, search=_LANGUAGE.search[:1]),
    },
    {
        "digits": _QUICK_TUNED,
        "modules": _QUICK_TUNED,
    },
    continual_seeds=1,
    teacher_costs=(1,),
    overhead_steps=12,
    views=(1, 4),
    view_epochs=(2,),
    views_seeds=1,
    kept=(4, 0),
    truncation_seeds=1,
    recording_seeds=1,
    entropy_seeds=1,
    quick=True,
)
