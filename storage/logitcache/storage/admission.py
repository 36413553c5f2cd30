"""Checking a shard's files against its commit, remembering what was checked, and moving aside what is damaged.

A shard is checked through the same open files that are mapped afterwards, so nothing can be exchanged in between.
Stamps (inode, size, change time) of files whose hash was right spare the hash next time: any write to a file changes
them.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from logitcache.labels.errors import InvalidIds, ShardDamaged, StorageFault
from logitcache.labels.identity import canonical_json, sha256_hex
from logitcache.labels.ids import text_keys
from logitcache.storage.files import Files
from logitcache.storage.layout import TEXTS, Layout
from logitcache.storage.places import Places
from logitcache.storage.reading import blocks, open_file, parsed, read_file, refuse_holes, status
from logitcache.storage.records import Commit, Part, most_texts

Stamp = tuple[int, int, int]
"""inode, size in bytes, change time in nanoseconds of one file."""

RACY_NS = 2_000_000_000
"""A file changed less long ago than this may be changed again within one tick of its file system's clock."""

MAX_NOTE_BYTES = 1 << 20
"""Stamps longer than this are ignored: there is one of some fifty bytes for each of at most 6,000 shards."""


@dataclass(frozen=True)
class OpenShard:
    """A committed shard's files, open and of the right size; ``handles`` and ``paths`` by the names of its parts.

    Their ``stamps`` were taken at ``looked_ns``, before anything was read.
    """

    shard: int
    looked_ns: int
    handles: dict[str, int]
    paths: dict[str, Path]
    stamps: tuple[Stamp, ...]


@contextlib.contextmanager
def opened(places: Places, layout: Layout, commit: Commit) -> Iterator[OpenShard]:
    """Open a committed shard's files.

    Raises:
        ShardDamaged: one is missing, no regular file, or of another size than its commit says.
        StorageFault: one cannot be opened.
    """
    handles: dict[str, int] = {}
    paths: dict[str, Path] = {}
    stamps: list[Stamp] = []
    looked_ns = time.time_ns()
    try:
        for name, part in commit.parts.items():
            path = paths[name] = places.part(layout, name, commit.shard)
            handles[name] = _open(places, path, name, commit.shard)
            status = os.fstat(handles[name])
            if status.st_size != part.bytes:
                raise ShardDamaged(
                    f"shard {commit.shard}: {name}/{path.name} has {status.st_size:,} bytes, not {part.bytes:,}",
                    shard=commit.shard,
                )
            stamps.append((status.st_ino, status.st_size, status.st_ctime_ns))
        yield OpenShard(commit.shard, looked_ns, handles, paths, tuple(stamps))
    finally:
        for handle in handles.values():
            os.close(handle)


def _open(places: Places, path: Path, name: str, shard: int) -> int:
    try:
        return open_file(places.root, path, ShardDamaged)
    except FileNotFoundError:
        raise ShardDamaged(f"shard {shard}: {name}/{path.name} is missing", shard=shard) from None
    except ShardDamaged as error:
        raise _of_shard(shard, error) from None


def _blocks(handle: int, size: int, path: Path, shard: int) -> Iterator[bytes]:
    try:
        yield from blocks(handle, size, path, ShardDamaged)
    except ShardDamaged as error:
        raise _of_shard(shard, error) from None


def _of_shard(shard: int, error: ShardDamaged) -> ShardDamaged:
    return ShardDamaged(f"shard {shard}: {error.message}", **error.details | {"shard": shard})


def is_lost(error: ShardDamaged) -> bool:
    """The disk gives an error for it, which may pass: it is not known to hold other bytes."""
    return "errno" in error.details


def read_part(places: Places, layout: Layout, commit: Commit, name: str) -> bytes:
    """One of a committed shard's files, hashed as a whole; unused slots are cut off.

    Raises:
        ShardDamaged: it is missing, lost to the disk (`is_lost`), or does not hash to what its commit says.
        StorageFault: it cannot be read.
    """
    path, part = places.part(layout, name, commit.shard), commit.parts[name]
    array = layout.arrays.get(name)
    used = part.bytes if array is None else layout.used(array, commit.shard) * array.row_bytes
    handle = _open(places, path, name, commit.shard)
    try:
        if os.fstat(handle).st_size != part.bytes:
            raise ShardDamaged(f"shard {commit.shard}: {name}/{path.name} has another size", shard=commit.shard)
        refuse_holes(handle, used, path, ShardDamaged)
        state, kept, rest = hashlib.sha256(), [], used
        for block in _blocks(handle, part.bytes, path, commit.shard):
            state.update(block)
            kept.append(block[:rest])
            rest -= len(kept[-1])
    finally:
        os.close(handle)
    if (found := state.hexdigest()) != part.sha256:
        raise _other_bytes(commit, name, found)
    return b"".join(kept)


def stored_rows(places: Places, layout: Layout, commit: Commit, name: str) -> np.ndarray:
    """One array of a committed shard, hashed, unused slots cut off; errors as in `read_part`."""
    array = layout.arrays[name]
    stored = np.frombuffer(read_part(places, layout, commit, name), array.dtype)
    return stored.reshape(-1, *array.row_shape)


def stored_texts(places: Places, layout: Layout, commit: Commit) -> list[str]:
    """Text ids of a committed shard's examples; errors as in `read_part`.

    Raises:
        ShardDamaged: also where they are not those that its ids are the keys of.
    """
    shard, keys = commit.shard, stored_rows(places, layout, commit, "ids")
    try:
        texts = parsed(read_part(places, layout, commit, TEXTS))
        if isinstance(texts, list) and len(texts) == len(keys) and np.array_equal(text_keys(texts), keys):
            return texts
    except (ValueError, InvalidIds):
        pass  # told below
    raise ShardDamaged(f"shard {shard}: its texts are not those of its ids, and were committed so", shard=shard)


