"""The terms of a label set: what one may begin with, and what it takes to continue one. Opens no file."""

from typing import Any

from logitcache.labels.errors import DatasetChanged, IdentityChanged, InvalidRequest
from logitcache.labels.identity import Identity
from logitcache.storage.layout import MOST_SHARDS, ROW_QUANTUM, Layout, default_rows_per_shard


def check_rows_per_shard(rows_per_shard: int | None, examples: int) -> None:
    """Refuse a shard size whose chunk files would not be whole pages, or that makes too many of them; None is neither.

    Raises:
        InvalidRequest: not a positive multiple of 4,096, or more than `MOST_SHARDS` shards.
    """
    if rows_per_shard is None:
        return
    if rows_per_shard < ROW_QUANTUM or rows_per_shard % ROW_QUANTUM:
        nearest = max(1, round(rows_per_shard / ROW_QUANTUM)) * ROW_QUANTUM
        raise InvalidRequest(
            f"--rows-per-shard {rows_per_shard} is not a positive multiple of {ROW_QUANTUM:,}: try {nearest:,}"
        )
    if examples > MOST_SHARDS * rows_per_shard:
        raise InvalidRequest(
            f"--rows-per-shard {rows_per_shard:,} makes {-(-examples // rows_per_shard):,} shards of {examples:,} "
            f"examples, more than the {MOST_SHARDS:,} that a reader can map: "
            f"use {default_rows_per_shard(examples):,}, the default"
        )


def refuse_another(
    name: str, layout: Layout, identity: Identity, examples: int, rows_per_shard: int | None = None
) -> None:
    """Refuse to continue a label set with anything that would make its rows those of another one.

    Raises:
        IdentityChanged: fields differ; each is named with both values.
        DatasetChanged: it was begun over another number of examples.
    """
    fields: dict[str, tuple[Any, Any]] = layout.identity.differences(identity)
    if rows_per_shard is not None and rows_per_shard != layout.rows_per_shard:
        fields["rows_per_shard"] = (layout.rows_per_shard, rows_per_shard)
    if fields:
        told = "; ".join(f"{field} was {old!r} and is now {new!r}" for field, (old, new) in fields.items())
        raise IdentityChanged(
            f"label set {name!r} was begun with something else: {told}. Nothing was changed: "
            "run with the old values, give the new label set another name, or delete its folder to begin anew",
            fields={field: list(values) for field, values in fields.items()},
        )
    if examples != layout.examples:
        verb = "shrank" if examples < layout.examples else "grew"
        raise DatasetChanged(
            f"label set {name!r} was begun over {layout.examples:,} examples, the dataset {verb} to {examples:,}. "
            "Nothing was changed: label it under another name",
            was=layout.examples,
            now=examples,
        )
