"""What servers answered of a label set, kept across restarts in one small file that may always be deleted.

The file lies outside what is hashed and means nothing to a reader; one that does not read, or is of another identity,
counts as none. Servers that share a store overwrite each other's.
"""

import json
import threading
from pathlib import Path

from logitcache.labels.bill import Served
from logitcache.labels.identity import Identity, canonical_json, sha256_hex
from logitcache.storage.files import Files


class ServedTally:
    """The running count of one label set. Safe to use from several threads."""

    def __init__(self, path: Path | None, identity: Identity, files: Files | None = None) -> None:
        """Go on from the file; without a path nothing is kept."""
        self._path, self._identity = path, sha256_hex(canonical_json(identity.to_json()))
        self._files = files or Files()
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._before = self._read()
        self._counted: Served | None = None
        self._saved: Served | None = None

    def count(self, rows: int, seconds: float) -> None:
        """One more answer; touches no disk."""
        with self._lock:
            self._counted = (self._counted or self._before or Served()).plus(rows, seconds)

    def so_far(self) -> Served | None:
        """What was served, by those before, too; None where nobody counted. Others are asked while this one is idle."""
        counted = self._counted
        return self._read() if counted is None else counted

    @property
    def is_unsaved(self) -> bool:
        """Something was counted that is not written down."""
        return self._path is not None and self._counted != self._saved

    def save(self) -> None:
        """Write the count down if it changed and this process may."""
        with self._saving:
            counted = self._counted
            if self._path is None or counted is None or counted == self._saved:
                return
            content = {"identity": self._identity, "rows": counted.rows, "seconds": counted.seconds}
            if self._files.replace_if_possible(self._path, canonical_json(content)):
                self._saved = counted

    def _read(self) -> Served | None:
        if self._path is None:
            return None
        try:
            content = json.loads(self._path.read_bytes())
            return Served.from_json(content) if content["identity"] == self._identity else None
        except (OSError, KeyError, TypeError, ValueError, RecursionError):
            return None
