"""Where everything of a label set lies: folders, arrays, shards, chunk files, the Zarr metadata that says so.

    zarr.json                   the group, and the manifest in its attributes
    ARRAY/zarr.json             indices, logits, scalars; ids, fingerprint
    ARRAY/c.SHARD[.0]           the array's bytes of one shard: plain little-endian, C order, unused slots zero
    commits/SHARD.json          what the shard's files hash to; without it they do not exist for a reader
    generations/N.json          all commits together, and their digest
    statistics/SHARD.json       retained mass, timings, settings of the run: not hashed, never needed to read rows
    staging/  quarantine/       not yet, and no longer, part of the label set
    stamps.json  lock           what was verified on this machine; who writes

Knows the arithmetic and the metadata, opens no file.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from logitcache.labels.identity import FORMAT_VERSION, Identity
from logitcache.labels.soft_labels import RowSpec

ROW_QUANTUM = 4096
"""Rows of a shard are a multiple of this: every chunk file is whole 4 KiB pages, whatever its columns."""

DEFAULT_ROWS_PER_SHARD = 4 * ROW_QUANTUM
"""Rows of a shard unless told: small enough that a kill costs little, large enough that fsyncs do not count."""

COMFORTABLE_SHARDS = 4_000
"""Shards that the default stays under: five mappings each, well below Linux's usual limit of 65,530 a process."""

MOST_SHARDS = 8_000
"""Shards that a label set may have at all."""

MAX_EXAMPLES = 2**40
"""Most examples that a manifest may claim; more is taken for damage."""


@dataclass(frozen=True)
class Array:
    """One Zarr array: chunked by shard, ``columns`` None for one-dimensional ones."""

    name: str
    dtype: str
    columns: int | None
    dimensions: tuple[str, ...]
    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row of this array."""
        return () if self.columns is None else (self.columns,)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of this array."""
        return int(np.dtype(self.dtype).itemsize * math.prod(self.row_shape))

    def chunk_key(self, shard: int) -> str:
        """File name of a shard's bytes within the array's folder."""
        return f"c.{shard}" + ("" if self.columns is None else ".0")


@dataclass(frozen=True)
class Layout:
    """A label set's shape: its identity, how many examples, and how many row slots a shard has.

    With one row an example a shard has as many example slots as row slots, and an example's row is its ordinal.
    """

    identity: Identity
    examples: int
    rows_per_shard: int

    @property
    def row_spec(self) -> RowSpec:
        """What one row consists of."""
        identity = self.identity
        return RowSpec(identity.k, identity.index_dtype, identity.dtype, identity.temperatures)

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """The arrays by name; the order is that of publishing and of a commit's entries."""
        spec = self.row_spec
        arrays = (
            Array("ids", "int64", None, ("example",)),
            Array("fingerprint", "uint64", self.identity.views, ("example", "view")),
            Array("indices", spec.index_dtype, spec.k, ("row", "rank")),
            Array("logits", spec.dtype, spec.k, ("row", "rank")),
            Array("scalars", "float32", len(spec.columns), ("row", "column"), (("columns", spec.columns),)),
        )
        return {array.name: array for array in arrays}

    @property
    def shards(self) -> int:
        """How many shards the label set has when it is complete."""
        return -(-self.examples // self.rows_per_shard)

    def span(self, shard: int) -> range:
        """Ordinals of the examples in a shard; with one row an example, also its rows."""
        first = shard * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.examples))

    def chunk_bytes(self, array: Array) -> int:
        """Size of each of an array's chunk files, the last one included."""
        return self.rows_per_shard * array.row_bytes

    @property
    def shard_bytes(self) -> int:
        """Bytes of all chunk files of one shard."""
        return sum(self.chunk_bytes(array) for array in self.arrays.values())

    def group_metadata(self) -> dict[str, Any]:
        """Content of the group's zarr.json: a Zarr group whose attributes are the manifest."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "identity": self.identity.to_json(),
            "examples": self.examples,
            "rows_per_shard": self.rows_per_shard,
        }
        return {"zarr_format": 3, "node_type": "group", "attributes": {"logitcache": manifest}}

    def array_metadata(self, array: Array) -> dict[str, Any]:
        """Content of an array's zarr.json, as far as a reader of ours insists on it."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": [self.examples, *array.row_shape],
            "data_type": array.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.rows_per_shard, *array.row_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "dimension_names": list(array.dimensions),
        }


def default_rows_per_shard(examples: int) -> int:
    """Row slots of a shard for a dataset of this size: a multiple of 4,096 that keeps the shards few enough to map."""
    needed = -(-examples // COMFORTABLE_SHARDS)
    return max(DEFAULT_ROWS_PER_SHARD, -(-needed // ROW_QUANTUM) * ROW_QUANTUM)


@dataclass(frozen=True)
class Places:
    """Paths of one label set."""

    root: Path

    @property
    def group(self) -> Path:
        """The group's metadata: when it exists, the label set does."""
        return self.root / "zarr.json"

    @property
    def commits(self) -> Path:
        """Folder of the commits."""
        return self.root / "commits"

    @property
    def generations(self) -> Path:
        """Folder of the generations."""
        return self.root / "generations"

    @property
    def statistics(self) -> Path:
        """Folder of what was measured while labelling."""
        return self.root / "statistics"

    @property
    def staging(self) -> Path:
        """Folder of files that are not published yet."""
        return self.root / "staging"

    @property
    def quarantine(self) -> Path:
        """Folder of what was withdrawn."""
        return self.root / "quarantine"

    @property
    def stamps(self) -> Path:
        """What was verified on this machine."""
        return self.root / "stamps.json"

    @property
    def lock(self) -> Path:
        """The file whose lock makes its holder the writer."""
        return self.root / "lock"

    def chunk(self, array: Array, shard: int) -> Path:
        """One array's bytes of one shard."""
        return self.root / array.name / array.chunk_key(shard)

    def commit(self, shard: int) -> Path:
        """A shard's commit."""
        return self.commits / f"{shard}.json"
