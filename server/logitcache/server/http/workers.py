"""Several processes that serve together: begun, watched, replaced when one dies, and stopped as one.

All accept connections of one socket. They share nothing else but the disk: each opens the label sets for itself, and
their counters lie in a folder (see `metrics`).
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Literal, Protocol

from prometheus_client.multiprocess import mark_process_dead

from logitcache.labels.errors import ServerFault
from logitcache.server import logs
from logitcache.server.http.metrics import SHARED

STOP_S = 10.0
"""Until workers that were told to stop are killed: more than they take to finish what is under way."""

MOST_FAILURES, CALM_S = 5, 60.0
"""Workers that may die within so many seconds before the server gives up: something is wrong that does not pass."""

LOOK_EVERY_S = 0.2

_spawn = multiprocessing.get_context("spawn")
_log = logs.logger(__name__)


class Working(Protocol):
    """What a worker does; it can be sent to another process."""

    @property
    def log_level(self) -> Literal["debug", "info", "warning"]:
        """Of its log."""

    def run(self, ready: Callable[[], object]) -> None:
        """Do it until told to stop by SIGTERM; ``ready`` is called when it is up."""


@dataclass
class _Worker:
    process: SpawnProcess
    told: Connection
    is_ready: bool = False


def supervise(work: Working, workers: int, ready: Callable[[], object]) -> None:
    """Have so many processes do this work until SIGTERM or Ctrl-C; ``ready`` is called once, when all are up.

    Raises:
        ServerFault: they die again and again.
        KeyboardInterrupt: ended by Ctrl-C.
    """
    stopping = threading.Event()
    interrupted = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = interrupted or number == signal.SIGINT
        stopping.set()

    with tempfile.TemporaryDirectory(prefix="logitcache-metrics-") as shared:
        os.environ[SHARED] = shared
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        running: list[_Worker] = []
        try:
            running += [_begun(work) for _ in range(workers)]
            _watch(work, running, ready, stopping)
        finally:
            _stop(running)
            del os.environ[SHARED]
            for number, handler in before.items():
                signal.signal(number, handler)
    if interrupted:
        raise KeyboardInterrupt


def _watch(work: Working, running: list[_Worker], ready: Callable[[], object], stopping: threading.Event) -> None:
    died: list[float] = []
    told = False
    while not stopping.is_set():
        wait([worker.process.sentinel for worker in running], LOOK_EVERY_S)
        for at, worker in enumerate(running):
            worker.is_ready = worker.is_ready or worker.told.poll()
            if worker.process.is_alive() or stopping.is_set():
                continue
            now_s = time.monotonic()
            died = [when for when in died if now_s - when < CALM_S] + [now_s]
            mark_process_dead(worker.process.pid)  # type: ignore[no-untyped-call]
            if len(died) >= MOST_FAILURES:
                raise ServerFault(f"{len(died)} worker processes died within {CALM_S:g} s; the log has the reason")
            _log.error("a worker died and is replaced", pid=worker.process.pid, exit=worker.process.exitcode)
            worker.told.close()
            running[at] = _begun(work)
        if not told and all(worker.is_ready for worker in running):
            told = True
            ready()


def _begun(work: Working) -> _Worker:
    told, tell = _spawn.Pipe(duplex=False)
    process = _spawn.Process(target=_work, args=(work, tell), name="logitcache-worker", daemon=False)
    process.start()
    tell.close()
    return _Worker(process, told)


def _stop(running: list[_Worker]) -> None:
    until_s = time.monotonic() + STOP_S
    for worker in running:
        worker.process.terminate()
    for worker in running:
        worker.process.join(max(0.0, until_s - time.monotonic()))
        if worker.process.is_alive():
            _log.warning("a worker did not stop and is killed", pid=worker.process.pid)
            worker.process.kill()
            worker.process.join()
        worker.told.close()


def _work(work: Working, tell: Connection) -> None:
    """In a worker. Ctrl-C at a terminal reaches all processes; the supervisor says what follows from it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(level=work.log_level)
    _die_with_the_supervisor()
    work.run(lambda: tell.send(None))


def _die_with_the_supervisor() -> None:
    """A supervisor that is killed leaves nobody who would stop its workers: they stop by themselves."""
    supervisor = multiprocessing.parent_process()

    def watch() -> None:
        if supervisor is not None:
            supervisor.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="logitcache-supervisor", daemon=True).start()
