"""Label sets made from a dense float64 reference, for tests: what is stored can be compared with what it came from.

The reference truncates with NumPy alone, so it shares no code with the selection that precompute makes.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.labels.identity import Dtype, Identity, TeacherId
from logitcache.labels.soft_labels import SoftLabels
from logitcache.storage.layout import Layout
from logitcache.storage.statistics import retained_mass
from logitcache.storage.writer import LabelSetWriter

ROWS_PER_SHARD = 4096


@dataclass(frozen=True)
class Reference:
    """Dense teacher logits (examples, classes) and the label set's layout."""

    layout: Layout
    logits: np.ndarray

    @property
    def identity(self) -> Identity:
        return self.layout.identity

    @property
    def fingerprints(self) -> np.ndarray:
        return (np.arange(len(self.logits), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(77)

    @cached_property
    def centred(self) -> np.ndarray:
        """Logits minus the row's maximum."""
        centred: np.ndarray = self.logits - self.logits.max(1, keepdims=True)
        return centred

    @cached_property
    def order(self) -> np.ndarray:
        """Stored classes, by falling logit."""
        return np.argsort(-self.logits, axis=1, kind="stable")[:, : self.identity.k]

    def probs(self, temperature: float) -> np.ndarray:
        """Dense probabilities in float64."""
        exp = np.exp(self.centred / temperature)
        probs: np.ndarray = exp / exp.sum(1, keepdims=True)
        return probs

    def arrays(self, span: range) -> dict[str, np.ndarray]:
        """What a shard of these examples stores."""
        rows = slice(span.start, span.stop)
        order, centred = self.order[rows], self.centred[rows]
        tails = []
        for temperature in self.identity.temperatures:
            rest = np.exp(centred / temperature)
            np.put_along_axis(rest, order, 0.0, 1)
            with np.errstate(divide="ignore"):
                tails.append(np.log(rest.sum(1)))
        return {
            "ids": np.arange(span.start, span.stop, dtype=np.int64),
            "fingerprint": self.fingerprints[rows][:, None],
            "indices": order.astype(self.identity.index_dtype),
            "logits": np.take_along_axis(centred, order, 1).astype(self.identity.dtype),
            "scalars": np.stack([self.logits[rows].max(1), *tails], 1).astype(np.float32),
        }


def reference(
    shards: int = 3,
    *,
    short_by: int = 1000,
    k: int = 4,
    classes: int = 20,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    dtype: Dtype = "float16",
    seed: int = 0,
) -> Reference:
    """A reference of so many shards, the last one short by some rows."""
    examples = shards * ROWS_PER_SHARD - short_by
    identity = Identity(TeacherId("reference", f"seed {seed}"), k, classes, temperatures, dtype)
    logits = np.random.default_rng(seed).normal(0, 3, (examples, classes))
    return Reference(Layout(identity, examples, ROWS_PER_SHARD), logits)


def statistics_of(arrays: dict[str, np.ndarray], identity: Identity) -> dict[str, Any]:
    """What precompute would note of these rows."""
    scalars = arrays["scalars"]
    rows = SoftLabels(
        arrays["indices"],
        arrays["logits"],
        scalars[:, 0],
        scalars[:, 1:],
        arrays["fingerprint"][:, 0],
        identity.temperatures,
    )
    return {"retained_mass": retained_mass(rows)}


def commit_shards(writer: LabelSetWriter, source: Reference, shards: list[int]) -> None:
    """Commit these shards of the reference."""
    for shard in shards:
        arrays = source.arrays(source.layout.span(shard))
        writer.commit(shard, arrays, statistics_of(arrays, source.identity))


def writer_of(path: Path, source: Reference, **options: Any) -> LabelSetWriter:
    """A writer that begins or continues the reference's label set."""
    layout = source.layout
    return LabelSetWriter(path, layout.identity, layout.examples, rows_per_shard=layout.rows_per_shard, **options)


def build(path: Path, source: Reference, shards: list[int] | None = None) -> Path:
    """Write these shards (default: all that are missing), and seal the label set when it is complete."""
    with writer_of(path, source) as writer:
        commit_shards(writer, source, writer.missing if shards is None else shards)
        if not writer.missing:
            writer.seal()
    return path
