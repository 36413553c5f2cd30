"""The one layer that changes files: stage, fsync, link, rename, remove.

Everything that a label set has on disk passes through these few operations, so that tests can fail or kill at each of
them by overriding it. Reads do not pass here. It knows nothing of label sets.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from logitcache.labels.errors import DiskFull, StorageFault, StoreNotWritable

Bytes = bytes | bytearray | memoryview


class Files:
    """Primitive operations on local files; each either happened when it returns, or raised.

    Raises (all operations):
        DiskFull: no space or quota left.
        StoreNotWritable: a read-only file system, or no permission.
        StorageFault: any other refusal of the operating system, named.
    """

    def write(self, path: Path, data: Bytes, size: int | None = None) -> None:
        """Create a file that must not exist yet, with this content and then zeros up to ``size`` bytes.

        The zeros are a hole: where the file system has those, they take no space.
        """
        with explained(path):
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                end = self._put_all(handle, data, 0)
                if size is not None and size > end:
                    os.ftruncate(handle, size)
            finally:
                os.close(handle)

    def fsync(self, path: Path) -> None:
        """Return when a file's content, or a folder's list of names, would survive a power cut."""
        with explained(path):
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def link(self, staged: Path, final: Path) -> None:
        """Give a file its final name, which must be free: two writers cannot both succeed."""
        with explained(final):
            os.link(staged, final)

    def rename(self, old: Path, new: Path) -> None:
        """Move a file or folder within the file system, replacing a file of the new name."""
        with explained(new):
            old.rename(new)

    def remove(self, path: Path) -> None:
        """Remove a file; it may be gone already."""
        with explained(path):
            path.unlink(missing_ok=True)

    def make_folder(self, path: Path) -> None:
        """Make a folder; it may exist already, its parent must."""
        with explained(path):
            path.mkdir(exist_ok=True)

    def open_to_append(self, path: Path) -> int:
        """A handle of a file for `append` and `cut`; the file is made if it is not there."""
        with explained(path):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def append(self, handle: int, path: Path, end: int, data: Bytes) -> None:
        """Write at the end of an open file, which is ``end``; it would survive a power cut when this returns."""
        with explained(path):
            self._put_all(handle, data, end)
            os.fdatasync(handle)

    def erase(self, handle: int, path: Path, at: int, size: int) -> None:
        """Put zeros over so many bytes of an open file, durably; those who map it go on reading it."""
        with explained(path):
            self._put_all(handle, bytes(size), at)
            os.fdatasync(handle)

    def cut(self, handle: int, path: Path, end: int) -> None:
        """Cut an open file off at ``end``, durably."""
        with explained(path):
            os.ftruncate(handle, end)
            os.fsync(handle)

    def put(self, handle: int, data: memoryview, at: int) -> int:
        """One write to an open file from byte ``at`` on: how many bytes the system took, which may be fewer."""
        return os.pwrite(handle, data, at)

    def _put_all(self, handle: int, data: Bytes, at: int) -> int:
        """Write all of it from byte ``at`` on; where it ends."""
        rest = memoryview(data).cast("B")
        while rest:
            written = self.put(handle, rest, at)
            rest, at = rest[written:], at + written
        return at

    def sync_names(self, folder: Path, *inside: Path) -> None:
        """Return when the names in a label set's folder and in these inside it, and its own, would survive a power cut.

        Whoever takes up what a killed process left believes names that it may not have synced.
        """
        for each in (*inside, folder, folder.parent):
            self.fsync(each)
        # That of the store is in a folder which may be another's, and not ours to open.
        with contextlib.suppress(StoreNotWritable):
            self.fsync(folder.parent.parent)

    def publish(self, staged: Path, final: Path) -> None:
        """Link an already synced file to its final name and drop the staging name; the folder is still to be synced."""
        self.link(staged, final)
        self.remove(staged)

    def create(self, staged: Path, final: Path, data: Bytes) -> None:
        """Write a whole file so that it appears under its final name complete and durable, or not at all."""
        self.write(staged, data)
        self.fsync(staged)
        self.publish(staged, final)
        self.fsync(final.parent)

    def replace(self, staged: Path, final: Path, data: Bytes) -> None:
        """Write a whole file in the place of an older one: readers see the one or the other."""
        self.write(staged, data)
        self.fsync(staged)
        self.rename(staged, final)
        self.fsync(final.parent)

    def replace_if_possible(self, final: Path, data: Bytes) -> bool:
        """`replace` a file that nothing depends on, staged beside it; False where that is refused. Raises nothing."""
        staged = final.with_name(f"{final.stem}.{os.getpid()}.{time.monotonic_ns()}")
        try:
            self.replace(staged, final, data)
        except StorageFault:
            with contextlib.suppress(StorageFault):
                self.remove(staged)
            return False
        return True


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise _explain(error, path) from error


def _explain(error: OSError, path: Path) -> StorageFault:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"no space left for {path}; what is committed is kept: make room and run the same command again",
            path=str(path),
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StoreNotWritable(
            f"cannot write {path}: {error.strerror}; choose another --store, or mend its permissions "
            "(it must be a local file system with hard links)",
            path=str(path),
        )
    return StorageFault(f"{path}: {error.strerror or error}", path=str(path))
