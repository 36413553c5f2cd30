"""Readers of hostile input, held to a bound of memory and of time."""

import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from typing import Any

from logitcache.labels import wire
from logitcache.labels.errors import LogitcacheError

MOST_BYTES = 48 * wire.MAX_HEADER_BYTES
"""Memory that reading any body of these may take: a header at its limit is 3 MB of Python's objects. None of the sizes
that a body tells of counts."""

MOST_S = 2.0
"""Seconds of a processor that reading one may take; what is quadratic in a header of 64 KiB takes longer."""

Reader = Callable[[bytes], Any]


class Bounded:
    """Reads bodies, and fails where one takes more memory or time than it may. Counts what came of them."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.peak_bytes, self.longest_s = 0, 0.0

    def __enter__(self) -> "Bounded":
        tracemalloc.start()
        return self

    def __exit__(self, *_error: object) -> None:
        tracemalloc.stop()

    def read(self, body: bytes, reader: Reader, errors: tuple[type[LogitcacheError], ...]) -> Any:
        """What the reader gives, or the error of these kinds that it raised."""
        tracemalloc.reset_peak()
        before, began = tracemalloc.get_traced_memory()[0], time.thread_time()
        try:
            found = reader(body)
        except errors as error:
            found = error
        took_s, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1] - before
        assert took_s < MOST_S, (took_s, body[:200])
        assert peak < MOST_BYTES, (peak, body[:200])
        self.longest_s, self.peak_bytes = max(self.longest_s, took_s), max(self.peak_bytes, peak)
        self.found[type(found).__name__ if isinstance(found, Exception) else "taken"] += 1
        return found

    def __str__(self) -> str:
        told = ", ".join(f"{name} {count:,}" for name, count in self.found.most_common())
        return f"{told}; at most {self.peak_bytes / 2**20:.1f} MiB and {1000 * self.longest_s:.0f} ms each"


def said_apart(statement: str) -> str:
    """The last line that a statement prints in a process of its own: without the run-time check of annotations, as it
    is shipped, and ten times as fast."""
    done = subprocess.run([sys.executable, "-c", statement], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]
