"""What every reader of a label set offers, be it in this process or behind HTTP.

`storage.LocalLabelSet` and `client.HttpLabelSet` are the two readers; `tests/conformance.py` holds them to one
behaviour.
"""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Protocol, runtime_checkable

from logitcache.labels.errors import MalformedMessage
from logitcache.labels.identity import Identity
from logitcache.labels.soft_labels import RowSpec, SoftLabels

OnMissing = Literal["error", "mask"]


@dataclass(frozen=True)
class Limits:
    """The most that one fetch may ask for: ``ids`` in number, ``response_bytes`` of the safetensors body."""

    ids: int = 65_536
    response_bytes: int = 256 << 20

    def rows_a_fetch(self, row_bytes: int) -> int:
        """Rows that one fetch may ask for, when a row takes so many bytes."""
        return max(1, min(self.ids, self.response_bytes // row_bytes))


@dataclass(frozen=True)
class Shards:
    """How many shards there are, and how many are committed, verified since opening, withdrawn as damaged."""

    total: int
    committed: int
    verified: int
    damaged: int


@dataclass(frozen=True)
class Description:
    """A label set as its readers describe it.

    ``digest`` and ``generation`` are None until it is complete. ``retained_mass`` gives, for each declared
    temperature, the mean and the smallest probability that the stored k hold, over the rows labelled so far.
    """

    name: str
    identity: Identity
    examples: int
    labelled: int
    digest: str | None
    generation: int | None
    shards: Shards
    label_bytes: int
    limits: Limits = field(default_factory=Limits)
    retained_mass: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def row_spec(self) -> RowSpec:
        """What one row consists of."""
        identity = self.identity
        return RowSpec(identity.k, identity.index_dtype, identity.dtype, identity.temperatures)

    def to_json(self) -> dict[str, Any]:
        """The description as JSON values."""
        return asdict(self) | {"identity": self.identity.to_json()}

    @classmethod
    def from_json(cls, value: Any) -> "Description":
        """Read what `to_json` gave. Members that this version does not know are passed over: a newer server has more.

        Raises:
            MalformedMessage: it is not a description.
        """
        try:
            return cls(
                name=_text(value["name"]),
                identity=Identity.from_json(value["identity"]),
                examples=_count(value["examples"]),
                labelled=_count(value["labelled"]),
                digest=None if value["digest"] is None else _text(value["digest"]),
                generation=None if value["generation"] is None else _count(value["generation"]),
                shards=Shards(**{name: _count(value["shards"][name]) for name in _names_of(Shards)}),
                label_bytes=_count(value["label_bytes"]),
                limits=Limits(**{name: _count(value["limits"][name], least=1) for name in _names_of(Limits)}),
                retained_mass={
                    _text(name): {_text(key): float(mass) for key, mass in entry.items()}
                    for name, entry in value["retained_mass"].items()
                },
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


@runtime_checkable
class LabelSet(Protocol):
    """A reader of one label set. Safe to use from several threads."""

    def describe(self) -> Description:
        """What the label set is and how far it is, as of now."""

    def fetch(
        self, ids: Any, *, view: int = 0, digest: str | None = None, on_missing: OnMissing = "error"
    ) -> SoftLabels:
        """Soft labels of these examples: order and duplicates preserved.

        Args:
            ids: whole numbers, see `logitcache.labels.ids.as_ids`.
            view: which augmentation; this version has one, 0.
            digest: the content expected; None takes what is there.
            on_missing: ``"error"``, or ``"mask"`` for a ``present`` mask.

        Raises:
            InvalidIds, UnknownView, TooManyRows: the call cannot be right.
            RowsMissing: some ids have no labels, and ``on_missing`` is ``"error"``.
            DigestChanged: another digest is there.
            Unavailable: a server could not be reached or is overloaded.
        """

    def close(self) -> None:
        """Give back connections and mappings; arrays that were fetched stay valid."""
