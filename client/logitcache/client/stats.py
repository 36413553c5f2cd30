"""What fetching has cost so far: rows, bytes, requests, the milliseconds that training steps waited, and those hidden.

Knows nothing of where labels come from. Memory is bounded: sums, and the last `WAITS_KEPT` waits.
"""

import statistics
import threading
from collections import deque
from dataclasses import dataclass, replace

from logitcache.labels.bill import Bill, TeacherTime

WAITS_KEPT = 4096
"""Waits that the median and the 99th percentile are taken over: the newest ones."""


@dataclass(frozen=True)
class Stats:
    """A snapshot, counted in this process alone: a DataLoader worker that fetches has its own.

    Attributes:
        rows: soft labels received.
        bytes: bytes of their arrays.
        requests: HTTP requests begun, retries not counted; 0 for a folder.
        retries: requests that were sent again.
        fetch_ms: milliseconds that all fetches took together, in whatever thread; with checks of inputs, and without
            waiting for labels that were still being made.
        steps: batches that `attach` delivered.
        waited_ms: milliseconds that all those steps waited for their labels, on their device if one was named.
        waited_ms_mean: per step, over all steps; 0 before the first.
        waited_ms_median: per step, over the last 4,096 steps.
        waited_ms_p99: 99 of 100 of these steps waited no longer.
        waited_ms_max: the longest wait of any step.
        hidden_ms: milliseconds that fetching the labels of these steps took, and turning them into tensors, beyond what
            the step waited: the time that fetching ahead hid.
        hidden_ms_mean: per step, over all steps.
        step_bytes_mean: bytes of the arrays of one step's labels, over all steps.
        depth: batches ahead that labels are fetched for, as of the last step.
        bill: what these rows would have taken the teacher, beside what fetching them took; None where the label set
            does not tell its teacher's time, or no call needed it yet.
    """

    rows: int = 0
    bytes: int = 0
    requests: int = 0
    retries: int = 0
    fetch_ms: float = 0.0
    steps: int = 0
    waited_ms: float = 0.0
    waited_ms_mean: float = 0.0
    waited_ms_median: float = 0.0
    waited_ms_p99: float = 0.0
    waited_ms_max: float = 0.0
    hidden_ms: float = 0.0
    hidden_ms_mean: float = 0.0
    step_bytes_mean: float = 0.0
    depth: int = 0
    bill: Bill | None = None

    def __str__(self) -> str:
        fetched = (
            f"{self.rows:,} rows, {self.bytes / 1e6:,.1f} MB, {self.requests:,} requests, {self.retries:,} retries"
        )
        bill = f"; {self.bill}" if self.bill else ""
        if not self.steps:
            return fetched + bill
        return (
            f"{fetched}; {self.steps:,} steps of {self.step_bytes_mean / 1e6:,.2f} MB, fetched {self.depth} ahead: "
            f"waited {self.waited_ms_mean:,.2f} ms a step (median {self.waited_ms_median:,.2f}, "
            f"p99 {self.waited_ms_p99:,.2f}, max {self.waited_ms_max:,.2f}), hid {self.hidden_ms_mean:,.2f} ms a step"
            f"{bill}"
        )


class Tally:
    """The running counts behind `Stats`. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {"rows": 0, "bytes": 0, "requests": 0, "retries": 0}
        self._waits_ms: deque[float] = deque(maxlen=WAITS_KEPT)
        self._fetch_ms = self._waited_ms = self._longest_ms = self._hidden_ms = 0.0
        self._steps = self._step_bytes = self._depth = 0

    def count(self, *, fetch_ms: float = 0.0, **amounts: int) -> None:
        """Add to ``rows``, ``bytes``, ``requests``, ``retries`` or ``fetch_ms``."""
        with self._lock:
            self._fetch_ms += fetch_ms
            for name, amount in amounts.items():
                self._counts[name] += amount

    def step(self, *, waited_ms: float, fetched_ms: float, label_bytes: int, depth: int) -> None:
        """Record one more step: how long it waited for its labels, how long they took, their bytes, the depth."""
        with self._lock:
            self._steps += 1
            self._waits_ms.append(waited_ms)
            self._waited_ms += waited_ms
            self._hidden_ms += max(0.0, fetched_ms - waited_ms)
            self._step_bytes += label_bytes
            self._depth = depth
            if waited_ms > self._longest_ms:
                self._longest_ms = waited_ms

    def snapshot(self, teacher_time: TeacherTime | None = None) -> Stats:
        """The counts as of now; with the bill where it is known what labelling took."""
        with self._lock:
            waits_ms = list(self._waits_ms)
            stats = Stats(
                rows=self._counts["rows"],
                bytes=self._counts["bytes"],
                requests=self._counts["requests"],
                retries=self._counts["retries"],
                fetch_ms=self._fetch_ms,
                steps=self._steps,
                waited_ms=self._waited_ms,
                waited_ms_mean=self._waited_ms / max(1, self._steps),
                waited_ms_max=self._longest_ms,
                hidden_ms=self._hidden_ms,
                hidden_ms_mean=self._hidden_ms / max(1, self._steps),
                step_bytes_mean=self._step_bytes / max(1, self._steps),
                depth=self._depth,
            )
        if teacher_time is not None:
            stats = replace(stats, bill=Bill(teacher_time, stats.rows, stats.fetch_ms / 1000))
        if not waits_ms:
            return stats
        waits_ms.sort()  # outside the lock, which steps take, too
        p99 = waits_ms[(99 * len(waits_ms) - 1) // 100]
        return replace(stats, waited_ms_median=statistics.median(waits_ms), waited_ms_p99=p99)
