"""The benchmark runs, checks what each method returns, and says what it ran on. No bar on its figures."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_quick_run_measures_every_method_and_writes_its_figures(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "fetch.py"
    out = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--out", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for method in ("memmap", "local", "LMDB", "HTTP", "JSON"):
        assert method in done.stdout
    text = json.dumps(json.loads(out.read_bytes()))
    assert "local against LMDB" in done.stdout
    assert "numpy" in text
