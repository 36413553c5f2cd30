"""Arrays as one safetensors body, built in place and read in place.

Layout (the safetensors format): u64 little-endian header length, JSON header padded with spaces, then the arrays'
bytes one after the other without gaps. Here the header is padded to 8 bytes and wider elements come first, so every
array is aligned. A body is allocated once, arrays are gathered straight into views of it, and it is sent as it is.
Nothing is ever unpickled; a header is checked against the body's size before any view is made.
"""

import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

from logitcache.labels.errors import MalformedMessage
from logitcache.labels.ids import Ids
from logitcache.labels.ranges import Ranges
from logitcache.labels.soft_labels import RowSpec, Shape, SoftLabels

MEDIA_TYPE = "application/vnd.safetensors"

MAX_HEADER_BYTES = 1 << 20
"""A longer header is refused: ours are under 1 KiB."""

_CODES = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "float32": "F32",
}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in _CODES.items()}

Arrays = dict[str, np.ndarray]


@lru_cache(maxsize=1024)
def _header(fields: tuple[tuple[str, str, Shape], ...], metadata: tuple[tuple[str, str], ...]) -> tuple[bytes, int]:
    """Length prefix and padded header of a body, and the body's size; computed once a batch shape."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in fields:
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, 8 + len(text) + end


def allocate(
    fields: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]
) -> tuple[UInt8[np.ndarray, " bytes"], Arrays]:
    """A body with its header written and its arrays not yet: the body, and writeable views of the arrays by name.

    ``fields`` gives dtype and shape by name, widest elements first; `RowSpec.fields` does.
    """
    key = tuple((name, dtype, shape) for name, (dtype, shape) in fields.items())
    header, size = _header(key, tuple(metadata.items()))
    body = np.empty(size, np.uint8)
    body[: len(header)] = np.frombuffer(header, np.uint8)
    views, offset = {}, len(header)
    for name, (dtype, shape) in fields.items():
        views[name], offset = _view(body, offset, np.dtype(dtype), shape)
    return body, views


def _view(body: np.ndarray, offset: int, dtype: np.dtype[Any], shape: Shape) -> tuple[np.ndarray, int]:
    end = offset + math.prod(shape) * dtype.itemsize
    return body[offset:end].view(dtype).reshape(shape), end


def parse(body: bytes | bytearray | memoryview | np.ndarray) -> tuple[Arrays, dict[str, str]]:
    """Views of the arrays of a body, and its metadata. Nothing is copied.

    Raises:
        MalformedMessage: the header is not JSON of the expected shape, a dtype is unknown, or the arrays do not fill
            the body exactly, one after the other.
    """
    data = np.frombuffer(body, np.uint8)
    if len(data) < 8:
        raise MalformedMessage(f"a body of {len(data)} bytes is too short for safetensors")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise MalformedMessage(f"a header of {length} bytes does not fit in a body of {len(data)} bytes")
    fields, metadata = _read_header(data[8 : 8 + length].tobytes())
    arrays: Arrays = {}
    offset = 8 + length
    for name, dtype, shape, begin, end in sorted(fields, key=lambda field: (field[3], field[4])):
        size = math.prod(shape) * dtype.itemsize
        if begin != offset - 8 - length or end - begin != size or 8 + length + end > len(data):
            raise MalformedMessage(
                f"array {name!r} of shape {shape} does not lie at bytes {begin} to {end} of this body"
            )
        arrays[name], offset = _view(data, offset, dtype, shape)
    if offset != len(data):
        raise MalformedMessage(f"{len(data) - offset} bytes of the body belong to no array")
    return arrays, metadata


def _read_header(text: bytes) -> tuple[list[tuple[str, np.dtype[Any], Shape, int, int]], dict[str, str]]:
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata are not texts")
        return [_read_field(name, entry) for name, entry in entries.items()], metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedMessage(f"the header is not one of safetensors: {error}") from None


def _read_field(name: str, entry: dict[str, Any]) -> tuple[str, np.dtype[Any], Shape, int, int]:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and 0 <= number < 2**48 for number in (*shape, begin, end)) or len(shape) > 8:
        raise ValueError(f"array {name!r} has an impossible shape or place")
    return name, dtype, shape, begin, end


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    if len(entries := dict(pairs)) != len(pairs):
        raise ValueError("a name stands there twice")
    return entries


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Arrays that exist already, copied into one body; rows are gathered into `allocate`'s views instead."""
    ordered = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))
    body, views = allocate({name: (array.dtype.name, array.shape) for name, array in ordered.items()}, metadata or {})
    for name, array in ordered.items():
        views[name][...] = array
    return body.tobytes()


def encode_ids(ids: Ids, rows: Ranges | None = None, **options: Any) -> bytes:
    """Body of a request about examples: their ids, ranges of their rows unless None, and options as metadata (None is
    left out).

    Whole numbers travel as int64, texts as their keys: a client hashes them once, and a server never.
    """
    arrays = {"ids": ids.keys} if rows is None else {"ids": ids.keys, "rows": rows}
    return encode(arrays, {name: str(value) for name, value in options.items() if value is not None})


def row_metadata(temperatures: tuple[float, ...], digest: str | None) -> dict[str, str]:
    """Metadata of a body of rows: what `decode_rows` needs besides the arrays."""
    return {"temperatures": json.dumps(list(temperatures)), "digest": digest or ""}


def decode_rows(body: bytes | bytearray | memoryview | np.ndarray) -> SoftLabels:
    """The soft labels in a response's body, as views of it.

    Raises:
        MalformedMessage: an array is absent, of another dtype, or disagrees with the others in rows, k or temperatures.
    """
    arrays, metadata = parse(body)
    try:
        temperatures = tuple(float(value) for value in json.loads(metadata["temperatures"]))
        (rows, k), examples = arrays["indices"].shape, len(arrays["fingerprint"])
        index_dtype, dtype = arrays["indices"].dtype.name, arrays["logits"].dtype.name
        spec = RowSpec(k, index_dtype, dtype, temperatures, "row_splits" in arrays, "target" in arrays)
        found = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
        expected = spec.fields(rows, examples, present="present" in arrays)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MalformedMessage(f"the body does not hold soft labels: {error}") from None
    if spec.index_dtype not in ("uint16", "uint32") or spec.dtype not in ("float16", "float32") or found != expected:
        raise MalformedMessage(f"the body does not hold soft labels: it holds {found}, not {expected}")
    if "present" in arrays and arrays["present"].view(np.uint8).max(initial=0) > 1:
        raise MalformedMessage("the body does not hold soft labels: present holds bytes that are neither 0 nor 1")
    splits = arrays.get("row_splits", np.arange(rows + 1))
    if len(splits) != examples + 1 or splits[0] != 0 or splits[-1] != rows or bool((np.diff(splits) < 0).any()):
        raise MalformedMessage(f"the body does not hold soft labels: its row_splits do not split {rows:,} rows")
    return SoftLabels(**arrays, temperatures=temperatures, digest=metadata.get("digest") or None)