def check_hashes(files: OpenShard, commit: Commit, stopped: threading.Event | None = None) -> None:
    """Hash every file of a shard, at disk speed.

    Raises:
        ShardDamaged: one does not hash to what its commit says, or is lost to the disk (`is_lost`).
        StorageFault: one cannot be read, or ``stopped`` was set meanwhile.
    """
    for name, handle in files.handles.items():
        state = hashlib.sha256()
        for block in _blocks(handle, commit.parts[name].bytes, files.paths[name], commit.shard):
            if stopped is not None and stopped.is_set():
                raise StorageFault(f"shard {commit.shard} was not verified: its label set was closed meanwhile")
            state.update(block)
        if (found := state.hexdigest()) != commit.parts[name].sha256:
            raise _other_bytes(commit, name, found)


def _other_bytes(commit: Commit, name: str, found: str) -> ShardDamaged:
    return ShardDamaged(
        f"shard {commit.shard}: the bytes of {name} hash to {found[:12]}…, "
        f"its commit says {commit.parts[name].sha256[:12]}…",
        shard=commit.shard,
    )


class Stamps:
    """Which files hashed right the last time, on this machine; kept in one small file that may always be deleted."""

    def __init__(self, path: Path) -> None:
        self._path, self._changed = path, False
        self._known: dict[str, str] = {}
        with contextlib.suppress(OSError, StorageFault, ValueError, TypeError):
            self._known.update(parsed(read_file(path.parent, path, MAX_NOTE_BYTES)))

    def match(self, files: OpenShard, commit: Commit) -> bool:
        """Are these the very files that hashed right for this very commit?"""
        return self._known.get(str(files.shard)) == _mark(files, commit)

    def remember(self, files: OpenShard, commit: Commit) -> None:
        """These files hashed right for this commit; not kept where a later write could leave the same change time."""
        newest = max(stamp[2] for stamp in files.stamps)
        if files.looked_ns - newest > RACY_NS and not self.match(files, commit):
            self._known[str(files.shard)] = _mark(files, commit)
            self._changed = True

    def forget(self, shard: int) -> None:
        """Hash its files the next time."""
        self._changed |= self._known.pop(str(shard), None) is not None

    def save(self, files: Files) -> None:
        """Write the stamps down if there are new ones and this process may: without them, verifying is done again."""
        if not self._changed:
            return
        self._changed = False
        data = json.dumps(self._known, separators=(",", ":")).encode()
        files.replace_if_possible(self._path, data)


def _mark(files: OpenShard, commit: Commit) -> str:
    """One short text for a commit and the stamps of its files: a label set may have thousands of shards."""
    stamps = sorted(zip(files.handles, files.stamps, strict=True))
    return sha256_hex(canonical_json([commit.sha256, stamps]))[:32]


def quarantine(places: Places, layout: Layout, shard: int, problem: str, files: Files) -> Path:
    """Withdraw a shard and move its files aside; the caller holds the writer's lock.

    The commit goes first, so that a reader never finds a commit without files; the folder says what was wrong. That no
    folder on the way is a symbolic link was seen to when the lock was taken.
    """
    folder = places.quarantine / f"{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09}-shard-{shard}"
    for each in (places.quarantine, folder):
        files.make_folder(each)
        files.fsync(each.parent)
    if status(places.commit(shard)) is not None:
        files.rename(places.commit(shard), folder / "commit.json")
        files.fsync(folder)
        files.fsync(places.commits)
    for name in layout.parts:
        path = places.part(layout, name, shard)
        if status(path) is not None:
            files.rename(path, folder / _set_aside(places, layout, name, shard))
    with contextlib.suppress(StorageFault):
        files.write(folder / "problem.txt", f"{problem}\n".encode())
    return folder


def quarantined(places: Places, layout: Layout, shard: int) -> Iterator[Commit]:
    """Commits of a shard as they stand in quarantine, and then as the files there would have them: of what was set
    aside since its commit was damaged, only they tell. What does not read is passed over.
    """
    for folder in sorted(places.quarantine.glob(f"*-shard-{shard}")):
        with contextlib.suppress(ShardDamaged, FileNotFoundError):
            yield Commit.read(folder / "commit.json", layout, shard)
        with contextlib.suppress(ShardDamaged, FileNotFoundError):
            yield _commit_of_files(places, layout, shard, folder)


def _commit_of_files(places: Places, layout: Layout, shard: int, folder: Path) -> Commit:
    parts: dict[str, Part] = {}
    for name in layout.parts:
        path = folder / _set_aside(places, layout, name, shard)
        handle = open_file(places.root, path, ShardDamaged)
        try:
            size, state = os.fstat(handle).st_size, hashlib.sha256()
            most = layout.chunk_bytes(layout.arrays[name]) if name in layout.arrays else most_texts(layout, shard)
            if size > most:
                raise ShardDamaged(f"{path} has {size:,} bytes, more than {most:,}", shard=shard)
            for block in blocks(handle, size, path, ShardDamaged):
                state.update(block)
        finally:
            os.close(handle)
        parts[name] = Part(size, state.hexdigest())
    try:
        return Commit.of(layout, shard, parts)[0]
    except ValueError as error:
        raise ShardDamaged(f"{folder}: {error!s:.200}", shard=shard) from None


def _set_aside(places: Places, layout: Layout, name: str, shard: int) -> str:
    """What a shard's file is called in quarantine."""
    return f"{name}.{places.part(layout, name, shard).name}"
