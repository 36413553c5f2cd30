"""Inputs that a training loop holds, and whether they are what the teacher was shown.

Of token ids two forms are taken: a batch padded to one length, with the attention mask that tells the padding; and a
sequence for each example. Nothing is guessed: what no mask calls padding is a token. Inputs of any other kind are
compared by their fingerprints. It knows NumPy, and no torch.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from logitcache.labels.errors import Id, InvalidRequest, LabelMismatch, ShapeMismatch, shown
from logitcache.labels.fingerprints import fingerprints
from logitcache.labels.ids import Ids
from logitcache.labels.ranges import Ranges
from logitcache.labels.soft_labels import SoftLabels, splits_of

_HINT = (
    "the ids are not those of these inputs, or the tokenizer, its template or the truncation changed; where inputs "
    "begin in the middle of an example, give rows"
)


@dataclass(frozen=True)
class HeldTokens:
    """Tokens of a batch, one example after the other, padding cut off.

    Attributes:
        tokens: (tokens,) ids, in whatever range they are: one that no teacher read is a difference like any other.
        counts: (examples,) how many each example has.
    """

    tokens: Int64[np.ndarray, " tokens"]
    counts: Int64[np.ndarray, " examples"]

    @property
    def ranges(self) -> Ranges:
        """Rows of these tokens, where each example's begin at its first."""
        return np.stack([np.zeros_like(self.counts), self.counts], 1)


def held_tokens(inputs: Any, attention_mask: Any, ids: Ids) -> HeldTokens:
    """The tokens in ``inputs``.

    Args:
        inputs: (batch, length) integers, an array or tensor; or one sequence of integers for each example.
        attention_mask: of the same form, 1 for a token and 0 for padding, which may be left or right of the tokens;
            None means that there is no padding.
        ids: of the examples, for messages.

    Raises:
        ShapeMismatch: not one line an id, or a mask of another shape.
        InvalidRequest: not integers, a mask of other numbers than 0 and 1, or padding between tokens.
    """
    tokens, counts = _flat(inputs, "inputs", "iu", len(ids))
    if attention_mask is None:
        return HeldTokens(tokens, counts)
    mask, mask_counts = _flat(attention_mask, "attention_mask", "biuf", len(ids))
    if not np.array_equal(counts, mask_counts):
        raise ShapeMismatch("the attention_mask has another shape than the inputs: it needs an entry a token")
    kept: np.ndarray = mask == 1
    if not (kept | (mask == 0)).all():
        raise InvalidRequest("the attention_mask holds numbers besides 0 (padding) and 1 (a token)")
    _check_gaps(kept, counts, ids)
    return HeldTokens(tokens[kept], _sums(kept, counts))


def check_one_an_id(values: Any, ids: int, name: str = "inputs", advice: str = "") -> None:
    """Refuse another number of inputs than of ids.

    Raises:
        ShapeMismatch: there is another, or one thing that has no number.
    """
    try:
        count = len(values)
    except TypeError as error:
        raise ShapeMismatch(f"{name} are no array, tensor or list with one entry an id: {error}") from None
    if count != ids:
        raise ShapeMismatch(f"{count:,} {name} were given for {ids:,} ids: one an id is needed{advice}")


def _flat(values: Any, name: str, kinds: str, examples: int) -> tuple[np.ndarray, Int64[np.ndarray, " examples"]]:
    """All lines one after the other as int64, and their lengths."""
    check_one_an_id(values, examples, name, "; of a packed batch, a list with one sequence for each example")
    if isinstance(values, list | tuple):
        lines = [_array(line, name, kinds, 1) for line in values]
        flat, counts = np.concatenate(lines), np.array([len(line) for line in lines], np.int64)
    else:
        array = _array(values, name, kinds, 2)
        flat, counts = array.reshape(-1), np.full(examples, array.shape[1], np.int64)
    return flat, counts


def _array(values: Any, name: str, kinds: str, dimensions: int) -> np.ndarray:
    try:
        array = np.asarray(on_cpu(values))
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{name} are not token ids: {error}") from None
    if array.size == 0 and array.ndim == dimensions:
        return array.astype(np.int64)
    if array.dtype.kind not in kinds:
        raise InvalidRequest(
            f"{name} are {array.dtype}: rows of this label set are of tokens, so whole numbers are needed"
        )
    if array.ndim != dimensions:
        raise ShapeMismatch(
            f"{name} of shape {array.shape}: give (batch, length), or a list with one sequence for each example"
        )
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64, copy=False)


def _check_gaps(kept: Bool[np.ndarray, " tokens"], counts: Int64[np.ndarray, " examples"], ids: Ids) -> None:
    begins = kept.copy()
    begins[1:] &= ~kept[:-1]
    starts = splits_of(counts)[:-1][counts > 0]
    begins[starts] = kept[starts]
    if (torn := _sums(begins, counts) > 1).any():
        raise InvalidRequest(
            f"the attention_mask has padding between tokens (ids: {shown(ids.at(torn))}): padding is left or right of "
            "them; give packed sequences as a list with one sequence for each example"
        )


