"""How examples are packed into shards: which sizes a shard may have, and when one closes.

Arithmetic alone: it knows nothing of arrays or files.
"""

import math
from collections.abc import Iterator

import numpy as np

from logitcache.labels.errors import DatasetFault, InvalidRequest

QUANTUM = 4096
"""Slots of a shard are a multiple of this: every chunk file is whole 4 KiB pages, whatever its columns."""

LEAST_DEFAULT = 8 * QUANTUM
"""Fewest row slots of a shard unless told: large enough that fsyncs do not count."""

MOST_DEFAULT = 64 * QUANTUM
"""Row slots from which larger shards gain nothing: of 8 bytes a row, as fingerprints are, they are a huge page of 2 MiB
(measured: random rows of 4 M in 0.8 of the time that shards of 32,768 rows take)."""

DEFAULT_SHARDS = 16
"""Shards, or so, that a label set has at least if it can have larger ones: a kill costs a small part of the work."""

COMFORTABLE_SHARDS = 4_000
"""Shards that the default stays under: some mappings each, well below Linux's usual limit of 65,530 a process."""

COMFORTABLE_EXAMPLES = 64
"""Examples that a shard of the default size holds at least: batches are formed inside a shard, of similar lengths."""

MOST_SHARDS = 6_000
"""Shards that a label set may have at all, those that it grew by included: ten mappings each fit that limit."""

MOST_SLOTS = 2**31
"""Most slots that a shard may have: positions within a shard are 32 bits."""


def check_rows_per_shard(rows_per_shard: int | None, views: int = 1) -> None:
    """Refuse a shard size whose chunk files would not be whole pages; None is left to the default.

    Raises:
        InvalidRequest: not a positive multiple of 4,096 for each view, or beyond `MOST_SLOTS`.
    """
    quantum = QUANTUM * views
    if rows_per_shard is None or (quantum <= rows_per_shard <= MOST_SLOTS and rows_per_shard % quantum == 0):
        return
    nearest = min(max(1, round(rows_per_shard / quantum)), MOST_SLOTS // quantum) * quantum
    each = "" if views == 1 else f" for {views:,} views"
    raise InvalidRequest(
        f"--rows-per-shard {rows_per_shard} is not a positive multiple of {quantum:,} up to {MOST_SLOTS:,}{each}: "
        f"try {nearest}"
    )


def default_rows_per_shard(rows: int, longest: int = 1, views: int = 1) -> int:
    """Row slots of a shard for a dataset of so many rows, at most ``longest`` an example, or one for each of ``views``.

    A multiple of 4,096 for each view: the power of two next to a sixteenth of the rows, from `LEAST_DEFAULT` to
    `MOST_DEFAULT`; more if an example, or `COMFORTABLE_EXAMPLES` of the longest, or shards few enough to map need more.
    """
    needed = max(longest, min(COMFORTABLE_EXAMPLES * longest, rows), -(-rows // COMFORTABLE_SHARDS))
    fitting = 1 << max(0, round(math.log2(max(1, rows) / DEFAULT_SHARDS)))
    quantum = QUANTUM * views
    return -(-max(min(max(LEAST_DEFAULT, fitting), MOST_DEFAULT), needed) // quantum) * quantum


def packed_shards(
    row_counts: np.ndarray, rows_per_shard: int, examples_per_shard: int, first_ordinal: int = 0
) -> Iterator[tuple[int, int]]:
    """Examples and rows of each shard: it closes when the next example would overflow its rows or its examples.

    Raises:
        DatasetFault: an example has no rows, or more than a shard has slots.
    """
    if len(row_counts) and int(row_counts.min()) < 1:
        empty = first_ordinal + int(row_counts.argmin())
        raise DatasetFault(f"example {empty:,} has no rows: leave it out of the dataset", example=empty)
    if len(row_counts) and int(row_counts.max()) > rows_per_shard:
        longest = int(row_counts.argmax())
        count = int(row_counts[longest])
        larger = f"--rows-per-shard {-(-count // QUANTUM) * QUANTUM} or more"
        # A label set that grows keeps the shards that it was begun with.
        advice = f"label all under another name with {larger}" if first_ordinal else f"use {larger}"
        raise DatasetFault(
            f"example {first_ordinal + longest:,} has {count:,} rows, a shard has {rows_per_shard:,} and an example "
            f"never straddles two: {advice}, or cut it",
            example=first_ordinal + longest,
        )
    ends = np.cumsum(row_counts)
    begin = rows_before = 0
    while begin < len(row_counts):
        fits = int(np.searchsorted(ends, rows_before + rows_per_shard, side="right"))
        end = min(fits, begin + examples_per_shard)
        yield end - begin, int(ends[end - 1]) - rows_before
        begin, rows_before = end, int(ends[end - 1])
