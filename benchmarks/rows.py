"""The rows that the benchmark stores everywhere and expects back: drawn shard by shard, the same in every run.

They look like a classifier's: distinct classes, falling float16 logits whose text has as many digits as real ones. It
knows nothing of how they are stored or fetched.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.labels.identity import Identity, TeacherId
from logitcache.labels.ids import IdKind, text_keys
from logitcache.storage.layout import Layout
from logitcache.storage.packing import default_rows_per_shard
from logitcache.storage.writer import LabelSetWriter

K = 32
CLASSES = 1000

FIELDS = ("fingerprint", "logit_max", "tail_logsumexp", "indices", "logits")
"""What every method gives back for a batch, by name."""

RECORD = np.dtype(
    [
        ("fingerprint", "<u8"),
        ("logit_max", "<f4"),
        ("tail_logsumexp", "<f4", (1,)),
        ("indices", "<u2", (K,)),
        ("logits", "<f2", (K,)),
    ]
)
"""One row as a record of raw bytes, for stores that keep one value a row."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """So many rows, drawn by the shard, under ids of one kind."""

    rows: int
    ids: IdKind = "ordinal"

    @cached_property
    def layout(self) -> Layout:
        """The label set that holds them."""
        identity = Identity(TeacherId("benchmark", "drawn"), K, CLASSES, (1.0,), "float16", ids=self.ids)
        return Layout.pointwise(identity, self.rows, default_rows_per_shard(self.rows))

    @cached_property
    def numbers(self) -> np.ndarray:
        """Ids that are whole numbers, by ordinal: different ones without an order."""
        return np.random.default_rng(1).choice(2**50, self.rows, replace=False)

    @cached_property
    def texts(self) -> list[str]:
        """Ids that are texts, by ordinal: paths, as a dataset of files would have them."""
        return [text_id(number) for number in self.numbers.tolist()]

    def given(self, ordinals: np.ndarray) -> Any:
        """Ids of these examples as a training loop holds them: an array of numbers or a list of texts."""
        if self.ids == "text":
            return [text_id(number) for number in self.numbers[ordinals].tolist()]
        return ordinals if self.ids == "ordinal" else self.numbers[ordinals]

    def keys(self, span: range) -> np.ndarray:
        """Keys of the ids of these examples, as a label set stores them."""
        if self.ids == "text":
            return text_keys(self.texts[span.start : span.stop])
        return np.arange(span.start, span.stop) if self.ids == "ordinal" else self.numbers[span.start : span.stop]

    def shard(self, shard: int) -> Arrays:
        """The arrays of one shard as a label set stores them."""
        span = self.layout.span(shard)
        rows, rng = len(span), np.random.default_rng([0, shard])
        indices, logits = drawn_head(rng, rows, K, CLASSES)
        return {
            "ids": self.keys(span),
            "fingerprint": rng.integers(2**64, size=(rows, 1), dtype=np.uint64),
            "indices": indices.astype(np.uint16),
            "logits": logits,
            "scalars": rng.normal((15, -3), 2, (rows, 2)).astype(np.float32),  # logit_max, tail_logsumexp
        }

    def shards(self) -> Iterator[tuple[range, Arrays]]:
        """Every shard's span and arrays."""
        for shard in range(self.layout.shards):
            yield self.layout.span(shard), self.shard(shard)

    def records(self, ids: np.ndarray) -> np.ndarray:
        """The rows of these ids as `RECORD`: what every method must give back."""
        found = np.empty(len(ids), RECORD)
        for span, arrays in self.shards():
            here = (span.start <= ids) & (ids < span.stop)
            found[here] = records_of(arrays)[ids[here] - span.start]
        return found

    def arrays(self, ids: np.ndarray) -> Arrays:
        """The same by `FIELDS`."""
        records = self.records(ids)
        return {name: records[name] for name in FIELDS}


def drawn_head(rng: np.random.Generator, rows: int, k: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (rows, k), all of a row different, and float16 logits (rows, k) that fall from 0."""
    first_class, ranks = rng.integers(classes, size=(rows, 1)), np.arange(k)
    gaps = rng.exponential(0.25, (rows, k))
    gaps[:, 0] = 0  # logits are centred: the largest is 0
    return (first_class + 31 * ranks) % classes, -np.cumsum(gaps, 1).astype(np.float16)


def text_id(number: int) -> str:
    """A path, made anew as a dataset makes it for each item."""
    return f"train/n{number % 1000:08d}/n{number % 1000:08d}_{number}.JPEG"


def records_of(arrays: Arrays) -> np.ndarray:
    """A shard's arrays as records."""
    records = np.empty(len(arrays["ids"]), RECORD)
    records["fingerprint"] = arrays["fingerprint"][:, 0]
    records["logit_max"], records["tail_logsumexp"] = arrays["scalars"][:, 0], arrays["scalars"][:, 1:]
    records["indices"], records["logits"] = arrays["indices"], arrays["logits"]
    return records


def write_label_set(path: Path, source: Source) -> Path:
    """The rows as a sealed label set, through the writer that `precompute` uses."""

    def texts(shard: int) -> list[str] | None:
        span = source.layout.span(shard)
        return source.texts[span.start : span.stop] if source.ids == "text" else None

    return sealed(path, source.layout, source.shard, texts)


def sealed(
    path: Path,
    layout: Layout,
    arrays: Callable[[int], Arrays],
    texts: Callable[[int], Sequence[str] | None] = lambda _shard: None,
) -> Path:
    """A complete label set of this layout, of what is drawn for each shard."""
    path.parent.mkdir(exist_ok=True)
    with LabelSetWriter(path, layout) as writer:
        for shard in writer.missing:
            writer.commit(shard, arrays(shard), {}, texts(shard))
        writer.seal()
    return path
