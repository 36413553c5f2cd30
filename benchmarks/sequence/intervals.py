"""Means over replicates, and paired differences with intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from benchmarks.sequence.plan import CONFIDENCE
from scipy import stats


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and interval (Student's t, `CONFIDENCE`) of one value a replicate; NaN bounds where there is one alone."""
    found = np.asarray(values, float)
    mean = float(found.mean())
    if len(found) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return mean, mean - half, mean + half


def paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """`mean_interval` of the differences within replicates: positive where ``values`` are larger."""
    return mean_interval([one - other for one, other in zip(values, base, strict=True)])


def less(runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], measure: str, digits: int = 4) -> str:
    """How much more of a measure each run had at its last look than the one that it is paired with, as `told`."""
    return told(paired([last(run)[measure] for run in runs], [last(run)[measure] for run in base]), digits)


def last(run: Mapping[str, Any]) -> Mapping[str, float]:
    """A trajectory's last look."""
    look: Mapping[str, float] = run["looks"][-1]
    return look


def told(interval: tuple[float, float, float], digits: int = 3) -> str:
    """``+0.012 (-0.003 to +0.027)``."""
    mean, low, high = interval
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
