"""The terms of a label set: what one may begin with, and what it takes to continue one. Opens no file."""

from typing import Any

import numpy as np
from jaxtyping import Int64

from logitcache.labels.errors import DatasetChanged, IdentityChanged
from logitcache.labels.identity import Identity
from logitcache.storage.layout import Layout


def refuse_another(name: str, layout: Layout, identity: Identity, rows_per_shard: int | None = None) -> None:
    """Refuse to continue a label set with anything that would make its rows those of another one.

    Raises:
        IdentityChanged: fields differ; each is named with both values.
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


def refuse_fewer(name: str, layout: Layout, examples: int) -> None:
    """Refuse a dataset with fewer examples than a label set was begun over; more are an append.

    Raises:
        DatasetChanged: it shrank.
    """
    if examples < layout.examples:
        raise DatasetChanged(
            f"label set {name!r} has {layout.examples:,} examples, the dataset shrank to {examples:,}. Nothing was "
            "changed: restore it, or label it under another name; to train on a part of the examples, ask for their "
            "ids alone",
            was=layout.examples,
            now=examples,
        )


def refuse_other_lengths(name: str, layout: Layout, row_counts: Int64[np.ndarray, " examples"]) -> None:
    """Refuse a causal dataset whose examples have other lengths than when the label set's shards were planned.

    Args:
        name: the label set's.
        layout: its layout.
        row_counts: (examples,) rows of each example of the dataset now; more examples than the layout's are an append.

    Raises:
        DatasetChanged: a shard would have other rows; its examples are named.
    """
    rows = np.add.reduceat(row_counts[: layout.examples], layout.first_examples[:-1])
    for shard in np.flatnonzero(rows != np.array(layout.shard_rows)).tolist():
        span = layout.span(shard)
        raise DatasetChanged(
            f"examples {span.start:,} to {span.stop - 1:,} have {rows[shard]:,} tokens, label set {name!r} was begun "
            f"when they had {layout.shard_rows[shard]:,}: the dataset was re-ordered, or its tokenizer changed. "
            "Nothing was changed: restore it, or label it under another name",
            shard=shard,
        )
