"""A job from inside: how the process of a precompute tells the server that began it how far it is and how it ended.

What it says is files in the job's folder, so it is heard by a server that was not there at the time. The folder comes
in an environment variable; without it nothing is recorded. Knows no pydantic: a machine that only labels has none.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.labels.errors import JobKilled, LogitcacheError, ServerFault
from logitcache.labels.identity import canonical_json
from logitcache.storage.files import Files

VARIABLE = "LOGITCACHE_JOB"
"""Environment variable that makes a precompute a job: the job's folder."""

GO = "go\n"
"""What the server writes to the process once it has written down which process that is."""

PROGRESS, OUTCOME = "progress.json", "outcome.json"

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
            code, message = ServerFault.code, f"it raised {type(error).__name__}: {error}; its log has the traceback"
        # Names of files that are not UTF-8 come as lone surrogates, which no JSON that others read can hold.
        message = message[:LONGEST_MESSAGE].encode(errors="replace").decode()
        with contextlib.suppress(LogitcacheError):
            write_json(self.folder / OUTCOME, {"error": {"code": code, "message": message}})


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Record how the work inside fails; it says itself when it succeeds. An interrupt is no outcome.

    Raises:
        JobKilled: the server ended before it had written down that this process is the job's. Nothing was begun, and
            the next server begins anew: two processes of one job never run.
    """
    # Taken away, so that what user code starts is not mistaken for the job.
    folder = os.environ.pop(VARIABLE, None)
    recording = Recording(Path(folder) if folder else None)
    if folder and sys.stdin.readline() != GO:
        raise JobKilled("the server that began this job was gone at once; the next one begins it anew")
    try:
        yield recording
    except Exception as error:
        recording.failed(error)
        raise


def write_json(path: Path, value: Any) -> None:
    """Put a JSON file in the place of an older one, durably. One process at a time writes it.

    Raises:
        StorageFault: as `Files` does.
    """
    files, staged = Files(), path.with_name(f"{path.name}.new")
    files.remove(staged)
    files.replace(staged, path, canonical_json(value))
