"""Which of a student's positions belong to which causal rows. NumPy alone: it is decided on the CPU, from row counts.

A student's positions are (lines, length), numbered in row-major order. A line holds one example, padded, or several one
after the other. Knows nothing of logits, targets or losses.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from logitcache.labels.errors import InvalidRequest, ShapeMismatch

_SAY = "say padding='right' or padding='left', or pass attention_mask"
_MASK = "pass the mask of these very examples"
_FETCH = "fetch the rows that the student saw, with fetch(…, rows=…)"


@dataclass(frozen=True)
class Places:
    """The positions that hold an example's tokens, in the order of the examples.

    Attributes:
        positions: (places,) their numbers, rising.
        following: (places,) the position of the same example's next token, -1 for its last.
        rows: (places,) the row of each, -1 in examples without labels; None when row i is simply that of place i.
    """

    positions: Int64[np.ndarray, " places"]
    following: Int64[np.ndarray, " places"]
    rows: Int64[np.ndarray, " places"] | None


def places_of(
    shape: tuple[int, int],
    row_counts: Int64[np.ndarray, " examples"],
    missing: Bool[np.ndarray, " examples"],
    *,
    padding: str | None = None,
    attention_mask: Bool[np.ndarray, "lines length"] | None = None,
) -> Places:
    """Where each example's tokens stand, of which an example with labels has as many as rows.

    As many lines as examples are one line an example; any other number is packed. A missing example has no rows: its
    tokens are where ``attention_mask`` says, and else taken to fill its line.

    Args:
        shape: the student's lines and their length.
        row_counts: how many rows each example has.
        missing: which examples have no labels.
        padding: the side on which lines are padded, ``"right"`` or ``"left"``; None if they are full, or with a mask.
        attention_mask: True where a token is.

    Raises:
        ShapeMismatch: rows and positions do not agree; the first example where they do not is named.
        InvalidRequest: ``padding`` is another word, or given beside ``attention_mask``.
    """
    lines, length = shape
    if padding not in (None, "right", "left"):
        raise InvalidRequest(f"padding={padding!r} is not known: use 'right' or 'left', the side that is padded")
    if padding is not None and attention_mask is not None:
        raise InvalidRequest("padding and attention_mask both say where the tokens are: give one of them")
    if lines != len(row_counts):
        return _packed(shape, row_counts, missing, padding, attention_mask)
    held = _held(shape, np.where(missing, length, row_counts), padding, attention_mask)
    counts = held.sum(1)
    wrong = np.flatnonzero((counts != row_counts) & ~missing)
    if len(wrong):
        first = wrong[0]
        has = f"example {first} of the batch has {row_counts[first]:,} rows"
        if row_counts[first] > length:
            raise ShapeMismatch(f"{has} and its line {length:,} positions: {_FETCH}")
        if attention_mask is None:
            raise ShapeMismatch(f"{has} and its line {length:,} positions: {_SAY}")
        raise ShapeMismatch(f"{has} and its line of attention_mask {counts[first]:,} positions: {_MASK}, or {_FETCH}")
    rows = np.repeat(~missing, counts)
    return Places(
        np.flatnonzero(held), _following(held, counts), np.where(rows, rows.cumsum() - 1, -1) if missing.any() else None
    )


def _held(
    shape: tuple[int, int],
    counts: Int64[np.ndarray, " lines"],
    padding: str | None,
    attention_mask: Bool[np.ndarray, "lines length"] | None,
) -> Bool[np.ndarray, "lines length"]:
    """Where the tokens of one example a line are."""
    if attention_mask is not None:
        return attention_mask
    if padding is None:
        return np.ones(shape, np.bool_)
    columns = np.arange(shape[1])
    return columns < counts[:, None] if padding == "right" else columns >= shape[1] - counts[:, None]


def _packed(
    shape: tuple[int, int],
    row_counts: Int64[np.ndarray, " examples"],
    missing: Bool[np.ndarray, " examples"],
    padding: str | None,
    attention_mask: Bool[np.ndarray, "lines length"] | None,
) -> Places:
    examples, rows = len(row_counts), int(row_counts.sum())
    lines = f"the student's logits have {shape[0]:,} lines for {examples:,} examples"
    if padding is not None:
        raise ShapeMismatch(
            f"padding={padding!r} needs one line an example, and {lines}; "
            "for several examples a line pass attention_mask, or logits of nothing but the rows"
        )
    held = np.ones(shape, np.bool_) if attention_mask is None else attention_mask
    if int(held.sum()) != rows:
        where = "positions" if attention_mask is None else "positions in attention_mask"
        hint = "pass an attention_mask that is 1 at the examples' tokens and nowhere else"
        if missing.any():
            first = int(np.flatnonzero(missing)[0])
            hint = f"example {first} of the batch has no labels: leave such out of a pack, or give each example a line"
        raise ShapeMismatch(f"{lines}, with {int(held.sum()):,} {where} for {rows:,} rows: {hint}")
    return Places(np.flatnonzero(held), _following(held, row_counts), None)


def _following(
    held: Bool[np.ndarray, "lines length"], counts: Int64[np.ndarray, " examples"]
) -> Int64[np.ndarray, " places"]:
    following = np.full(int(counts.sum()), -1)
    following[:-1] = np.flatnonzero(held)[1:]
    following[np.cumsum(counts)[counts > 0] - 1] = -1
    return following
