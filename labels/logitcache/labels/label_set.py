"""What every reader of a label set offers, be it in this process or behind HTTP.

`storage.LocalLabelSet` and `client.HttpLabelSet` are the two readers; `tests/conformance.py` holds them to one
behaviour.
"""

from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from logitcache.labels.bill import Bill, Served, TeacherTime
from logitcache.labels.errors import MalformedMessage, TooManyRows
from logitcache.labels.identity import Identity
from logitcache.labels.soft_labels import RowSpec, SoftLabels

OnMissing = Literal["error", "mask"]

LABELLED, UNLABELLED, UNKNOWN = 0, 1, 2
"""What `LabelSet.states` says of an id. While shards are missing, ids that are no ordinals and not found may be among
those that are still to be labelled: they are `UNLABELLED`."""


@dataclass(frozen=True)
class Limits:
    """The most that one fetch may ask for: ``ids`` in number, ``response_bytes`` of the safetensors body."""

    ids: int = 65_536
    response_bytes: int = 256 << 20

    def examples_a_fetch(self, spec: RowSpec) -> int:
        """Examples that one fetch may ask for; where examples have many rows, their bytes may allow fewer."""
        return max(1, min(self.ids, self.response_bytes // (spec.nbytes(1, 1))))

    def check(self, spec: RowSpec, examples: int, rows: int) -> None:
        """Refuse a fetch of so many examples and rows if it is above these limits.

        Raises:
            TooManyRows: it is.
        """
        if examples > self.ids:
            raise TooManyRows(
                f"{examples:,} ids in one fetch, {self.ids:,} are allowed: split it", ids=examples, limit=self.ids
            )
        size = spec.nbytes(rows, examples)
        # One row of one example is always given.
        if size > self.response_bytes and rows > 1:
            raise TooManyRows(
                f"{rows:,} rows of {examples:,} examples take {size:,} bytes in one answer, "
                f"{self.response_bytes:,} are allowed: split the ids, or ask for fewer rows of each",
                rows=rows,
                limit_bytes=self.response_bytes,
            )


@dataclass(frozen=True)
class Shards:
    """How many shards there are, and how many are committed, verified since opening, withdrawn as damaged.

    While a label set is recorded it has none.
    """

    total: int
    committed: int
    verified: int
    damaged: int


@dataclass(frozen=True)
class Sealed:
    """A generation: a complete state of a label set, which stays readable by its digest when the label set grows."""

    number: int
    examples: int
    digest: str


@dataclass(frozen=True)
class Description:
    """A label set as its readers describe it.

    ``examples`` are those that it has when all are labelled, ``labelled`` those whose shards are committed, with
    ``rows`` rows. ``generations`` are its complete states, the oldest first; while it is built for the first time there
    is none. ``retained_mass`` gives, for each declared temperature, the mean and the smallest probability that the
    stored k hold, over the rows labelled so far. ``teacher_time`` is what labelling those took of which that was
    recorded; None where it was for none. ``served`` is what servers answered so far, and what that took them; None
    where none has counted.
    """

    name: str
    identity: Identity
    examples: int
    labelled: int
    rows: int
    generations: tuple[Sealed, ...]
    shards: Shards
    label_bytes: int
    limits: Limits = field(default_factory=Limits)
    retained_mass: dict[str, dict[str, float]] = field(default_factory=dict)
    teacher_time: TeacherTime | None = None
    served: Served | None = None

    @property
    def bill(self) -> Bill | None:
        """What labelling took, and what servers saved and took since; None without the teacher's time."""
        if self.teacher_time is None:
            return None
        served = self.served or Served()
        return Bill(self.teacher_time, served.rows, served.seconds)

    @cached_property
    def row_spec(self) -> RowSpec:
        """What one row consists of."""
        return row_spec(self.identity)

    @property
    def digest(self) -> str | None:
        """Digest of the newest generation: what is served unless another is asked for; None before there is one."""
        return self.generations[-1].digest if self.generations else None

    @property
    def generation(self) -> int | None:
        """Number of the newest generation, or None."""
        return self.generations[-1].number if self.generations else None

    def to_json(self) -> dict[str, Any]:
        """The description as JSON values; ``digest`` and ``generation`` stand there for people."""
        return asdict(self) | {
            "identity": self.identity.to_json(),
            "digest": self.digest,
            "generation": self.generation,
        }

    @classmethod
    def from_json(cls, value: Any) -> "Description":
        """Read what `to_json` gave. Members that this version does not know are passed over: a newer server has more.
        An older one has no ``teacher_time``, and no ``served``.

        Raises:
            MalformedMessage: it is not a description.
        """
        try:
            time, served = value.get("teacher_time"), value.get("served")
            return cls(
                name=_text(value["name"]),
                identity=Identity.from_json(value["identity"]),
                examples=_count(value["examples"]),
                labelled=_count(value["labelled"]),
                rows=_count(value["rows"]),
                generations=tuple(
                    Sealed(_count(entry["number"]), _count(entry["examples"]), _text(entry["digest"]))
                    for entry in value["generations"]
                ),
                shards=Shards(**{name: _count(value["shards"][name]) for name in _names_of(Shards)}),
                label_bytes=_count(value["label_bytes"]),
                limits=Limits(**{name: _count(value["limits"][name], least=1) for name in _names_of(Limits)}),
                retained_mass={
                    _text(name): {_text(key): float(mass) for key, mass in entry.items()}
                    for name, entry in value["retained_mass"].items()
                },
                teacher_time=None if time is None else TeacherTime.from_json(time),
                served=None if served is None else Served.from_json(served),
            )
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise MalformedMessage(f"this is not the description of a label set: {error}") from None


def _names_of(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is not a text")
    return value


def _count(value: Any, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{value!r:.60} is not a whole number of at least {least}")
    return value


def row_spec(identity: Identity) -> RowSpec:
    """What one row of a label set of this identity consists of."""
    ragged = identity.alignment == "causal"
    return RowSpec(identity.k, identity.index_dtype, identity.dtype, identity.temperatures, ragged, identity.targets)


@runtime_checkable
class LabelSet(Protocol):
    """A reader of one label set. Safe to use from several threads."""

    def describe(self) -> Description:
        """What the label set is and how far it is, as of now."""

    def fetch(
        self, ids: Any, *, rows: Any = None, view: Any = 0, digest: str | None = None, on_missing: OnMissing = "error"
    ) -> SoftLabels:
        """Soft labels of these examples: order and duplicates preserved.

        Args:
            ids: whole numbers or texts, see `logitcache.labels.ids.as_ids`.
            rows: which rows of each example, see `logitcache.labels.ranges.as_ranges`; None means all.
            view: which augmentation: one for all ids, or one for each, see `logitcache.labels.views.as_views`.
            digest: the generation to read; None takes the newest, or what is labelled so far.
            on_missing: ``"error"``, or ``"mask"`` for a ``present`` mask.

        Raises:
            InvalidIds, UnknownView, RangeOutside, TooManyRows: the call cannot be right.
            RowsMissing: some ids have no labels, and ``on_missing`` is ``"error"``.
            DigestChanged: no such generation is there, or some of its rows were repaired with other bytes.
            Unavailable: a server could not be reached or is overloaded.
        """

    def states(self, ids: Any, *, digest: str | None = None) -> UInt8[np.ndarray, " ids"]:
        """For each id `LABELLED`, `UNLABELLED` or `UNKNOWN`; arguments and errors as in `fetch`."""

    def close(self) -> None:
        """Give back connections and mappings; arrays that were fetched stay valid."""
