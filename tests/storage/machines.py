"""What stateful machines share: a reader in another thread, faults, how long they run, and what they did."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tests.storage.faults import FAULTS

from logitcache.labels.errors import LabelSetLocked

DONE = Counter[str]()
"""What the machines did, told at the end."""

FAST = settings(max_examples=25, stateful_step_count=15, deadline=None)

LONG = settings(FAST, max_examples=1500, stateful_step_count=40, suppress_health_check=list(HealthCheck))


class Reading:
    """A thread that reads all along; `check` raises what it came upon since."""

    def __init__(self, read: Callable[[], None]) -> None:
        self._read, self._stop = read, threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="reads all along")
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            try:
                self._read()
            except BaseException as error:
                self._error = error
                return
            DONE["reads in another thread"] += 1

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def retried(act: Callable[[], Any]) -> Any:
    """Its result; a reader may hold the lock for a moment, while it moves damaged files aside."""
    until = time.monotonic() + 30
    while True:
        try:
            return act()
        except LabelSetLocked:
            if time.monotonic() > until:
                raise
            time.sleep(0.001)


def faults(most: int) -> st.SearchStrategy[tuple[str, int] | None]:
    """None, or what befalls the operation of a number: less often, so that things come to an end, too."""
    fault = st.tuples(st.sampled_from(FAULTS), st.integers(0, most))
    return st.none() | st.none() | st.none() | fault
