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

from logitcache.labels.errors import ShardDamaged, StorageFault
from logitcache.storage.files import Files
from logitcache.storage.layout import Array, Layout, Places
from logitcache.storage.records import Commit

Stamp = tuple[int, int, int]
"""inode, size in bytes, change time in nanoseconds of one file."""

RACY_NS = 2_000_000_000
"""A file changed less long ago than this may be changed again within one tick of its file system's clock."""

_HASH_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class OpenShard:
    """A committed shard's chunk files, open and of the right size; ``handles`` by array name."""

    shard: int
    handles: dict[str, int]
    stamps: tuple[Stamp, ...]


@contextlib.contextmanager
def opened(places: Places, layout: Layout, commit: Commit) -> Iterator[OpenShard]:
    """Open a committed shard's chunk files.

    Raises:
        ShardDamaged: one is missing, or of another size than its commit says.
    """
    handles: dict[str, int] = {}
    stamps: list[Stamp] = []
    try:
        for name, array in layout.arrays.items():
            handles[name] = _open(places, array, commit.shard)
            status = os.fstat(handles[name])
            if status.st_size != layout.chunk_bytes(array):
                raise ShardDamaged(
                    f"shard {commit.shard}: {name}/{array.chunk_key(commit.shard)} has {status.st_size:,} bytes, "
                    f"not {layout.chunk_bytes(array):,}",
                    shard=commit.shard,
                )
            stamps.append((status.st_ino, status.st_size, status.st_ctime_ns))
        yield OpenShard(commit.shard, handles, tuple(stamps))
    finally:
        for handle in handles.values():
            os.close(handle)


def _open(places: Places, array: Array, shard: int) -> int:
    path = places.chunk(array, shard)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        # Out of handles or memory is this process's trouble: the shard must not be condemned for it.
        if isinstance(error, FileNotFoundError) or path.is_symlink():
            raise ShardDamaged(
                f"shard {shard}: {array.name}/{path.name} is missing ({error.strerror})", shard=shard
            ) from None
        raise StorageFault(f"{path}: {error.strerror}", path=str(path)) from error


def check_hashes(files: OpenShard, commit: Commit) -> None:
    """Hash every chunk file of a shard, at disk speed.

    Raises:
        ShardDamaged: one does not hash to what its commit says.
        StorageFault: one cannot be read.
    """
    for name, handle in files.handles.items():
        found = _sha256(handle)
        if found != commit.arrays[name]:
            raise ShardDamaged(
                f"shard {files.shard}: the bytes of {name} hash to {found[:12]}…, "
                f"its commit says {commit.arrays[name][:12]}…",
                shard=files.shard,
            )


def _sha256(handle: int) -> str:
    state, offset = hashlib.sha256(), 0
    try:
        while block := os.pread(handle, _HASH_BLOCK_BYTES, offset):
            state.update(block)
            offset += len(block)
    except OSError as error:
        raise StorageFault(f"a chunk file cannot be read: {error.strerror}") from error
    return state.hexdigest()


class Stamps:
    """Which files hashed right the last time, on this machine; kept in one small file that may always be deleted."""

    def __init__(self, path: Path) -> None:
        self._path, self._changed = path, False
        self._known: dict[str, tuple[str, tuple[Stamp, ...]]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            for shard, (commit, stamps) in json.loads(path.read_bytes()).items():
                self._known[shard] = (commit, tuple((*map(int, stamp),) for stamp in stamps))  # type: ignore[misc]

    def match(self, files: OpenShard, commit: Commit) -> bool:
        """Are these the very files that hashed right for this very commit?"""
        return self._known.get(str(files.shard)) == (commit.sha256, files.stamps)

    def remember(self, files: OpenShard, commit: Commit) -> None:
        """These files hashed right for this commit; not kept where a later write could leave the same change time."""
        newest = max(stamp[2] for stamp in files.stamps)
        if time.time_ns() - newest > RACY_NS and not self.match(files, commit):
            self._known[str(files.shard)] = (commit.sha256, files.stamps)
            self._changed = True

    def save(self, files: Files) -> None:
        """Write the stamps down if there are new ones and this process may: without them, verifying is done again."""
        if not self._changed:
            return
        self._changed = False
        data = json.dumps(self._known, separators=(",", ":")).encode()
        staged = self._path.with_name(f"stamps.{os.getpid()}.{time.monotonic_ns()}")
        with contextlib.suppress(StorageFault):
            try:
                files.replace(staged, self._path, data)
            except StorageFault:
                files.remove(staged)


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
    for array in layout.arrays.values():
        path = places.chunk(array, shard)
        if path.exists() or path.is_symlink():
            files.rename(path, folder / f"{array.name}.{path.name}")
    with contextlib.suppress(StorageFault):
        files.write(folder / "problem.txt", f"{problem}\n".encode())
    return folder
