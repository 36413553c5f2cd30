"""Progress of long work on stderr: a bar when a person watches, plain lines when a log does, a file beside them for a
program."""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from logitcache.server.under_way import UnderWay

LINE_EVERY_S = 10.0
"""Seconds between two plain lines."""

FILE_EVERY_S = 0.5
"""Seconds between two replacements of a progress file."""


class Reporter(Protocol):
    """Where precompute tells how far it is."""

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        """Some activity over so many rows begins, or over so many of another unit; the one before has ended."""

    def advance(self, rows: int) -> None:
        """So many more rows are done."""

    def note(self, text: str) -> None:
        """Something that a person should read, now and in the log."""

    def under_way(self, told: Callable[[], str]) -> None:
        """What is being done from now on, named as finely as can be: should the process die of it, that is known."""


class Silent:
    """Reports nothing; for callers that are programs."""

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        """Nothing."""

    def advance(self, rows: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def under_way(self, told: Callable[[], str]) -> None:
        """Nothing."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        return Text(f"{task.speed:,.0f} {unit}/s" if task.speed else f"- {unit}/s")


class Bar:
    """A progress bar with the rate and the time left."""

    def __init__(self, stream: TextIO) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=Console(file=stream), transient=False, speed_estimate_period=30)
        self._task: TaskID | None = None

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        """Start the next bar."""
        self._task = self._progress.add_task(activity, total=rows, unit=unit)

    def advance(self, rows: int) -> None:
        """Move the bar."""
        if self._task is not None:
            self._progress.advance(self._task, rows)

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def under_way(self, told: Callable[[], str]) -> None:
        """Nothing: a person sees how far the bar is."""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Lines:
    """A line when an activity begins and ends, and one every ten seconds between."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._activity, self._unit, self._total, self._done, self._began, self._next = "", "rows", 0, 0, 0.0, 0.0

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        """Print the activity and its size."""
        self._activity, self._unit = activity, unit
        self._total, self._done, self._began = rows, 0, time.monotonic()
        self._next = self._began + LINE_EVERY_S
        self.note(f"{activity}: {rows:,} {unit}")

    def advance(self, rows: int) -> None:
        """Print a line if it is time for one."""
        self._done += rows
        now = time.monotonic()
        if now < self._next and self._done < self._total:
            return
        self._next = now + LINE_EVERY_S
        rate = self._done / max(now - self._began, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        self.note(
            f"{self._activity}: {self._done:,}/{self._total:,} {self._unit} "
            f"({100 * self._done / max(1, self._total):.0f} %), {rate:,.0f} {self._unit}/s, {left:,.0f} s left"
        )

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def under_way(self, told: Callable[[], str]) -> None:
        """Nothing: a line a batch would be too many."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class ProgressFile(Lines):
    """The lines, and a JSON file that always says how far it is: replaced whole, so a reader sees no half of it.

    Beside it stands what is under way, for whoever finds the process dead.
    """

    def __init__(self, stream: TextIO, path: Path) -> None:
        super().__init__(stream)
        self._path, self._next_file = path, 0.0
        self._under_way = UnderWay(path.parent)

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        """Print the activity, and write it down."""
        super().begin(activity, rows, unit)
        self._under_way.say("")
        self._write()

    def under_way(self, told: Callable[[], str]) -> None:
        """Write it down."""
        self._under_way.say(told())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._under_way.__exit__(kind, error, trace)

    def advance(self, rows: int) -> None:
        """Print a line and write the file, each if it is time."""
        super().advance(rows)
        if time.monotonic() >= self._next_file or self._done >= self._total:
            self._write()

    def _write(self) -> None:
        now = time.monotonic()
        self._next_file = now + FILE_EVERY_S
        rate = self._done / max(now - self._began, 1e-9)
        value = {
            "activity": self._activity,
            "rows_done": self._done,
            "rows_total": self._total,
            "rows_per_s": round(rate, 1),
            "seconds_left": round((self._total - self._done) / rate, 1) if rate else None,
        }
        staged = self._path.with_name(f"{self._path.name}.new")
        # Labelling goes on where the disk has no room to say so.
        with contextlib.suppress(OSError):
            staged.write_text(json.dumps(value))
            staged.replace(self._path)


def reporter(stream: TextIO | None = None, file: Path | None = None) -> Bar | Lines:
    """The reporter for a stream (default: stderr), used as a context manager; ``file`` gets it as JSON too."""
    stream = stream or sys.stderr
    if file is not None:
        return ProgressFile(stream, file)
    return Bar(stream) if stream.isatty() else Lines(stream)
