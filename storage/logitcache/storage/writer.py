"""Building a label set: create or continue it, commit shard after shard, seal it.

The caller labels `missing` shards in any order and gives each one whole to `commit`. Killed at any moment, what was
committed stays and the next writer continues; what was not is removed under the lock before anything else happens.
It knows nothing of teachers or datasets.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from logitcache.labels.errors import (
    DatasetChanged,
    IdentityChanged,
    InvalidRequest,
    NotALabelSet,
    ShardDamaged,
    StorageFault,
    StoreNotFound,
)
from logitcache.labels.identity import canonical_json, check_name
from logitcache.storage.admission import (
    Stamps,
    check_hashes,
    opened,
    quarantine,
    quarantined,
    stored_rows,
    stored_texts,
)
from logitcache.storage.contents import Content, contents, refuse_repeated, sha256_of
from logitcache.storage.files import Files
from logitcache.storage.id_index import IdIndex
from logitcache.storage.layout import TEXTS, Layout
from logitcache.storage.lock import WriterLock
from logitcache.storage.manifest import read_layout
from logitcache.storage.places import Places
from logitcache.storage.recorded import refuse_lost_recording
from logitcache.storage.records import (
    Commit,
    Generation,
    Part,
    newest_generation,
    numbered,
    refuse_another_manifest,
)
from logitcache.storage.terms import refuse_another, refuse_fewer


class LabelSetWriter:
    """The one writer of a label set, from construction to `close`.

    Construction creates the label set or takes up an unfinished or damaged one: leftovers of a killed writer are
    removed, committed shards are hashed (files that hashed right before and did not change are spared), damaged ones
    quarantined.

    Attributes:
        layout: shape of the label set: the stored one when it exists already, else the one that was given.
        committed: shards that need no work, ascending.
        quarantined: shards found damaged now, with what was wrong.

    Raises:
        StoreNotFound: neither the store nor its parent folder exists.
        NotALabelSet: the folder holds something that logitcache did not write.
        NewerFormat: a newer logitcache began it.
        LabelSetLocked: another process is writing it.
        IdentityChanged: it was begun with another identity or shard size; each field that differs is named with both
            values.
        DatasetChanged: it was begun over more examples. Over fewer is an append: `seal`, then `grow`.
        DiskFull, StoreNotWritable: as they say; nothing was lost.

    Every method that writes raises StorageFault when the label set's folder was removed or replaced meanwhile: what
    stands there now is another's.
    """

    def __init__(
        self, path: Path, layout: Layout, *, files: Files | None = None, lock: WriterLock | None = None
    ) -> None:
        """``lock`` is that of the recording that is to become this label set, whose writer holds it; it stays held."""
        check_name(path.name)
        self.path, self._places, self._files = path, Places(path), files or Files()
        self._claim_folder()
        self._lock = lock or WriterLock(self._places.lock)
        self._releases = lock is None
        try:
            if lock is None and self._places.recording.exists():
                raise IdentityChanged(
                    f"{path.name!r} is being recorded by a run: use another name, or seal it first with "
                    f"`logitcache seal {path.name}`"
                )
            refuse_lost_recording(self._places)
            if self._places.group.exists():
                self.layout = read_layout(path)
                refuse_another_manifest(self._places.generations, self._places.commits, self.layout)
                refuse_another(path.name, self.layout, layout.identity, layout.rows_per_shard)
                refuse_fewer(path.name, self.layout, layout.examples)
            else:
                self.layout = layout
                self._create()
            self.quarantined: dict[int, str] = {}
            self._stamps = Stamps(self._places.stamps)
            self._commits = self._take_up()
        except BaseException:
            self.close()
            raise

    def _claim_folder(self) -> None:
        store = self.path.parent
        if not store.is_dir():
            if not store.parent.is_dir():
                raise StoreNotFound(f"the store {store} cannot be made: {store.parent} does not exist")
            self._files.make_folder(store)
        if self.path.is_dir() and not self._places.lock.exists() and any(self.path.iterdir()):
            if self._places.group.exists():
                read_layout(self.path)
            elif not self._places.recording.exists():
                raise NotALabelSet(f"{self.path} holds files that logitcache did not write: use another name")
        self._files.make_folder(self.path)

    def _create(self) -> None:
        from logitcache.storage.zarr_library import library_metadata

        places, files = self._places, self._files
        if numbered(places.commits) or numbered(places.generations):
            raise NotALabelSet(
                f"{places.group} is missing, and shards that were committed stand beside it: restore it; or remove "
                f"{self.path}, and the shards with it"
            )
        # The name of the lock file: without it a power cut could leave what passes for a foreign folder.
        files.fsync(self.path)
        files.make_folder(places.staging)
        self._clear_staging()
        files.remove(places.served)  # of another label set
        self._make_folders()
        *arrays, group = library_metadata(self.layout).items()
        for key, data in arrays:
            final = self.path / key
            files.make_folder(final.parent)
            files.remove(final)
            files.create(self._staged(key.replace("/", ".")), final, data)
        # When it is named, what it describes is there: also after a power cut.
        files.fsync(self.path)
        files.create(self._staged("zarr.json"), self.path / "zarr.json", group[1])

    def _make_folders(self) -> None:
        """Folders that may be empty: what copied the label set may have left them out."""
        places = self._places
        texts = [self.path / TEXTS] if TEXTS in self.layout.parts else []
        for folder in (places.commits, places.generations, places.statistics, *texts):
            self._files.make_folder(folder)

    def _staged(self, name: str) -> Path:
        return self._places.staging / f"{name}.{os.getpid()}"

    def _clear_staging(self) -> None:
        self._files.make_folder(self._places.staging)
        self._clear_folder(self._places.staging)

    def _clear_folder(self, folder: Path) -> None:
        if folder.is_dir():
            for path in folder.iterdir():
                self._files.remove(path)

    def _take_up(self) -> dict[int, Commit]:
        """Sync what a killed writer left, remove what nobody needs, read the commits, check what they promise."""
        self._make_folders()
        left = self._places.recording.parent
        recorded = [left] if left.is_dir() else []
        self._files.sync_names(self.path, self._places.commits, self._places.generations, *recorded)
        self._clear_staging()
        if not self._places.recording.exists():
            self._clear_folder(self._places.recording.parent)  # of a recording that was sealed
        for name in ("stamps", "served"):
            for path in self.path.glob(f"{name}.*.*"):
                self._files.remove(path)
        on_disk = numbered(self._places.commits)
        self._refuse_beyond(on_disk)
        self._remove_uncommitted(set(on_disk))
        commits: dict[int, Commit] = {}
        for shard in on_disk:
            try:
                commits[shard] = self._checked(shard)
            except ShardDamaged as error:
                self._set_aside(shard, error.message)
        self._stamps.save(self._files)
        self._ids = IdIndex()
        if self.layout.identity.ids != "ordinal":
            self._ids, damaged = self._ids.following(self._places, self.layout, commits)
            for commit, fault in damaged:
                # It hashed right before, as its stamp says, and rotted since.
                self._set_aside(commit.shard, fault.message)
                del commits[commit.shard]
        return commits

    def _set_aside(self, shard: int, problem: str) -> None:
        quarantine(self._places, self.layout, shard, problem, self._files)
        self.quarantined[shard] = problem

    def _refuse_beyond(self, committed: list[int]) -> None:
        """Commits of shards that the manifest does not have mean an old manifest; their files must not be cleared."""
        if committed and committed[-1] >= self.layout.shards:
            raise NotALabelSet(
                f"{self._places.commit(committed[-1])} is of a shard that {self._places.group} does not have: "
                f"an older zarr.json was put in its place; restore the newer one. Nothing was changed"
            )

    def _remove_uncommitted(self, committed: set[int]) -> None:
        for name in self.layout.parts:
            kept = {self._places.part(self.layout, name, shard).name for shard in committed} | {"zarr.json"}
            for path in (self.path / name).iterdir():
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
        return stored_rows(self._places, self.layout, self._commits[shard], name)

    def stored_texts(self, shard: int) -> list[str]:
        """Text ids of a committed shard's examples.

        Raises:
            ShardDamaged: they are not those that its ids are the keys of.
        """
        return stored_texts(self._places, self.layout, self._commits[shard])

    def commit(
        self,
        shard: int,
        arrays: dict[str, np.ndarray],
        statistics: dict[str, Any],
        texts: Sequence[str] | None = None,
    ) -> Commit:
        """Make one shard durable: all of it, or nothing.

        Args:
            shard: a missing shard.
            arrays: by name, each of exactly the shard's examples or rows, of the layout's dtype and row shape.
            statistics: JSON values, kept beside the commit and outside what is hashed.
            texts: the examples' ids, if they are texts; ``arrays["ids"]`` holds their keys.

        Raises:
            ShapeMismatch: an array is not what the layout says, or disagrees with another or with the texts.
            DatasetFault: an id is already that of another example; both are named.
            DatasetChanged: the shard was sealed with other examples, before it was damaged and withdrawn.
            DiskFull, StoreNotWritable, StorageFault: as they say. The shard is not committed (or is, whole, if only the
                last sync failed: the next writer finds out), and what was staged is removed if that is possible.
        """
        if shard in self._commits or not 0 <= shard < self.layout.shards:
            raise InvalidRequest(f"shard {shard} is not missing")
        self._refuse_removed()
        files = contents(self.layout, shard, arrays, texts)
        if self.layout.identity.ids != "ordinal":
            refuse_repeated(self.layout, shard, arrays["ids"], texts, self._ids)
        try:
            commit = self._publish(shard, files, statistics)
        except (StorageFault, DatasetChanged):
            self._clear_after_failure()
            raise
        self._commits[shard] = commit
        if self.layout.identity.ids != "ordinal":
            first = int(self.layout.first_examples[shard])
            self._ids = self._ids.with_shard(shard, commit.sha256, arrays["ids"], first)
        return commit

    def _publish(self, shard: int, content: dict[str, Content], statistics: dict[str, Any]) -> Commit:
        files, places = self._files, self._places
        parts: dict[str, Part] = {}
        for name, (data, size) in content.items():
            staged = self._staged(f"{name}.{shard}")
            files.write(staged, data, size)
            files.fsync(staged)
            parts[name] = Part(size, sha256_of((data, size)))
        self._refuse_other_examples(shard, parts)
        self._refuse_removed()
        for name in content:
            files.publish(self._staged(f"{name}.{shard}"), places.part(self.layout, name, shard))
        for name in content:
            files.fsync(self.path / name)
        files.replace(
            self._staged(f"statistics.{shard}"), places.statistics / f"{shard}.json", canonical_json(statistics)
        )
        commit, record = Commit.of(self.layout, shard, parts)
        self._refuse_removed()
        files.create(self._staged(f"commit.{shard}"), places.commit(shard), record)
        return commit

    def _refuse_removed(self) -> None:
        """What stands under this path by now may be another label set, begun when this one's folder was removed."""
        if self._lock.is_removed:
            raise StorageFault(
                f"the label set {self.path.name!r} was removed or replaced while it was being written: nothing more is "
                "written to it; run the same command again",
                path=str(self.path),
            )

    def _refuse_other_examples(self, shard: int, parts: dict[str, Part]) -> None:
        """A repair may give other rows (and then a new generation), but never labels of other examples."""
        sealed = self._sealed_commit(shard)
        of_the_dataset = [name for name in parts if name not in ("indices", "logits", "scalars")]
        if sealed is not None and any(sealed.parts[name] != parts[name] for name in of_the_dataset):
            span = self.layout.span(shard)
            raise DatasetChanged(
                f"examples {span.start:,} to {span.stop - 1:,} are not those that were labelled before shard {shard} "
                "was damaged: the dataset was re-ordered or changed. Nothing was changed: restore it, or label it "
                "under another name",
                shard=shard,
            )

    def _sealed_commit(self, shard: int) -> Commit | None:
        """The commit that the newest generation lists for a withdrawn shard, if quarantine still has it or, where it is
        the commit itself that was damaged, the files that it was of.
        """
        generation = self.generation
        if generation is None or shard >= len(generation.commits):
            return None
        found = quarantined(self._places, self.layout, shard)
        return next((commit for commit in found if commit.sha256 == generation.commits[shard]), None)

    def _clear_after_failure(self) -> None:
        """Give the disk back what was staged; if even that fails, the next writer does it."""
        try:
            self._refuse_removed()
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
        self._refuse_removed()
        self._files.create(self._staged(f"generation.{number}"), self._places.generations / f"{number}.json", data)
        return generation

    def grow(self, layout: Layout) -> None:
        """Take up more examples, in new shards; what is committed stays as it is, and is served on by its generation.

        The arrays' shapes are written first and the manifest last: killed in between, the label set has not grown, and
        growing it again begins anew.

        Args:
            layout: extends the present one; see `Layout.grown`.

        Raises:
            InvalidRequest: it does not, or the label set is not sealed as it is now.
        """
        newest, commits = self.generation, tuple(commit.sha256 for _, commit in sorted(self._commits.items()))
        if not layout.extends(self.layout) or layout == self.layout:
            raise InvalidRequest("a label set grows by shards after its last one, and by nothing else")
        if self.missing or newest is None or newest.commits != commits:
            raise InvalidRequest("a label set grows when it is complete and sealed: label what is missing first")
        from logitcache.storage.zarr_library import library_metadata

        self._refuse_removed()
        for key, data in library_metadata(layout).items():
            self._files.replace(self._staged(key.replace("/", ".")), self.path / key, data)
        self.layout = layout

    def close(self) -> None:
        """Let another process write; a second call does nothing."""
        if self._releases:
            self._lock.release()

    def __enter__(self) -> "LabelSetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
