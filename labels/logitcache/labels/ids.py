"""Ids of examples as callers give them, made into one array of keys.

An id is a whole number of 64 signed bits or a text. A whole number is its own key; a text's key is the XXH3-128 of its
UTF-8 bytes, so that a batch of ids is one array whatever the texts are. Whether an id exists is the label set's to say.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np
import xxhash
from jaxtyping import Int64, UInt64

from logitcache.labels.errors import InvalidIds

IdKind = Literal["ordinal", "integer", "text"]
"""What a label set's ids are: the examples' ordinals, whole numbers of the dataset's own, or texts."""

MAX_TEXT_BYTES = 4096
"""UTF-8 bytes that a text id may have: as many as a path of Linux."""

_NO_NUMBERS = (str, bytes, bool, np.bool_)

Keys = Int64[np.ndarray, " ids"] | UInt64[np.ndarray, "ids 2"]


@dataclass(frozen=True)
class Ids:
    """Ids of one kind, in the order given, duplicates kept.

    Attributes:
        keys: (ids,) int64 of whole numbers, or (ids, 2) uint64 of texts: the high, then the low half of the hash.
        texts: what the keys were made from, or None where only hashes are known (a request's, say).
    """

    keys: Keys
    texts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, part: slice) -> "Ids":
        return Ids(self.keys[part], None if self.texts is None else self.texts[part])

    @property
    def are_texts(self) -> bool:
        """The keys are hashes of texts."""
        return self.keys.ndim == 2

    def at(self, which: Any) -> list[int | str]:
        """The ids at these positions (an index or mask array), once each, in the order given; for messages and errors.

        A text of which only the hash is known is told as the hash, 32 hexadecimal digits.
        """
        if not self.are_texts:
            return list(dict.fromkeys(self.keys[which].tolist()))
        if self.texts is None:
            return list(dict.fromkeys(f"{high:016x}{low:016x}" for high, low in self.keys[which].tolist()))
        positions = np.arange(len(self))[which].tolist()
        return list(dict.fromkeys(self.texts[position] for position in positions))


def as_ids(ids: Any) -> Ids:
    """Ids in one array; order and duplicates are kept.

    ``ids`` is a sequence of whole numbers or of texts, a NumPy array of integers or texts, or a CPU tensor.

    Raises:
        InvalidIds: empty, not one-dimensional, neither all whole numbers nor all texts (floats and booleans are
            neither), a number beyond 64 signed bits, or a text that `check_text` refuses.
    """
    if isinstance(ids, Ids):
        return ids
    if type(ids) is np.ndarray and ids.dtype == np.int64 and ids.ndim == 1 and ids.size and ids.flags.c_contiguous:
        return Ids(ids)
    if isinstance(ids, str | bytes | dict | set):
        raise InvalidIds(f"ids must be a sequence of whole numbers or of texts, not {type(ids).__name__}")
    if isinstance(ids, list | tuple) and ids and isinstance(ids[0], str):
        return _texts(ids)
    listed = isinstance(ids, list | tuple)
    # NumPy would read True as 1, and give every number of a list the room of its longest text.
    if listed and any(issubclass(kind, _NO_NUMBERS) for kind in set(map(type, ids))):
        _refuse(ids)
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidIds(f"ids must be a sequence of whole numbers or of texts: {error}") from None
    if array.ndim != 1:
        raise InvalidIds(f"ids must be one-dimensional, not of shape {array.shape}; for one example pass [id]")
    if array.size == 0:
        raise InvalidIds("ids is empty: ask for at least one example")
    if not listed and (array.dtype.kind in "UT" or isinstance(array[0], str)):
        return _texts(array.tolist())
    if array.dtype.kind not in "iu":
        _refuse(ids if listed else array)
    if array.dtype == np.uint64 and bool((array > np.iinfo(np.int64).max).any()):
        raise InvalidIds(f"id {int(array.max())} is beyond 64 signed bits")
    return Ids(np.ascontiguousarray(array, np.int64))


def text_keys(texts: Iterable[Any]) -> UInt64[np.ndarray, "ids 2"]:
    """Keys of text ids: XXH3-128 (seed 0) of the UTF-8 bytes, as its high and its low 64 bits.

    Raises:
        InvalidIds: one is not a text, or cannot be an id; see `check_text`.
    """
    texts = list(texts)
    try:
        # Put together, encoded once and cut again: a third faster than a text at a time.
        encoded = "\0".join(texts).encode().split(b"\0")
    except (TypeError, UnicodeEncodeError):
        encoded = []
    if len(encoded) != len(texts) or not all(encoded) or len(max(encoded, key=len)) > MAX_TEXT_BYTES:
        encoded = [check_text(text) for text in texts]
    digests = b"".join(map(xxhash.xxh3_128_digest, encoded))
    return np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)


def check_text(text: Any) -> bytes:
    """UTF-8 bytes of a text, if it can be an id.

    Raises:
        InvalidIds: not a text, empty, longer than `MAX_TEXT_BYTES`, with a NUL, or with half a surrogate pair.
    """
    if not isinstance(text, str):
        raise InvalidIds(
            f"id {repr(text)[:60]} is not a text, but {type(text).__name__}: ids are all numbers or all texts"
        )
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise InvalidIds(f"id {text[:40]!a} is not Unicode text: it has half a surrogate pair") from None
    if not encoded:
        raise InvalidIds("an id is empty: a text id has at least one character")
    if len(encoded) > MAX_TEXT_BYTES:
        raise InvalidIds(f"id {text[:20]!r}… has {len(encoded):,} bytes of UTF-8, an id may have {MAX_TEXT_BYTES:,}")
    if b"\0" in encoded:
        raise InvalidIds(f"id {text[:60]!r} has a NUL character, which no command line and few file systems can carry")
    return encoded


def _texts(texts: Sequence[Any]) -> Ids:
    return Ids(text_keys(texts), texts)


def _refuse(ids: Iterable[Any]) -> NoReturn:
    """Name the first id that is wrong."""
    for value in ids:
        # NumPy counts a time span among its whole numbers.
        if isinstance(value, bool | np.bool_ | np.timedelta64) or not isinstance(value, int | np.integer):
            raise InvalidIds(f"id {repr(value)[:60]} is not a whole number, but {type(value).__name__}")
        if not -(2**63) <= int(value) < 2**63:
            raise InvalidIds(f"id {str(value)[:60]} is beyond 64 signed bits")
    raise InvalidIds("ids must be whole numbers or texts")


def check_kind(ids: Ids, kind: IdKind, name: str) -> None:
    """Refuse texts where a label set's ids are whole numbers, and the other way round.

    Raises:
        InvalidIds: they are of the other kind.
    """
    wanted = kind == "text"
    if ids.are_texts != wanted:
        words = {True: "texts", False: "whole numbers"}
        raise InvalidIds(f"the ids of {name!r} are {words[wanted]}, these are {words[ids.are_texts]}")
