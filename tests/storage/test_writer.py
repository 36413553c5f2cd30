"""The writer: what is committed stays, what is not never shows, and only the same label set is continued."""

import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from tests.building import Reference, build, commit_shards, writer_of
from tests.conformance import assert_rows_equal
from tests.storage.faults import Counting, failing, full_disk

from logitcache.labels.errors import (
    DatasetChanged,
    DiskFull,
    IdentityChanged,
    InvalidName,
    InvalidRequest,
    LabelSetLocked,
    NewerFormat,
    NotALabelSet,
    ShapeMismatch,
    StorageFault,
    StoreNotFound,
    StoreNotWritable,
)
from logitcache.labels.identity import TeacherId, label_set_digest
from logitcache.storage import LocalLabelSet
from logitcache.storage.layout import Layout
from logitcache.storage.packing import default_rows_per_shard
from logitcache.storage.writer import LabelSetWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "x"


def content(path: Path) -> dict[str, bytes]:
    """Every file that belongs to the content of a label set."""
    patterns = ("zarr.json", "*/zarr.json", "*/c.*", "commits/*", "generations/*")
    return {str(file.relative_to(path)): file.read_bytes() for pattern in patterns for file in path.glob(pattern)}


def test_the_same_rows_give_the_same_bytes_in_whatever_order_shards_are_committed(
    source: Reference, tmp_path: Path
) -> None:
    build(tmp_path / "s" / "x", source)
    with writer_of(tmp_path / "s" / "y", source) as writer:
        commit_shards(writer, source, [2, 0])
    with writer_of(tmp_path / "s" / "y", source) as writer:
        assert writer.committed == [0, 2]
        commit_shards(writer, source, [1])
        writer.seal()
    assert content(tmp_path / "s" / "x") == content(tmp_path / "s" / "y")


def test_the_digest_is_that_of_the_identity_and_the_commits(source: Reference, path: Path) -> None:
    build(path, source)
    commits = [hashlib.sha256((path / f"commits/{shard}.json").read_bytes()).hexdigest() for shard in range(3)]
    assert LocalLabelSet(path).describe().digest == label_set_digest(source.identity, commits)
    for shard in range(3):
        for name, entry in json.loads((path / f"commits/{shard}.json").read_bytes())["files"].items():
            [chunk] = [file for file in (path / name).glob(f"c.{shard}*") if file.name.split(".")[1] == str(shard)]
            assert hashlib.sha256(chunk.read_bytes()).hexdigest() == entry["sha256"]
            assert chunk.stat().st_size == entry["bytes"]


def test_a_label_set_is_sealed_only_when_it_is_complete(source: Reference, path: Path) -> None:
    with writer_of(path, source) as writer:
        commit_shards(writer, source, [0])
        with pytest.raises(InvalidRequest, match="2 of 3 shards are missing"):
            writer.seal()
        commit_shards(writer, source, [1, 2])
        first = writer.seal()
        assert writer.seal() == first


def test_a_shard_is_committed_once(source: Reference, path: Path) -> None:
    with writer_of(path, source) as writer:
        commit_shards(writer, source, [0])
        with pytest.raises(InvalidRequest, match="not missing"):
            commit_shards(writer, source, [0])


@pytest.mark.parametrize("name", ["ids", "fingerprint", "indices", "logits", "scalars"])
def test_rows_of_another_shape_or_dtype_are_refused(source: Reference, path: Path, name: str) -> None:
    with writer_of(path, source) as writer:
        arrays = source.arrays(source.layout.span(0))
        for wrong in (arrays[name][:-1], arrays[name].astype(np.float64), arrays[name][None]):
            with pytest.raises(ShapeMismatch, match=name):
                writer.commit(0, arrays | {name: wrong}, {})
        assert writer.missing == [0, 1, 2]


def test_one_process_writes_and_another_is_told_who(source: Reference, path: Path) -> None:
    with writer_of(path, source), pytest.raises(LabelSetLocked, match=str(os.getpid())):
        writer_of(path, source)
    writer_of(path, source).close()


