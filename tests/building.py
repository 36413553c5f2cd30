"""Label sets made from a dense float64 reference, for tests: what is stored can be compared with what it came from.

The reference truncates with NumPy alone, so it shares no code with the selection that precompute makes.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.labels.identity import Alignment, Dtype, Identity, TeacherId
from logitcache.labels.ids import IdKind, text_keys
from logitcache.labels.soft_labels import SoftLabels
from logitcache.storage.layout import Layout
from logitcache.storage.statistics import retained_mass
from logitcache.storage.writer import LabelSetWriter

ROWS_PER_SHARD = 4096

Id = int | str

SHAPES: dict[str, dict[str, Any]] = {
    "pointwise, integers, targets": {"ids": "integer", "targets": True},
    "pointwise, texts": {"ids": "text"},
    "causal": {"alignment": "causal"},
    "causal, texts, targets": {"alignment": "causal", "ids": "text", "targets": True},
}
"""Options of `reference` for label sets of other shapes than one row an ordinal."""


@dataclass(frozen=True)
class Reference:
    """Dense teacher logits (rows, classes), the rows of each example one after the other, and the label set's layout.

    ``row_counts`` are (examples,), ``targets`` (rows,) with -1 for none; tokens are made up.
    """

    layout: Layout
    logits: np.ndarray
    row_counts: np.ndarray
    ids: tuple[Id, ...]
    targets: np.ndarray

    @property
    def identity(self) -> Identity:
        return self.layout.identity

    @property
    def fingerprints(self) -> np.ndarray:
        return (np.arange(len(self.row_counts), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(77)

    @property
    def tokens(self) -> np.ndarray:
        """(rows,) the token of each row."""
        return ((np.arange(len(self.logits)) * 7919) % self.identity.classes).astype(np.uint32)

    @property
    def keys(self) -> np.ndarray:
        """Keys of the ids."""
        if self.identity.ids == "text":
            return text_keys(str(id) for id in self.ids)
        return np.array(self.ids, np.int64)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """(examples + 1,) where the rows of each example begin among all rows."""
        return np.concatenate([[0], np.cumsum(self.row_counts)])

    @cached_property
    def centred(self) -> np.ndarray:
        """Logits minus the row's maximum."""
        centred: np.ndarray = self.logits - self.logits.max(1, keepdims=True)
        return centred

    @cached_property
    def order(self) -> np.ndarray:
        """Stored classes, by falling logit."""
        return np.argsort(-self.logits, axis=1, kind="stable")[:, : self.identity.k]

    @cached_property
    def target_logits(self) -> np.ndarray:
        """Centred logit of each row's target, NaN for none."""
        found = np.take_along_axis(self.centred, np.maximum(self.targets, 0)[:, None], 1)[:, 0]
        return np.where(self.targets >= 0, found, np.nan).astype(np.float32)

    def probs(self, temperature: float, rows: Any = slice(None)) -> np.ndarray:
        """Dense probabilities of some rows, in float64."""
        exp = np.exp(self.centred[rows] / temperature)
        probs: np.ndarray = exp / exp.sum(1, keepdims=True)
        return probs

    def at(self, ordinals: Any) -> list[Id]:
        """Ids of these examples."""
        return [self.ids[ordinal] for ordinal in np.asarray(ordinals).tolist()]

    def rows(self, ordinals: Any, ranges: Any = None) -> np.ndarray:
        """Which of all rows are those of these examples, in their order; (start, stop) of each, or all of them."""
        ordinals = np.asarray(ordinals)
        starts, stops = np.zeros(len(ordinals), int), self.row_counts[ordinals]
        if ranges is not None:
            starts, stops = np.broadcast_to(ranges, (len(ordinals), 2)).T
        first = self.first_rows[ordinals]
        spans = [np.arange(f + a, f + b) for f, a, b in zip(first, starts, stops, strict=True)]
        return np.concatenate(spans) if spans else np.empty(0, int)

    def arrays(self, span: range) -> dict[str, np.ndarray]:
        """What a shard of these examples stores."""
        rows = slice(int(self.first_rows[span.start]), int(self.first_rows[span.stop]))
        order, centred = self.order[rows], self.centred[rows]
        tails = []
        for temperature in self.identity.temperatures:
            rest = np.exp(centred / temperature)
            np.put_along_axis(rest, order, 0.0, 1)
            with np.errstate(divide="ignore"):
                tails.append(np.log(rest.sum(1)))
        scalars = [self.logits[rows].max(1), *tails, *([self.target_logits[rows]] if self.identity.targets else [])]
        arrays = {
            "ids": self.keys[span.start : span.stop],
            "fingerprint": self.fingerprints[span.start : span.stop, None],
            "indices": order.astype(self.identity.index_dtype),
            "logits": np.take_along_axis(centred, order, 1).astype(self.identity.dtype),
            "scalars": np.stack(scalars, 1).astype(np.float32),
        }
        if self.identity.alignment == "causal":
            arrays["row_start"] = (self.first_rows[span.start : span.stop] - rows.start).astype(np.uint32)
            arrays["row_count"] = self.row_counts[span.start : span.stop].astype(np.uint32)
            arrays["tokens"] = self.tokens[rows]
        if self.identity.targets:
            arrays["target"] = self.targets[rows].astype(np.int32)
        return arrays

    def texts(self, span: range) -> list[str] | None:
        """Text ids of these examples, if they are texts."""
        return [str(id) for id in self.ids[span.start : span.stop]] if self.identity.ids == "text" else None

    def first(self, shards: int) -> "Reference":
        """The reference of the first so many shards: what this one is grown from."""
        layout = self.layout.first(shards)
        rows = int(self.first_rows[layout.examples])
        return Reference(
            layout,
            self.logits[:rows],
            self.row_counts[: layout.examples],
            self.ids[: layout.examples],
            self.targets[:rows],
        )


