"""The benchmarks run, check what they measure, and write their figures. No bar on the figures themselves."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def figures(tmp_path: Path, script: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a script writes as JSON, and prints."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_bytes()), done.stdout


def test_the_quick_run_measures_every_method_and_writes_its_figures(tmp_path: Path) -> None:
    run, told = figures(tmp_path, "fetch.py", "--quick")
    assert list(run["methods"]) == ["memmap", "local", "LMDB", "HTTP", "JSON", "JSON, flat"]
    assert "local against LMDB" in told
    assert "numpy" in run["machine"]["libraries"]


def test_every_kind_of_ids_is_measured_here_and_over_http(tmp_path: Path) -> None:
    run, told = figures(tmp_path, "ids.py", "--quick")
    kinds = ("ordinals", "integers", "texts")
    assert set(run["methods"]) == {f"{place}, {kind}" for place in ("local", "HTTP") for kind in kinds}
    assert "HTTP, texts against HTTP, integers" in told


def test_an_append_keeps_its_promises_at_a_small_size(tmp_path: Path) -> None:
    run, _ = figures(tmp_path, "append.py", "--quick")
    assert all(run["bounds"].values())
    assert run["append"]["shown"] == run["settings"]["more"] == 204


def test_memory_of_the_selection_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    sizes = ("--batch", "2", "--length", "64", "--classes", "5000", "--top-k", "8")
    run, told = figures(tmp_path, "selection_memory.py", *sizes)
    assert "naive" in told
    assert "bfloat16" in json.dumps(run)
