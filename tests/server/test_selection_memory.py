"""Peak memory of the selection, of a process by itself: torch's memory is invisible to Python's own accounting."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "selection_memory.py"
BATCH, LENGTH, CLASSES = 4, 512, 128_256


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_selecting_takes_little_more_memory_than_the_logits_themselves(dtype: str) -> None:
    case = {"method": "ours", "dtype": dtype, "batch": BATCH, "length": LENGTH, "classes": CLASSES, "top_k": 64}
    done = subprocess.run([sys.executable, str(SCRIPT), "--child", json.dumps(case)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    of_logits = json.loads(done.stdout)["of_logits"]
    # Logits of half a gigabyte, chunks of an eighth of one: nothing that grows with the logits is left over.
    assert 1 <= of_logits < 1.3
