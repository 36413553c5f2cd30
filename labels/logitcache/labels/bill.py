"""The bill of a label set: teacher time spent once, saved by each row served, and what fetching costs instead.

Arithmetic of seconds and rows alone; it measures nothing.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TeacherTime:
    """What labelling took.

    Attributes:
        seconds: of the teacher's forward and the selection of its largest logits; not of reading and storing.
        rows: labelled in this time.
        device: where, for people; several are separated by commas.
    """

    seconds: float
    rows: int
    device: str

    @property
    def seconds_a_row(self) -> float:
        """What a live teacher would cost for each row; 0 without rows."""
        return self.seconds / self.rows if self.rows else 0.0

    @classmethod
    def from_json(cls, value: Any) -> "TeacherTime":
        """Read the members of this class; others are passed over.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        seconds, rows, device = value["seconds"], value["rows"], value["device"]
        if type(rows) is not int or not 0 <= rows < 2**63 or not isinstance(device, str):
            raise ValueError(f"{rows!r:.60} rows on {device!r:.60} are no teacher time")
        if type(seconds) not in (int, float) or not 0 <= seconds < 2**63:
            raise ValueError(f"{seconds!r:.60} is no time in seconds")
        return cls(float(seconds), rows, device)

    @classmethod
    def summed(cls, times: Iterable["TeacherTime | None"]) -> "TeacherTime | None":
        """That of several shards together, those left out of which none is known; None where of none it is."""
        known = [time for time in times if time is not None]
        if not known:
            return None
        devices = ", ".join(sorted({time.device for time in known}))
        return cls(math.fsum(time.seconds for time in known), sum(time.rows for time in known), devices)

    def __str__(self) -> str:
        return f"{told(self.seconds)} on {self.device} for {self.rows:,} rows, {told(self.seconds_a_row)} a row"


MOST = 2**53
"""Rows, and seconds, beyond which nothing is counted any more."""


@dataclass(frozen=True)
class Served:
    """What was fetched of a label set, and what that took.

    Attributes:
        rows: fetched, each as often as it was; those of examples that were masked are none.
        seconds: that fetching them took.
    """

    rows: int = 0
    seconds: float = 0.0

    def plus(self, rows: int, seconds: float) -> "Served":
        """With so much more, up to `MOST` of either."""
        return Served(min(self.rows + rows, MOST), min(self.seconds + seconds, float(MOST)))

    @classmethod
    def from_json(cls, value: Any) -> "Served":
        """Read the members of this class; others are passed over.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        rows, seconds = value["rows"], value["seconds"]
        if type(rows) is not int or not 0 <= rows <= MOST:
            raise ValueError(f"{rows!r:.60} is no count of rows")
        if type(seconds) not in (int, float) or not 0 <= seconds <= MOST:
            raise ValueError(f"{seconds!r:.60} is no time in seconds")
        return cls(rows, float(seconds))


@dataclass(frozen=True)
class Bill:
    """What was spent, saved and paid.

    Attributes:
        teacher: the time that labelling took, once.
        served: rows that a teacher was not asked for, since they were fetched.
        fetch_s: seconds that fetching these rows took; None where nobody knows.
    """

    teacher: TeacherTime
    served: int = 0
    fetch_s: float | None = None

    @property
    def saved_s(self) -> float:
        """Seconds that the teacher would have taken for the rows served."""
        return self.served * self.teacher.seconds_a_row

    @property
    def fetch_s_a_row(self) -> float | None:
        """Seconds that fetching a row took; None before one was fetched, or where nobody knows."""
        return None if self.fetch_s is None or not self.served else self.fetch_s / self.served

    @property
    def epochs_to_pay(self) -> float | None:
        """Passes over all labelled rows after which what is saved makes up for labelling and fetching.

        Infinite where fetching a row takes as long as labelling it or longer; None while the cost of fetching is
        unknown. They may be of one run or of several. With V views a pass over all rows is V epochs.
        """
        fetched, labelled = self.fetch_s_a_row, self.teacher.seconds_a_row
        if fetched is None:
            return None
        return math.inf if fetched >= labelled else labelled / (labelled - fetched)

    @property
    def is_paid(self) -> bool:
        """What was saved so far makes up for labelling, and for fetching as far as that is known."""
        return self.served > 0 and self.saved_s - (self.fetch_s or 0.0) >= self.teacher.seconds

    def __str__(self) -> str:
        lines = [f"the teacher took {self.teacher}, once"]
        fetched, epochs = self.fetch_s_a_row, self.epochs_to_pay
        if self.served:
            lines.append(f"{self.served:,} rows served would have taken it {told(self.saved_s)}")
        if fetched is not None and self.fetch_s is not None and epochs is not None:
            lines[-1] += f", and took {told(self.fetch_s)} to fetch, {told(fetched)} a row"
            if epochs == math.inf:
                lines.append("the label set never pays for itself: to fetch a row takes as long as to label it")
            else:
                verb = "paid" if self.is_paid else "pays"
                lines.append(f"the label set {verb} for itself after {epochs:,.2f} passes over all rows")
        return "; ".join(lines)


def told(seconds: float) -> str:
    """A time for people, three digits of it: ``9.36 ms``, ``2.5 h``."""
    for most, size, unit in ((1e-3, 1e-6, "µs"), (1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "min")):
        if seconds < most:
            return f"{seconds / size:.3g} {unit}"
    hours = seconds / 3600
    return f"{hours:.3g} h" if hours < 999.5 else f"{hours:,.0f} h"
