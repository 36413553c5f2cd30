"""What an item of a dataset may be, and what an example of it is.

An item is an input, an ``(input, target)`` pair, or a mapping with ``input`` or ``input_ids``, and optionally
``labels``, ``attention_mask`` and ``id``. The first item settles which of these a dataset gives, and every other must
be of that kind. What is not is a `DatasetFault` that names the example. It knows no loader and no teacher.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from logitcache.labels.errors import DatasetFault, InvalidIds, shown
from logitcache.labels.fingerprints import fingerprint
from logitcache.labels.identity import MAX_CLASSES, Alignment
from logitcache.labels.ids import IdKind, check_text
from logitcache.server.labelling.causal import cut_tokens, is_sequence, next_targets

NO_TARGET = (-1, -100)
"""What a dataset gives in a target's place where an example has none."""


@dataclass(frozen=True)
class Kind:
    """What the items of a dataset are: how rows line up with inputs, what ids are, whether targets are kept."""

    alignment: Alignment
    ids: IdKind
    targets: bool

    @property
    def causal(self) -> bool:
        """Items are token sequences, with a row a token."""
        return self.alignment == "causal"


@dataclass(frozen=True)
class Example:
    """One item, read.

    Attributes:
        ordinal: its place in the dataset.
        id: what the dataset calls it; the ordinal where the dataset gives no ids.
        input: what the teacher is shown, as the dataset gave it; of a token sequence (length,) uint32, padding cut off.
        targets: (rows,) int32, -1 for none; None where targets are not kept.
        view: which of its views it is.
    """

    ordinal: int
    id: int | str
    input: Any
    targets: np.ndarray | None
    view: int = 0

    @property
    def fingerprint(self) -> int:
        """Hash of the input.

        Raises:
            DatasetFault: the input is no tensor of numbers.
        """
        try:
            return fingerprint(self.input)
        except (TypeError, RuntimeError, ValueError) as error:
            raise DatasetFault(f"the input of {self} is no tensor of numbers: {error}", example=self.ordinal) from None

    def __str__(self) -> str:
        return f"example {self.ordinal:,}{told_id(self.ordinal, self.id)}"


def told_id(ordinal: int, id: int | str) -> str:
    """An example's id in brackets, where it is not its ordinal."""
    return "" if id == ordinal else f" (id {id!r:.80})"


class _Parts(NamedTuple):
    input: Any
    target: Any = None
    id: Any = None
    mask: Any = None
    causal: bool = False


def settle(item: Any, targets: bool | None) -> Kind:
    """The kind of a dataset, from its first item; ``targets`` overrides whether targets are kept.

    Raises:
        DatasetFault: the item is none that can be labelled.
    """
    parts = _parts(item, 0)
    if targets is None:
        targets = is_sequence(parts.target) if parts.causal else whole_number(parts.target) is not None
    if parts.id is None:
        ids: IdKind = "ordinal"
    elif isinstance(parts.id, str):
        ids = "text"
    elif whole_number(parts.id) is not None:
        ids = "integer"
    else:
        raise _fault(0, f"has an id of type {type(parts.id).__name__}: give a whole number or a text")
    return Kind("causal" if parts.causal else "pointwise", ids, targets)


def read_item(item: Any, ordinal: int, kind: Kind, view: int = 0) -> Example:
    """An item of a dataset of this kind, as it is in this view.

    Raises:
        DatasetFault: it is not of this kind, or cannot be labelled.
    """
    parts = _parts(item, ordinal)
    if parts.causal != kind.causal:
        given, first = ("'input_ids'", "none") if parts.causal else ("no 'input_ids'", "some")
        raise _fault(ordinal, f"has {given}, example 0 has {first}: all examples must be of one kind")
    id = _id(parts.id, ordinal, kind.ids)
    try:
        return _read(parts, ordinal, id, kind, view)
    except DatasetFault as fault:
        raise DatasetFault(fault.message + told_id(ordinal, id), **fault.details) from fault.__cause__


def _read(parts: _Parts, ordinal: int, id: int | str, kind: Kind, view: int) -> Example:
    if kind.causal:
        tokens = cut_tokens(parts.input, parts.mask, ordinal)
        targets = next_targets(parts.target, tokens, ordinal) if kind.targets else None
        return Example(ordinal, id, tokens.ids, targets)
    targets = np.array([_target(parts.target, ordinal)], np.int32) if kind.targets else None
    return Example(ordinal, id, parts.input, targets, view)


def _parts(item: Any, ordinal: int) -> _Parts:
    if isinstance(item, tuple | list):
        if len(item) != 2:
            raise _fault(
                ordinal,
                f"has {len(item)} parts: give an input, an (input, target) pair, or a mapping with 'input' or "
                "'input_ids'",
            )
        parts = _Parts(*item)
    elif isinstance(item, Mapping):
        if ("input" in item) == ("input_ids" in item):
            has = "both 'input' and 'input_ids'" if "input" in item else f"neither, but {shown(map(str, item))}"
            raise _fault(ordinal, f"is a mapping, which must have 'input' or 'input_ids': it has {has}")
        causal = "input_ids" in item
        input, mask = item["input_ids" if causal else "input"], item.get("attention_mask") if causal else None
        parts = _Parts(input, item.get("labels"), item.get("id"), mask, causal)
    else:
        parts = _Parts(item)
    if not parts.causal and not hasattr(parts.input, "dtype") and not isinstance(parts.input, int | float):
        raise DatasetFault(
            f"the input of example {ordinal:,} is {type(parts.input).__name__}, not a tensor, an array or a number",
            example=ordinal,
        )
    return parts


def whole_number(value: Any) -> int | None:
    """A whole number as such, or a tensor or array of no dimensions that holds one; None for anything else."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or len(getattr(value, "shape", ())):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _id(id: Any, ordinal: int, kind: IdKind) -> int | str:
    if kind == "ordinal":
        if id is not None:
            raise _fault(ordinal, f"has the id {id!r:.80}, example 0 has none: give every example an id, or none")
        return ordinal
    if id is None:
        raise _fault(ordinal, "has no id, example 0 has one: give every example an id, or none")
    try:
        if kind == "text":
            # str() of an enumeration's member is another text than what it is equal to.
            return check_text(id).decode()
        number = whole_number(id)
        if number is None:
            raise InvalidIds(f"id {id!r:.80} is not a whole number, but {type(id).__name__}; that of example 0 is one")
        if not -(2**63) <= number < 2**63:
            raise InvalidIds(f"id {number} is beyond 64 signed bits")
        return number
    except InvalidIds as error:
        raise DatasetFault(f"example {ordinal:,}: {error.message}", example=ordinal) from None


def _target(target: Any, ordinal: int) -> int:
    number = whole_number(target)
    if number is None:
        told = "none" if target is None else type(target).__name__
        raise _fault(
            ordinal,
            f"has a target that is no whole number ({told}): give -100 where there is none, or leave all targets out "
            "with --no-targets",
        )
    if number in NO_TARGET:
        return -1
    if not 0 <= number < MAX_CLASSES:
        raise _fault(
            ordinal, f"has the target {number:,}, which is no class: -1 and -100 mean none, --no-targets leaves all out"
        )
    return number


def _fault(ordinal: int, told: str) -> DatasetFault:
    return DatasetFault(f"example {ordinal:,} {told}", example=ordinal)
