"""Progress: a bar for a person, lines for a log, a file for a program, with rows a second and the time left in all."""

import io
import json
import re
from functools import partial
from pathlib import Path

import pytest

from logitcache.server.progress import Bar, Lines, ProgressFile, reporter
from logitcache.server.under_way import LONGEST, last_under_way


class Clock:
    """Seconds that a test decides."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("logitcache.server.progress.time.monotonic", clock)
    return clock


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(clock: Clock) -> None:
    log = io.StringIO()
    with reporter(log) as lines:
        assert isinstance(lines, Lines)
        lines.begin("labelling x", 1000)
        for _ in range(10):
            clock.now += 4
            lines.advance(100)
    assert log.getvalue().splitlines() == [
        "labelling x: 1,000 rows",
        "labelling x: 300/1,000 rows (30 %), 25 rows/s, 28 s left",
        "labelling x: 600/1,000 rows (60 %), 25 rows/s, 16 s left",
        "labelling x: 900/1,000 rows (90 %), 25 rows/s, 4 s left",
        "labelling x: 1,000/1,000 rows (100 %), 25 rows/s, 0 s left",
    ]


def test_what_is_counted_is_named(clock: Clock) -> None:
    log, terminal = io.StringIO(), Terminal()
    with reporter(log) as lines, reporter(terminal) as bar:
        for each in (lines, bar):
            each.begin("reading lengths", 1000, "examples")
            clock.now += 4
            each.advance(1000)
    assert log.getvalue().splitlines() == [
        "reading lengths: 1,000 examples",
        "reading lengths: 1,000/1,000 examples (100 %), 250 examples/s, 0 s left",
    ]
    assert "examples/s" in terminal.getvalue()
    assert "rows" not in terminal.getvalue()


def test_a_terminal_gets_a_bar_with_rate_and_time_left_and_notes_above_it() -> None:
    terminal = Terminal()
    with reporter(terminal) as bar:
        assert isinstance(bar, Bar)
        bar.begin("labelling x", 1000)
        bar.advance(250)
        bar.note("damaged: [shard 3]")
        bar.advance(750)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "labelling x" in text
    assert "1000/1000" in text
    assert "rows/s" in text
    assert re.search(r"\d:\d\d:\d\d", text)
    assert "damaged: [shard 3]" in text


def test_a_program_gets_a_whole_file_twice_a_second_and_at_the_end(clock: Clock, tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    told = {"activity": "labelling x", "rows_total": 1000}
    with reporter(io.StringIO(), file) as lines:
        assert isinstance(lines, ProgressFile)
        lines.begin("labelling x", 1000)
        assert json.loads(file.read_text()) == told | {"rows_done": 0, "rows_per_s": 0.0, "seconds_left": None}
        seen = []
        for _ in range(10):
            clock.now += 0.2
            lines.advance(100)
            seen.append(json.loads(file.read_text())["rows_done"])
        assert seen == [0, 0, 300, 300, 300, 600, 600, 600, 900, 1000]
    assert json.loads(file.read_text()) == told | {"rows_done": 1000, "rows_per_s": 500.0, "seconds_left": 0.0}
    assert {path.name for path in tmp_path.iterdir()} == {"progress.json", "under-way.txt"}


def test_what_is_under_way_stays_until_something_else_is(tmp_path: Path) -> None:
    assert last_under_way(tmp_path) == ""
    with reporter(io.StringIO(), tmp_path / "progress.json") as lines:
        for text in ("labelling examples 0 to 4,095", "reading example 'é'", "x" * 2000):
            lines.under_way(partial(str, text))
            assert last_under_way(tmp_path) == text[:LONGEST]
        lines.begin("verifying", 1000)
        assert last_under_way(tmp_path) == ""


def test_a_folder_that_cannot_take_the_file_does_not_stop_the_work(tmp_path: Path) -> None:
    log = io.StringIO()
    with reporter(log, tmp_path / "gone" / "progress.json") as lines:
        lines.begin("labelling x", 10)
        lines.under_way(lambda: "labelling example 0")
        lines.advance(10)
    assert "10/10 rows" in log.getvalue()
