"""Every write path, cut off at every operation in every way: nothing acknowledged is lost, nothing wrong is served, and
going on comes to what an undisturbed run comes to.

The default suite tries a sample; `make proof` tries all, and prints how many.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tests.storage.disk import Disk, Forgets, Tree, rebuilt, same
from tests.storage.faults import FAULTS, Counting, Faulty, Killed
from tests.storage.write_paths import Told, WritePath, write_paths

from logitcache.labels.errors import LogitcacheError, StorageFault
from logitcache.storage import admission, packing
from logitcache.storage.files import Files

PATHS = (
    "create, commit, seal",
    "grow",
    "quarantine and repair",
    "repair with other rows",
    "quarantine by a reader",
    "record and seal",
    "record tokens and seal a part",
    "record on after a torn frame",
    "count what was served",
    "states of a job",
)


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Small shards; stamps of files as young as those here; and no waiting for the disk, whose kernel is not killed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "LEAST_DEFAULT", packing.QUANTUM)
        patched.setattr(admission, "RACY_NS", 0)
        for name in ("fsync", "fdatasync"):
            patched.setattr(os, name, lambda handle: None)
        yield


@pytest.fixture(scope="module")
def paths(fast: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, WritePath]:
    found = write_paths(tmp_path_factory.mktemp("paths"))
    assert tuple(found) == PATHS
    return found


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, paths: dict[str, WritePath]) -> WritePath:
    return paths[request.param]


def operations_of(path: WritePath, root: Path) -> list[tuple[str, str]]:
    """The operations of an undisturbed run."""
    counting, told = Counting(lambda *_: None), Told()
    place = path.begun(root)
    path.run(place, counting, told)
    path.check(place, told)
    path.end(place)
    shutil.rmtree(root)
    return counting.log


def disturbed(path: WritePath, root: Path, number: int, fault: str) -> bool:
    """Run it with this fault at this operation, look at it, go on; False if the operation cannot have that fault."""
    place, told, files = path.begun(root), Told(), Faulty(number, fault)
    try:
        path.run(place, files, told)
    except Killed:
        assert fault.startswith("killed")
    except StorageFault:
        assert not fault.startswith("killed")
        assert fault != "short"
    if files.happened:
        path.check(place, told)
        path.run(place, Files(), told)
        path.check(place, told)
        path.end(place)
    shutil.rmtree(root)
    return files.happened


def schedule(path: WritePath, root: Path, every: int) -> tuple[int, Counter[str]]:
    """Each fault at every so manieth operation, each fault beginning elsewhere; how many operations and runs."""
    total, runs = len(operations_of(path, root)), Counter[str]()
    for at, fault in enumerate(FAULTS):
        for number in islice(range(total), at % every, None, every):
            try:
                runs[fault] += disturbed(path, root, number, fault)
            except BaseException as error:
                error.add_note(f"{fault} at operation {number} of {total}")
                raise
    return total, runs


def told(path: WritePath, total: int, runs: Counter[str]) -> None:
    each = ", ".join(f"{count} {fault}" for fault, count in runs.items())
    print(f"\n{path.name}: {total} operations, {runs.total()} runs ({each}); the same end each time")


def test_a_fault_or_a_kill_at_an_operation_of_any_write_path_loses_nothing(path: WritePath, tmp_path: Path) -> None:
    total, runs = schedule(path, tmp_path / "root", every=60)
    told(path, total, runs)
    assert runs.total() >= total // 12


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_every_fault_and_kill_at_every_operation_of_every_write_path_loses_nothing(
    path: WritePath, tmp_path: Path
) -> None:
    total, runs = schedule(path, tmp_path / "root", every=1)
    told(path, total, runs)
    assert runs["killed before"] == runs["killed after"] == runs["EIO"] == total


CUT_SEED = 20270
"""Seed of what random power cuts keep, written down before the run."""


@dataclass
class Cuts:
    """Power cuts in a run of a write path: what the disk held then, and what the path had been told."""

    path: WritePath
    found: list[tuple[Tree, Told]] = field(default_factory=list)
    moments: int = 0

    def run(
        self,
        root: Path,
        *,
        subsets: int = 1,
        every: int = 1,
        dies_at: int = -1,
        within: bool = False,
        forgets: Forgets = lambda *_: False,
    ) -> Disk:
        """Run the path undisturbed, with a look at the disk at every so manieth moment.

        ``dies_at`` kills it first, before an operation or ``within`` it, and looks at the run after that: what the
        first one left unsynced still is.
        """
        rng, told, seen = random.Random(CUT_SEED), Told(), set[Any]()
        place = self.path.begun(root)
        died = dies_at < 0

        def moment() -> None:
            self.moments += 1
            if not died or self.moments % every:
                return
            for tree in disk.after_a_cut(rng, subsets):
                key = (same(tree), repr(told))
                if key not in seen:
                    seen.add(key)
                    self.found.append((tree, told.copy()))

        disk = Disk(root, moment, forgets)
        if not died:
            disk.dies_at, disk.dies_within = (-1, dies_at) if within else (dies_at, -1)
            with suppress(Killed):
                self.path.run(place, disk, told)
            died, disk.dies_at, disk.dies_within = True, -1, -1
        self.path.run(place, disk, told)
        assert same(disk.now) == same(Disk(root, lambda: None).now), "the model is not what stands on the disk"
        every = 1
        moment()
        shutil.rmtree(root)
        return disk

    def check(self, root: Path, most: int | None = None) -> int:
        """So many of them, or all, are served right and gone on with; how many."""
        # The last ones first: the most was told by then.
        chosen = (
            self.found[::-1] if most is None else random.Random(CUT_SEED).sample(self.found, min(most, len(self.found)))
        )
        for tree, told in chosen:
            place = self.path.path(rebuilt(tree, root))
            going_on = told.copy()
            try:
                self.path.check(place, told)
                self.path.run(place, Files(), going_on)
                self.path.check(place, going_on)
                self.path.end(place)
            except BaseException as error:
                error.add_note(f"the power was cut when it had been told {told}; it left {sorted(tree)}")
                raise
            finally:
                shutil.rmtree(root)
        return len(chosen)


def test_a_power_cut_at_a_moment_of_any_write_path_tears_and_loses_nothing(path: WritePath, tmp_path: Path) -> None:
    cuts = Cuts(path)
    cuts.run(tmp_path / "root")
    assert cuts.check(tmp_path / "cut", most=8) == 8


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_a_power_cut_at_every_moment_of_every_write_path_tears_and_loses_nothing(
    path: WritePath, tmp_path: Path
) -> None:
    cuts = Cuts(path)
    disk = cuts.run(tmp_path / "root", subsets=4)
    states = cuts.check(tmp_path / "cut")
    print(
        f"\n{path.name}: {disk.number} operations, {len(disk.syncs)} of them syncs; {cuts.moments} moments, {states} "
    )


def taken_up(path: WritePath, tmp_path: Path, every: int) -> tuple[int, int]:
    """Kill it at every so manieth operation, go on, cut the power: how many kills, how many states.

    The power is cut at the end, and after a kill between a write and its sync at moments before that, too.
    """
    done, states = operations_of(path, tmp_path / "root"), 0
    kills = [(number, False) for number in range(1, len(done), every)]
    kills += [(number, True) for number, (operation, _) in enumerate(done) if operation in ("append", "cut", "erase")]
    for number, within in kills:
        cuts = Cuts(path)
        try:
            looks = max(4, every // 2) if within else 10**9
            cuts.run(tmp_path / "root", subsets=0, every=looks, dies_at=number, within=within)
            states += cuts.check(tmp_path / "cut")
        except BaseException as error:
            error.add_note(f"killed {'within' if within else 'before'} operation {number} of {len(done)}")
            raise
    return len(kills), states


@pytest.mark.parametrize("name", PATHS)
def test_what_is_taken_up_after_a_kill_outlasts_a_power_cut(
    name: str, paths: dict[str, WritePath], tmp_path: Path
) -> None:
    """What a killed process had named but not synced is believed by the next one, so that one must sync it."""
    kills, states = taken_up(paths[name], tmp_path, every=45)
    assert states >= kills


@pytest.mark.proof
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PATHS)
def test_what_is_taken_up_after_a_kill_at_any_operation_outlasts_a_power_cut(
    name: str, paths: dict[str, WritePath], tmp_path: Path
) -> None:
    kills, states = taken_up(paths[name], tmp_path, every=1)
    print(f"\n{name}: {kills} kills, {states} states of the disk after the power cut that follows")


def test_folders_of_arrays_are_durable_before_the_manifest_that_describes_them(
    paths: dict[str, WritePath], tmp_path: Path
) -> None:
    """Of names that were not synced a power cut may leave any: the last one, and none before it."""
    done = operations_of(paths["create, commit, seal"], tmp_path / "root")
    named = max(number for number, operation in enumerate(done) if operation == ("link", "zarr.json"))
    made = max(number for number, operation in enumerate(done) if operation == ("make_folder", "scalars"))
    assert ("fsync", "set") in done[made:named]


# The tests above can fail: of code that leaves out a sync they find it.

FORGOTTEN = {
    "bytes of a shard": ("create, commit, seal", "fsync", "logits.0."),
    "names of a shard's files": ("create, commit, seal", "fsync", "logits"),
    "bytes of a commit": ("create, commit, seal", "fsync", "commit.1."),
    "names of commits": ("create, commit, seal", "fsync", "commits"),
    "bytes of a generation": ("create, commit, seal", "fsync", "generation.1."),
    "names of generations": ("create, commit, seal", "fsync", "generations"),
    "names in a label set": ("create, commit, seal", "fsync", "set"),
    "names in a store": ("create, commit, seal", "fsync", "store"),
    "a grown manifest": ("grow", "fsync", "zarr.json."),
    "names in the quarantine": ("quarantine by a reader", "fsync", "quarantine"),
    "recorded rows": ("record and seal", "append", "log"),
    "names of a recording": ("record and seal", "fsync", "recording"),
    "ids of a recording": ("record and seal", "fsync", "ids"),
    "what was counted": ("count what was served", "fsync", "served."),
    "a job": ("states of a job", "fsync", "job.json"),
}
"""Syncs without which something is torn or lost: the path, the operation, and how the name of the file begins."""


@pytest.mark.parametrize("what", FORGOTTEN)
def test_a_sync_that_is_left_out_is_found(what: str, paths: dict[str, WritePath], tmp_path: Path) -> None:
    name, operation, begins = FORGOTTEN[what]
    cuts = Cuts(paths[name])

    def forgets(done: str, path: Path) -> bool:
        return done == operation and path.name.startswith(begins)

    disk = cuts.run(tmp_path / "root", subsets=0, forgets=forgets)
    assert any(forgets(*sync) for sync in disk.syncs)
    with pytest.raises((AssertionError, LogitcacheError)):
        cuts.check(tmp_path / "cut")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("create, commit, seal", ("link", "zarr.json")),
        ("create, commit, seal", ("link", "0.json")),
        ("create, commit, seal", ("link", "1.json")),
        ("record and seal", ("link", "recording.json")),
        ("record and seal", ("remove", "recording.json")),
    ],
)
def test_taking_up_what_was_not_synced_without_syncing_it_is_found(
    name: str, named: tuple[str, str], paths: dict[str, WritePath], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = operations_of(paths[name], tmp_path / "root")
    after = max(number for number, operation in enumerate(done) if operation == named) + 1
    monkeypatch.setattr(Files, "sync_names", lambda *_: None)
    cuts = Cuts(paths[name])
    with pytest.raises((AssertionError, LogitcacheError)):
        cuts.run(tmp_path / "root", subsets=0, dies_at=after)
        cuts.check(tmp_path / "cut")