def hold_lock(path: Path, source: Reference, ready: Any) -> None:
    writer = writer_of(path, source)
    commit_shards(writer, source, [0])
    ready.set()
    multiprocessing.Event().wait()


def test_the_lock_dies_with_its_process(source: Reference, path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=hold_lock, args=(path, source, ready))
    child.start()
    ready.wait()
    with pytest.raises(LabelSetLocked, match=str(child.pid)):
        writer_of(path, source)
    child.kill()
    child.join()
    with writer_of(path, source) as writer:
        assert writer.committed == [0]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"k": 5}, "k was 4 and is now 5"),
        ({"temperatures": (1.0, 3.0)}, "temperatures was"),
        ({"dtype": "float32"}, "dtype was 'float16' and is now 'float32'"),
        (
            {"teacher": TeacherId("reference", "other weights")},
            "teacher.weights was 'seed 0' and is now 'other weights'",
        ),
        ({"teacher": TeacherId("reference", "seed 0", "crop")}, "teacher.preprocessing was '' and is now 'crop'"),
        ({"classes": 21}, "classes was 20 and is now 21"),
    ],
)
def test_another_identity_is_refused_field_by_field(
    source: Reference, path: Path, change: dict[str, Any], field: str
) -> None:
    build(path, source, [0])
    before = content(path)
    other = dataclasses.replace(source.identity, **change)
    with pytest.raises(IdentityChanged) as caught:
        LabelSetWriter(path, dataclasses.replace(source.layout, identity=other))
    assert field in str(caught.value)
    assert len(caught.value.details["fields"]) == 1
    assert content(path) == before


def test_fewer_examples_or_another_shard_size_are_refused(source: Reference, path: Path) -> None:
    build(path, source, [0])
    examples = source.layout.examples
    with pytest.raises(DatasetChanged, match="shrank"):
        LabelSetWriter(path, Layout.pointwise(source.identity, examples - 1, 4096))
    with pytest.raises(IdentityChanged, match="rows_per_shard was 4096 and is now 8192"):
        LabelSetWriter(path, Layout.pointwise(source.identity, examples, 8192))
    # More examples are an append, which begins when what was begun is sealed.
    with LabelSetWriter(path, Layout.pointwise(source.identity, examples + 1, 4096)) as writer:
        assert writer.layout == source.layout
        with pytest.raises(InvalidRequest, match="label what is missing first"):
            writer.grow(source.layout.grown(1))


@pytest.mark.parametrize("rows", [0, -4096, 1, 5000, 2**31 + 4096])
def test_a_shard_size_that_is_no_multiple_of_a_page_is_refused(source: Reference, rows: int) -> None:
    with pytest.raises(InvalidRequest, match=r"multiple of 4,096 up to 2,147,483,648: try \d"):
        Layout.pointwise(source.identity, source.layout.examples, rows)


def test_more_shards_than_a_reader_can_map_are_refused(source: Reference) -> None:
    with pytest.raises(InvalidRequest, match=r"make 6,001, more than .* \(262,144 is the default\)"):
        Layout.pointwise(source.identity, 6000 * 4096 + 1, 4096)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-x", "x" * 65, "a b", ".hidden", "naïve"])
def test_names_that_are_no_names_are_refused(source: Reference, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidName, match="1 to 64"):
        writer_of(Path(str(tmp_path) + "/" + name) if name not in ("", "a/b") else _Named(tmp_path, name), source)


class _Named(type(Path())):  # type: ignore[misc]
    """A path whose last part is not what a path would make of it."""

    def __new__(cls, parent: Path, name: str) -> "_Named":
        made: _Named = super().__new__(cls, parent / "x")
        made._given = name
        return made

    @property
    def name(self) -> str:
        return str(self._given)