def _sums(
    values: Bool[np.ndarray, " tokens"], counts: Int64[np.ndarray, " examples"]
) -> Int64[np.ndarray, " examples"]:
    """How many are True in each line."""
    running = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=running[1:])
    sums: np.ndarray = np.diff(running[splits_of(counts)])
    return sums


def check_counts(held: HeldTokens, ranges: Ranges, ids: Ids) -> None:
    """Refuse inputs that have more or fewer tokens than the ranges of rows that were asked for beside them.

    Raises:
        ShapeMismatch: they have; the examples are named.
    """
    wrong = held.counts != ranges[:, 1] - ranges[:, 0]
    if wrong.any():
        first = int(np.argmax(wrong))
        start, stop = ranges[first].tolist()
        raise ShapeMismatch(
            f"inputs hold {held.counts[first]:,} tokens of {ids.at([first])[0]!r} and rows {start:,} to {stop:,} were "
            f"asked for (ids: {shown(ids.at(wrong))}): give the tokens of these rows, and attention_mask where "
            "they are padded"
        )


def check_tokens(held: HeldTokens, soft: SoftLabels, ids: Ids, name: str, *, masked: bool = True) -> None:
    """Refuse tokens that the teacher did not read; examples without labels are passed over.

    Args:
        held: the tokens.
        soft: labels of as many rows.
        ids: of the examples, for messages.
        name: the label set's, for messages.
        masked: it was told which of the inputs are padding.

    Raises:
        LabelMismatch: some differ; the examples and the first difference are told.
    """
    if soft.tokens is None or soft.row_splits is None:
        raise InvalidRequest(f"{name} holds no tokens to compare inputs with")
    tokens, counts = held.tokens, held.counts
    if soft.present is not None:
        tokens, counts = tokens[np.repeat(soft.present, counts)], np.where(soft.present, counts, 0)
    differs = tokens != soft.tokens
    if not differs.any():
        return
    at = int(np.argmax(differs))
    example = int(np.searchsorted(soft.row_splits, at, side="right")) - 1
    wrong = ids.at(_sums(differs, counts) > 0)
    position = at - int(soft.row_splits[example])
    raise LabelMismatch(
        f"the tokens of {len(wrong):,} examples are not those that the teacher read (ids: {shown(wrong)}): row "
        f"{position:,} of those fetched for {wrong[0]!r} is of token {int(soft.tokens[at])}, and here stands "
        f"{int(tokens[at])}: {_advice(masked)}",
        ids=wrong,
        position=position,
        held=int(tokens[at]),
        read=int(soft.tokens[at]),
    )


def too_many(wrong: list[Id], masked: bool) -> LabelMismatch:
    """The error for inputs with more tokens than their examples have."""
    return LabelMismatch(
        f"the inputs of {len(wrong):,} examples have more tokens than the teacher read (ids: {shown(wrong)}): "
        f"{_advice(masked)}",
        ids=wrong,
    )


def _advice(masked: bool) -> str:
    return _HINT if masked else f"give attention_mask if these batches are padded; else {_HINT}"


def check_fingerprints(inputs: Any, soft: SoftLabels, ids: Ids) -> None:
    """Refuse inputs whose fingerprints are not those of what the teacher was shown; examples without labels are passed
    over.

    Raises:
        LabelMismatch: some differ, or were recorded without their inputs; the examples are named.
        InvalidRequest: the inputs are not arrays of numbers.
    """
    try:
        held = fingerprints(on_cpu(inputs))
    except TypeError as error:
        raise InvalidRequest(f"inputs cannot be compared with what the teacher was shown: {error}") from None
    differs = held != soft.fingerprint
    if soft.present is not None:
        differs &= soft.present
    unknown = differs & (soft.fingerprint == 0)
    if unknown.any():
        wrong = ids.at(unknown)
        raise LabelMismatch(
            f"the inputs of {len(wrong):,} examples cannot be compared (ids: {shown(wrong)}): their rows were recorded "
            "without telling what the model was shown. Record with add(…, inputs=…), or fetch without inputs",
            ids=wrong,
        )
    if differs.any():
        wrong = ids.at(differs)
        raise LabelMismatch(
            f"the inputs of {len(wrong):,} examples are not what the teacher was shown (ids: {shown(wrong)}): "
            "the ids are not those of these inputs (was with_ids forgotten, or wrapped around a subset?), or the "
            "dataset was re-ordered or is preprocessed in another way",
            ids=wrong,
        )


def on_cpu(values: Any) -> Any:
    """A tensor in one transfer in place of one a row; anything else as it is."""
    return values.detach().cpu() if hasattr(values, "detach") else values
