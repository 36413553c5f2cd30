"""Commits behind the labelling: a thread checks, hashes and writes one shard while the teacher labels the next.

One commit is under way at a time, in the order in which they were begun: there is never more than the shard that is
filled and the one that is written. It knows no teacher and no batches.
"""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any

from logitcache.server.labelling.shard_arrays import ShardArrays
from logitcache.storage.statistics import retained_mass
from logitcache.storage.writer import LabelSetWriter


class Commits:
    """Commits of one writer, in a thread of their own; a context manager whose end is the end of that thread.

    While a commit is under way nobody else may use the writer; after `wait` none is. Left by an error, it lets the
    commit that is under way finish first. If that fails too, its error is raised: without a thread, it would have come
    first. An interrupt stays one.
    """

    def __init__(self, writer: LabelSetWriter) -> None:
        self._writer, self._thread = writer, ThreadPoolExecutor(1, "commit")
        self._under_way: Future[None] | None = None

    def begin(self, shard: int, filled: ShardArrays, statistics: dict[str, Any]) -> None:
        """Begin to commit a shard, whose arrays must not be changed from now on; its retained mass is added.

        Raises:
            LogitcacheError: as `LabelSetWriter.commit`, for the shard before; this one is not committed then.
        """
        self.wait()
        self._under_way = self._thread.submit(self._commit, shard, filled, statistics)

    def _commit(self, shard: int, filled: ShardArrays, statistics: dict[str, Any]) -> None:
        statistics = {"retained_mass": retained_mass(filled.soft_labels())} | statistics
        self._writer.commit(shard, filled.arrays, statistics, filled.texts)

    def check(self) -> None:
        """Raise what the commit under way ended with, if it did; return at once if it goes on."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Return when no commit is under way.

        Raises:
            LogitcacheError: as `LabelSetWriter.commit`.
        """
        if self._under_way is not None:
            wait([self._under_way])
            ended, self._under_way = self._under_way, None
            ended.result()

    def __enter__(self) -> "Commits":
        # An interrupt while a thread starts would leave it unknown to its pool: it starts where nothing depends on it.
        self._thread.submit(_nothing).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = False
        while not ended:
            # Interrupted again, it waits on: the writer's lock must not be given up while its files are written. Not
            # waited for is `_under_way`, which an interrupt may have kept from being set, nor the thread: of an
            # interrupted `Thread.join` Python 3.11 believes that the thread ended.
            with contextlib.suppress(BaseException):
                self._thread.submit(_nothing).result()
                ended = True
        self._thread.shutdown()
        if isinstance(error, Exception):
            self.wait()


def _nothing() -> None:
    """What is done when all that was begun before is done."""
