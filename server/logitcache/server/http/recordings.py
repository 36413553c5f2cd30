"""The recordings of one store, opened for writing when first recorded into; and their sealing, behind the requests.

Knows nothing of HTTP.
"""

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from logitcache.labels.errors import InvalidRequest, LogitcacheError, RequestRefused, Unavailable
from logitcache.labels.identity import check_name
from logitcache.labels.ids import Ids
from logitcache.labels.recorded import RecordedRows, RecordingTerms, Stand, Who
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.name_locks import NameLocks
from logitcache.server.logs import logger
from logitcache.storage import Recording
from logitcache.storage.places import Places

MOST_OPEN = 64
"""Recordings that are held open, of three descriptors each. Beyond it the one that was not used longest is closed, and
opened anew when it is recorded into."""

_log = logger(__name__)


class Recordings:
    """Recordings by name. Safe to use from several threads."""

    def __init__(self, catalog: Catalog, *, allowed: bool) -> None:
        self._catalog, self._store, self._allowed = catalog, catalog.store, allowed
        self._lock = threading.Lock()
        self._open: dict[str, Recording] = {}
        self._opening = NameLocks()
        self._sealings: dict[str, Future[None]] = {}
        self._threads, self._stopping = ThreadPoolExecutor(1, "seal"), threading.Event()

    def begin(self, name: str, terms: RecordingTerms, who: Who, ids: Ids | None, like: str | None) -> Stand:
        """A recorder begins; ``ids`` are those of the examples, or of ``like``, another label set of the store.

        Raises:
            RequestRefused: this server does not record.
            LogitcacheError: as `storage.recording.Recording` and its ``begin``.
        """
        self.check(name)
        if like is not None:
            if ids is not None:
                raise InvalidRequest("ids and like both say what the examples are: give one of them")
            ids = self._catalog.get(like).example_ids()
        recording = self._opened(name, terms, ids)
        self._catalog.look_again()
        recording.begin(who)
        return recording.stand()

    def append(self, name: str, rows: RecordedRows, who: Who) -> None:
        """Make rows durable; errors as of `Recording.append`."""
        self.check(name)
        self._opened(name).append(rows, who)

    def finish(self, name: str, who: Who, *, part: bool) -> Stand:
        """A recorder has finished. When all have, and every example has rows or ``part`` is said, it is sealed behind
        this; ask again to learn of the digest, or of the error.
        """
        self.check(name)
        with self._lock:
            under_way = self._sealings.get(name)
            if under_way is not None and under_way.done():
                self._sealings.pop(name).result()
            # Taken under the lock, under which it is let go of once it is sealed.
            sealing = self._open.get(name) if under_way is not None and not under_way.done() else None
        if sealing is not None:
            return replace(sealing.stand(), sealing=True)
        if not Places(self._path(name)).recording.exists():
            described = self._catalog.get(name).describe()
            return Stand(described.examples, described.labelled, described.rows, digest=described.digest)
        recording = self._opened(name)
        recording.finish(who)
        stand = recording.stand()
        all_finished = len(stand.finished) == recording.terms.recorders
        may = stand.recorded == stand.examples or (part and stand.recorded > 0)
        if not stand.sealing and not (all_finished and may):
            return stand
        with self._lock:
            if name not in self._sealings:
                self._sealings[name] = self._threads.submit(self._seal, name, recording, part)
        return replace(stand, sealing=True)

    def _seal(self, name: str, recording: Recording, part: bool) -> None:
        try:
            generation = recording.seal(part=part, progress=self._go_on)
        except LogitcacheError as error:
            _log.error("recording not sealed", label_set=name, code=error.code, detail=error.message)
            raise
        with self._lock:
            self._forget(name)
        self._catalog.look_again()
        _log.info("recording sealed", label_set=name, digest=generation.digest, examples=generation.examples)

    def _go_on(self, _done: int, _total: int) -> None:
        if self._stopping.is_set():
            raise Unavailable("the server is shutting down; what is sealed already is kept, finish again to go on")

    def close(self) -> None:
        """Let other processes record. What is being sealed is left where it is, and taken up by the next `finish`."""
        self._stopping.set()
        self._threads.shutdown()
        with self._lock:
            for name in list(self._open):
                self._forget(name)

    def check(self, name: str) -> None:
        """Refuse what could not be recorded whatever it is.

        Raises:
            InvalidName: no label set can have this name.
            RequestRefused: this server does not record.
        """
        check_name(name)
        if not self._allowed:
            raise RequestRefused(
                "this server does not record: start it with `logitcache serve --record`, so that whoever can connect "
                "may write label sets into its store",
                status=403,
            )

    def _opened(self, name: str, terms: RecordingTerms | None = None, ids: Ids | None = None) -> Recording:
        """The recording of that name, opened if it was not or is of no use any more; ``terms`` begin it, or are
        checked.
        """
        with self._opening.of(name):
            with self._lock:
                found = self._open.get(name)
                if found is not None and (found.is_removed or found.is_broken):
                    self._forget(name)
                    found = None
                if found is not None:
                    self._open[name] = self._open.pop(name)  # used last
            if found is not None:
                if terms is not None:
                    found.check_terms(terms, ids)
                return found
            found = Recording(self._path(name), terms, ids)
            with self._lock:
                idle = next((other for other in self._open if other not in self._sealings), None)
                if len(self._open) >= MOST_OPEN and idle is not None:
                    self._forget(idle)
                self._open[name] = found
                if self._stopping.is_set():  # too late for `close`
                    self._forget(name)
        if terms is not None:
            _log.info("recording begun", label_set=name, run=terms.identity.teacher.name)
        return found

    def _path(self, name: str) -> Path:
        return self._store / name

    def _forget(self, name: str) -> None:
        if name in self._open:
            self._open.pop(name).close()
