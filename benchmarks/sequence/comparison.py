"""Later runs beside those of hard labels: how good, how soon at run 1's quality, and what the whole sequence cost.

A later run is paired with that of hard labels that has its number, in the same replicate: same first weights, order of
batches, rate and width. Intervals are over replicates, of each the mean over its runs.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.sequence.intervals import last, mean_interval, told
from benchmarks.sequence.plan import TARGET, Arm

HARD = Arm("hard").name

HEADINGS = (
    "validation loss, less that of hard labels",
    "accuracy, less that of hard labels",
    "reached run 1",
    "steps to run 1, less those of hard labels",
    "seconds a run",
    "sequence to run 1, of that of hard labels",
)
"""Of what `compared` gives."""

Replicate = Mapping[str, Any]
"""``first``, run 1's trajectory, and ``runs``: trajectories with their ``run`` (number) and ``arm``."""


def own_seed(seed: int, number: int) -> int:
    """Of weights, order and lots of a run of a replicate; run 1 has number 0."""
    return 1000 * seed + number


def of_arm(replicate: Replicate, arm: str) -> dict[int, dict[str, Any]]:
    """Runs of an arm by their number."""
    return {run["run"]: run for run in replicate["runs"] if run["arm"] == arm}


def target(replicate: Replicate) -> float:
    """The loss that later runs are to reach."""
    return last(replicate["first"])["loss"] * TARGET


def to_target(run: Mapping[str, Any], target: float) -> dict[str, Any]:
    """The first look that reached the target; where none did, the whole run, which is where it was cut off."""
    for look in run["looks"]:
        if look["loss"] <= target:
            return {"steps": look["step"], "seconds": look["seconds"], "reached": True}
    return {"steps": run["steps"], "seconds": run["seconds"], "reached": False}


Pairs = list[list[tuple[dict[str, Any], dict[str, Any]]]]


def sequence(replicates: Sequence[Replicate], arm: str, before: Callable[[Replicate], float], *, run_1: bool) -> str:
    """Seconds until each later run reached run 1, as a share of those of hard labels: a cell.

    Args:
        replicates: of the search.
        arm: of its runs.
        before: seconds that a replicate spent before its later runs with this arm.
        run_1: the sequence of hard labels contains run 1.
    """
    shares = [
        (before(replicate) + sum(one["seconds"] for one, _ in runs))
        / (run_1 * replicate["first"]["seconds"] + sum(other["seconds"] for _, other in runs))
        for runs, replicate in zip(_ends(replicates, arm), replicates, strict=True)
    ]
    return f"{mean(shares):.2f}"


def compared(replicates: Sequence[Replicate], arm: str, before: Callable[[Replicate], float]) -> list[str]:
    """Cells of an arm, under `HEADINGS`; ``before`` is that of `sequence`, of which run 1 is part."""
    pairs, ends = _pairs(replicates, arm), _ends(replicates, arm)

    def less(measure: str) -> str:
        each = [mean(last(one)[measure] - last(other)[measure] for one, other in runs) for runs in pairs]
        return told(mean_interval(each), 4)

    reached = [one["reached"] for runs in ends for one, _ in runs]
    return [
        less("loss"),
        less("accuracy"),
        f"{sum(reached)} of {len(reached)}",
        told(mean_interval([mean(one["steps"] - other["steps"] for one, other in runs) for runs in ends]), 0),
        f"{mean(mean(one['seconds'] for one, _ in runs) for runs in pairs):.2f}",
        sequence(replicates, arm, before, run_1=True),
    ]


def _pairs(replicates: Sequence[Replicate], arm: str) -> Pairs:
    """By replicate each run of an arm, and that of hard labels with its number."""
    return [
        [(one, of_arm(replicate, HARD)[number]) for number, one in of_arm(replicate, arm).items()]
        for replicate in replicates
    ]


def _ends(replicates: Sequence[Replicate], arm: str) -> Pairs:
    """`to_target` of the same."""
    return [
        [(to_target(one, target(replicate)), to_target(other, target(replicate))) for one, other in runs]
        for runs, replicate in zip(_pairs(replicates, arm), replicates, strict=True)
    ]
