"""The benchmarks of steps, clients, cold pages and many shards run. No bar on their figures."""

from pathlib import Path

import pytest
from tests.e2e.test_benchmarks import figures


@pytest.mark.parametrize("script", ["clients.py", "cold.py", "sparse.py", "step.py"])
def test_it_runs_and_tells_its_goals(tmp_path: Path, script: str) -> None:
    run, told = figures(tmp_path, script, "--quick")
    assert run["benchmark"] == script.removesuffix(".py")
    assert run["goals"]
    assert all(isinstance(met, bool) for met in run["goals"].values())
    assert all(goal in told for goal in run["goals"])
