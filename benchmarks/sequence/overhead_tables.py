"""Tables of parts 3 and 6."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.sequence.markdown import Replicates, table


def tables(found: Replicates) -> dict[str, str]:
    """Overhead by teacher, what schedules save, break-even, and the crossover."""
    costs = sorted((unit["found"] for unit in found.get("overhead", [])), key=lambda one: int(one["cost"]))
    made: dict[str, str] = {}
    if costs:
        made |= {"steps": _steps_table(costs), "schedules": _schedules_table(costs), "break-even": _paid_table(costs)}
    if crossover := found.get("crossover"):
        made["crossover"] = _crossover_table(crossover[0]["found"])
    return made


def _percent(entry: Mapping[str, float]) -> str:
    return f"{entry['mean']:.1%} ({entry['low']:.1%} to {entry['high']:.1%})"


def _between(entry: Mapping[str, Any], digits: int = 2) -> str:
    if entry["mean"] is None:
        return "never"
    low, high = (f"{entry[end]:.{digits}f}" if entry[end] is not None else "never" for end in ("low", "high"))
    return f"{entry['mean']:.{digits}f} ({low} to {high})"


def _steps_table(costs: Sequence[Mapping[str, Any]]) -> str:
    headings = [
        "teacher, in forwards of the student",
        "student's step, ms",
        "live",
        "cached",
        "labelling, ms an example",
    ]
    rows = [
        [
            str(one["cost"]),
            f"{one['arms']['hard']['step_ms']:.1f}",
            _percent(one["arms"]["live"]["share"]),
            _percent(one["arms"]["cached"]["share"]),
            f"{one['precompute']['ms_an_example']:.2f}",
        ]
        for one in costs
    ]
    return table(headings, rows)


def _schedules_table(costs: Sequence[Mapping[str, Any]]) -> str:
    headings = [
        "teacher",
        "labels",
        "schedule",
        "steps that distil",
        "saves by arithmetic",
        "saves, as timed",
        "overhead",
    ]
    rows = [
        [
            str(one["cost"]),
            source,
            name,
            f"{composed['steps_that_distil']:.1%}",
            f"{composed['saved_by_arithmetic']:.1%}",
            _percent(composed["saved"]),
            _percent(composed["share"]),
        ]
        for one in costs
        for source, schedules in one["schedules"].items()
        for name, composed in schedules.items()
    ]
    return table(headings, rows)


def _paid_table(costs: Sequence[Mapping[str, Any]]) -> str:
    headings = [
        "teacher, in forwards of the student",
        "precompute, s",
        "saved a step, ms",
        "epochs by the formula",
        "epochs as run",
        "passes that the bill tells",
    ]
    rows = []
    for one in costs:
        crossing, even = one["crossing"], one["break_even"]
        ran = bill = "not run"
        if crossing is not None:
            last = crossing["epochs"][-1]["bill"]
            ran = "never in 6" if crossing["crossed_after"] is None else f"{crossing['crossed_after']:.2f}"
            bill = (
                "unknown"
                if last is None
                else "never"
                if last["epochs_to_pay"] is None
                else f"{last['epochs_to_pay']:.2f}"
            )
        rows.append(
            [
                str(one["cost"]),
                f"{even['precompute_s']:.1f}",
                _between(even["saved_ms_a_step"]),
                _between(even["epochs"]),
                ran,
                bill,
            ]
        )
    return table(headings, rows)


def _crossover_table(found: Mapping[str, Any]) -> str:
    rows = [["cached labels", "", "", _between(found["cached"]["overhead_ms"])]]
    rows += [
        [
            f"live: {name}",
            f"{entry['forward_ms']['mean']:.2f}",
            f"{entry['student_forwards']:.2f}",
            _between(entry["overhead_ms"]),
        ]
        for name, entry in found["teachers"].items()
    ]
    at = found["crossover"]
    told = (
        f"The lines cross at a teacher whose forward takes {_between(at['forward_ms'])} ms a batch, "
        f"{_between(at['student_forwards'])} of the student's."
    )
    return (
        table(["labels", "teacher's forward, ms", "in forwards of the student", "overhead a step, ms"], rows)
        + f"\n\n{told}"
    )
