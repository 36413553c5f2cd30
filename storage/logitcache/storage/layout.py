"""Where everything of a label set lies: folders, arrays, shards, chunk files, the Zarr metadata that says so.

    zarr.json                   the group, and the manifest in its attributes
    ARRAY/zarr.json             ids, fingerprint; indices, logits, scalars; and what `Layout.arrays` adds to them
    ARRAY/c.SHARD[.0]           the array's bytes of one shard: plain little-endian, C order, unused slots zero
    texts/SHARD.json            the ids of a shard's examples, where they are texts
    commits/SHARD.json          what the shard's files hash to; without it they do not exist for a reader
    generations/N.json          all commits together, and their digest
    statistics/SHARD.json       retained mass, timings, settings of the run: not hashed, never needed to read rows
    staging/  quarantine/       not yet, and no longer, part of the label set
    stamps.json  lock           what was verified on this machine; who writes
    served.json                 rows that servers answered with, and the seconds that took: for the bill alone

A shard is a run of consecutive examples. It has as many example slots and row slots as every other shard, and uses the
first of them: so an example's slot is a sum, and where a label set grew, its last shard stays as it was.

Knows the arithmetic and the metadata, opens no file.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64

from logitcache.labels.errors import InvalidRequest
from logitcache.labels.identity import FORMAT_VERSION, Identity
from logitcache.labels.label_set import row_spec
from logitcache.labels.soft_labels import RowSpec
from logitcache.labels.views import Views
from logitcache.storage.packing import (
    MOST_SHARDS,
    QUANTUM,
    check_rows_per_shard,
    default_rows_per_shard,
    packed_shards,
)

TEXTS = "texts"
"""Name under which a commit has a shard's texts file."""


