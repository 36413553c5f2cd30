"""Checking a shard's files against its commit, remembering what was checked, and moving aside what is damaged.

A shard is checked through the same open files that are mapped afterwards, so nothing can be exchanged in between.
Stamps (inode, size, change time) of files whose hash was right spare the hash next time: any write to a file changes
them.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from logitcache.labels.errors import ShardDamaged, StorageFault
from logitcache.labels.identity import canonical_json, sha256_hex
from logitcache.storage.files import Files
from logitcache.storage.layout import Layout
from logitcache.storage.places import Places
from logitcache.storage.records import Commit

Stamp = tuple[int, int, int]
"""inode, size in bytes, change time in nanoseconds of one file."""

RACY_NS = 2_000_000_000
"""A file changed less long ago than this may be changed again within one tick of its file system's clock."""

_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class OpenShard:
    """A committed shard's files, open and of the right size; ``handles`` by the names of its parts."""

    shard: int
    handles: dict[str, int]
    stamps: tuple[Stamp, ...]


@contextlib.contextmanager
def opened(places: Places, layout: Layout, commit: Commit) -> Iterator[OpenShard]:
    """Open a committed shard's files.

    Raises:
        ShardDamaged: one is missing, or of another size than its commit says.
    """
    handles: dict[str, int] = {}
    stamps: list[Stamp] = []
    try:
        for name, part in commit.parts.items():
            path = places.part(layout, name, commit.shard)
            handles[name] = _open(path, name, commit.shard)
            status = os.fstat(handles[name])
            if status.st_size != part.bytes:
                raise ShardDamaged(
                    f"shard {commit.shard}: {name}/{path.name} has {status.st_size:,} bytes, not {part.bytes:,}",
                    shard=commit.shard,
                )
            stamps.append((status.st_ino, status.st_size, status.st_ctime_ns))
        yield OpenShard(commit.shard, handles, tuple(stamps))
    finally:
        for handle in handles.values():
            os.close(handle)


def _open(path: Path, name: str, shard: int) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        # Out of handles or memory is this process's trouble: the shard must not be condemned for it.
        if isinstance(error, FileNotFoundError) or path.is_symlink():
            raise ShardDamaged(
                f"shard {shard}: {name}/{path.name} is missing ({error.strerror})", shard=shard
            ) from None
        raise StorageFault(f"{path}: {error.strerror}", path=str(path)) from error


def read_part(places: Places, layout: Layout, commit: Commit, name: str) -> bytes:
    """One of a committed shard's files as a whole, hashed.

    Raises:
        ShardDamaged: it is missing, or does not hash to what its commit says.
        StorageFault: it cannot be read.
    """
    path, part = places.part(layout, name, commit.shard), commit.parts[name]
    handle = _open(path, name, commit.shard)
    try:
        if os.fstat(handle).st_size != part.bytes:
            raise ShardDamaged(f"shard {commit.shard}: {name}/{path.name} has another size", shard=commit.shard)
        data = b"".join(_blocks(handle))
    finally:
        os.close(handle)
    if sha256_hex(data) != part.sha256:
        raise _other_bytes(commit, name, sha256_hex(data))
    return data


def stored_rows(places: Places, layout: Layout, commit: Commit, name: str) -> np.ndarray:
    """One array of a committed shard, hashed, unused slots cut off; errors as in `read_part`."""
    array = layout.arrays[name]
    stored = np.frombuffer(read_part(places, layout, commit, name), array.dtype)
    return stored.reshape(-1, *array.row_shape)[: layout.used(array, commit.shard)]


def check_hashes(files: OpenShard, commit: Commit) -> None:
    """Hash every file of a shard, at disk speed.

    Raises:
        ShardDamaged: one does not hash to what its commit says.
        StorageFault: one cannot be read.
    """
    for name, handle in files.handles.items():
        found = _sha256(handle)
        if found != commit.parts[name].sha256:
            raise _other_bytes(commit, name, found)


def _other_bytes(commit: Commit, name: str, found: str) -> ShardDamaged:
    return ShardDamaged(
        f"shard {commit.shard}: the bytes of {name} hash to {found[:12]}…, "
        f"its commit says {commit.parts[name].sha256[:12]}…",
        shard=commit.shard,
    )


def _sha256(handle: int) -> str:
    state = hashlib.sha256()
    for block in _blocks(handle):
        state.update(block)
    return state.hexdigest()


def _blocks(handle: int) -> Iterator[bytes]:
    """A file's bytes, read and not mapped: a file that is truncated meanwhile is an error, and not SIGBUS."""
    offset = 0
    try:
        while block := os.pread(handle, _HASH_BLOCK_BYTES, offset):
            yield block
            offset += len(block)
    except OSError as error:
        raise StorageFault(f"a file of a shard cannot be read: {error.strerror}") from error


class Stamps:
    """Which files hashed right the last time, on this machine; kept in one small file that may always be deleted."""

    def __init__(self, path: Path) -> None:
        self._path, self._changed = path, False
        self._known: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
            self._known.update(json.loads(path.read_bytes()))

    def match(self, files: OpenShard, commit: Commit) -> bool:
        """Are these the very files that hashed right for this very commit?"""
        return self._known.get(str(files.shard)) == _mark(files, commit)

    def remember(self, files: OpenShard, commit: Commit) -> None:
        """These files hashed right for this commit; not kept where a later write could leave the same change time."""
        newest = max(stamp[2] for stamp in files.stamps)
        if time.time_ns() - newest > RACY_NS and not self.match(files, commit):
            self._known[str(files.shard)] = _mark(files, commit)
            self._changed = True

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

    The commit goes first, so that a reader never finds a commit without files; the folder says what was wrong.
    """
    folder = places.quarantine / f"{time.strftime('%Y%m%dT%H%M%S')}-{time.time_ns() % 10**9:09}-shard-{shard}"
    files.make_folder(places.quarantine)
    files.make_folder(folder)
    if places.commit(shard).exists():
        files.rename(places.commit(shard), folder / "commit.json")
        files.fsync(places.commits)
    for name in layout.parts:
        path = places.part(layout, name, shard)
        if path.exists() or path.is_symlink():
            files.rename(path, folder / f"{name}.{path.name}")
    with contextlib.suppress(StorageFault):
        files.write(folder / "problem.txt", f"{problem}\n".encode())
    return folder
