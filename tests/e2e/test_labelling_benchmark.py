"""The labelling benchmark runs, and holds both ways to the same rows. No bar on its figures."""

from pathlib import Path

import pytest
from tests.e2e.test_benchmarks import figures


@pytest.mark.smoke
@pytest.mark.parametrize("kind", [[], ["--tokens"]], ids=["pictures", "tokens"])
def test_precompute_and_the_bare_loop_label_the_same_and_are_timed(tmp_path: Path, kind: list[str]) -> None:
    run, told = figures(tmp_path, "labelling.py", "--quick", *kind)
    assert set(run["found"]) == {"bare", "precompute"}
    assert set(run["ratios"]) == {"wall_s", "cpu_s"}
    assert "precompute over bare" in told
