"""The benchmarks of steps, clients, cold pages and many shards run. No bar on their figures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.sequence.parts import PARTS
from benchmarks.sequence.report import PAGE
from tests.e2e.test_benchmarks import BENCHMARKS, figures


@pytest.mark.smoke
@pytest.mark.parametrize("script", ["clients.py", "cold.py", "sparse.py", "step.py", "verify.py"])
def test_it_runs_and_tells_its_goals(tmp_path: Path, script: str) -> None:
    run, told = figures(tmp_path, script, "--quick")
    assert run["benchmark"] == script.removesuffix(".py")
    assert run["goals"]
    assert all(isinstance(met, bool) for met in run["goals"].values())
    assert all(goal in told for goal in run["goals"])


HALVES = (
    ("search", "continual", "tuning", "tuned", "recorded"),
    ("views", "truncation", "entropy", "overhead"),
)
"""Of the experiments, so that two processes can run them."""

TOO_LONG = {"tuning: language", "tuned: language"}
"""What a smoke run leaves out."""


def test_the_halves_are_the_whole() -> None:
    assert {part for half in HALVES for part in half} == set(PARTS)


@pytest.mark.smoke
@pytest.mark.parametrize("parts", HALVES)
def test_the_experiments_on_sequences_of_runs_run_and_go_on_where_they_were(
    tmp_path: Path, parts: tuple[str, ...]
) -> None:
    options = [word for part in parts for word in ("--part", part)]
    run_again = [sys.executable, str(BENCHMARKS / "sequence_of_runs.py"), "--quick", "--out", str(tmp_path), *options]
    done = subprocess.run(run_again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name.partition("-")[0] for path in tmp_path.glob("*.json")} == set(parts)
    tables = (tmp_path / "tables.md").read_text()
    places = re.findall(r"<!-- (.*?) -->\n.*?<!-- end -->", PAGE.read_text(), re.DOTALL)
    named = [name for name in places if name.partition(":")[0] in parts]
    assert named
    assert [name for name in named if f"## {name}\n" not in tables and name not in TOO_LONG] == []
    if "continual" not in parts:
        return
    next(tmp_path.glob("continual-*.json")).unlink()
    done = subprocess.run(run_again, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 replicates to run" in done.stdout
