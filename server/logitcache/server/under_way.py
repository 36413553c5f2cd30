"""What a precompute is at this moment doing, in a file that outlives the process: who died of an example can be told.

Written in place, twice a batch, by one call that costs microseconds; it is read once the process is gone. Knows no jobs
and no batches.
"""

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from logitcache.labels.errors import StorageFault
from logitcache.storage.reading import read_file

NAME = "under-way.txt"
"""The file, beside that of the progress."""

LONGEST = 500
"""Bytes that are told."""


class UnderWay:
    """The file, open; a context manager. Where it cannot be written nothing is said: labelling goes on."""

    def __init__(self, folder: Path) -> None:
        self._handle = -1
        with contextlib.suppress(OSError):
            self._handle = os.open(folder / NAME, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def say(self, text: str) -> None:
        """From now on it does this; nothing that could be named where it is empty."""
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, text.encode(errors="replace")[:LONGEST].ljust(LONGEST), 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def last_under_way(folder: Path) -> str:
    """What a process that is gone was doing when it ended; empty where that is not known."""
    try:
        return read_file(folder, folder / NAME, LONGEST).decode(errors="replace").strip()
    except (FileNotFoundError, StorageFault):
        return ""
