"""Token sequences that the benchmark stores everywhere and expects back: a causal label set, drawn shard by shard.

All are of one length, so that what we compare with may keep them as plain arrays; the label set does not know that. As
`rows`, it knows nothing of how they are stored by others or fetched.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from benchmarks.rows import Arrays, drawn_head, sealed

from logitcache.labels.identity import Identity, TeacherId
from logitcache.storage.layout import Layout
from logitcache.storage.packing import default_rows_per_shard

K = 64
CLASSES = 128_256
BATCH = 8
"""Whole sequences that are asked for at once."""

FIELDS = ("fingerprint", "logit_max", "tail_logsumexp", "indices", "logits", "tokens", "row_splits")
"""What every method gives back for a batch, by name; all but the first and last have a row a token."""


@dataclass(frozen=True)
class Sequences:
    """So many sequences of so many tokens each."""

    count: int
    length: int

    @cached_property
    def layout(self) -> Layout:
        """The label set that holds them."""
        identity = Identity(TeacherId("benchmark", "drawn"), K, CLASSES, (1.0,), "float16", alignment="causal")
        counts = np.full(self.count, self.length, np.int64)
        return Layout.causal(identity, counts, default_rows_per_shard(self.count * self.length, self.length))

    @cached_property
    def record(self) -> np.dtype[np.void]:
        """A whole sequence as raw bytes: array after array."""
        return np.dtype(
            [
                ("fingerprint", "<u8"),
                ("logit_max", "<f4", (self.length,)),
                ("tail_logsumexp", "<f4", (self.length, 1)),
                ("indices", "<u4", (self.length, K)),
                ("logits", "<f2", (self.length, K)),
                ("tokens", "<u4", (self.length,)),
            ]
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row on disk and on the wire."""
        return self.layout.row_spec.row_bytes

    def shard(self, shard: int) -> Arrays:
        """The arrays of one shard as a label set stores them."""
        span, rng = self.layout.span(shard), np.random.default_rng([1, shard])
        rows = len(span) * self.length
        indices, logits = drawn_head(rng, rows, K, CLASSES)
        return {
            "ids": np.arange(span.start, span.stop),
            "fingerprint": rng.integers(2**64, size=(len(span), 1), dtype=np.uint64),
            "indices": indices.astype(np.uint32),
            "logits": logits,
            "scalars": rng.normal((15, -3), 2, (rows, 2)).astype(np.float32),  # logit_max, tail_logsumexp
            "row_start": np.arange(len(span), dtype=np.uint32) * np.uint32(self.length),
            "row_count": np.full(len(span), self.length, np.uint32),
            "tokens": rng.integers(CLASSES, size=rows, dtype=np.uint32),
        }

    def records(self, shard: int) -> np.ndarray:
        """A shard's sequences as `record`."""
        arrays = self.shard(shard)
        arrays |= {"logit_max": arrays["scalars"][:, 0], "tail_logsumexp": arrays["scalars"][:, 1:]}
        found = np.empty(len(arrays["ids"]), self.record)
        for name in found.dtype.names or ():
            found[name] = arrays[name].reshape(found[name].shape)
        return found

    def arrays(self, ids: np.ndarray) -> Arrays:
        """The rows of these sequences by `FIELDS`: what every method must give back."""
        found = np.empty(len(ids), self.record)
        for shard in range(self.layout.shards):
            span = self.layout.span(shard)
            here = (span.start <= ids) & (ids < span.stop)
            if here.any():
                found[here] = self.records(shard)[ids[here] - span.start]
        return self.flat({name: found[name] for name in self.record.names or ()})

    def flat(self, arrays: Arrays) -> Arrays:
        """Arrays (sequences, length, ...) as (rows, ...), with ``row_splits``; contiguous ones are not copied."""
        count = len(arrays["fingerprint"])
        rows = {
            name: array if name == "fingerprint" else array.reshape(-1, *array.shape[2:])
            for name, array in arrays.items()
        }
        return rows | {"row_splits": np.arange(count + 1) * self.length}


def write_sequences(path: Path, sequences: Sequences) -> Path:
    """The sequences as a sealed label set, through the writer that `precompute` uses."""
    return sealed(path, sequences.layout, sequences.shard)
