"""The experiments, by name.

A part has `units`, which tells task and seed of its replicates, and `run`, which gives one as JSON values; `tables` and
`figures` are made of what its replicates gave.
"""

from typing import Any, Protocol

from benchmarks.sequence import continual, entropy, overhead, recorded, search, truncation, tuned, tuning, views
from benchmarks.sequence.labelled import Shop
from benchmarks.sequence.markdown import Replicates
from benchmarks.sequence.plan import Plan
from matplotlib.figure import Figure


class Part(Protocol):
    """One of the experiments."""

    def units(self, plan: Plan) -> list[tuple[str, int]]:
        """Task and seed of each replicate."""

    def run(self, plan: Plan, name: str, seed: int, shop: Shop) -> dict[str, Any]:
        """One replicate."""

    def tables(self, found: Replicates) -> dict[str, str]:
        """Markdown tables by name."""

    def figures(self, found: Replicates) -> dict[str, Figure]:
        """Figures by name."""


PARTS: dict[str, Part] = {
    "search": search,
    "continual": continual,
    "views": views,
    "truncation": truncation,
    "recorded": recorded,
    "entropy": entropy,
    "tuning": tuning,
    "tuned": tuned,
    "overhead": overhead,
}

ALONE = frozenset({"overhead"})
"""Parts of which single steps are timed: nothing else runs beside them."""
