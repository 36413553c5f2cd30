"""What a part's tables are made of and written in."""

from collections.abc import Sequence
from typing import Any

Replicates = dict[str, list[dict[str, Any]]]
"""By task: the file of each replicate, by seed; what it found is under ``found``."""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
