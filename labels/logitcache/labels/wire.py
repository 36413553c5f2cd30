"""Arrays as one safetensors body, built in place and read in place.

Layout (the safetensors format): u64 little-endian header length, JSON header padded with spaces, then the arrays'
bytes one after the other without gaps. Here the header is padded to 8 bytes and wider elements come first, so every
array is aligned. A body is allocated once, arrays are gathered straight into views of it, and it is sent as it is.
Nothing is ever unpickled; a header is checked against the body's size before any view is made.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

from logitcache.labels.errors import MalformedMessage
from logitcache.labels.ids import Ids
from logitcache.labels.ranges import Ranges
from logitcache.labels.soft_labels import RowSpec, Shape, SoftLabels, are_splits

MEDIA_TYPE = "application/vnd.safetensors"

MAX_HEADER_BYTES = 64 << 10
"""A longer header is refused: ours are under 1 KiB. What is made of one takes up to 40 times its bytes."""

TOLD = 200
"""Characters of a header that a message may repeat."""

PLANS = 256
"""Shapes of bodies whose headers are kept. Longer headers than `KEPT_HEADER_BYTES` are read anew each time."""

KEPT_HEADER_BYTES = 2048

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


@dataclass(frozen=True, eq=False)
class BodyPlan:
    """Where everything of a body lies; the same for all bodies of one shape, so it is made once and kept.

    Attributes:
        head: (bytes,) length prefix and padded header.
        size: bytes of the whole body.
        places: name, dtype, shape and offset of each array.
        metadata: the header's metadata.
    """

    head: UInt8[np.ndarray, " bytes"]
    size: int
    places: tuple[tuple[str, np.dtype[Any], Shape, int], ...]
    metadata: Mapping[str, str]

    def views(self, body: np.ndarray | bytes | bytearray | memoryview) -> Arrays:
        """The arrays of a body of this plan, not copied; they can be written to where the body can."""
        return {name: np.ndarray(shape, dtype, body, offset) for name, dtype, shape, offset in self.places}

    def allocate(self) -> tuple[UInt8[np.ndarray, " bytes"], Arrays]:
        """A body with its header written and its arrays not yet: the body, and writeable views of the arrays."""
        body = np.empty(self.size, np.uint8)
        body[: len(self.head)] = self.head
        return body, self.views(body)


@lru_cache(maxsize=PLANS)
def _plan(fields: tuple[tuple[str, str, Shape], ...], metadata: tuple[tuple[str, str], ...]) -> BodyPlan:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    ends = [0]
    for name, dtype, shape in fields:
        ends.append(ends[-1] + math.prod(shape) * np.dtype(dtype).itemsize)
        entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": ends[-2:]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = np.frombuffer(len(text).to_bytes(8, "little") + text, np.uint8)
    places = tuple(
        (name, np.dtype(dtype), shape, len(head) + begin)
        for (name, dtype, shape), begin in zip(fields, ends, strict=False)
    )
    return BodyPlan(head, len(head) + ends[-1], places, dict(metadata))


def allocate(
    fields: Mapping[str, tuple[str, Shape]], metadata: Mapping[str, str]
) -> tuple[UInt8[np.ndarray, " bytes"], Arrays]:
    """A body with its header written and its arrays not yet: the body, and writeable views of the arrays by name.

    ``fields`` gives dtype and shape by name, widest elements first; `RowSpec.fields` does.
    """
    return _plan(tuple((name, *field) for name, field in fields.items()), tuple(metadata.items())).allocate()


@lru_cache(maxsize=PLANS)
def rows_plan(spec: RowSpec, rows: int, examples: int, present: bool, digest: str | None) -> BodyPlan:
    """The plan of a body of ``rows`` rows of ``examples`` examples, with a mask if ``present``."""
    fields = spec.fields(rows, examples, present=present)
    metadata = row_metadata(spec.temperatures, digest)
    return _plan.__wrapped__(tuple((name, *field) for name, field in fields.items()), tuple(metadata.items()))


def parse(body: bytes | bytearray | memoryview | np.ndarray) -> tuple[Arrays, dict[str, str]]:
    """Views of the arrays of a body, and its metadata. Nothing is copied.

    Raises:
        MalformedMessage: the header is not JSON of the expected shape, a dtype is unknown, or the arrays do not fill
            the body exactly, one after the other.
    """
    data = np.frombuffer(body, np.uint8)
    head = _head(data)
    plan = (_kept_plan if len(head) <= KEPT_HEADER_BYTES else _read_plan)(head, len(data))
    return plan.views(data), dict(plan.metadata)


def _head(data: np.ndarray) -> bytes:
    """Length prefix and header of a body."""
    if len(data) < 8:
        raise MalformedMessage(f"a body of {len(data)} bytes is too short for safetensors")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise MalformedMessage(f"a header of {length} bytes does not fit in a body of {len(data)} bytes")
    return data[: 8 + length].tobytes()


def _read_plan(head: bytes, size: int) -> BodyPlan:
    fields, metadata = _read_header(head[8:])
    places = []
    offset = len(head)
    for name, dtype, shape, begin, end in sorted(fields, key=lambda field: (field[3], field[4])):
        length = math.prod(shape) * dtype.itemsize
        if begin != offset - len(head) or end - begin != length or len(head) + end > size:
            raise MalformedMessage(
                f"array {name[:TOLD]!r} of shape {shape} does not lie at bytes {begin} to {end} of this body"
            )
        places.append((name, dtype, shape, offset))
        offset += length
    if offset != size:
        raise MalformedMessage(f"{size - offset} bytes of the body belong to no array")
    return BodyPlan(np.frombuffer(head, np.uint8), size, tuple(places), metadata)


_kept_plan = lru_cache(maxsize=PLANS)(_read_plan)


def _read_header(text: bytes) -> tuple[list[tuple[str, np.dtype[Any], Shape, int, int]], dict[str, str]]:
    try:
        # Decoded first: of bytes the library would take UTF-16, too, and a byte order mark.
        entries = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        metadata = entries.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata are not texts")
        "".join((*entries, *metadata, *metadata.values())).encode()  # refuses a lone surrogate, which is no text
        return [_read_field(name, entry) for name, entry in entries.items()], metadata
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedMessage(f"the header is not one of safetensors: {str(error)[:TOLD]}") from None


def _read_field(name: str, entry: Any) -> tuple[str, np.dtype[Any], Shape, int, int]:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    whole = all(type(number) is int and 0 <= number < 2**48 for number in (*shape, begin, end))
    # NumPy bounds the product of the sides that are not 0, even where one is.
    if not whole or len(shape) > 8 or math.prod(side or 1 for side in shape) >= 2**48:
        raise ValueError(f"array {name[:TOLD]!r} has an impossible shape or place")
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


def encode_ids(ids: Ids, rows: Ranges | None = None, view: Any = None, **options: Any) -> bytes:
    """Body of a request about examples: their ids, ranges of their rows unless None, their views, and options as
    metadata (None is left out).

    Whole numbers travel as int64, texts as their keys: a client hashes them once, and a server never. A view for each
    id is an array ``view``, one for all is metadata.
    """
    arrays: dict[str, np.ndarray] = {"ids": ids.keys}
    if rows is not None:
        arrays["rows"] = rows
    if isinstance(view, np.ndarray):
        arrays["view"] = view
    else:
        options["view"] = view
    return encode(arrays, {name: str(value) for name, value in options.items() if value is not None})


def row_metadata(temperatures: tuple[float, ...], digest: str | None) -> dict[str, str]:
    """Metadata of a body of rows: what `decode_rows` needs besides the arrays."""
    return {"temperatures": json.dumps(list(temperatures)), "digest": digest or ""}


def decode_rows(body: bytes | bytearray | memoryview | np.ndarray) -> SoftLabels:
    """The soft labels in a response's body, as views of it.

    Raises:
        MalformedMessage: an array is absent, of another dtype, or disagrees with the others in rows, k or temperatures.
    """
    data = np.frombuffer(body, np.uint8)
    head = _head(data)
    read = _read_rows if len(head) <= KEPT_HEADER_BYTES else _read_rows.__wrapped__
    plan, temperatures = read(head, len(data))
    arrays = plan.views(data)
    if "present" in arrays and arrays["present"].view(np.uint8).max(initial=0) > 1:
        raise MalformedMessage("the body does not hold soft labels: present holds bytes that are neither 0 nor 1")
    if (splits := arrays.get("row_splits")) is not None:
        rows = len(arrays["indices"])
        if not are_splits(splits, rows):
            raise MalformedMessage(f"the body does not hold soft labels: its row_splits do not split {rows:,} rows")
    return SoftLabels(**arrays, temperatures=temperatures, digest=plan.metadata.get("digest") or None)


def rows_of(arrays: Arrays, metadata: Mapping[str, str]) -> SoftLabels:
    """Soft labels of arrays that were parsed already, such as those of a body that holds more than rows; errors as in
    `decode_rows`.
    """
    temperatures = _check_rows({name: (array.dtype.name, array.shape) for name, array in arrays.items()}, metadata)
    rows: Any = arrays
    return SoftLabels(**rows, temperatures=temperatures)


@lru_cache(maxsize=PLANS)
def _read_rows(head: bytes, size: int) -> tuple[BodyPlan, tuple[float, ...]]:
    """The plan of a body of rows, and their temperatures; whatever can be told without the arrays is checked."""
    plan = _read_plan(head, size)
    return plan, _check_rows({name: (dtype.name, shape) for name, dtype, shape, _ in plan.places}, plan.metadata)


def _check_rows(found: dict[str, tuple[str, Shape]], metadata: Mapping[str, str]) -> tuple[float, ...]:
    """Temperatures of rows in these arrays, by their dtypes and shapes, which are refused unless they agree."""
    try:
        temperatures = tuple(float(value) for value in json.loads(metadata["temperatures"]))
        (index_dtype, (rows, k)), (dtype, _), (_, (examples,)) = (
            found[name] for name in ("indices", "logits", "fingerprint")
        )
        spec = RowSpec(k, index_dtype, dtype, temperatures, "row_splits" in found, "target" in found)
        expected = spec.fields(rows, examples, present="present" in found)
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MalformedMessage(f"the body does not hold soft labels: {str(error)[:TOLD]}") from None
    if spec.index_dtype not in ("uint16", "uint32") or spec.dtype not in ("float16", "float32") or found != expected:
        held = str(found)[: 5 * TOLD]
        raise MalformedMessage(f"the body does not hold soft labels: it holds {held}, not {expected}")
    if not spec.ragged and rows != examples:
        raise MalformedMessage(f"the body does not hold soft labels: {rows:,} rows of {examples:,} examples")
    return temperatures
