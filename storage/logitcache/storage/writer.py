"""Building a label set: create or continue it, commit shard after shard, seal it.

The caller labels `missing` shards in any order and gives each one whole to `commit`. Killed at any moment, what was
committed stays and the next writer continues; what was not is removed under the lock before anything else happens.
It knows nothing of teachers or datasets.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from logitcache.labels.errors import (
    DatasetChanged,
    InvalidRequest,
    NotALabelSet,
    ShapeMismatch,
    ShardDamaged,
    StorageFault,
    StoreNotFound,
)
from logitcache.labels.identity import Identity, canonical_json, check_name
from logitcache.storage.admission import Stamps, check_hashes, opened, quarantine
from logitcache.storage.files import Files
from logitcache.storage.layout import Layout, Places, default_rows_per_shard
from logitcache.storage.lock import WriterLock
from logitcache.storage.manifest import read_layout
from logitcache.storage.records import Commit, Generation, newest_generation, numbered
from logitcache.storage.terms import check_rows_per_shard, refuse_another


class LabelSetWriter:
    """The one writer of a label set, from construction to `close`.

    Construction creates the label set or takes up an unfinished or damaged one: leftovers of a killed writer are
    removed, committed shards are hashed (files that hashed right before and did not change are spared), damaged ones
    quarantined.

    Attributes:
        layout: shape of the label set; ``rows_per_shard`` is the stored one when it exists already.
        committed: shards that need no work, ascending.
        quarantined: shards found damaged now, with what was wrong.

    Raises:
        StoreNotFound: neither the store nor its parent folder exists.
        NotALabelSet: the folder holds something that logitcache did not write.
        NewerFormat: a newer logitcache began it.
        LabelSetLocked: another process is writing it.
        IdentityChanged: it was begun with another identity; every field that differs is named with both values.
        DatasetChanged: it was begun over another number of examples.
        DiskFull, StoreNotWritable: as they say; nothing was lost.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        examples: int,
        *,
        rows_per_shard: int | None = None,
        files: Files | None = None,
    ) -> None:
        check_name(path.name)
        check_rows_per_shard(rows_per_shard, examples)
        self.path, self._places, self._files = path, Places(path), files or Files()
        self._claim_folder()
        self._lock = WriterLock(self._places.lock)
        try:
            if self._places.group.exists():
                self.layout = read_layout(path)
                refuse_another(path.name, self.layout, identity, examples, rows_per_shard)
            else:
                self.layout = Layout(identity, examples, rows_per_shard or default_rows_per_shard(examples))
                self._create()
            self.quarantined: dict[int, str] = {}
            self._stamps = Stamps(self._places.stamps)
            self._commits = self._take_up()
        except BaseException:
            self._lock.release()
            raise

    def _claim_folder(self) -> None:
        store = self.path.parent
        if not store.is_dir():
            if not store.parent.is_dir():
                raise StoreNotFound(f"the store {store} cannot be made: {store.parent} does not exist")
            self._files.make_folder(store)
        if self.path.is_dir() and not self._places.lock.exists() and any(self.path.iterdir()):
            if not self._places.group.exists():
                raise NotALabelSet(f"{self.path} holds files that logitcache did not write: use another name")
            read_layout(self.path)
        self._files.make_folder(self.path)

    def _create(self) -> None:
        from logitcache.storage.zarr_library import library_metadata

        places, files = self._places, self._files
        files.make_folder(places.staging)
        self._clear_staging()
        for folder in (places.commits, places.generations, places.statistics):
            files.make_folder(folder)
        for key, data in library_metadata(self.layout).items():
            final = self.path / key
            files.make_folder(final.parent)
            if key != "zarr.json":
                files.remove(final)
            files.create(self._staged(key.replace("/", ".")), final, data)
        files.fsync(self.path.parent)

    def _staged(self, name: str) -> Path:
        return self._places.staging / f"{name}.{os.getpid()}"

    def _clear_staging(self) -> None:
        self._files.make_folder(self._places.staging)
        for path in self._places.staging.iterdir():
            self._files.remove(path)

    def _take_up(self) -> dict[int, Commit]:
        """Remove leftovers, read the commits, check what they promise."""
        self._clear_staging()
        for path in self.path.glob("stamps.*.*"):
            self._files.remove(path)
        on_disk = [shard for shard in numbered(self._places.commits) if shard < self.layout.shards]
        self._remove_uncommitted(set(on_disk))
        commits: dict[int, Commit] = {}
        for shard in on_disk:
            try:
                commits[shard] = self._checked(shard)
            except ShardDamaged as error:
                quarantine(self._places, self.layout, shard, error.message, self._files)
                self.quarantined[shard] = error.message
        self._stamps.save(self._files)
        return commits

    def _remove_uncommitted(self, committed: set[int]) -> None:
        for array in self.layout.arrays.values():
            kept = {array.chunk_key(shard) for shard in committed} | {"zarr.json"}
            for path in (self.path / array.name).iterdir():
                if path.name not in kept:
                    self._files.remove(path)

    def _checked(self, shard: int) -> Commit:
        commit = Commit.read(self._places.commit(shard), self.layout, shard)
        with opened(self._places, self.layout, commit) as files:
            if not self._stamps.match(files, commit):
                check_hashes(files, commit)
                self._stamps.remember(files, commit)
        return commit

    @property
    def committed(self) -> list[int]:
        """Shards that need no work, ascending."""
        return sorted(self._commits)

    @property
    def missing(self) -> list[int]:
        """Shards still to be labelled, ascending."""
        return [shard for shard in range(self.layout.shards) if shard not in self._commits]

    @property
    def generation(self) -> Generation | None:
        """The newest complete generation, whether or not all its shards are still there."""
        return newest_generation(self._places.generations, self.layout)

    def stored(self, shard: int, name: str) -> np.ndarray:
        """One array of a committed shard, unused slots cut off; for comparing, not for serving."""
        array, span = self.layout.arrays[name], self.layout.span(shard)
        rows = np.fromfile(self._places.chunk(array, shard), array.dtype)
        return rows.reshape(-1, *array.row_shape)[: len(span)]

    def commit(self, shard: int, arrays: dict[str, np.ndarray], statistics: dict[str, Any]) -> Commit:
        """Make one shard durable: all of it, or nothing.

        Args:
            shard: a missing shard.
            arrays: by name, each of exactly the shard's rows, of the layout's dtype and row shape.
            statistics: JSON values, kept beside the commit and outside what is hashed.

        Raises:
            ShapeMismatch: an array is not what the layout says.
            DatasetChanged: the shard was sealed with other examples, before it was damaged and withdrawn.
            DiskFull, StoreNotWritable, StorageFault: as they say. The shard is not committed (or is, whole, if only the
                last sync failed: the next writer finds out), and what was staged is removed if that is possible.
        """
        if shard in self._commits or not 0 <= shard < self.layout.shards:
            raise InvalidRequest(f"shard {shard} is not missing")
        slots = {name: self._padded(shard, name, arrays[name]) for name in self.layout.arrays}
        try:
            commit = self._publish(shard, slots, statistics)
        except (StorageFault, DatasetChanged):
            self._clear_after_failure()
            raise
        self._commits[shard] = commit
        return commit

    def _publish(self, shard: int, slots: dict[str, np.ndarray], statistics: dict[str, Any]) -> Commit:
        files, places = self._files, self._places
        hashes: dict[str, str] = {}
        for name, array in slots.items():
            staged = self._staged(f"{name}.{shard}")
            files.write(staged, array.data)
            files.fsync(staged)
            hashes[name] = hashlib.sha256(array.data).hexdigest()
        self._refuse_other_examples(shard, hashes)
        for name in slots:
            files.publish(self._staged(f"{name}.{shard}"), places.chunk(self.layout.arrays[name], shard))
        for name in slots:
            files.fsync(self.path / name)
        files.replace(
            self._staged(f"statistics.{shard}"), places.statistics / f"{shard}.json", canonical_json(statistics)
        )
        commit, data = Commit.of(self.layout, shard, hashes)
        files.create(self._staged(f"commit.{shard}"), places.commit(shard), data)
        return commit

    def _refuse_other_examples(self, shard: int, hashes: dict[str, str]) -> None:
        """A repair may give other rows (and then a new generation), but never labels of other examples."""
        sealed = self._sealed_commit(shard)
        if sealed is not None and any(sealed.arrays[name] != hashes[name] for name in ("ids", "fingerprint")):
            span = self.layout.span(shard)
            raise DatasetChanged(
                f"examples {span.start:,} to {span.stop - 1:,} are not those that were labelled before shard {shard} "
                "was damaged: the dataset was re-ordered or changed. Nothing was changed: restore it, or label it "
                "under another name",
                shard=shard,
            )

    def _sealed_commit(self, shard: int) -> Commit | None:
        """The commit that the newest generation lists for a withdrawn shard, if quarantine still has it."""
        generation = self.generation
        for path in self._places.quarantine.glob(f"*-shard-{shard}/commit.json") if generation else ():
            with contextlib.suppress(ShardDamaged, FileNotFoundError):
                commit = Commit.read(path, self.layout, shard)
                if generation is not None and commit.sha256 == generation.commits[shard]:
                    return commit
        return None

    def _padded(self, shard: int, name: str, rows: np.ndarray) -> np.ndarray:
        """The array's bytes of a whole chunk: unused slots zero, little-endian."""
        array, span = self.layout.arrays[name], self.layout.span(shard)
        dtype = np.dtype(array.dtype).newbyteorder("<")
        if rows.dtype != dtype or rows.shape != (len(span), *array.row_shape):
            raise ShapeMismatch(
                f"shard {shard}: {name} is {rows.dtype} of shape {rows.shape}, "
                f"not {array.dtype} of shape {(len(span), *array.row_shape)}"
            )
        slots = np.zeros((self.layout.rows_per_shard, *array.row_shape), dtype)
        slots[: len(rows)] = rows
        return slots.reshape(-1).view(np.uint8)

    def _clear_after_failure(self) -> None:
        """Give the disk back what was staged; if even that fails, the next writer does it."""
        try:
            self._clear_staging()
            self._remove_uncommitted(set(numbered(self._places.commits)))
        except StorageFault:
            return

    def seal(self) -> Generation:
        """Declare the label set complete; gives the generation that holds now.

        When the newest generation already lists these very commits (after a repair that reproduced the bytes), it is
        that one.

        Raises:
            InvalidRequest: shards are missing.
        """
        if self.missing:
            raise InvalidRequest(f"{len(self.missing)} of {self.layout.shards} shards are missing: label them first")
        commits = [self._commits[shard].sha256 for shard in range(self.layout.shards)]
        newest = self.generation
        if newest is not None and list(newest.commits) == commits:
            return newest
        number = max(numbered(self._places.generations), default=0) + 1
        generation, data = Generation.of(self.layout.identity, number, self.layout.examples, commits)
        self._files.create(self._staged(f"generation.{number}"), self._places.generations / f"{number}.json", data)
        return generation

    def close(self) -> None:
        """Let another process write; a second call does nothing."""
        self._lock.release()

    def __enter__(self) -> "LabelSetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
