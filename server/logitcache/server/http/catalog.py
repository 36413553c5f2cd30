"""The label sets of one store, opened when first asked for and kept open.

A name is looked up among the folders of the store and never joined to a path unseen. Folders that appear or go are
noticed within `LOOK_AGAIN_S`; one that cannot be opened is logged and answers with its own error, and the others are
served all the same. Knows nothing of HTTP.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from logitcache.labels.errors import LogitcacheError, StorageFault, StoreNotFound, Unavailable
from logitcache.labels.identity import check_name
from logitcache.labels.label_set import Description, Limits
from logitcache.server.http.name_locks import NameLocks
from logitcache.server.logs import logger
from logitcache.server.names import not_found
from logitcache.storage import Readable, label_set_names, open_label_set
from logitcache.storage.places import Places

LOOK_AGAIN_S = 0.5
"""How long a listing of the store is trusted."""

IN_USE_S = 60.0
"""How long a label set stays open that is gone or was replaced: a request may be reading from it."""

AWAY_S = 5.0
"""When to ask again for a store that is not there."""

Manifest = tuple[int, int, int]
"""What tells a label set from another of the same name: device, inode and time of its manifest, or of what its
recording was begun with.
"""

_log = logger(__name__)


class Catalog:
    """Open label sets by name. Safe to use from several threads."""

    def __init__(
        self,
        store: Path,
        *,
        verify: Literal["strict", "background"] = "strict",
        scrub_s: float | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.store = store.absolute()
        self._verify: Literal["strict", "background"] = verify
        self._scrub_s = scrub_s
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Manifest | None, Readable]] = {}
        self._retired: list[tuple[float, Readable]] = []
        self._opening = NameLocks()
        self._complained: dict[str, str] = {}
        self._names: list[str] = []
        self._looked_at = float("-inf")

    def names(self) -> list[str]:
        """Names of the label sets that the store holds now, sorted.

        Raises:
            Unavailable: the store is not there, or cannot be listed.
        """
        with self._lock:
            return list(self._look())

    def get(self, name: str) -> Readable:
        """The label set of that name, opened if it was not.

        Raises:
            InvalidName: no label set can have this name.
            LabelSetNotFound: the store holds none of this name; ``details["available"]`` lists those it holds.
            Unavailable: the store is not there, or cannot be listed.
            StorageFault: the label set cannot be read.
        """
        check_name(name)
        with self._lock:
            names = self._look()
            if name not in names:
                raise not_found(name, names)
            if name in self._open:
                return self._open[name][1]
        with self._opening.of(name):
            with self._lock:
                if name in self._open:
                    return self._open[name][1]
            opened = (self._manifest(name), self._open_one(name))
            with self._lock:
                self._open[name] = opened
            return opened[1]

    def at_hand(self, name: str) -> Readable | None:
        """The label set of that name if it is known without looking at the disk; else ask `get`."""
        opened = self._open.get(name)
        if opened is None or time.monotonic() - self._looked_at >= LOOK_AGAIN_S:
            return None
        return opened[1]

    def look_again(self) -> None:
        """Somebody in this process changed the store: believe no listing that was made before."""
        with self._lock:  # one that is being made is waited for
            self._looked_at = float("-inf")

    def descriptions(self) -> Iterator[Description]:
        """Description of each label set that can be opened; those that cannot are in the log."""
        for name in self.names():
            try:
                yield self.get(name).describe()
            except LogitcacheError as error:
                self._complain(name, error)

    def save_tallies(self) -> None:
        """Write down what was served of each open label set, where it changed and this process may; called now and
        then, so what nobody reads from any more is closed as well.
        """
        with self._lock:
            self._close_retired(time.monotonic() - IN_USE_S)
            opened = [label_set for _, label_set in self._open.values()]
        for label_set in opened:
            label_set.save_tally()

    def close(self) -> None:
        """Close every label set. One that is asked for afterwards is opened anew."""
        with self._lock:
            for name in list(self._open):
                self._retire(name)
            self._close_retired(float("inf"))

    def _look(self) -> list[str]:
        """List the store if the last listing is old, and forget what is gone or was replaced."""
        if time.monotonic() - self._looked_at < LOOK_AGAIN_S:
            return self._names
        try:
            self._names = label_set_names(self.store)
        except (StoreNotFound, StorageFault) as error:
            # It was there when the server started: a mount that comes back, most likely.
            away = Unavailable(f"the store cannot be read now: {error.message}", cause=error.code)
            away.retry_after_s = AWAY_S
            raise away from error
        self._looked_at = time.monotonic()
        self._close_retired(self._looked_at - IN_USE_S)
        for name in list(self._open):
            if name not in self._names or not self._still_stands(name):
                _log.info("label set closed", label_set=name, why="its folder is gone or was replaced")
                self._retire(name)
        return self._names

    def _still_stands(self, name: str) -> bool:
        """The open label set is the one in its folder; it may have grown, which gives it another manifest."""
        manifest, label_set = self._open[name]
        if (now := self._manifest(name)) == manifest:
            return True
        try:
            if label_set.is_replaced:
                return False
        except LogitcacheError:
            return False  # opening it anew tells what is wrong
        self._open[name] = (now, label_set)
        return True

    def _open_one(self, name: str) -> Readable:
        try:
            label_set = open_label_set(
                self.store / name, verify=self._verify, scrub_s=self._scrub_s, limits=self._limits
            )
        except LogitcacheError as error:
            self._complain(name, error)
            raise
        self._complained.pop(name, None)
        _log.info("label set opened", label_set=name, path=str(self.store / name))
        return label_set

    def _retire(self, name: str) -> None:
        """Give it to nobody from now on."""
        self._retired.append((time.monotonic(), self._open.pop(name)[1]))

    def _close_retired(self, before_s: float) -> None:
        while self._retired and self._retired[0][0] <= before_s:
            self._retired.pop(0)[1].close()

    def _manifest(self, name: str) -> Manifest | None:
        places = Places(self.store / name)
        for path in (places.recording, places.group):
            with suppress(OSError):
                status = path.stat()
                return status.st_dev, status.st_ino, status.st_mtime_ns
        return None

    def _complain(self, name: str, error: LogitcacheError) -> None:
        """Log what is wrong with a label set, once until it changes."""
        if self._complained.get(name) != error.message:
            self._complained[name] = error.message
            _log.error("label set cannot be served", label_set=name, code=error.code, detail=error.message)
