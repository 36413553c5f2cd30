"""The benchmarks run, check what they measure, and write their figures. No bar on the figures themselves."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import report
from benchmarks.fetch import check, single_rows
from benchmarks.goals import PAIRS, Pair, judged, methods_of
from benchmarks.programs import NEEDED
from benchmarks.timing import Block, Blocks, Method

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def figures(tmp_path: Path, script: str, *arguments: str, path: str | None = None) -> tuple[dict[str, Any], str]:
    """What a script writes as JSON, and prints; ``path`` is where it finds programs."""
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--out", str(out)]
    environment = os.environ | ({} if path is None else {"PATH": path})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_bytes()), done.stdout


@pytest.mark.smoke
def test_the_quick_run_measures_every_method_and_tells_how_to_get_those_that_are_not_installed(tmp_path: Path) -> None:
    run, told = figures(tmp_path, "fetch.py", "--quick", "--plot", str(tmp_path / "rates.png"))
    missing = {name: program for name, program in NEEDED.items() if program.path is None}
    of_rows, of_sequences = [*PAIRS["local"], *PAIRS["http"]], PAIRS["sequences"]
    for subject, pairs in (("rows", of_rows), ("sequences", of_sequences)):
        assert set(run[subject]["methods"]) == set(methods_of(pairs)) - set(missing)
        assert [(ratio["method"], ratio["against"]) for ratio in run[subject]["ratios"]] == [
            (pair.method, pair.against) for pair in pairs if not {pair.method, pair.against} & set(missing)
        ]
    assert all(f"{name} is left out: {program.advice}" in told for name, program in missing.items())
    assert "local against LMDB" in told
    assert {"numpy", "datasets", "redis"} <= set(run["machine"]["libraries"])
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.smoke
def test_a_part_runs_alone_and_without_a_program_its_peer_is_left_out(tmp_path: Path) -> None:
    run, told = figures(tmp_path, "fetch.py", "--quick", "--only", "http", path=str(tmp_path))
    assert set(run["rows"]["methods"]) == set(methods_of(PAIRS["http"])) - {"Redis"}
    assert "sequences" not in run
    assert "apt-get install redis-server" in told


def test_figures_are_never_written_over_others(tmp_path: Path) -> None:
    out = tmp_path / "results" / "fetch.json"
    for name in ("fetch.json", "fetch-2.json", "fetch-3.json"):
        found = report.unused(out)
        assert found == out.with_name(name)
        found.write_text("{}")


def test_a_method_that_gives_one_wrong_number_is_not_measured() -> None:
    subject = single_rows(5000)

    def wrong(ids: np.ndarray) -> dict[str, np.ndarray]:
        rows = {name: array.copy() for name, array in subject.expected(ids).items()}
        rows["logits"][-1, -1] += 1
        return rows

    check([Method("right", subject.expected)], subject, np.random.default_rng(0))
    with pytest.raises(ValueError, match="wrong gives other logits"):
        check([Method("right", subject.expected), Method("wrong", wrong)], subject, np.random.default_rng(0))


def test_a_ratio_is_taken_within_the_rounds_in_which_both_took_part_and_held_to_its_goal() -> None:
    ours = [Block(round, wall_s, 0, None) for round, wall_s in ((0, 1.0), (1, 100.0), (2, 2.0))]
    theirs = [Block(round, wall_s, 0, None) for round, wall_s in ((0, 3.0), (2, 6.0))]
    blocks: Blocks = {"ours": {256: ours}, "theirs": {256: theirs}}
    (ratio,) = report.ratios(blocks, [("ours", "theirs")])
    assert ratio["rate"][256] == dict.fromkeys(("median", "q1", "q3", "min", "max"), 3.0)
    for goal, met in ((2.9, True), (3.1, False)):
        (found,) = judged([ratio], [Pair("ours", "theirs", (goal,))])
        assert (found["goal"], found["met"]) == ({256: goal}, {256: met})


@pytest.mark.smoke
def test_every_kind_of_ids_is_measured_here_and_over_http(tmp_path: Path) -> None:
    run, told = figures(tmp_path, "ids.py", "--quick")
    kinds = ("ordinals", "integers", "texts")
    assert set(run["methods"]) == {f"{place}, {kind}" for place in ("local", "HTTP") for kind in kinds}
    assert "HTTP, texts against HTTP, integers" in told


@pytest.mark.smoke
def test_an_append_keeps_its_promises_at_a_small_size(tmp_path: Path) -> None:
    run, _ = figures(tmp_path, "append.py", "--quick")
    assert all(run["bounds"].values())
    assert run["append"]["shown"] == run["settings"]["more"] == 204


@pytest.mark.smoke
def test_memory_of_the_selection_is_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    sizes = ("--batch", "2", "--length", "64", "--classes", "5000", "--top-k", "8")
    run, told = figures(tmp_path, "selection_memory.py", *sizes)
    assert "naive" in told
    assert "bfloat16" in json.dumps(run)