def reference(
    shards: int = 3,
    *,
    short_by: int = 1000,
    k: int = 4,
    classes: int = 20,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    dtype: Dtype = "float16",
    alignment: Alignment = "pointwise",
    ids: IdKind = "ordinal",
    targets: bool = False,
    longest: int = 300,
    seed: int = 0,
) -> Reference:
    """A reference of so many shards, the last one short by some rows. Causal examples have 1 to ``longest`` rows."""
    rng = np.random.default_rng(seed)
    rows = shards * ROWS_PER_SHARD - short_by
    identity = Identity(
        TeacherId("reference", f"seed {seed}"), k, classes, temperatures, dtype, alignment, targets=targets, ids=ids
    )
    counts = np.ones(rows, int)
    if alignment == "causal":
        counts = rng.integers(1, longest + 1, rows)
        # Shards are packed to almost the last slot: the next example would not fit.
        counts = counts[: int(np.searchsorted(np.cumsum(counts), rows - shards * longest)) + 1]
        layout = Layout.causal(identity, counts, ROWS_PER_SHARD)
    else:
        layout = Layout.pointwise(identity, rows, ROWS_PER_SHARD)
    logits = rng.normal(0, 3, (int(counts.sum()), classes))
    some = rng.integers(-1, classes, len(logits)) if targets else np.full(len(logits), -1)
    return Reference(layout, logits, counts, _ids(ids, len(counts), rng), some)


def _ids(kind: IdKind, examples: int, rng: np.random.Generator) -> tuple[Id, ...]:
    if kind == "integer":
        return tuple(rng.choice(2**62, examples, replace=False).tolist())
    if kind == "text":
        return tuple(f"train/n{number % 7}/{number}-é😀.jpg" for number in rng.permutation(examples).tolist())
    return tuple(range(examples))


def grown(source: Reference, more: int, *, longest: int = 200, seed: int = 1) -> Reference:
    """The reference and so many more rows (pointwise) or examples (causal), in new shards."""
    rng = np.random.default_rng(seed)
    causal = source.identity.alignment == "causal"
    counts = rng.integers(1, longest + 1, more) if causal else np.ones(more, int)
    logits = rng.normal(0, 3, (int(counts.sum()), source.identity.classes))
    names = source.identity.ids == "text"
    first = len(source.ids) if names else max(int(id) for id in source.ids) + 1
    ids: tuple[Id, ...] = tuple(f"grown/{first + number}" if names else first + number for number in range(more))
    targets = (
        rng.integers(-1, source.identity.classes, len(logits)) if source.identity.targets else -np.ones(len(logits))
    )
    return replace(
        source,
        layout=source.layout.grown(counts if causal else more),
        logits=np.concatenate([source.logits, logits]),
        row_counts=np.concatenate([source.row_counts, counts]),
        ids=source.ids + ids,
        targets=np.concatenate([source.targets, targets.astype(int)]),
    )


def statistics_of(arrays: dict[str, np.ndarray], identity: Identity) -> dict[str, Any]:
    """What precompute would note of these rows."""
    scalars = arrays["scalars"]
    rows = SoftLabels(
        arrays["indices"],
        arrays["logits"],
        scalars[:, 0],
        scalars[:, 1 : 1 + len(identity.temperatures)],
        arrays["fingerprint"][:, 0],
        identity.temperatures,
    )
    return {"retained_mass": retained_mass(rows)}


def commit_shards(writer: LabelSetWriter, source: Reference, shards: list[int]) -> None:
    """Commit these shards of the reference."""
    for shard in shards:
        span = source.layout.span(shard)
        arrays = source.arrays(span)
        writer.commit(shard, arrays, statistics_of(arrays, source.identity), source.texts(span))


def writer_of(path: Path, source: Reference, **options: Any) -> LabelSetWriter:
    """A writer that begins or continues the reference's label set."""
    return LabelSetWriter(path, source.layout, **options)


def build(path: Path, source: Reference, shards: list[int] | None = None) -> Path:
    """Write these shards (default: all that are missing), and seal the label set when it is complete."""
    with writer_of(path, source) as writer:
        commit_shards(writer, source, writer.missing if shards is None else shards)
        if not writer.missing:
            writer.seal()
    return path


def grow(path: Path, source: Reference) -> Path:
    """Take the label set to this reference, which extends the one it was built from, and seal it again."""
    with writer_of(path, source) as writer:
        writer.grow(source.layout)
        commit_shards(writer, source, writer.missing)
        writer.seal()
    return path


def complete_and_partial(store: Path, source: Reference) -> Path:
    """Two label sets of the reference in a store: ``complete``, and ``partial``, which has its first shard alone."""
    build(store / "complete", source)
    build(store / "partial", source, [0])
    return store
