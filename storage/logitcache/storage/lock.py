"""Who writes a label set: an advisory file lock that dies with its process, however that dies."""

import contextlib
import fcntl
import json
import os
import platform
import stat
import weakref
from pathlib import Path
from types import TracebackType

from logitcache.labels.errors import LabelSetLocked, StorageFault
from logitcache.storage.files import explained
from logitcache.storage.reading import refuse_links, status


class WriterLock:
    """Held from construction to `release`: this process alone changes the label set.

    The kernel gives the lock up when the process ends; the file stays and says who held it last. Who holds it moves and
    removes files, so it is not given where a symbolic link in the label set would lead that elsewhere.

    Raises:
        LabelSetLocked: another process, or another holder in this one, has it; or it was removed at this moment.
        StoreNotWritable: the lock file cannot be opened for writing.
        StorageFault: the label set's folder is a symbolic link or holds one, or the lock is no file.
    """

    def __init__(self, path: Path) -> None:
        with explained(path):
            refuse_links(path.parent)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._handle = os.open(path, flags, 0o644)
            try:
                self._take(path)
            except BaseException:
                os.close(self._handle)
                raise
        _held.add(self)

    def _take(self, path: Path) -> None:
        found = os.fstat(self._handle)
        if not stat.S_ISREG(found.st_mode):
            raise StorageFault(f"{path} is not a regular file: remove it", path=str(path))
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._handle, 4096, 0).decode(errors="replace").strip()
            raise LabelSetLocked(
                f"label set {path.parent.name!r} is being written by another process ({holder or 'unknown'}): "
                "wait for it, or stop it; nothing was changed",
                label_set=path.parent.name,
            ) from None
        self._path = path
        if self.is_removed:
            raise LabelSetLocked(
                f"label set {path.parent.name!r} was removed while it was being locked: run the same command again",
                label_set=path.parent.name,
            )
        if found.st_nlink > 1:
            return  # Whose other name it is cannot be told: it is not written to.
        # The note is for people; on a full disk the lock holds without it.
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode(), 0)

    @property
    def is_removed(self) -> bool:
        """What stands under its name is another file, or none: whoever holds that one may write there now."""
        stands, held = status(self._path), os.fstat(self._handle)
        return stands is None or (stands.st_ino, stands.st_dev) != (held.st_ino, held.st_dev)

    def release(self) -> None:
        """Let others write; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        _held.discard(self)

    def __enter__(self) -> "WriterLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


_held: "weakref.WeakSet[WriterLock]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A fork shares the lock: a DataLoader worker that outlives a killed writer would hold it on."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)
