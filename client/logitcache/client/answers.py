"""What an answer of a label set server must hold: checked before anyone trains on it.

The bytes are well formed by now (`labels.wire`); here they are held against the description and against what was asked
for. It knows nothing of HTTP.
"""

import numpy as np
from jaxtyping import UInt8

from logitcache.labels import wire
from logitcache.labels.errors import DigestChanged, MalformedMessage
from logitcache.labels.label_set import LABELLED, UNKNOWN, UNLABELLED, Description
from logitcache.labels.ranges import Ranges
from logitcache.labels.soft_labels import RowSpec, SoftLabels


def check_rows(
    soft: SoftLabels, described: Description, url: str, *, examples: int, ranges: Ranges | None, masked: bool
) -> None:
    """Refuse rows that are not what the description says, or not those of the examples asked for.

    Args:
        soft: what arrived.
        described: the label set, as it was described last.
        url: where it came from, for the message.
        examples: how many were asked for.
        ranges: (examples, 2) which rows of each, or None for all.
        masked: a mask was asked for.

    Raises:
        DigestChanged: rows of another shape: another label set stands there now.
        MalformedMessage: anything else that cannot be.
    """
    spec, classes = described.row_spec, described.identity.classes
    (_, k), index_dtype, dtype = soft.indices.shape, soft.indices.dtype.name, soft.logits.dtype.name
    found = RowSpec(k, index_dtype, dtype, soft.temperatures, soft.row_splits is not None, soft.target is not None)
    if found != spec:
        raise DigestChanged(
            f"{url} sends rows of another shape than it described (as {found}): "
            "another label set stands there now; connect again to take it",
            served=soft.digest,
        )
    if soft.examples != examples:
        raise MalformedMessage(
            f"{url} answered with {soft.examples:,} examples for {examples:,} ids; nothing of it was used"
        )
    if (soft.present is not None) != masked:
        raise MalformedMessage(f"{url} sends a mask that was not asked for, or none where it was")
    largest = int(soft.indices.max(initial=0))
    if soft.target is not None:
        largest = max(largest, int(soft.target.max(initial=-1)))
    if largest >= classes:
        raise MalformedMessage(f"{url} sends class {largest:,} of a teacher with {classes:,} classes")
    if soft.target is not None and int(soft.target.min(initial=0)) < -1:
        raise MalformedMessage(f"{url} sends target {int(soft.target.min()):,}: a class, or -1 for none, was expected")
    _check_row_counts(soft, url, ranges)


def _check_row_counts(soft: SoftLabels, url: str, ranges: Ranges | None) -> None:
    """Each example has the rows that were asked for, at least one where all were, and none where it has no labels."""
    if soft.row_splits is None:
        return
    counts = np.diff(soft.row_splits)
    wrong = counts < 1 if ranges is None else counts != ranges[:, 1] - ranges[:, 0]
    if soft.present is not None:
        wrong = np.where(soft.present, wrong, counts != 0)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise MalformedMessage(
            f"{url} sends {int(counts[first]):,} rows of the example at position {first:,}, which are not those that "
            "were asked for; nothing of it was used"
        )


def check_digest(soft: SoftLabels, digest: str | None, url: str) -> None:
    """Refuse rows of another generation than this one; None is a label set that is not finished.

    Raises:
        DigestChanged: they are.
    """
    if soft.digest != digest:
        raise DigestChanged(
            f"{url} serves {soft.digest or 'an unfinished label set'} where "
            f"{digest or 'an unfinished label set'} was expected; "
            "connect again without a digest to take what is there",
            expected=digest,
            served=soft.digest,
        )


def decode_states(body: memoryview, ids: int, url: str) -> UInt8[np.ndarray, " ids"]:
    """The states in the answer to a question about so many ids; see `LabelSet.states`.

    Raises:
        MalformedMessage: it holds something else.
    """
    arrays, _ = wire.parse(body)
    state = arrays.get("state")
    if len(arrays) != 1 or state is None or state.dtype != np.uint8 or state.shape != (ids,):
        raise MalformedMessage(f"{url} answered with something else than the states of {ids:,} ids")
    if int(state.max(initial=0)) > max(LABELLED, UNLABELLED, UNKNOWN):
        raise MalformedMessage(f"{url} sends state {int(state.max())}, which this version does not know")
    return state