def test_foreign_folders_are_left_alone(source: Reference, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    with pytest.raises(NotALabelSet, match="did not write"):
        writer_of(tmp_path / "x", source)
    assert [file.name for file in (tmp_path / "x").iterdir()] == ["thesis.tex"]
    zarr.create_group(tmp_path / "y")
    with pytest.raises(NotALabelSet, match="did not write"):
        writer_of(tmp_path / "y", source)
    assert [file.name for file in (tmp_path / "y").iterdir()] == ["zarr.json"]


def test_a_newer_format_is_not_written_to(source: Reference, path: Path) -> None:
    build(path, source, [0])
    group = path / "zarr.json"
    group.write_text(group.read_text().replace('"format_version": 1,', '"format_version": 2,'))
    before = content(path)
    with pytest.raises(NewerFormat, match="upgrade"):
        writer_of(path, source)
    assert content(path) == before


def test_a_store_is_made_but_not_its_parents(source: Reference, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="no-such"):
        writer_of(tmp_path / "no-such" / "store" / "x", source)
    writer_of(tmp_path / "store" / "x", source).close()


def operations_of_a_run(source: Reference, path: Path) -> list[tuple[str, str]]:
    counting = Counting(lambda number, operation, path: None)
    with writer_of(path, source, files=counting) as writer:
        commit_shards(writer, source, [0, 1, 2])
        writer.seal()
    return counting.log


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_at_any_operation_loses_nothing_and_the_next_run_finishes(
    source: Reference, tmp_path: Path, code: int
) -> None:
    (tmp_path / "s").mkdir()
    total = len(operations_of_a_run(source, tmp_path / "s" / "whole"))
    # Each code begins elsewhere, so that together they fail at every operation.
    first = [errno.ENOSPC, errno.EIO, errno.EROFS].index(code)
    whole = content(tmp_path / "s" / "whole")
    expected = {errno.ENOSPC: DiskFull, errno.EROFS: StoreNotWritable}.get(code, StorageFault)
    for number in range(first, total, 3):
        path = tmp_path / "s" / f"at-{number}"
        committed: list[int] = []
        with pytest.raises(expected), writer_of(path, source, files=failing(number, code)) as writer:
            for shard in range(3):
                commit_shards(writer, source, [shard])
                committed.append(shard)
            writer.seal()
        with writer_of(path, source) as writer:
            assert set(committed) <= set(writer.committed)
            assert len(writer.committed) <= len(committed) + 1
            commit_shards(writer, source, writer.missing)
            writer.seal()
        assert content(path) == whole, f"operation {number}"


def test_a_full_disk_is_named_gives_back_what_was_staged_and_keeps_what_was_committed(
    source: Reference, path: Path
) -> None:
    log = operations_of_a_run(source, path.parent.with_name("other") / "x")
    number = next(
        at for at, (operation, name) in enumerate(log) if operation == "write" and name.startswith("scalars.1")
    )
    with (
        writer_of(path, source, files=full_disk(number)) as writer,
        pytest.raises(DiskFull, match="what is committed is kept: make room and run the same command again"),
    ):
        commit_shards(writer, source, [0, 1])
    assert list((path / "staging").iterdir()) == []
    assert not (path / "logits" / "c.1.0").exists()
    reader = LocalLabelSet(path)
    assert_rows_equal(reader.fetch([17]), source, np.array([17]))
    reader.close()


def test_default_shards_are_few_enough_to_map() -> None:
    for examples in (1, 10_000, 1_281_167, 10**9):
        rows = default_rows_per_shard(examples)
        assert rows % 4096 == 0
        assert -(-examples // rows) <= 4000


def test_a_layout_of_one_example_has_one_shard_of_whole_pages(source: Reference) -> None:
    layout = Layout.pointwise(source.identity, 1, 4096)
    assert (layout.shards, layout.span(0)) == (1, range(1))
    assert all(layout.chunk_bytes(array) % 4096 == 0 for array in layout.arrays.values())
