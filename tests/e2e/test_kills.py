"""Killed at any moment: nothing committed is labelled twice, nothing uncommitted is served, the digest is that of an
undisturbed run.

Children are forked from a process that has torch loaded already, so that a run costs what it does and not an import.
The default suite tries every kind of operation in a few shards; `make proof` tries first, middle and last of fifty, and
a hundred random moments.
"""

import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.e2e.workload import times_labelled, workload
from tests.storage.faults import Counting, killed

from logitcache.labels.errors import RowsMissing
from logitcache.server.labelling.precompute import precompute
from logitcache.storage import LocalLabelSet

SHARD_ROWS = 4096
PROOF_SHARDS = 50
PROOF_KILLS = int(os.environ.get("PROOF_KILLS", "100"))
"""Random moments that each such proof tries; fewer for a trial."""
PROOF_SEED = 20260
"""Seed of the random moments, written down before the run."""


@pytest.fixture(scope="session")
def context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.child"])
    return context


def run_in_child(store: str, environment: dict[str, str], kill_at: int | None, log: Any) -> None:
    """Precompute in this process with some operation deadly; send back the log of operations if it survives."""
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    files = Counting(lambda number, operation, path: None) if kill_at is None else killed(kill_at)
    summary = precompute(workload(Path(store)).request, files=files)
    if log is not None:
        log.send((files.log, summary.digest))
        log.close()


@dataclass
class Runs:
    """Runs of one workload, each in its own process."""

    context: ForkServerContext
    root: Path
    shards: int
    appended: int = 0

    @property
    def examples(self) -> int:
        return self.shards * SHARD_ROWS - 96 + self.appended

    def environment(self, store: Path) -> dict[str, str]:
        return {"WORKLOAD_EXAMPLES": str(self.examples), "WORKLOAD_CALLS": str(store / "calls")}

    def start(self, store: Path, kill_at: int | None = None, log: Any = None) -> Any:
        store.mkdir(exist_ok=True)
        process = self.context.Process(target=run_in_child, args=(str(store), self.environment(store), kill_at, log))
        process.start()
        return process

    def whole(self, store: Path, kill_at: int | None = None) -> tuple[list[tuple[str, str]], str] | None:
        """Run to its end: the log of operations and the digest, or None when it was killed as planned."""
        receive, send = self.context.Pipe(duplex=False)
        process = self.start(store, kill_at, send)
        send.close()
        try:
            result: tuple[list[tuple[str, str]], str] | None = receive.recv()
        except EOFError:
            result = None
        process.join()
        assert process.exitcode == (0 if result else -9), f"kill at {kill_at} ended with {process.exitcode}"
        return result

    def check_after_a_kill(self, store: Path, digest: str) -> None:
        """What stands in the store after a kill, and what the next run makes of it."""
        path = store / "points"
        committed = committed_shards(path)
        check_served(path, committed, self.examples)
        before = times_labelled(store / "calls", self.examples)
        result = self.whole(store)
        assert result is not None
        assert result[1] == digest
        again = times_labelled(store / "calls", self.examples) - before
        of_shard = np.arange(self.examples) // SHARD_ROWS
        labelled_again = np.isin(of_shard, committed)
        assert (again[labelled_again] == 0).all(), "a committed shard was labelled twice"
        assert (again[~labelled_again] >= 1).all()
        check_served(path, list(range(self.shards)), self.examples)


def committed_shards(path: Path) -> list[int]:
    return sorted(int(file.stem) for file in (path / "commits").glob("*.json")) if path.exists() else []


def check_served(path: Path, committed: list[int], examples: int) -> None:
    """Exactly the committed shards are served, first and last row of each."""
    if not (path / "zarr.json").exists():
        assert committed == []
        return
    reader = LocalLabelSet(path)
    shards = -(-examples // SHARD_ROWS)
    for shard in range(shards):
        ends = [shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, examples) - 1]
        if shard in committed:
            assert len(reader.fetch(ends)) == 2
        else:
            with pytest.raises(RowsMissing):
                reader.fetch(ends[:1])
    assert reader.damaged() == {}
    reader.close()


def moments(log: list[tuple[str, str]], shards: list[int]) -> Iterator[int]:
    """Numbers of the operations at which to kill: every one of creation, of these shards, and of the seal."""
    seen: list[int] = []
    shard = -1
    for number, (operation, name) in enumerate(log):
        if operation == "write" and name.startswith("ids."):
            shard += 1
        if shard in shards or shard == -1 or number > len(log) - 6:
            seen.append(number)
    return iter(seen)


@pytest.fixture
def runs(context: ForkServerContext, tmp_path: Path) -> Callable[[int], Runs]:
    return lambda shards: Runs(context, tmp_path, shards)


