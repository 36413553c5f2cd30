"""What to say about ids that have no labels: the same words for a folder and for a server."""

from logitcache.labels.errors import Id, RowsMissing, shown
from logitcache.labels.ids import IdKind

AGAIN = "run its precompute again"

NOT_YET = f"not labelled yet; {AGAIN}"


def rows_missing(
    name: str,
    kind: IdKind,
    examples: int,
    *,
    asked: int,
    unknown: list[Id],
    unlabelled: list[Id],
    reason: str = NOT_YET,
) -> RowsMissing:
    """The error for ids without labels.

    Args:
        name: the label set's.
        kind: what its ids are.
        examples: how many it has, for telling what its ordinals are.
        asked: how many different ids were asked for.
        unknown: ids that it does not contain, once each.
        unlabelled: ids whose labels are not there yet or no longer, once each.
        reason: why they are not, and what to do about it.
    """
    parts = []
    if unknown:
        hint = f"its ids are 0 to {examples - 1:,}" if kind == "ordinal" else "no example of it has such an id"
        parts.append(f"unknown: {shown(unknown)}; {hint}")
    if unlabelled:
        parts.append(f"without labels: {shown(unlabelled)} ({reason})")
    return RowsMissing(
        f"{len(unknown) + len(unlabelled):,} of {asked:,} examples have no labels in {name!r}: {'; '.join(parts)}",
        unknown=unknown,
        unlabelled=unlabelled,
    )
