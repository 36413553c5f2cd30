"""What every reader of a label set offers, be it in this process or behind HTTP.

`storage.LocalLabelSet` and `client.HttpLabelSet` are the two readers; `tests/conformance.py` holds them to one
behaviour.
"""

from dataclasses import asdict, dataclass, field
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
        """Read what `to_json` gave.

        Raises:
            MalformedMessage: it is not a description.
        """
        try:
            parts = {
                "identity": Identity.from_json(value["identity"]),
                "shards": Shards(**value["shards"]),
                "limits": Limits(**value["limits"]),
            }
            return cls(**value | parts)
        except (KeyError, ValueError, TypeError) as error:
            raise MalformedMessage(f"this is not the description of a label set: {error}") from None


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
