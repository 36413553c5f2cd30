"""What fetching has cost so far: rows, bytes, requests, and the milliseconds that training steps waited.

Knows nothing of where labels come from. Memory is bounded: sums, and the last `WAITS_KEPT` waits.
"""

import statistics
import threading
from collections import deque
from dataclasses import dataclass

WAITS_KEPT = 4096
"""Waits that the median is taken over: the newest ones."""


@dataclass(frozen=True)
class Stats:
    """A snapshot, counted in this process alone: a DataLoader worker that fetches has its own.

    Attributes:
        rows: soft labels received.
        bytes: bytes of their arrays.
        requests: HTTP requests begun, retries not counted; 0 for a folder.
        retries: requests that were sent again.
        steps: batches that `attach` delivered.
        waited_ms: milliseconds that all those steps waited for their labels.
        waited_ms_mean: per step, over all steps; 0 before the first.
        waited_ms_median: per step, over the last 4,096 steps.
        waited_ms_max: the longest wait of any step.
    """

    rows: int = 0
    bytes: int = 0
    requests: int = 0
    retries: int = 0
    steps: int = 0
    waited_ms: float = 0.0
    waited_ms_mean: float = 0.0
    waited_ms_median: float = 0.0
    waited_ms_max: float = 0.0

    def __str__(self) -> str:
        fetched = (
            f"{self.rows:,} rows, {self.bytes / 1e6:,.1f} MB, {self.requests:,} requests, {self.retries:,} retries"
        )
        if not self.steps:
            return fetched
        return (
            f"{fetched}; {self.steps:,} steps waited {self.waited_ms:,.1f} ms in all "
            f"(a step: mean {self.waited_ms_mean:.2f}, median {self.waited_ms_median:.2f}, "
            f"max {self.waited_ms_max:.2f} ms)"
        )


class Tally:
    """The running counts behind `Stats`. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {"rows": 0, "bytes": 0, "requests": 0, "retries": 0, "steps": 0}
        self._waits_ms: deque[float] = deque(maxlen=WAITS_KEPT)
        self._waited_ms = self._longest_ms = 0.0

    def count(self, **amounts: int) -> None:
        """Add to ``rows``, ``bytes``, ``requests`` or ``retries``."""
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] += amount

    def step_waited(self, milliseconds: float) -> None:
        """Record that one more step was delivered after waiting so long."""
        with self._lock:
            self._counts["steps"] += 1
            self._waits_ms.append(milliseconds)
            self._waited_ms += milliseconds
            self._longest_ms = max(self._longest_ms, milliseconds)

    def snapshot(self) -> Stats:
        """The counts as of now."""
        with self._lock:
            return Stats(
                **self._counts,
                waited_ms=self._waited_ms,
                waited_ms_mean=self._waited_ms / max(1, self._counts["steps"]),
                waited_ms_median=statistics.median(self._waits_ms) if self._waits_ms else 0.0,
                waited_ms_max=self._longest_ms,
            )
