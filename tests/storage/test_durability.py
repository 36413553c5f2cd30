"""The order of operations on which surviving a power cut rests: nothing is named before it is synced.

A kill cannot show a missing fsync, since the kernel still has the pages. So the order itself is asserted.
"""

from pathlib import Path

import numpy as np
import pytest
from tests.building import Reference, build, commit_shards, reference, writer_of
from tests.storage.faults import Counting

from logitcache.storage.admission import quarantine
from logitcache.storage.places import Places


class Recording(Counting):
    """Records operations with whole paths."""

    def __init__(self) -> None:
        super().__init__(lambda number, operation, path: self.done.append((operation, path)))
        self.done: list[tuple[str, Path]] = []


@pytest.fixture(scope="module")
def source() -> Reference:
    return reference(2, ids="text", targets=True)


@pytest.fixture(scope="module")
def recorded(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, Path]]]:
    path, files = tmp_path_factory.mktemp("r") / "store" / "set", Recording()
    with writer_of(path, source, files=files) as writer:
        commit_shards(writer, source, [0, 1])
        writer.seal()
    return path, files.done


def position(done: list[tuple[str, Path]], operation: str, path: Path, after: int = -1) -> int:
    return next(at for at, entry in enumerate(done) if at > after and entry == (operation, path))


def test_every_file_is_synced_between_its_writing_and_its_naming(recorded: tuple[Path, list[tuple[str, Path]]]) -> None:
    path, done = recorded
    names = [(at, name) for at, (operation, name) in enumerate(done) if operation in ("link", "rename")]
    written: list[int] = [at for at, (operation, _) in enumerate(done) if operation == "write"]
    assert len(names) == len(written)
    for at in written:
        staged = done[at][1]
        synced = position(done, "fsync", staged, at)
        # No name is given between a write and its sync, and the sync follows the write.
        assert not any(at < named < synced for named, _ in names)
    assert path.exists()


def test_chunks_are_durable_under_their_names_before_the_commit_that_promises_them(
    recorded: tuple[Path, list[tuple[str, Path]]], source: Reference
) -> None:
    path, done = recorded
    places = Places(path)
    for shard in range(2):
        committed = position(done, "link", places.commit(shard))
        for name in source.layout.parts:
            linked = position(done, "link", places.part(source.layout, name, shard))
            assert linked < position(done, "fsync", path / name, linked) < committed
        assert position(done, "fsync", places.commits, committed) > committed
    sealed = position(done, "link", places.generations / "1.json")
    assert position(done, "fsync", places.commits, committed) < sealed
    assert position(done, "fsync", places.generations, sealed) > sealed


def test_the_group_appears_after_all_its_arrays(
    recorded: tuple[Path, list[tuple[str, Path]]], source: Reference
) -> None:
    path, done = recorded
    group = position(done, "link", path / "zarr.json")
    for name in source.layout.arrays:
        metadata = position(done, "link", path / name / "zarr.json")
        assert metadata < position(done, "fsync", path / name, metadata) < group
    assert position(done, "fsync", path, group) > group


def test_a_quarantine_withdraws_the_commit_durably_before_it_moves_a_file(source: Reference, tmp_path: Path) -> None:
    path = build(tmp_path / "store" / "set", source)
    files = Recording()
    quarantine(Places(path), source.layout, 1, "for a test", files)
    renamed = [at for at, (operation, _) in enumerate(files.done) if operation == "rename"]
    assert files.done[renamed[0]][1].name == "commit.json"
    assert renamed[0] < position(files.done, "fsync", path / "commits") < renamed[1]
    assert len(renamed) == 1 + len(source.layout.parts)


def test_unused_slots_of_the_last_shard_are_zero(source: Reference, tmp_path: Path) -> None:
    path = build(tmp_path / "store" / "set", source)
    used = len(source.layout.span(1))
    for name, array in source.layout.arrays.items():
        chunk = np.fromfile(path / name / array.chunk_key(1), array.dtype).reshape(-1, *array.row_shape)
        assert len(chunk) == source.layout.rows_per_shard
        assert not chunk[used:].any()
        assert chunk[:used].any()
