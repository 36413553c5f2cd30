"""Soft labels: rows of a teacher's distribution in memory, and the mathematics of a truncated row.

Written for NumPy alone. It knows nothing of where rows come from (`storage`, the wire) or of losses (`client`).
"""

from dataclasses import dataclass
from numbers import Real

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, UInt, UInt64

from logitcache.labels.errors import InvalidRequest, ShapeMismatch, UndeclaredTemperature

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowSpec:
    """What one row consists of: enough to allocate, send and check any number of rows."""

    k: int
    index_dtype: str
    dtype: str
    temperatures: tuple[float, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the float32 columns that are stored together as ``scalars``."""
        return ("logit_max", *(f"tail_logsumexp@{temperature_name(value)}" for value in self.temperatures))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, its fingerprint included, on disk and on the wire."""
        head = self.k * (np.dtype(self.index_dtype).itemsize + np.dtype(self.dtype).itemsize)
        return head + 4 * len(self.columns) + 8

    def fields(self, rows: int, *, present: bool = False) -> dict[str, tuple[str, Shape]]:
        """Name, dtype and shape of each array of ``rows`` rows, widest elements first so that all stay aligned."""
        fields: dict[str, tuple[str, Shape]] = {
            "fingerprint": ("uint64", (rows,)),
            "logit_max": ("float32", (rows,)),
            "tail_logsumexp": ("float32", (rows, len(self.temperatures))),
            "indices": (self.index_dtype, (rows, self.k)),
            "logits": (self.dtype, (rows, self.k)),
        }
        if present:
            fields["present"] = ("bool", (rows,))
        return dict(sorted(fields.items(), key=lambda field: -np.dtype(field[1][0]).itemsize))


@dataclass(frozen=True)
class SoftLabels:
    """Rows of a label set in the order asked for: one row an example.

    Attributes:
        indices: (rows, k) stored classes, by falling logit.
        logits: (rows, k) centred logits: minus the row's maximum, so the first is 0.
        logit_max: (rows,) what was subtracted; ``logits + logit_max[:, None]`` are the teacher's own.
        tail_logsumexp: (rows, T) log-sum-exp of centred logits / temperature over the classes that are not stored.
        fingerprint: (rows,) hash of what the teacher was shown.
        temperatures: the T declared temperatures, in the order of the columns of ``tail_logsumexp``.
        digest: the content these rows belong to, or None while the label set is being built.
        present: (rows,) with ``on_missing="mask"``: False where there is no label. Such rows hold NaN logits, so that a
            loss that forgets the mask is NaN and not wrong.
    """

    indices: UInt[np.ndarray, "rows k"]
    logits: Float[np.ndarray, "rows k"]
    logit_max: Float32[np.ndarray, " rows"]
    tail_logsumexp: Float32[np.ndarray, "rows temperatures"]
    fingerprint: UInt64[np.ndarray, " rows"]
    temperatures: tuple[float, ...]
    digest: str | None = None
    present: Bool[np.ndarray, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def log_normalizer(self, temperature: float = 1.0) -> Float64[np.ndarray, " rows"]:
        """log of the sum of exp(centred logit / temperature) over all classes, stored or not.

        ``logaddexp(logsumexp(logits / T), tail_logsumexp[T])``: probabilities sum to 1 with the rounded head.

        Raises:
            UndeclaredTemperature: no tail was stored for this temperature.
        """
        log_normalizer: np.ndarray = np.logaddexp(logsumexp(self._scaled(temperature)), self.tail(temperature))
        return log_normalizer

    def log_probs(self, temperature: float = 1.0) -> Float64[np.ndarray, "rows k"]:
        """log-probabilities of the stored classes at a declared temperature."""
        log_probs: np.ndarray = self._scaled(temperature) - self.log_normalizer(temperature)[:, None]
        return log_probs

    def residual_mass(self, temperature: float = 1.0) -> Float64[np.ndarray, " rows"]:
        """Teacher probability outside the stored k, in [0, 1]; accurate however small: the tail was summed apart."""
        mass: np.ndarray = np.exp(self.tail(temperature) - self.log_normalizer(temperature))
        return mass

    def tail(self, temperature: float) -> Float64[np.ndarray, " rows"]:
        """The column of ``tail_logsumexp`` that belongs to a declared temperature."""
        return self.tail_logsumexp[:, temperature_column(self.temperatures, temperature)].astype(np.float64)

    def _scaled(self, temperature: float) -> Float64[np.ndarray, "rows k"]:
        return self.logits.astype(np.float64) / temperature


def temperature_name(temperature: float) -> str:
    """A temperature as text, exact and without a needless ``.0``: ``1``, ``2``, ``0.1``."""
    return repr(float(temperature)).removesuffix(".0")


def temperature_column(temperatures: tuple[float, ...], temperature: float) -> int:
    """Which column of ``tail_logsumexp`` is this temperature's.

    Raises:
        UndeclaredTemperature: none is; the message names those that are.
        InvalidRequest: it can be no label set's.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not 0.01 <= temperature <= 1000:
        raise InvalidRequest(f"temperature {temperature!r} is not a number between 0.01 and 1000")
    try:
        return temperatures.index(float(temperature))
    except ValueError:
        known = ", ".join(map(temperature_name, temperatures))
        raise UndeclaredTemperature(
            f"temperature {temperature:g} was not declared when these labels were made (declared: {known}); "
            f"use one of those, or precompute another label set with --temperature {temperature:g}",
            temperature=float(temperature),
            declared=list(temperatures),
        ) from None


def logsumexp(values: Float64[np.ndarray, "rows k"]) -> Float64[np.ndarray, " rows"]:
    """log-sum-exp of each row; -inf for a row of -inf."""
    top = values.max(axis=1)
    safe = np.where(np.isneginf(top), 0.0, top)
    with np.errstate(divide="ignore"):
        total: np.ndarray = safe + np.log(np.exp(values - safe[:, None]).sum(axis=1))
    return total


def concatenate(parts: list[SoftLabels]) -> SoftLabels:
    """Rows of several fetches of one label set, one after the other.

    Raises:
        ShapeMismatch: the parts are of different label sets.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any((part.temperatures, part.digest) != (first.temperatures, first.digest) for part in parts):
        raise ShapeMismatch("parts of different label sets cannot be put together")

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    names = ("indices", "logits", "logit_max", "tail_logsumexp", "fingerprint")
    present = None if first.present is None else joined("present")
    return SoftLabels(
        **{name: joined(name) for name in names},
        temperatures=first.temperatures,
        digest=first.digest,
        present=present,
    )
