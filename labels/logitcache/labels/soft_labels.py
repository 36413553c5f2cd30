"""Soft labels: rows of a teacher's distribution in memory, and the mathematics of a truncated row.

Written for NumPy alone. It knows nothing of where rows come from (`storage`, the wire) or of losses (`client`).
"""

from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64, Integer, UInt, UInt32, UInt64

from logitcache.labels.errors import InvalidRequest, ShapeMismatch, UndeclaredTemperature

Shape = tuple[int, ...]

ARRAYS = (
    "indices",
    "logits",
    "logit_max",
    "tail_logsumexp",
    "fingerprint",
    "present",
    "row_splits",
    "tokens",
    "target",
    "target_logit",
)
"""Names of the arrays that soft labels can have."""


@dataclass(frozen=True)
class RowSpec:
    """What the rows of a label set consist of: enough to allocate, send and check any number of them.

    ``ragged`` rows are those of a causal label set: an example has a row a token, and each row has its token.
    """

    k: int
    index_dtype: str
    dtype: str
    temperatures: tuple[float, ...]
    ragged: bool = False
    targets: bool = False

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Names of the float32 columns that are stored together as ``scalars``."""
        tails = (f"tail_logsumexp@{temperature_name(value)}" for value in self.temperatures)
        return ("logit_max", *tails, *(("target_logit",) if self.targets else ()))

    @cached_property
    def arrays(self) -> tuple[str, ...]:
        """Names of the fields that are stored as one array each, a row of it for each row."""
        return ("indices", "logits", *(("tokens",) if self.ragged else ()), *(("target",) if self.targets else ()))

    @cached_property
    def scalars(self) -> dict[str, int | slice]:
        """The fields that are stored together as ``scalars``, and which of its columns they are."""
        tails: dict[str, int | slice] = {"tail_logsumexp": slice(1, 1 + len(self.temperatures))}
        return {"logit_max": 0} | tails | ({"target_logit": -1} if self.targets else {})

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row on disk and on the wire; what belongs to its example not included."""
        head = self.k * (np.dtype(self.index_dtype).itemsize + np.dtype(self.dtype).itemsize)
        return head + 4 * (len(self.columns) + self.ragged + self.targets)

    @cached_property
    def example_bytes(self) -> int:
        """Bytes on the wire of what an example has once: its fingerprint, and where its rows end."""
        return 16 if self.ragged else 8

    def nbytes(self, rows: int, examples: int) -> int:
        """Bytes of so many rows of so many examples on the wire, header and mask not included."""
        return rows * self.row_bytes + examples * self.example_bytes

    def fields(self, rows: int, examples: int, *, present: bool = False) -> dict[str, tuple[str, Shape]]:
        """Name, dtype and shape of each array of ``rows`` rows of ``examples`` examples, widest elements first so that
        all stay aligned.
        """
        fields: dict[str, tuple[str, Shape]] = {
            "fingerprint": ("uint64", (examples,)),
            "logit_max": ("float32", (rows,)),
            "tail_logsumexp": ("float32", (rows, len(self.temperatures))),
            "indices": (self.index_dtype, (rows, self.k)),
            "logits": (self.dtype, (rows, self.k)),
        }
        if self.ragged:
            fields |= {"row_splits": ("int64", (examples + 1,)), "tokens": ("uint32", (rows,))}
        if self.targets:
            fields |= {"target": ("int32", (rows,)), "target_logit": ("float32", (rows,))}
        if present:
            fields["present"] = ("bool", (examples,))
        return dict(sorted(fields.items(), key=lambda field: -np.dtype(field[1][0]).itemsize))


