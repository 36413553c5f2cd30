"""What makes two label sets the same: the teacher, what was stored of it, and how it is hashed.

Knows nothing of files: `storage` writes these values down, `server` fills them in, `client` compares them.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from logitcache.labels.errors import InvalidName, InvalidRequest
from logitcache.labels.ids import IdKind

FORMAT_VERSION = 1
"""Version of the bytes on disk. A reader refuses a newer one."""

WIDE_CLASSES = 65_536
"""Above this many classes indices are uint32, up to it uint16."""

MAX_CLASSES = 2**31 - 1
"""Most classes that the format allows: a target is an int32."""

MAX_VIEWS = 4096
"""Most views that an example may have."""

MAX_TEMPERATURES = 100
"""Most temperatures that a label set declares besides 1: each is a scalar of a row, and stands in the header of every
answer."""

MAX_SEED = 2**63 - 1
"""Largest seed of views."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""What a label set's name, and every other name that goes into addresses and paths, must match."""

NAME_RULE = "1 to 64 of a-z, 0-9, '.', '_', '-', beginning with a letter or digit"
"""The same in words."""

Dtype = Literal["float16", "float32"]

Alignment = Literal["pointwise", "causal"]
"""``"pointwise"``: an example has one row. ``"causal"``: an example of L tokens has L rows, and row i is the teacher's
distribution after tokens 0 to i, that is, of token i + 1."""


_WORDS: dict[str, tuple[Any, ...]] = {
    "dtype": ("float16", "float32"),
    "alignment": ("pointwise", "causal"),
    "targets": (False, True),
    "ids": ("ordinal", "integer", "text"),
    "selection": ("top-k",),
}


@dataclass(frozen=True)
class TeacherId:
    """Who labelled: a name, a digest of the weights, a digest of the preprocessing; compared as text."""

    name: str
    weights: str
    preprocessing: str = ""


@dataclass(frozen=True)
class Identity:
    """Everything that a label set's rows depend on besides the data. Two runs that differ in it never share a label
    set.

    ``temperatures`` are sorted, distinct and contain 1. ``dtype`` is that of the stored logits. ``targets`` says
    whether the dataset's targets and their logits are stored, ``ids`` what its ids are. An example has a row for each
    of its ``views``; they are made from ``seed``, and with seed 0 the dataset's items are taken as they are.
    """

    teacher: TeacherId
    k: int
    classes: int
    temperatures: tuple[float, ...]
    dtype: Dtype
    alignment: Alignment = "pointwise"
    targets: bool = False
    ids: IdKind = "ordinal"
    selection: Literal["top-k"] = "top-k"
    views: int = 1
    seed: int = 0
    format_version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """The identity as JSON values, as it stands in the manifest and in the digest."""
        return asdict(self) | {"temperatures": list(self.temperatures)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Identity":
        """Read what `to_json` gave.

        Raises:
            ValueError: a field is missing, unknown, or out of its bounds; nothing was allocated.
        """
        if not isinstance(value, dict) or set(value) != {field.name for field in fields(cls)}:
            raise ValueError("its fields are not those of this format")
        teacher, temperatures = value["teacher"], value["temperatures"]
        if not (isinstance(teacher, dict) and all(isinstance(text, str) for text in teacher.values())):
            raise ValueError("teacher is not an object of texts")
        if set(teacher) != {"name", "weights", "preprocessing"}:
            raise ValueError("teacher lacks a name, weights or preprocessing")
        numbers = ("k", "classes", "views", "seed", "format_version")
        if any(type(value[name]) is not int or value[name] < 0 for name in numbers):
            raise ValueError(f"one of {', '.join(numbers)} is not a whole number")
        if not 1 <= value["k"] <= value["classes"] <= MAX_CLASSES or not 1 <= value["views"] <= MAX_VIEWS:
            raise ValueError(f"k={value['k']}, classes={value['classes']}, views={value['views']} are out of bounds")
        if value["views"] > 1 and value["alignment"] == "causal":
            raise ValueError("token sequences have one view")
        if value["seed"] > MAX_SEED:
            raise ValueError("seed is beyond 63 bits")
        for name, known in _WORDS.items():
            if value[name] not in known or type(value[name]) is not type(known[0]):
                raise ValueError(f"{name}={value[name]!r} is unknown")
        try:
            canonical = list(declared(temperatures)) if isinstance(temperatures, list) else None
        except InvalidRequest as error:
            raise ValueError(error.message) from None
        if canonical != temperatures:
            raise ValueError(f"temperatures={temperatures!r} are not sorted, distinct and with 1 among them")
        return cls(**value | {"teacher": TeacherId(**teacher), "temperatures": tuple(map(float, temperatures))})

    @property
    def index_dtype(self) -> Literal["uint16", "uint32"]:
        """dtype of the stored class indices: unsigned, the narrowest of two that holds every class."""
        return "uint16" if self.classes <= WIDE_CLASSES else "uint32"

    def differences(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """Fields in which two identities differ, with both values; the teacher's as ``teacher.weights`` and so on."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    teacher = {f"teacher.{name}": text for name, text in value["teacher"].items()}
    return teacher | {name: item for name, item in value.items() if name != "teacher"}


def declared(temperatures: Iterable[float]) -> tuple[float, ...]:
    """Temperatures as a label set declares them: sorted, distinct, 1 always among them.

    Raises:
        InvalidRequest: one is not a finite number in [0.01, 1000]: outside, float16 logits say nothing about the
            distribution; or they are more than `MAX_TEMPERATURES`.
    """
    temperatures = tuple(temperatures)
    for temperature in temperatures:
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise InvalidRequest(f"temperature {temperature!r} is not a number")
        if not 0.01 <= temperature <= 1000:
            raise InvalidRequest(f"temperature {temperature!r} is not between 0.01 and 1000")
    found = {1.0, *map(float, temperatures)}
    if len(found) > 1 + MAX_TEMPERATURES:
        raise InvalidRequest(f"{len(found) - 1:,} temperatures besides 1, {MAX_TEMPERATURES} can be declared")
    return tuple(sorted(found))


def check_name(name: str) -> str:
    """The name, if it is one that a label set may have.

    Raises:
        InvalidName: it does not match `NAME_PATTERN`.
    """
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        raise InvalidName(f"{str(name)[:80]!r} cannot be a label set's name: use {NAME_RULE}")
    return name


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, ASCII only, no NaN: the same value is always the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """sha256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def label_set_digest(identity: Identity, commits: Iterable[str]) -> str:
    """``sha256:…`` over the canonical identity and the sha256 of every commit, in shard order."""
    content = {"identity": identity.to_json(), "commits": list(commits)}
    return f"sha256:{sha256_hex(canonical_json(content))}"
