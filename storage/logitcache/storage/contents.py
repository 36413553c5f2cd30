"""What a shard's files are to hold: checked against the layout and against each other, then bytes.

A row that is committed is believed for good, so what could make it another example's is refused here: arrays of another
shape, ids that are not those of their texts, rows that do not follow each other, an id that two examples have. Opens no
file.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from logitcache.labels.errors import DatasetFault, ShapeMismatch
from logitcache.labels.identity import canonical_json
from logitcache.labels.ids import text_keys
from logitcache.storage.id_index import IdIndex, repeated
from logitcache.storage.layout import TEXTS, Layout

Arrays = Mapping[str, np.ndarray]

Content = tuple[memoryview, int]
"""Bytes of a file, and its size; what is beyond the bytes is zero."""


def contents(layout: Layout, shard: int, arrays: Arrays, texts: Sequence[str] | None) -> dict[str, Content]:
    """Content of each of a shard's files, by the names of `Layout.parts`.

    Raises:
        ShapeMismatch: an array is not what the layout says, or disagrees with another or with the texts.
    """
    files = {name: _rows(layout, shard, name, arrays[name]) for name in layout.arrays}
    if layout.identity.ids == "ordinal" and not np.array_equal(arrays["ids"], np.arange(*_span(layout, shard))):
        raise ShapeMismatch(f"shard {shard}: its ids are not the ordinals of its examples")
    if layout.ragged:
        _check_row_counts(layout, shard, arrays)
    if TEXTS in layout.parts:
        if texts is None or len(texts) != len(arrays["ids"]):
            raise ShapeMismatch(f"shard {shard}: {len(arrays['ids'])} text ids need as many texts")
        if not np.array_equal(text_keys(texts), arrays["ids"]):
            raise ShapeMismatch(f"shard {shard}: its ids are not the keys of its texts")
        data = canonical_json(list(texts))
        files[TEXTS] = memoryview(data), len(data)
    return files


def _span(layout: Layout, shard: int) -> tuple[int, int]:
    span = layout.span(shard)
    return span.start, span.stop


def _rows(layout: Layout, shard: int, name: str, rows: np.ndarray) -> Content:
    """An array's bytes, little-endian, and the size of its chunk."""
    array = layout.arrays[name]
    dtype, shape = np.dtype(array.dtype).newbyteorder("<"), (layout.used(array, shard), *array.row_shape)
    if rows.dtype != dtype or rows.shape != shape:
        raise ShapeMismatch(
            f"shard {shard}: {name} is {rows.dtype} of shape {rows.shape}, not {array.dtype} of shape {shape}"
        )
    data = np.ascontiguousarray(rows, dtype).reshape(-1).view(np.uint8).data
    return data, layout.chunk_bytes(array)


def _check_row_counts(layout: Layout, shard: int, arrays: Arrays) -> None:
    """Examples use the shard's rows one after the other, each at least one, and together all of them."""
    ends = np.cumsum(arrays["row_count"], dtype=np.int64)
    starts = ends - arrays["row_count"]
    if not (arrays["row_count"].all() and np.array_equal(arrays["row_start"], starts)):
        raise ShapeMismatch(f"shard {shard}: its examples' rows do not follow each other")
    if ends[-1] != layout.shard_rows[shard]:
        raise ShapeMismatch(f"shard {shard}: its examples have {ends[-1]:,} rows, not {layout.shard_rows[shard]:,}")


def refuse_repeated(
    layout: Layout, shard: int, keys: np.ndarray, texts: Sequence[str] | None, committed: IdIndex
) -> None:
    """An id names one example: neither another of this shard nor one of those that are committed has it.

    Raises:
        DatasetFault: two examples have the same id; both are named.
    """
    first = layout.span(shard).start
    pairs = [(first + one, first + other) for one, other in repeated(keys)]
    elsewhere = committed.ordinals(keys)
    pairs += [(int(elsewhere[at]), first + at) for at in np.flatnonzero(elsewhere >= 0)[:10].tolist()]
    if pairs:
        one, other = pairs[0]
        id = int(keys[other - first]) if texts is None else texts[other - first]
        raise DatasetFault(
            f"examples {one:,} and {other:,} have the same id, {id!r:.80}: ids must be different, or labels would "
            f"belong to two examples (repeated ids in shard {shard}: {len(pairs)}); shards committed before are kept",
            examples=[one, other],
        )


def sha256_of(content: Content) -> str:
    """sha256 of a file of this content."""
    data, size = content
    state = hashlib.sha256(data)
    rest = size - len(data)
    zeros = bytes(min(rest, 1 << 20))
    while rest:
        state.update(zeros[:rest])
        rest -= min(rest, len(zeros))
    return state.hexdigest()
