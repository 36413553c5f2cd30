"""Ranges of an example's rows: what truncation, packing and context parallelism ask for in place of all of them."""

from typing import Any

import numpy as np
from jaxtyping import Int64

from logitcache.labels.errors import InvalidRequest, RangeOutside, ShapeMismatch, shown
from logitcache.labels.ids import Ids

Ranges = Int64[np.ndarray, "examples 2"]
"""First row and the row after the last, counted from 0 within each example."""


def as_ranges(rows: Any, examples: int) -> Ranges:
    """One range an example: ``rows`` is one ``(start, stop)`` for all examples, or an array (examples, 2) of them.

    A range may be empty; it may not go backwards, and ends are not counted from the example's end.

    Raises:
        ShapeMismatch: neither one pair nor one an example.
        InvalidRequest: not whole numbers, below 0, or a stop before its start.
    """
    try:
        array = np.asarray(rows)
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidRequest(f"rows must be (start, stop), or one such pair an example: {error}") from None
    if array.dtype.kind not in "iu":
        raise InvalidRequest(
            f"rows must be whole numbers, not {array.dtype}: give (start, stop), or one pair an example"
        )
    if array.shape not in ((2,), (examples, 2)):
        raise ShapeMismatch(
            f"rows has shape {array.shape}, not (2,) or ({examples:,}, 2): give (start, stop), or one pair an example"
        )
    if array.size and int(array.max()) >= 2**62:
        raise InvalidRequest(f"rows: no example has row {int(array.max()):,}")
    ranges = np.ascontiguousarray(np.broadcast_to(array, (examples, 2)), np.int64)
    wrong = np.flatnonzero((ranges[:, 0] < 0) | (ranges[:, 1] < ranges[:, 0]))
    if len(wrong):
        start, stop = ranges[wrong[0]].tolist()
        raise InvalidRequest(f"rows {start:,} to {stop:,} are no range: 0 <= start <= stop is needed")
    return ranges


def check_ranges(
    ranges: Ranges,
    row_counts: Int64[np.ndarray, " examples"],
    ids: Ids,
    name: str,
    positions: Int64[np.ndarray, " examples"],
) -> None:
    """Refuse ranges that reach beyond their examples.

    Args:
        ranges: one an example.
        row_counts: (examples,) how many rows each example has.
        ids: those that were asked for, for the message.
        name: the label set's.
        positions: (examples,) which of the ids these examples are.

    Raises:
        RangeOutside: some do; the examples are named.
    """
    beyond = np.flatnonzero(ranges[:, 1] > row_counts)
    if len(beyond):
        first = beyond[0]
        wrong = ids.at(positions[beyond])
        raise RangeOutside(
            f"rows {ranges[first, 0]:,} to {ranges[first, 1]:,} of example {wrong[0]!r} were asked for, in {name!r} it "
            f"has {row_counts[first]:,}: ask for rows that are there ({len(wrong):,} examples: {shown(wrong)})",
            ids=wrong,
        )