def test_killed_at_every_kind_of_operation_nothing_is_lost_and_nothing_unfinished_is_served(
    runs: Callable[[int], Runs], tmp_path: Path
) -> None:
    few = runs(2)
    whole = few.whole(tmp_path / "whole")
    assert whole is not None
    log, digest = whole
    chosen: dict[tuple[str, str], int] = {}
    for number in moments(log, [1]):
        operation, name = log[number]
        chosen[operation, "".join(filter(str.isalpha, name))] = number
    assert {operation for operation, _ in chosen} >= {"write", "fsync", "link", "rename"}
    for number in sorted(chosen.values()):
        store = tmp_path / f"killed-{number}"
        assert few.whole(store, kill_at=number) is None
        few.check_after_a_kill(store, digest)


def growing_moments(log: list[tuple[str, str]]) -> list[int]:
    """Numbers of the operations of growing at which to kill: of its metadata, its first row, its commit, its seal."""
    first_row = next(number for number, (_, name) in enumerate(log) if name.startswith("ids.1."))
    metadata = [number for number in range(first_row) if log[number] == ("rename", "zarr.json")]
    ends = [number for number in range(len(log) - 10, len(log)) if log[number][0] in ("write", "link", "fsync")]
    return [metadata[0], metadata[-1] - 2, metadata[-1], first_row - 1, first_row, *ends]


def test_killed_while_it_grows_the_older_generation_is_served_and_the_next_run_finishes(
    runs: Callable[[int], Runs], tmp_path: Path
) -> None:
    begun = runs(1)
    grown = replace(begun, appended=500)
    sealed = begun.whole(tmp_path / "begun")
    assert sealed is not None
    whole = grown.whole(Path(shutil.copytree(tmp_path / "begun", tmp_path / "whole")))
    assert whole is not None
    points = tmp_path / "begun" / "points"
    files = [*points.glob("*/c.0*"), points / "commits" / "0.json", points / "generations" / "1.json"]
    old = {path: path.read_bytes() for path in files}
    for number in growing_moments(whole[0]):
        store = Path(shutil.copytree(tmp_path / "begun", tmp_path / f"killed-{number}"))
        before = times_labelled(store / "calls", grown.examples)
        assert grown.whole(store, kill_at=number) is None
        with closing(LocalLabelSet(store / "points")) as reader:
            assert len(reader.fetch([0, begun.examples - 1], digest=sealed[1])) == 2
            if committed_shards(store / "points") == [0]:
                with pytest.raises(RowsMissing):
                    reader.fetch([begun.examples])
        result = grown.whole(store)
        assert result is not None
        assert result[1] == whole[1]
        again = times_labelled(store / "calls", grown.examples) - before
        assert (again[: begun.examples] == 0).all(), "an old example was labelled again"
        assert (again[begun.examples :] >= 1).all()
        assert {path: (store / path.relative_to(tmp_path / "begun")).read_bytes() for path in old} == old


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_killed_at_every_operation_of_the_first_a_middle_and_the_last_of_fifty_shards(
    runs: Callable[[int], Runs], tmp_path: Path
) -> None:
    many = runs(PROOF_SHARDS)
    whole = many.whole(tmp_path / "whole")
    assert whole is not None
    log, digest = whole
    numbers = list(moments(log, [0, PROOF_SHARDS // 2, PROOF_SHARDS - 1]))
    for number in numbers:
        store = tmp_path / f"killed-{number}"
        assert many.whole(store, kill_at=number) is None
        many.check_after_a_kill(store, digest)
    print(f"\nkilled at {len(numbers)} of {len(log)} operations; digest {digest[:19]} each time")


@pytest.mark.proof
@pytest.mark.timeout(7200)
def test_killed_at_random_moments_spread_over_its_progress(runs: Callable[[int], Runs], tmp_path: Path) -> None:
    many = runs(PROOF_SHARDS)
    whole = many.whole(tmp_path / "whole")
    assert whole is not None
    digest = whole[1]
    rng = random.Random(PROOF_SEED)
    found = []
    for part in range(PROOF_KILLS):
        # A moment of the run's progress, not of the clock: some microseconds after so many shards are committed.
        first, last = part * PROOF_SHARDS // PROOF_KILLS, (part + 1) * PROOF_SHARDS // PROOF_KILLS
        after = rng.randrange(first, max(first + 1, last))
        store = tmp_path / f"random-{part}"
        process = many.start(store)
        while process.is_alive() and len(committed_shards(store / "points")) < after:
            process.join(0.002)
        deadline = time.perf_counter() + rng.uniform(0, 0.03)
        while time.perf_counter() < deadline:
            pass
        process.kill()
        process.join()
        found.append(len(committed_shards(store / "points")))
        many.check_after_a_kill(store, digest)
        shutil.rmtree(store)
    assert len({count for count in found if 0 < count < PROOF_SHARDS}) >= min(10, PROOF_KILLS // 2)
    told = f"{PROOF_KILLS} kills, with {sorted(found)} of {PROOF_SHARDS} shards committed"
    print(f"\n{told}; digest {digest[:19]} each time")
