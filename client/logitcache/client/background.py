"""One background thread that works through tasks in order, and is gone when it is closed.

It knows nothing of what the tasks do.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

GRACE_S = 1.0
"""Longest that `close` waits for the task under way. A fetch from a server that is gone may take until its deadline;
the thread is a daemon and is left to end by itself then, so that neither leaving a loop nor Ctrl-C hangs."""

Result = TypeVar("Result")


class BackgroundThread(Generic[Result]):
    """Runs what is submitted, one after the other.

    The pool of concurrent.futures was rejected: the interpreter joins it at exit, however long its task takes.
    """

    def __init__(self, name: str) -> None:
        self._tasks: SimpleQueue[tuple[Future[Result], Callable[[], Result]] | None] = SimpleQueue()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], Result]) -> "Future[Result]":
        """The future result of a task, which runs after those submitted before it."""
        future: Future[Result] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Drop the tasks that have not begun, and wait for the one under way for at most `GRACE_S` seconds."""
        self._closed.set()
        with suppress(Empty):
            while True:
                self._tasks.get_nowait()
        self._tasks.put(None)
        self._thread.join(GRACE_S)

    def _work(self) -> None:
        while (entry := self._tasks.get()) is not None and not self._closed.is_set():
            future, task = entry
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001 - whatever it is belongs to whoever waits for the result
                future.set_exception(error)
            del entry, future, task  # hold no batch while waiting for the next task