@dataclass(frozen=True)
class Array:
    """One Zarr array: chunked by shard, along examples or rows; ``columns`` is None for one-dimensional ones."""

    name: str
    per: Literal["example", "row"]
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
    """A label set's shape: its identity, the slots of a shard, and how many of them each shard uses.

    Attributes:
        identity: what its rows depend on.
        rows_per_shard: row slots of every shard, a multiple of `QUANTUM`.
        examples_per_shard: example slots of every shard, likewise.
        shard_examples: examples in each shard, at least one.
        shard_rows: rows in each shard. Where each example has one row a view, as many as examples times views.
    """

    identity: Identity
    rows_per_shard: int
    examples_per_shard: int
    shard_examples: tuple[int, ...]
    shard_rows: tuple[int, ...]

    @classmethod
    def pointwise(cls, identity: Identity, examples: int, rows_per_shard: int) -> "Layout":
        """The layout of so many examples with one row a view each, in full shards but for the last.

        Raises:
            InvalidRequest: as `check_rows_per_shard` and `grown` do.
        """
        check_rows_per_shard(rows_per_shard, identity.views)
        return cls(identity, rows_per_shard, rows_per_shard // identity.views, (), ()).grown(examples)

    @classmethod
    def causal(cls, identity: Identity, row_counts: Int64[np.ndarray, " examples"], rows_per_shard: int) -> "Layout":
        """The layout of examples with these numbers of rows; a shard has example slots for the fullest one.

        Raises:
            DatasetFault: an example has more rows than a shard has slots.
            InvalidRequest: as `check_rows_per_shard` and `grown` do.
        """
        check_rows_per_shard(rows_per_shard)
        packed = list(packed_shards(row_counts, rows_per_shard, rows_per_shard))
        fullest = max((examples for examples, _ in packed), default=1)
        slots = -(-fullest // QUANTUM) * QUANTUM
        return cls(identity, rows_per_shard, slots, (), ())._with(packed)

    def grown(self, more: int | Int64[np.ndarray, " examples"]) -> "Layout":
        """This layout and new shards for more examples: their number, or of a causal label set their row counts.

        Raises:
            DatasetFault: an example has more rows than a shard has slots.
            InvalidRequest: there would be more than `MOST_SHARDS` shards.
        """
        if isinstance(more, int):
            full, rest = divmod(more, self.examples_per_shard)
            counts = [self.examples_per_shard] * full + [rest] * (rest > 0)
            return self._with([(count, count * self.identity.views) for count in counts])
        return self._with(list(packed_shards(more, self.rows_per_shard, self.examples_per_shard, self.examples)))

    def _with(self, packed: list[tuple[int, int]]) -> "Layout":
        if len(packed) + self.shards > MOST_SHARDS:
            default = default_rows_per_shard(self.rows + sum(rows for _, rows in packed))
            larger = f"a larger --rows-per-shard ({default:,} is the default)"
            advice = f"append less often, or label all under another name with {larger}"
            raise InvalidRequest(
                f"{len(packed):,} more shards of {self.rows_per_shard:,} rows make {len(packed) + self.shards:,}, "
                f"more than the {MOST_SHARDS:,} that a reader can map: {advice if self.shards else f'use {larger}'}"
            )
        examples, rows = zip(*packed, strict=True) if packed else ((), ())
        return Layout(
            self.identity,
            self.rows_per_shard,
            self.examples_per_shard,
            self.shard_examples + examples,
            self.shard_rows + rows,
        )

    def first(self, shards: int) -> "Layout":
        """The layout of the first so many shards: an earlier generation, or what the label set was before it grew."""
        return Layout(
            self.identity,
            self.rows_per_shard,
            self.examples_per_shard,
            self.shard_examples[:shards],
            self.shard_rows[:shards],
        )

    def extends(self, other: "Layout") -> bool:
        """The other layout is the beginning of this one, or all of it."""
        return self.first(other.shards) == other

    @property
    def ragged(self) -> bool:
        """Examples have different numbers of rows, which arrays of the label set tell."""
        return self.identity.alignment == "causal"

    @property
    def row_spec(self) -> RowSpec:
        """What one row consists of."""
        return row_spec(self.identity)

    @cached_property
    def arrays(self) -> dict[str, Array]:
        """The arrays by name; the order is that of publishing and of a commit's entries."""
        spec, identity = self.row_spec, self.identity
        ids = ("uint64", 2, ("example", "half")) if identity.ids == "text" else ("int64", None, ("example",))
        arrays = [
            Array("ids", "example", *ids),
            Array("fingerprint", "example", "uint64", identity.views, ("example", "view")),
            Array("indices", "row", spec.index_dtype, spec.k, ("row", "rank")),
            Array("logits", "row", spec.dtype, spec.k, ("row", "rank")),
            Array("scalars", "row", "float32", len(spec.columns), ("row", "column"), (("columns", spec.columns),)),
        ]
        if spec.ragged:
            arrays.append(Array("row_start", "example", "uint32", None, ("example",)))
            arrays.append(Array("row_count", "example", "uint32", None, ("example",)))
            arrays.append(Array("tokens", "row", "uint32", None, ("row",)))
        if spec.targets:
            arrays.append(Array("target", "row", "int32", None, ("row",)))
        return {array.name: array for array in arrays}

    @property
    def parts(self) -> list[str]:
        """Names of the files that a commit covers: the arrays, and the texts where ids are texts."""
        return [*self.arrays, *([TEXTS] if self.identity.ids == "text" else [])]

    @property
    def shards(self) -> int:
        """How many shards the label set has when it is complete."""
        return len(self.shard_examples)

    @cached_property
    def first_examples(self) -> Int64[np.ndarray, " edges"]:
        """(shards + 1,) ordinal of each shard's first example, and after the last shard the number of examples."""
        edges = np.zeros(self.shards + 1, np.int64)
        np.cumsum(self.shard_examples, out=edges[1:])
        return edges

    @property
    def examples(self) -> int:
        """How many examples the label set has when it is complete."""
        return int(self.first_examples[-1])

    @cached_property
    def rows(self) -> int:
        """How many rows the label set has when it is complete."""
        return sum(self.shard_rows)

    def span(self, shard: int) -> range:
        """Ordinals of the examples in a shard."""
        return range(int(self.first_examples[shard]), int(self.first_examples[shard + 1]))

    def used(self, array: Array, shard: int) -> int:
        """How many of an array's slots a shard uses."""
        return self.shard_examples[shard] if array.per == "example" else self.shard_rows[shard]

    def slots(self, array: Array) -> int:
        """How many slots a chunk of an array has."""
        return self.examples_per_shard if array.per == "example" else self.rows_per_shard

    @cached_property
    def _runs(self) -> tuple[np.ndarray, np.ndarray]:
        """First ordinal of each run of shards without a gap before its last, and what to add to get slots."""
        # A shard that is not full leaves a gap after it, so the next one begins a run.
        begins = [0] + [s + 1 for s in range(self.shards - 1) if self.shard_examples[s] != self.examples_per_shard]
        ordinals = self.first_examples[begins]
        return ordinals, np.array(begins, np.int64) * self.examples_per_shard - ordinals

    def example_slots(self, ordinals: Int64[np.ndarray, " ids"]) -> Int64[np.ndarray, " ids"]:
        """Where these examples stand in arrays over all example slots; ordinals must be of this label set."""
        firsts, shifts = self._runs
        if len(firsts) == 1:
            return ordinals
        slots: np.ndarray = ordinals + shifts[np.searchsorted(firsts, ordinals, side="right") - 1]
        return slots

    def row_slots(self, example_slots: Int64[np.ndarray, " ids"], views: Views) -> Int64[np.ndarray, " ids"]:
        """Where the rows of these views of examples stand in arrays over all row slots, where an example has a row a
        view: one after the other.
        """
        count = self.identity.views
        return example_slots if count == 1 else example_slots * count + views

    def chunk_bytes(self, array: Array) -> int:
        """Size of each of an array's chunk files, unused slots included."""
        return self.slots(array) * array.row_bytes

    def used_bytes(self, examples: int, rows: int) -> int:
        """Bytes that so many examples and rows take on disk: slots of chunk files that are not used are holes."""
        counts = {"example": examples, "row": rows}
        return sum(counts[array.per] * array.row_bytes for array in self.arrays.values())

    def group_metadata(self) -> dict[str, Any]:
        """Content of the group's zarr.json: a Zarr group whose attributes are the manifest."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "identity": self.identity.to_json(),
            "rows_per_shard": self.rows_per_shard,
            "examples_per_shard": self.examples_per_shard,
            "shards": {"examples": list(self.shard_examples), "rows": list(self.shard_rows)},
        }
        return {"zarr_format": 3, "node_type": "group", "attributes": {"logitcache": manifest}}

    def array_shape(self, array: Array) -> tuple[int, ...]:
        """Shape of an array: it ends with the last slot that is used."""
        last = self.shards - 1
        return (last * self.slots(array) + self.used(array, last), *array.row_shape)

    def array_metadata(self, array: Array) -> dict[str, Any]:
        """Content of an array's zarr.json, as far as a reader of ours insists on it; but for its shape."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "data_type": array.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.slots(array), *array.row_shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "fill_value": 0,
            "dimension_names": list(array.dimensions),
        }
