"""Token sequences as a dataset gives them: padding cut off, labels shifted to the rows that predict them.

Row i of a sequence is the teacher's distribution after tokens 0 to i, that is, of token i + 1. Labels come unshifted,
as for transformers: the label of row i is ``labels[i + 1]``, and the last row has none. Knows NumPy and what quacks
like it; what is wrong is a `DatasetFault` that names the example.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.labels.errors import DatasetFault
from logitcache.labels.identity import MAX_CLASSES

NO_LABEL = (-1, -100)
"""Labels that mean none."""

MOST_TOKEN = 2**32 - 1
"""Largest token id that can be stored."""


FEWEST_SHIFTED = 8
"""Labels of one example that must all be the next token before they are taken for shifted."""


@dataclass(frozen=True)
class Tokens:
    """A token sequence without its padding: (length,) uint32 ids, where they began, and how many there were with it."""

    ids: np.ndarray
    start: int
    given: int

    def cut(self, values: np.ndarray) -> np.ndarray:
        """The same part of something that stands beside all the tokens that were given."""
        return values[self.start : self.start + len(self.ids)]


def is_sequence(values: Any) -> bool:
    """A one-dimensional tensor, array or list of whole numbers: what labels of a token sequence are."""
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, ValueError):
        return False
    return array.ndim == 1 and array.dtype.kind in "iu"


def cut_tokens(input_ids: Any, mask: Any, ordinal: int) -> Tokens:
    """Tokens without their padding.

    ``mask`` is None, or as long as ``input_ids``: ones that stand together, and zeros before or after them.

    Raises:
        DatasetFault: not one sequence of whole numbers; no token is left; a token below 0 or beyond 32 bits; a mask of
            another length, with other values, or with holes.
    """
    given = _sequence(input_ids, "input_ids", ordinal)
    if not len(given):
        raise _fault(ordinal, "has no tokens: leave it out, or give it one (a row needs a token that was read)")
    kept = slice(0, len(given)) if mask is None else _kept(mask, len(given), ordinal)
    tokens = given[kept]
    wrong = np.flatnonzero((tokens < 0) | (tokens > MOST_TOKEN))
    if len(wrong):
        at = int(wrong[0])
        raise _fault(
            ordinal,
            f"has the token id {tokens[at]} at position {kept.start + at:,}: token ids are 0 to {MOST_TOKEN:,}"
            + (" (labels may hold -100, input_ids may not)" if tokens[at] < 0 else ""),
        )
    return Tokens(tokens.astype(np.uint32), kept.start, len(given))


def next_targets(labels: Any, tokens: Tokens, ordinal: int) -> np.ndarray:
    """The target of each row, (length,) int32: the label of the token that comes next, -1 for none.

    Args:
        labels: unshifted, as long as ``input_ids``; -1 and -100 mean none.
        tokens: those of the example.
        ordinal: of the example, for messages.

    Raises:
        DatasetFault: there are no labels; they are no sequence of whole numbers, of another length than the tokens that
            came with them, or no classes.
    """
    if labels is None:
        raise _fault(ordinal, "has no 'labels': give -100 where there are none, or leave all out with --no-targets")
    whole = _sequence(labels, "labels", ordinal)
    if len(whole) != tokens.given:
        raise _fault(
            ordinal,
            f"has {len(whole):,} labels for {tokens.given:,} tokens: give one a token, in its place (unshifted)",
        )
    kept = tokens.cut(whole)
    if _are_shifted(kept, tokens.ids):
        raise _fault(
            ordinal,
            "has labels that are its tokens shifted by one: give label i for token i, as transformers takes them, "
            "since they are shifted here; --no-targets leaves all out",
        )
    following = kept[1:]
    none = np.isin(following, NO_LABEL)
    wrong = np.flatnonzero(~none & ((following < 0) | (following >= MAX_CLASSES)))
    if len(wrong):
        at = int(wrong[0])
        raise _fault(
            ordinal,
            f"has the label {following[at]} at position {tokens.start + at + 1:,}, which is no class: "
            "-100 means none, --no-targets leaves all out",
        )
    targets = np.full(len(tokens.ids), -1, np.int32)
    targets[:-1] = np.where(none, -1, following)
    return targets


def _are_shifted(labels: np.ndarray, ids: np.ndarray) -> bool:
    """Every label is the next token, and not its own: enough of them that it is no chance."""
    given = np.flatnonzero(~np.isin(labels[:-1], NO_LABEL))
    if len(given) < FEWEST_SHIFTED:
        return False
    return bool((labels[given] == ids[given + 1]).all()) and not bool((labels[given] == ids[given]).all())


def _kept(mask: Any, length: int, ordinal: int) -> slice:
    """Where the ones of a mask stand."""
    try:
        array = np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask)
        right = array.ndim == 1 and bool(np.isin(array, (0, 1)).all())
    except (TypeError, ValueError):
        right = False
    if not right:
        raise _fault(ordinal, "has an attention_mask that is not one sequence of zeros and ones")
    if len(array) != length:
        raise _fault(
            ordinal, f"has an attention_mask of {len(array):,} for {length:,} tokens: they must be equally long"
        )
    ones = np.flatnonzero(array)
    if not len(ones):
        raise _fault(ordinal, "has an attention_mask without a single 1, so it has no tokens: leave it out")
    kept = slice(int(ones[0]), int(ones[-1]) + 1)
    if kept.stop - kept.start != len(ones):
        hole = kept.start + int(np.flatnonzero(array[kept] == 0)[0])
        raise _fault(
            ordinal,
            f"has an attention_mask with a hole at position {hole:,}: it cuts padding off before or after the tokens, "
            "and selects none between them",
        )
    return kept


def _sequence(values: Any, name: str, ordinal: int) -> np.ndarray:
    """Whole numbers in one dimension."""
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
    except (TypeError, ValueError) as error:
        raise _fault(ordinal, f"has {name} that are no sequence of whole numbers: {error}") from None
    if array.ndim != 1:
        raise _fault(
            ordinal, f"has {name} of shape {array.shape}: give one sequence an example, of shape (length,), not a batch"
        )
    if len(array) and array.dtype.kind not in "iu":
        raise _fault(ordinal, f"has {name} of {array.dtype}, not whole numbers of up to 32 bits")
    return array


def _fault(ordinal: int, told: str) -> DatasetFault:
    return DatasetFault(f"example {ordinal:,} {told}", example=ordinal)
