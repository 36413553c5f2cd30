"""A job from inside: how the process of a precompute tells the server that began it how far it is and how it ended.

What it says is files in the job's folder, so it is heard by a server that was not there at the time. The folder comes
in an environment variable; without it nothing is recorded. Knows no pydantic: a machine that only labels has none.
"""

import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.labels.errors import JobKilled, LabelSetLocked, LogitcacheError, ServerFault
from logitcache.labels.identity import canonical_json
from logitcache.storage.files import Files
from logitcache.storage.lock import WriterLock

VARIABLE = "LOGITCACHE_JOB"
"""Environment variable that makes a precompute a job: the job's folder."""

GO = "go\n"
"""What the server writes to the process once it has written down which process that is."""

PROGRESS, OUTCOME = "progress.json", "outcome.json"

ALIVE = "alive.lock"
"""Locked while the job's process lives: who cannot see its number, being in another container, sees this."""

TRACEBACK = "traceback.txt"
"""Where an error, or a signal that ends the process, says which line it was at: for whoever runs the server."""

LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class Recording:
    """Where a job's process writes; a folder of None is nowhere."""

    folder: Path | None = None

    @property
    def progress(self) -> Path | None:
        """The file that always says how far it is."""
        return self.folder and self.folder / PROGRESS

    def succeeded(self, digest: str) -> None:
        """Record, durably, that the label set is complete with this digest."""
        if self.folder is not None:
            write_json(self.folder / OUTCOME, {"digest": digest})

    def failed(self, error: Exception) -> None:
        """Record why it failed. A disk that is full keeps this, too, from being written: the log has it."""
        if self.folder is None:
            return
        if isinstance(error, LogitcacheError):
            code, message = error.code, error.message
        else:
            code, message = ServerFault.code, _unexpected(error).message
        # Names of files that are not UTF-8 come as lone surrogates, which no JSON that others read can hold.
        message = message[:LONGEST_MESSAGE].encode(errors="replace").decode()
        with contextlib.suppress(LogitcacheError):
            write_json(self.folder / OUTCOME, {"error": {"code": code, "message": message}})


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Record how the work inside fails; it says itself when it succeeds. An interrupt is no outcome.

    Raises:
        JobKilled: the server ended before it had written down that this process is the job's, or another process of
            the job lives. Nothing was begun: two processes of one job never run.
    """
    # Taken away, so that what user code starts is not mistaken for the job.
    variable = os.environ.pop(VARIABLE, None)
    if variable is None:
        yield Recording()
        return
    folder = Path(variable)
    with _alive(folder), (folder / TRACEBACK).open("wb", buffering=0) as trace:
        faulthandler.enable(trace)
        if sys.stdin.readline() != GO:
            raise JobKilled("the server that began this job was gone at once; the next one begins it anew")
        recording = Recording(folder)
        try:
            yield recording
        except Exception as error:
            recording.failed(error)
            with contextlib.suppress(OSError):
                trace.write("".join(traceback.format_exception(error)).encode(errors="replace"))
            if isinstance(error, LogitcacheError):
                raise
            # What it prints is told over HTTP, where our own lines have no place.
            raise _unexpected(error) from None
        finally:
            faulthandler.disable()


def _unexpected(error: Exception) -> ServerFault:
    return ServerFault(f"it raised {type(error).__name__}: {error}; {TRACEBACK} in the job's folder says where")


def _alive(folder: Path) -> WriterLock:
    try:
        return WriterLock(folder / ALIVE)
    except LabelSetLocked:
        raise JobKilled("another process of this job is alive: it goes on, and this one ends") from None


def is_alive(folder: Path) -> bool:
    """Does a process of the job live, on this machine, in whatever container?

    Raises:
        StorageFault: the lock cannot be opened.
    """
    try:
        WriterLock(folder / ALIVE).release()
    except LabelSetLocked:
        return True
    return False


def write_json(path: Path, value: Any) -> None:
    """Put a JSON file in the place of an older one, durably. One process at a time writes it.

    Raises:
        StorageFault: as `Files` does.
    """
    files, staged = Files(), path.with_name(f"{path.name}.new")
    files.remove(staged)
    files.replace(staged, path, canonical_json(value))
