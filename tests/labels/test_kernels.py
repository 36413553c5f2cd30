"""No row depends on which kernel a thread happened to compute its part of a first batch with."""

import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.labels.selection.kernels import FUNCTIONS

FIRST_CALLS = """
import torch
called = []
for name in {functions}:
    def told(given, name=name, function=getattr(torch, name)):
        called.append((name, given.dtype, given.numel()))
        return function(given)
    setattr(torch, name, told)
import {module}
assert sorted(called, key=str) == sorted(
    ((name, dtype, 1) for name in {functions} for dtype in (torch.float32, torch.float64)), key=str
), called
"""

SECONDS = 240


@pytest.mark.parametrize("module", ["server.labelling.precompute", "server.labelling.teachers", "client.selecting"])
def test_every_function_is_called_for_one_element_before_there_is_a_teacher(module: str) -> None:
    script = FIRST_CALLS.format(functions=FUNCTIONS, module=f"logitcache.{module}")
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.proof
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("function", ["exp", "log"])
def test_thousands_of_first_calls_in_two_threads_give_the_same_bits(function: str) -> None:
    script = Path(__file__).parent / "first_calls.py"

    def found(settled: str) -> tuple[int, int]:
        command = [sys.executable, str(script), function, str(SECONDS), settled]
        calls, others = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        return int(calls), int(others)

    without, settled = found("unsettled"), found("settled")
    told = f"{without[1]} of {without[0]:,} first calls gave other bits, of settled ones {settled[1]} of {settled[0]:,}"
    print(f"\n{function}: {told}")
    assert settled[1] == 0
