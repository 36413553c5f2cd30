"""What is kept of how a shard was made: retained mass, the teacher's time, settings of the run.

It lies beside the commits and outside what is hashed: rows never depend on it, and what does not read is left out.
"""

import math
from typing import Any

import numpy as np

from logitcache.labels.bill import TeacherTime
from logitcache.labels.errors import StorageFault
from logitcache.labels.soft_labels import SoftLabels, temperature_name
from logitcache.storage.places import Places
from logitcache.storage.reading import parsed, read_file

MAX_STATISTICS_BYTES = 64 << 10
"""Longer statistics are ignored."""

MAX_DEVICE_TEXT = 200
"""Characters that the name of a device may have."""

RetainedMass = dict[str, tuple[int, float, float]]
"""By temperature: rows, sum and minimum of the probability that the stored k hold."""


def read_statistics(places: Places, shard: int) -> dict[str, Any]:
    """A shard's statistics; empty when there are none that read."""
    try:
        content = parsed(read_file(places.root, places.statistics / f"{shard}.json", MAX_STATISTICS_BYTES))
    except (OSError, StorageFault, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def retained_mass(rows: SoftLabels) -> dict[str, dict[str, float]]:
    """Rows, sum and minimum of the retained mass of some rows, by declared temperature, as statistics keep it."""
    found = {}
    for temperature in rows.temperatures:
        retained = 1.0 - rows.residual_mass(temperature)
        entry = {"rows": len(rows), "sum": float(np.sum(retained)), "min": float(np.min(retained))}
        found[temperature_name(temperature)] = entry
    return found


def retained_in(statistics: dict[str, Any]) -> RetainedMass:
    """A shard's retained mass; empty where its statistics do not tell."""
    try:
        entries = statistics["retained_mass"]
        return {str(name): _retained(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return {}


def _retained(entry: Any) -> tuple[int, float, float]:
    rows, total, least = int(entry["rows"]), float(entry["sum"]), float(entry["min"])
    if not 0 <= rows < 2**63 or not math.isfinite(least) or not abs(total) < 2**63:
        raise ValueError(f"{entry!r:.60} is no retained mass")
    return rows, total, least


def teacher_time_in(statistics: dict[str, Any]) -> TeacherTime | None:
    """What the teacher took for a shard's rows; None where its statistics do not tell."""
    try:
        found = TeacherTime.from_json(statistics["teacher_time"])
    except (KeyError, TypeError, ValueError):
        return None
    return found if len(found.device) <= MAX_DEVICE_TEXT else None


def summed(shards: list[RetainedMass]) -> dict[str, dict[str, float]]:
    """Mean and minimum over all rows of these shards, by temperature."""
    known = [shard for shard in shards if shard]
    return {
        name: {
            "mean": sum(shard[name][1] for shard in known) / max(1, sum(shard[name][0] for shard in known)),
            "min": min(shard[name][2] for shard in known),
        }
        for name in (known[0] if known else ())
        if all(name in shard for shard in known)
    }
