"""What servers answered of a label set, kept across restarts in one small file that may always be deleted.

The file lies outside what is hashed and means nothing to a reader; one that does not read, or is of another identity,
counts as none. Servers that share a store, and the processes of one, add to it in turn.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from logitcache.labels.bill import Served
from logitcache.labels.errors import StorageFault
from logitcache.labels.identity import Identity, canonical_json, sha256_hex
from logitcache.storage.files import Files
from logitcache.storage.reading import parsed, read_file

MAX_BYTES = 4096
"""A longer file counts as none."""


class ServedTally:
    """The running count of one label set. Safe to use from several threads."""

    def __init__(self, path: Path | None, identity: Identity, files: Files | None = None) -> None:
        """Add to the file; without a path nothing is kept."""
        self._path, self._identity = path, sha256_hex(canonical_json(identity.to_json()))
        self._files = files or Files()
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._counted, self._saved = Served(), Served()

    def count(self, rows: int, seconds: float) -> None:
        """One more answer; touches no disk."""
        with self._lock:
            self._counted = self._counted.plus(rows, seconds)

    def so_far(self) -> Served | None:
        """What was served, by those before and by others, too; None where nobody counted."""
        written, counted = self._read(), self._unsaved(self._counted)
        return written if counted == Served() else (written or Served()).plus(counted.rows, counted.seconds)

    @property
    def is_unsaved(self) -> bool:
        """Something was counted that is not written down."""
        return self._path is not None and self._counted != self._saved

    def save(self) -> None:
        """Add to what is written down if something was counted and this process may."""
        with self._saving:
            counted = self._counted
            if self._path is None or counted == self._saved:
                return
            with _alone(self._path.parent):
                more = self._unsaved(counted)
                total = (self._read() or Served()).plus(more.rows, more.seconds)
                content = {"identity": self._identity, "rows": total.rows, "seconds": total.seconds}
                if self._files.replace_if_possible(self._path, canonical_json(content)):
                    self._saved = counted

    def _unsaved(self, counted: Served) -> Served:
        return Served(counted.rows - self._saved.rows, max(0.0, counted.seconds - self._saved.seconds))

    def _read(self) -> Served | None:
        if self._path is None:
            return None
        try:
            content = parsed(read_file(self._path.parent, self._path, MAX_BYTES))
            return Served.from_json(content) if content["identity"] == self._identity else None
        except (OSError, StorageFault, KeyError, TypeError, ValueError):
            return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process of this machine adds; where folders cannot be locked, at the risk of losing a count."""
    handle = -1
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)