@dataclass(frozen=True, repr=False)
class SoftLabels:
    """Rows of a label set, the examples in the order asked for.

    In a pointwise label set an example has one row. In a causal one the rows of example i are those from
    ``row_splits[i]`` to ``row_splits[i + 1]``, one a token.

    Attributes:
        indices: (rows, k) stored classes, by falling logit.
        logits: (rows, k) centred logits: minus the row's maximum, so the first is 0.
        logit_max: (rows,) what was subtracted; ``logits + logit_max[:, None]`` are the teacher's own.
        tail_logsumexp: (rows, T) log-sum-exp of centred logits / temperature over the classes that are not stored.
        fingerprint: (examples,) hash of what the teacher was shown.
        temperatures: the T declared temperatures, in the order of the columns of ``tail_logsumexp``.
        digest: the content these rows belong to, or None while the label set is being built.
        present: (examples,) with ``on_missing="mask"``: False where there is no label. In a pointwise label set such a
            row holds NaN logits, so that a loss that forgets the mask is NaN and not wrong; in a causal one the
            example has no rows.
        row_splits: (examples + 1,) int64, causal only: where the rows of each example begin and end.
        tokens: (rows,) uint32, causal only: the token that the teacher had read last when it gave this row.
        target: (rows,) int32, where the dataset gave targets: the class, -1 for none. Of a causal row, the class of
            the token that comes next.
        target_logit: (rows,) float32, the teacher's centred logit of the target, stored among the k or not; NaN for
            none.
    """

    indices: UInt[np.ndarray, "rows k"]
    logits: Float[np.ndarray, "rows k"]
    logit_max: Float32[np.ndarray, " rows"]
    tail_logsumexp: Float32[np.ndarray, "rows temperatures"]
    fingerprint: UInt64[np.ndarray, " examples"]
    temperatures: tuple[float, ...]
    digest: str | None = None
    present: Bool[np.ndarray, " examples"] | None = None
    row_splits: Int64[np.ndarray, " splits"] | None = None
    tokens: UInt32[np.ndarray, " rows"] | None = None
    target: Int32[np.ndarray, " rows"] | None = None
    target_logit: Float32[np.ndarray, " rows"] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in self.arrays().items())
        return (
            f"{type(self).__name__}({self.examples:,} examples, {len(self):,} rows; {fields}; digest={self.digest!r})"
        )

    @property
    def examples(self) -> int:
        """How many examples these rows are of."""
        return len(self.fingerprint)

    @property
    def rows_present(self) -> int:
        """How many rows hold labels: those of masked examples do not."""
        if self.present is None or self.row_splits is not None:
            return len(self)
        return int(np.count_nonzero(self.present))

    def rows_of(self, position: int) -> slice:
        """Where the rows of the example at this position are."""
        if self.row_splits is None:
            return slice(position, position + 1)
        return slice(int(self.row_splits[position]), int(self.row_splits[position + 1]))

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by field name."""
        held = self.__dict__
        return {name: held[name] for name in ARRAYS if held[name] is not None}

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
    held = [part.arrays() for part in parts]
    if any(set(arrays) != set(held[0]) for arrays in held):
        raise ShapeMismatch("parts with other fields cannot be put together")
    joined = {name: np.concatenate([arrays[name] for arrays in held]) for name in held[0] if name != "row_splits"}
    if first.row_splits is not None:
        joined["row_splits"] = splits_of(np.concatenate([np.diff(arrays["row_splits"]) for arrays in held]))
    return SoftLabels(**joined, temperatures=first.temperatures, digest=first.digest)


def are_splits(splits: Int64[np.ndarray, " splits"], rows: int) -> bool:
    """These split so many rows into runs, one after the other. Compared and not subtracted: differences may wrap."""
    return bool(splits[0] == 0 and splits[-1] == rows and (splits[1:] >= splits[:-1]).all())


def splits_of(row_counts: Integer[np.ndarray, " examples"]) -> Int64[np.ndarray, " splits"]:
    """``row_splits`` of examples with so many rows each: 0, and then the running sum."""
    splits = np.zeros(len(row_counts) + 1, np.int64)
    np.cumsum(row_counts, out=splits[1:])
    return splits
