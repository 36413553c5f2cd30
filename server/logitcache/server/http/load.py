"""How much a server takes on at once: bytes of requests and answers, and requests that wait for a thread.

What is beyond is answered at once, with 503 and when to come back, before anything is allocated for it; what is within
is then done in time. Knows nothing of routes or label sets.
"""

import math
import threading
import time

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from logitcache.labels.errors import ServerBusy
from logitcache.server.http.record import Record
from logitcache.server.logs import logger

MOST_BYTES = 1 << 30
"""Of requests that are read, answers that are made, and answers that are not taken yet, together."""

MOST_WAITING = 64
"""Requests that wait for a thread: with 8 threads, the last of them waits for the time of eight requests."""

RETRY_AFTER_S = 1.0

TELL_EVERY_S = 10.0
"""Seconds between two lines in the log about what was refused."""

_log = logger(__name__)


async def enough_threads(request: Request) -> None:
    """What routes depend on that are plain functions, for each of which the framework takes one of its threads.

    Raises:
        ServerBusy: it would wait for one behind too many others.
    """
    load: Load = request.app.state.load
    load.check_queue(to_thread.current_default_thread_limiter())


class Load:
    """What is under way. Safe to use from several threads."""

    def __init__(self, most_bytes: int = MOST_BYTES, most_waiting: int = MOST_WAITING) -> None:
        self._most_bytes, self._most_waiting = most_bytes, most_waiting
        self._lock = threading.Lock()
        self._refused, self._told_s = 0, -math.inf
        self.bytes = 0
        """Of requests and answers that are under way."""

    def hold(self, record: Record, count: int) -> None:
        """Count so many bytes more as under way, until the request of this record is answered.

        A request that is alone may have any number.

        Raises:
            ServerBusy: they would be too many.
        """
        with self._lock:
            others = self.bytes - record.held_bytes
            if others and self.bytes + count > self._most_bytes:
                raise self._busy(f"{others:,} bytes of other requests and answers are under way")
            self.bytes += count
        record.held_bytes += count

    def settle(self, record: Record, held: int, found: int) -> None:
        """What was held as so many bytes is of another size."""
        self.add(found - held)
        record.held_bytes += found - held

    def add(self, count: int) -> None:
        """Count so many bytes that are there already; fewer, where it is negative."""
        with self._lock:
            self.bytes += count

    def check_queue(self, threads: CapacityLimiter) -> None:
        """Refuse a request that would wait for a thread behind too many others.

        Raises:
            ServerBusy: so many wait already.
        """
        if (waiting := threads.statistics().tasks_waiting) >= self._most_waiting:
            raise self._busy(f"{waiting:,} requests are waiting")

    def _busy(self, why: str) -> ServerBusy:
        """The refusal, which is logged now and then: it comes by the thousand when it comes."""
        self._refused += 1
        now_s = time.monotonic()
        if now_s - self._told_s >= TELL_EVERY_S:
            _log.warning("overloaded", why=why, refused=self._refused)
            self._refused, self._told_s = 0, now_s
        error = ServerBusy(f"the server is overloaded: {why}; ask again in a second")
        error.retry_after_s = RETRY_AFTER_S
        return error
