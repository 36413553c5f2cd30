"""Schedules: at which optimizer steps a run distils at all, and how strongly.

KD need not be paid at every step of a run. A schedule is a function of the optimizer's step and of nothing else, so
that every rank of a run, and a run that resumes, decides alike. It knows nothing of labels or losses: `attach` fetches
nothing for steps of weight 0, and the loop multiplies its ``alpha`` by the weight.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from logitcache.labels.derived import uniform
from logitcache.labels.errors import InvalidRequest

LOOKED_THROUGH = 100_000
"""Steps within which a product of schedules must distil at least once, unless it draws lots and ends later."""


class Schedule(ABC):
    """A weight from 0 to 1 for each optimizer step; 0 means that the step does not distil.

    Schedules multiply: ``FirstSteps(3000) * EveryNth(4)`` distils at every fourth of the first 3,000 steps.

    Raises:
        InvalidRequest: a product that distils at no step.
    """

    @property
    def ends(self) -> int | None:
        """The first step from which on it never distils; None if there is none."""
        return None

    @abstractmethod
    def weight(self, step: int) -> float:
        """The weight at this step of the optimizer, counted from 0."""

    def __call__(self, step: int) -> float:
        """See `weight`."""
        return self.weight(step)

    def __mul__(self, other: "Schedule") -> "Schedule":
        if not isinstance(other, Schedule):
            return NotImplemented
        return Product((*_factors(self), *_factors(other)))


@dataclass(frozen=True)
class FirstSteps(Schedule):
    """Weight 1 at the first so many steps, 0 from then on.

    Raises:
        InvalidRequest: ``steps`` is below 1.
    """

    steps: int

    def __post_init__(self) -> None:
        _check_positive("FirstSteps", "steps", self.steps)

    @classmethod
    def fraction(cls, fraction: float, of: int) -> "FirstSteps":
        """The first ``fraction`` of a run of so many steps, rounded up.

        Raises:
            InvalidRequest: ``fraction`` is not above 0 and up to 1, or ``of`` is below 1.
        """
        _check_positive("FirstSteps.fraction", "of", of)
        if not 0 < fraction <= 1:
            raise InvalidRequest(f"FirstSteps.fraction({fraction!r}): a fraction above 0 and up to 1 is wanted")
        return cls(math.ceil(Fraction(str(fraction)) * of))  # the product of floats may be just above

    @property
    def ends(self) -> int:
        """As many steps as it has."""
        return self.steps

    def weight(self, step: int) -> float:
        """1 before the end."""
        return float(step < self.steps)


@dataclass(frozen=True)
class EveryNth(Schedule):
    """Weight 1 at steps ``offset``, ``offset + n``, ``offset + 2 n``, …; 0 between them.

    Raises:
        InvalidRequest: ``n`` is below 1, or ``offset`` is not from 0 to n - 1.
    """

    n: int
    offset: int = 0

    def __post_init__(self) -> None:
        _check_positive("EveryNth", "n", self.n)
        if not 0 <= self.offset < self.n:
            raise InvalidRequest(
                f"EveryNth({self.n}, offset={self.offset!r}): an offset from 0 to {self.n - 1} is wanted"
            )

    def weight(self, step: int) -> float:
        """1 at every n-th step."""
        return float(step % self.n == self.offset)


@dataclass(frozen=True)
class WithProbability(Schedule):
    """Weight 1 with this probability at each step, drawn from the seed and the step: the same on every rank.

    Raises:
        InvalidRequest: the probability is not above 0 and up to 1.
    """

    probability: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 < self.probability <= 1:
            raise InvalidRequest(f"WithProbability({self.probability!r}): a probability above 0 and up to 1 is wanted")

    def weight(self, step: int) -> float:
        """1 or 0, by lot."""
        return float(uniform(self.seed, step) < self.probability)


@dataclass(frozen=True)
class Decay(Schedule):
    """A weight that falls from 1 at step 0 to ``to`` at step ``steps``, and stays there.

    Raises:
        InvalidRequest: ``steps`` is below 1, ``to`` is not from 0 up to 1, 1 excluded, or the shape is another word.
    """

    steps: int
    to: float = 0.0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        _check_positive("Decay", "steps", self.steps)
        if not 0 <= self.to < 1:
            raise InvalidRequest(f"Decay(to={self.to!r}): a weight from 0 up to 1 is wanted, 1 excluded")
        if self.shape not in ("linear", "cosine"):
            raise InvalidRequest(f"Decay(shape={self.shape!r}): use 'linear' or 'cosine'")

    @property
    def ends(self) -> int | None:
        """Where it has fallen to 0."""
        return None if self.to else self.steps

    def weight(self, step: int) -> float:
        """The line, or half a wave of the cosine (Loshchilov and Hutter 2017, arXiv 1608.03983, equation 5)."""
        done = min(1.0, step / self.steps)
        left = 1 - done if self.shape == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.to + (1 - self.to) * left


@dataclass(frozen=True)
class Product(Schedule):
    """The product of schedules' weights; made by multiplying them."""

    factors: tuple[Schedule, ...]

    def __post_init__(self) -> None:
        until = LOOKED_THROUGH if self.ends is None else min(self.ends, LOOKED_THROUGH)
        if until != self.ends and any(isinstance(each, WithProbability) for each in self.factors):
            return  # lots that are rare may fall later
        if not any(self.weight(step) for step in range(until)):
            raise InvalidRequest(
                f"{self!r} distils at none of its first {until:,} steps: fetch no labels, or mend the schedule"
            )

    @property
    def ends(self) -> int | None:
        """Where the first of them ends."""
        return min((each.ends for each in self.factors if each.ends is not None), default=None)

    def weight(self, step: int) -> float:
        """All weights multiplied."""
        return math.prod(each.weight(step) for each in self.factors)

    def __repr__(self) -> str:
        return " * ".join(map(repr, self.factors))


def _factors(schedule: Schedule) -> tuple[Schedule, ...]:
    return schedule.factors if isinstance(schedule, Product) else (schedule,)


def _check_positive(what: str, name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{what}({name}={value!r}): a whole number of at least 1 is wanted")
