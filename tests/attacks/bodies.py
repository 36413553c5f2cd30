"""Safetensors bodies that must be refused, by what is wrong with them: for whoever reads such bodies, client or server.

Three tables: `BODIES` are no safetensors of ours whatever they should hold; `ROWS` are, and hold no soft labels;
`RECORDED` hold no rows of a recording. `SOUND` are the bodies that they were made from, which are taken.
"""

import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from logitcache.labels import wire
from logitcache.labels.soft_labels import RowSpec, splits_of

EXAMPLES, K, TEMPERATURES = 4, 3, (1.0, 2.0)

Arrays = dict[str, np.ndarray]


def header(entries: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    """A body with this header, JSON text or what becomes it, whose length is told as it is unless ``length`` lies."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def one(**changes: Any) -> dict[str, Any]:
    """The header of one array ``ids`` of one int64, with changes."""
    return {"ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]} | changes}


def _two(first: list[int], second: list[int]) -> dict[str, Any]:
    """The header of two arrays of one int64 each, at these places."""
    return {name: {"dtype": "I64", "shape": [1], "data_offsets": at} for name, at in (("a", first), ("b", second))}


EIGHT = b"8bytes.."


def _without(name: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {other: value for other, value in entries.items() if other != name}


_ENTRY = b'{"dtype":"I64","shape":[1],"data_offsets":[0,8]}'

_NO_SIDES: dict[str, Any] = {
    "negative": -1,
    "very negative": -(2**63),
    "2^48": 2**48,
    "2^63": 2**63,
    "2^64 + 1": 2**64 + 1,
    "of 400 digits": 10**400,
    "a float": 1.0,
    "infinite": float("inf"),
    "no number": float("nan"),
    "a boolean": True,
    "null": None,
    "a text": "1",
    "a list": [1],
    "an object": {"1": 1},
}

_NO_DTYPES: list[Any] = ["F8_E4M3", "BF16", "F64", "I8", "O", "V8", "<i8", "i64", "", "I64 ", "x" * 9000]
_NO_DTYPES += [None, 8, [1], {"I64": 1}, True]

BODIES: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header of no bytes": header(b""),
    "a header longer than the body": header({}, length=1 << 40),
    "a header one byte longer than the body": header(one(), EIGHT, length=len(json.dumps(one())) + 9),
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2^64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header beyond the limit": header(b"{}".ljust(wire.MAX_HEADER_BYTES + 1)),
    "a header that ends too early": header(one(), EIGHT, length=10),
    "a header of zeros": header(bytes(1000)),
    "a header of spaces": header(b" " * 1000),
    "no JSON": header(b"{]"),
    "JSON and more": header(b"{}{}"),
    "a comma at the end": header(b'{"ids":' + _ENTRY + b",}", EIGHT),
    "single quotes": header(b"{'ids':" + _ENTRY + b"}", EIGHT),
    "JSON that is no object": header(b"[1]"),
    "a number": header(b"3"),
    "null": header(b"null"),
    "a text": header(b'"ids"'),
    "not UTF-8": header(b'{"\xff": 1}'),
    "a name that is not UTF-8": header(b'{"\xc3\x28":' + _ENTRY + b"}", EIGHT),
    "an overlong encoding": header(b'{"\xc0\x80":' + _ENTRY + b"}", EIGHT),
    "a byte order mark": header(b"\xef\xbb\xbf" + json.dumps(one()).encode(), EIGHT),
    "UTF-16": header(json.dumps(one()).encode("utf-16"), EIGHT),
    "UTF-16 without its mark": header(json.dumps(one()).encode("utf-16-le"), EIGHT),
    "UTF-32": header(json.dumps(one()).encode("utf-32-be"), EIGHT),
    "a name of half a character": header({"\ud800": one()["ids"]}, EIGHT),
    "metadata of half a character": header({"__metadata__": {"digest": "\udfff"}}),
    "deep nesting": header(b"[" * 60_000),
    "deep nesting of objects": header(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "deep nesting where it is closed": header(b'{"a":' + b"[" * 30_000 + b"]" * 30_000 + b"}"),
    "deep nesting in a shape": header(b'{"a":{"dtype":"U8","shape":' + b"[" * 20_000 + b"]" * 20_000 + b"}}"),
    "a number of 5,000 digits": header(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"x"
    ),
    "a number of 60,000 digits": header(b'{"a":{"dtype":"U8","shape":[' + b"9" * 60_000 + b'],"data_offsets":[0,1]}}'),
    "many lists": header(b'{"a":[' + b"[]," * 20_000 + b"[]]}"),
    "many numbers": header(b'{"a":{"dtype":"U8","shape":[' + b"1," * 30_000 + b'1],"data_offsets":[0,1]}}', b"x"),
    "many names": header({str(number): {} for number in range(6000)}),
    "many arrays, one of them wrong": header(
        {str(number): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(1000)} | {"x": 1}
    ),
    "a long name": header({"x" * 60_000: one()["ids"] | {"data_offsets": [1, 9]}}, EIGHT),
    "a name twice": header(b'{"a":' + _ENTRY + b',"a":' + _ENTRY + b"}", EIGHT),
    "a name twice, once escaped": header(b'{"a":' + _ENTRY + b',"\\u0061":' + _ENTRY + b"}", EIGHT),
    "a name twice, at two places": header(
        b'{"a":' + _ENTRY + b',"a":' + _ENTRY.replace(b"[0,8]", b"[8,16]") + b"}", EIGHT * 2
    ),
    "a dtype twice": header(b'{"a":' + _ENTRY.replace(b"{", b'{"dtype":"U8",') + b"}", EIGHT),
    "metadata twice": header(b'{"__metadata__":{"a":"1"},"__metadata__":{"a":"2"}}'),
    "a datum twice": header(b'{"__metadata__":{"a":"1","a":"2"}}'),
    "no entry": header({"ids": None}),
    "an entry that is a list": header({"ids": ["I64", [1], [0, 8]]}, EIGHT),
    "an entry that is a text": header({"ids": "dtype shape data_offsets"}, EIGHT),
    **{
        f"without {name}": header({"ids": {k: v for k, v in one()["ids"].items() if k != name}}, EIGHT)
        for name in one()["ids"]
    },
    **{f"dtype {value!r:.20}": header(one(dtype=value), EIGHT) for value in _NO_DTYPES},
    **{f"a side that is {what}": header(one(shape=[value]), EIGHT) for what, value in _NO_SIDES.items()},
    **{f"an offset that is {what}": header(one(data_offsets=[0, value]), EIGHT) for what, value in _NO_SIDES.items()},
    **{f"a begin that is {what}": header(one(data_offsets=[value, 8]), EIGHT) for what, value in _NO_SIDES.items()},
    "a shape that is a number": header(one(shape=1), EIGHT),
    "a shape that is null": header(one(shape=None), EIGHT),
    "a shape that is a text": header(one(shape="1"), EIGHT),
    "two sides that overflow 64 bits": header(one(shape=[2**47, 2**47]), EIGHT),
    "two sides whose product is 2^64": header(one(shape=[2**32, 2**32], data_offsets=[0, 0])),
    "four sides whose product is 2^64": header(one(shape=[2**16] * 4, data_offsets=[0, 0])),
    "sides whose bytes are 2^64": header(one(shape=[2**45, 2**16], data_offsets=[0, 0])),
    "eight sides": header(one(shape=[2**47] * 8), EIGHT),
    "sides that overflow beside one of 0": header(one(shape=[2**47, 0, 2**47], data_offsets=[0, 0])),
    "a larger array than its bytes": header(one(shape=[2**40]), EIGHT),
    "a larger array than the body": header(one(shape=[2**40], data_offsets=[0, 2**43]), EIGHT),
    "nine sides": header(one(shape=[1] * 9), EIGHT),
    "64 sides": header(one(shape=[1] * 64), EIGHT),
    "offsets beyond the body": header(one(data_offsets=[0, 1 << 30], shape=[1 << 27]), EIGHT),
    "offsets backwards": header(one(data_offsets=[8, 0]), EIGHT),
    "offsets of another size": header(one(data_offsets=[0, 4]), b"4byt"),
    "one offset": header(one(data_offsets=[0]), EIGHT),
    "three offsets": header(one(data_offsets=[0, 8, 8]), EIGHT),
    "offsets in an object": header(one(data_offsets={"0": 0, "8": 8}), EIGHT),
    "offsets in a text": header(one(data_offsets="08"), EIGHT),
    "a gap before the first": header(one(data_offsets=[8, 16]), EIGHT * 2),
    "a gap between two": header(_two([0, 8], [16, 24]), EIGHT * 3),
    "two at one place": header(_two([0, 8], [0, 8]), EIGHT),
    "two that overlap": header(_two([0, 8], [4, 12]), EIGHT + b"4byt"),
    "one within the other": header({"a": one(shape=[2], data_offsets=[0, 16])["ids"], "b": one()["ids"]}, EIGHT * 2),
    "one in the header": header(_two([0, 8], [-8, 0]), EIGHT),
    "a byte left over": header(one(), EIGHT + b"x"),
    "bytes and no array": header({}, EIGHT),
    "bytes missing": header(one(), EIGHT[:5]),
    "all bytes missing": header(one()),
    "metadata that are no texts": header({"__metadata__": {"a": 1}}),
    "metadata of null": header({"__metadata__": {"a": None}}),
    "metadata that are null": header({"__metadata__": None}),
    "metadata that are a list": header({"__metadata__": ["a"]}),
    "metadata that are an array": header({"__metadata__": one()["ids"]}, EIGHT),
    "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
    "a file of NumPy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n\x80\x04N.",
    "a zip": b"PK\x03\x04" + bytes(60),
    "a page": b"<!doctype html><html><body><h1>502 Bad Gateway</h1></body></html>",
}
"""Each is to be refused as `MalformedMessage`, by whoever takes a body of safetensors."""


def arrays_of(spec: RowSpec, *, present: bool = False) -> Arrays:
    """Rows that are taken: zeros; of a causal label set two rows an example."""
    rows = 2 * EXAMPLES if spec.ragged else EXAMPLES
    fields = spec.fields(rows, EXAMPLES, present=present)
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in fields.items()}
    if spec.ragged:
        arrays["row_splits"][:] = splits_of(np.full(EXAMPLES, 2))
    return arrays


POINTWISE = RowSpec(K, "uint16", "float16", TEMPERATURES)
CAUSAL = RowSpec(K, "uint16", "float16", TEMPERATURES, ragged=True, targets=True)
TERMS = wire.row_metadata(TEMPERATURES, "sha256:" + "1" * 64)


def _misshapen(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    other = {"u": np.int32, "i": np.uint64, "f": np.uint32, "b": np.uint16}[array.dtype.kind]
    yield "of another dtype", array.astype(other)
    yield "of wider numbers", array.astype({2: np.int64, 4: np.int64, 8: np.bool_, 1: np.uint32}[array.dtype.itemsize])
    yield "one longer", np.concatenate([array, array[:1]])
    yield "one shorter", array[:-1]
    yield "empty", array[:0]
    yield "with a side more", array[..., None]
    yield "of a number", array.reshape(-1)[:1].reshape(())
    yield "with a side of 0", np.zeros((*array.shape, 0), array.dtype)


def _not_rows(spec: RowSpec) -> Iterator[tuple[str, bytes]]:
    """Bodies that are not rows as this spec has them."""
    good = arrays_of(spec, present=True)
    for name, array in good.items():
        if name != "present":
            yield f"no {name}", wire.encode(_without(name, good), TERMS)
        for what, changed in _misshapen(array):
            yield f"{name} {what}", wire.encode(good | {name: changed}, TERMS)
    extra = {"surprise": np.zeros(EXAMPLES, np.uint8), "__proto__": np.zeros(1, np.uint8), "": np.zeros(1, np.uint8)}
    for name, array in extra.items():
        yield f"an array {name!r} more", wire.encode(good | {name: array}, TERMS)
    for value in (2, 255):
        yield (
            f"a mask of {value}",
            wire.encode(good | {"present": np.full(EXAMPLES, value, np.uint8)}, TERMS).replace(
                b'"present":{"dtype":"U8"', b'"present":{"dtype":"BOOL"'
            ),
        )
    yield "nothing but metadata", wire.encode({}, TERMS)
    yield "no metadata", wire.encode(good)
    said = ["", "x", "1", "null", "{}", "[null]", '["x"]', "[[1]]", "[1,2,3]", "[]", "[1", "[1e999,1e9999,3]"]
    for text in [*said, "[" * 9999, f"[{10**400}]", f"[{'9' * 6000}]", '["' + "x" * 9000 + '"]']:
        yield f"temperatures {text:.20}", wire.encode(good, TERMS | {"temperatures": text})


def _other_splits() -> Iterator[tuple[str, bytes]]:
    good = arrays_of(CAUSAL)
    last = 2 * EXAMPLES
    for splits in (
        [1, 2, 4, 6, last],
        [0, 2, 4, 6, last - 1],
        [0, 2, 4, 6, last + 1],
        [0, 4, 2, 6, last],
        [0, -1, 4, 6, last],
        [0, last + 1, 4, 6, last],
        [0, 2**62, 4, 6, last],
        [0, -(2**63), 2**63 - 1, 6, last],
        [0, 0, 0, 0, 2**63 - 1],
        [0, 2**63 - 1, -2, 6, last],
        [-(2**63), 2, 4, 6, last],
    ):
        yield f"row_splits {splits}", wire.encode(good | {"row_splits": np.array(splits)}, TERMS)


ROWS: dict[str, bytes] = {
    **{f"pointwise: {what}": body for what, body in _not_rows(POINTWISE)},
    **{f"causal: {what}": body for what, body in _not_rows(CAUSAL)},
    **{f"causal: {what}": body for what, body in _other_splits()},
}
"""Each is well formed, and is to be refused as `MalformedMessage` where soft labels are expected."""

WHO = {"rank": "0", "sitting": "7"}


def recorded_of(spec: RowSpec) -> Arrays:
    """Rows of a recording that are taken."""
    told = {name: np.arange(EXAMPLES, dtype=np.int64) for name in ("ids", "view", "step")}
    return told | arrays_of(spec)


def _not_recorded(spec: RowSpec) -> Iterator[tuple[str, bytes]]:
    good, terms = recorded_of(spec), _without("digest", TERMS) | WHO
    for name in good:
        yield f"no {name}", wire.encode(_without(name, good), terms)
        for what, changed in _misshapen(good[name]):
            yield f"{name} {what}", wire.encode(good | {name: changed}, terms)
    yield "an array more", wire.encode(good | {"surprise": np.zeros(1, np.uint8)}, terms)
    yield "keys of three words", wire.encode(good | {"ids": np.zeros((EXAMPLES, 3), np.uint64)}, terms)
    yield "keys of another length", wire.encode(good | {"ids": np.zeros((EXAMPLES - 1, 2), np.uint64)}, terms)
    for name in WHO:
        yield f"no {name} told", wire.encode(good, _without(name, terms))
        for text in ("", "-1", "+1", "1.0", "1e3", " 1", "x", "\u0663", "9" * 20, "9" * 9000):
            yield f"{name} {text!r:.20}", wire.encode(good, terms | {name: text})


RECORDED: dict[str, bytes] = {
    **{f"pointwise: {what}": body for what, body in _not_recorded(POINTWISE)},
    **{f"causal: {what}": body for what, body in _not_recorded(CAUSAL)},
}
"""Each is well formed, and is to be refused, as `MalformedMessage` or `InvalidIds`, where rows to record are."""

SOUND: dict[str, list[bytes]] = {
    "a fetch request": [
        wire.encode({"ids": np.arange(EXAMPLES)}, {"view": "0", "on_missing": "error"}),
        wire.encode({name: np.zeros((EXAMPLES, 2), dtype) for name, dtype in (("ids", "uint64"), ("rows", "int64"))}),
        wire.encode({"ids": np.arange(EXAMPLES), "view": np.arange(EXAMPLES)}),
    ],
    "a missing request": [wire.encode({"ids": np.arange(EXAMPLES)})],
    "rows": [
        wire.encode(arrays_of(POINTWISE), TERMS),
        wire.encode(arrays_of(POINTWISE, present=True), TERMS),
        wire.encode(arrays_of(CAUSAL), TERMS),
    ],
    "recorded rows": [wire.encode(recorded_of(spec), TERMS | WHO) for spec in (POINTWISE, CAUSAL)],
}
"""Bodies that are taken, by what they hold."""
