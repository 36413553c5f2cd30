"""What else happens while a label set grows: readers that are opened just then, folders that are exchanged, damage."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, Reference, build, commit_shards, grow, grown, reference, writer_of
from tests.conformance import assert_rows_equal

from logitcache.labels.errors import (
    DatasetFault,
    DigestChanged,
    InvalidRequest,
    NotALabelSet,
    RowsMissing,
    StorageFault,
)
from logitcache.labels.label_set import LABELLED
from logitcache.storage import LocalLabelSet, reading, shards
from logitcache.storage.manifest import read_layout
from logitcache.storage.packing import packed_shards
from logitcache.storage.places import Places
from logitcache.storage.records import Generation, newest_generation, read_generations


def refreshed(reader: LocalLabelSet) -> LocalLabelSet:
    """Look at the folder now, without waiting for the half second."""
    reader._shards.refresh()
    return reader


def other_rows(source: Reference) -> Reference:
    """The same label set over another dataset."""
    return dataclasses.replace(source, logits=source.logits[:, ::-1].copy())


def test_a_label_set_that_is_replaced_while_it_is_built_is_never_served_as_the_first_one(tmp_path: Path) -> None:
    """The same identity and shape, no digest to tell them apart: only what was seen of the first one can."""
    source = reference(3)
    path = build(tmp_path / "s" / "set", source, [0])
    reader = LocalLabelSet(path)
    reader.fetch([0])
    path.rename(tmp_path / "old")
    build(path, other_rows(source), [0])
    for _ in range(3):
        with pytest.raises(DigestChanged, match="open it again"):
            refreshed(reader).fetch([0])
    reader.close()


def test_a_label_set_that_is_replaced_during_a_fetch_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.Shards, "_start_verifier", lambda self: None)
    source = reference(2)
    path = build(tmp_path / "s" / "set", source)
    reader = LocalLabelSet(path)
    admit = reader._shards.admit

    def replaced_meanwhile(waiting: Iterable[int]) -> None:
        path.rename(tmp_path / "old")
        build(path, other_rows(source))
        reader._shards.refresh()
        admit(waiting)

    monkeypatch.setattr(reader._shards, "admit", replaced_meanwhile)
    with pytest.raises(DigestChanged, match="open it again"):
        reader.fetch([0], on_missing="mask")
    reader.close()


@pytest.mark.parametrize("shards_built", [[0], None])
def test_a_manifest_that_is_changed_in_place_is_another_label_set(
    tmp_path: Path, shards_built: list[int] | None
) -> None:
    path = build(tmp_path / "s" / "set", reference(2), shards_built)
    reader = LocalLabelSet(path)
    reader.fetch([0])
    group = path / "zarr.json"
    group.write_text(group.read_text().replace("seed 0", "seed 1"))
    assert reader.is_replaced
    reader.close()


def test_a_reader_that_is_opened_while_the_manifest_is_replaced_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = reference(2)
    whole = grown(begun, 10)
    path = build(tmp_path / "s" / "set", begun)
    read: Callable[[Path], Any] = read_layout

    def grown_just_then(root: Path) -> Any:
        layout = read(root)
        monkeypatch.setattr(shards, "read_layout", read)
        grow(path, whole)
        return layout

    monkeypatch.setattr(shards, "read_layout", grown_just_then)
    reader = refreshed(LocalLabelSet(path))
    new = np.arange(begun.layout.examples, whole.layout.examples)
    assert_rows_equal(reader.fetch(new), whole, new)
    reader.close()


def test_an_old_manifest_in_the_place_of_the_new_one_costs_no_labels(tmp_path: Path) -> None:
    begun = reference(2)
    whole = grown(begun, 10)
    path = build(tmp_path / "s" / "set", begun)
    old = shutil.copyfile(path / "zarr.json", tmp_path / "old.json")
    grow(path, whole)
    new = shutil.copyfile(path / "zarr.json", tmp_path / "new.json")
    shutil.copyfile(old, path / "zarr.json")
    with pytest.raises(NotALabelSet, match="restore the newer one"):
        writer_of(path, begun)
    reader = LocalLabelSet(path)
    assert (reader.describe().examples, reader.describe().generation) == (begun.layout.examples, 1)
    reader.close()
    shutil.copyfile(new, path / "zarr.json")
    with writer_of(path, whole) as writer:
        assert (writer.missing, writer.quarantined) == ([], {})


@pytest.mark.parametrize("change", [-1, 1])
def test_an_array_may_be_longer_than_the_manifest_says_and_not_shorter(tmp_path: Path, change: int) -> None:
    """Growing writes the arrays first, and may be killed before it writes the manifest."""
    path = build(tmp_path / "s" / "set", reference(1))
    metadata = path / "scalars" / "zarr.json"
    content = json.loads(metadata.read_bytes())
    content["shape"][0] += change
    metadata.write_text(json.dumps(content))
    if change < 0:
        with pytest.raises(NotALabelSet, match="shape is"):
            LocalLabelSet(path)
    else:
        LocalLabelSet(path).close()


def test_a_manifest_with_fewer_rows_than_examples_is_damaged(tmp_path: Path) -> None:
    source = reference(1, alignment="causal")
    path = build(tmp_path / "s" / "set", source, [])
    group = json.loads((path / "zarr.json").read_bytes())
    group["attributes"]["logitcache"]["shards"]["rows"] = [source.layout.examples - 1]
    (path / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(NotALabelSet, match="fewer rows than examples"):
        LocalLabelSet(path)


def test_a_label_set_grows_only_after_a_repair_with_other_bytes_is_sealed(tmp_path: Path) -> None:
    begun = reference(2)
    path = build(tmp_path / "s" / "set", begun)
    (path / "logits" / "c.1.0").unlink()
    with writer_of(path, begun) as writer:
        commit_shards(writer, other_rows(begun), [1])
        with pytest.raises(InvalidRequest, match="complete and sealed"):
            writer.grow(begun.layout.grown(5))
        with pytest.raises(InvalidRequest, match="by shards after its last one"):
            writer.grow(begun.layout)
        writer.seal()
        writer.grow(begun.layout.grown(5))


def test_folders_that_were_empty_when_a_label_set_was_copied_are_made_again(tmp_path: Path) -> None:
    source = reference(1, ids="text")
    path = build(tmp_path / "s" / "set", source, [])
    for folder in ("texts", "commits", "generations", "statistics", "staging"):
        (path / folder).rmdir()
    build(path, source)
    reader = LocalLabelSet(path)
    assert_rows_equal(reader.fetch(source.at([5])), source, [5])
    reader.close()


def test_an_example_without_rows_is_refused() -> None:
    with pytest.raises(DatasetFault, match="example 12 has no rows") as caught:
        list(packed_shards(np.array([3, 1, 0, 4]), 4096, 4096, first_ordinal=10))
    assert caught.value.details["example"] == 12


def test_every_shard_of_an_older_generation_is_looked_at_though_the_newest_has_fewer(tmp_path: Path) -> None:
    """No writer of ours makes such a folder; rows of what is not mapped must not come out of it all the same."""
    source = reference(3)
    path = build(tmp_path / "s" / "set", source)
    (first,) = read_generations(path / "generations", source.layout)
    _, data = Generation.of(source.identity, 2, ROWS_PER_SHARD, list(first.commits[:1]))
    (path / "generations" / "2.json").write_bytes(data)
    (path / "commits" / "2.json").unlink()
    reader = LocalLabelSet(path)
    assert reader.describe().digest != first.digest
    assert len(reader.fetch([0])) == 1
    with pytest.raises(RowsMissing):
        reader.fetch([2 * ROWS_PER_SHARD], digest=first.digest)
    reader.close()


def test_states_of_a_generation_whose_rows_were_repaired_with_other_bytes_are_refused_like_its_rows(
    tmp_path: Path,
) -> None:
    begun = reference(2)
    path = build(tmp_path / "s" / "set", begun)
    old = Generation.read(path / "generations" / "1.json", begun.layout).digest
    (path / "logits" / "c.1.0").unlink()
    build(path, other_rows(begun))
    reader = LocalLabelSet(path)
    assert reader.states([3], digest=old).tolist() == [LABELLED]
    for call in (reader.states, reader.fetch):
        with pytest.raises(DigestChanged, match="labelled again with other bytes"):
            call([ROWS_PER_SHARD], digest=old)
    reader.close()


def test_generations_that_are_known_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label set that grew a thousand times has a thousand of them, and each lists every shard."""
    source = reference(1)
    path = build(tmp_path / "s" / "set", source)
    for step in range(3):
        source = grown(source, 5, seed=step)
        grow(path, source)
    reader = LocalLabelSet(path)
    source = grown(source, 5, seed=9)
    grow(path, source)
    read: list[str] = []
    plain = reading.read_file

    def noted(root: Path, file: Path, most: int, refused: type[StorageFault]) -> bytes:
        read.append(f"{file.parent.name}/{file.name}")
        return plain(root, file, most, refused)

    monkeypatch.setattr("logitcache.storage.records.read_file", noted)
    assert len(refreshed(reader).describe().generations) == 5
    assert {name for name in read if name.startswith("generations")} == {"generations/4.json", "generations/5.json"}
    reader.close()


def test_a_damaged_generation_is_passed_over_and_its_number_is_not_used_again(tmp_path: Path) -> None:
    begun = reference(1)
    whole = grown(begun, 5)
    path = grow(build(tmp_path / "s" / "set", begun), whole)
    newest = path / "generations" / "2.json"
    newest.write_bytes(newest.read_bytes()[:-1])
    found = newest_generation(Places(path).generations, whole.layout)
    assert found is not None
    assert found.number == 1
    reader = LocalLabelSet(path)
    with pytest.raises(RowsMissing, match="without labels"):
        reader.fetch([begun.layout.examples])
    with writer_of(path, whole) as writer:
        assert writer.seal().number == 3
    assert_rows_equal(refreshed(reader).fetch([begun.layout.examples]), whole, [begun.layout.examples])
    reader.close()


def test_a_label_set_that_grows_beyond_the_addresses_of_its_reader_must_be_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = reference(2)
    whole = grown(begun, ROWS_PER_SHARD + 1)
    path = build(tmp_path / "s" / "set", begun)
    monkeypatch.setattr(shards, "RESERVED_BYTES", 3 * ROWS_PER_SHARD * 3 * 4)
    reader = LocalLabelSet(path)
    grow(path, whole)
    with pytest.raises(DigestChanged, match="open it again"):
        refreshed(reader).fetch([0])
    reader.close()
    again = LocalLabelSet(path)
    last = [whole.layout.examples - 1]
    assert_rows_equal(again.fetch(last), whole, last)
    again.close()


@pytest.mark.parametrize("kind", ["integer", "text"])
def test_ids_of_a_shard_that_was_labelled_anew_are_those_of_the_new_one(tmp_path: Path, kind: Any) -> None:
    """While a label set is built nothing holds a withdrawn shard to its old examples."""
    source = reference(2, ids=kind)
    shuffled = np.random.default_rng(0).permutation(source.layout.examples)
    other = dataclasses.replace(source, ids=tuple(source.at(shuffled)))
    path = build(tmp_path / "s" / "set", source, [0])
    reader = LocalLabelSet(path)
    reader.fetch(source.at([3]))
    (path / "logits" / "c.0.0").unlink()
    build(path, other, [0])
    refreshed(reader)
    ordinals = np.arange(0, ROWS_PER_SHARD, 100)
    assert_rows_equal(reader.fetch(other.at(ordinals)), other, ordinals)
    gone = sorted(set(source.ids[:ROWS_PER_SHARD]) - set(other.ids[:ROWS_PER_SHARD]), key=str)[:3]
    with pytest.raises(RowsMissing) as caught:
        reader.fetch(gone)
    assert caught.value.unlabelled == gone
    reader.close()


def test_a_process_with_few_addresses_reads_what_is_there(tmp_path: Path) -> None:
    """Room for growth is asked for, and done without: clusters limit the addresses of a job (ulimit -v)."""
    path = build(tmp_path / "s" / "set", reference(2))
    program = (
        "import pathlib, resource, sys; from logitcache.storage import LocalLabelSet;"
        "pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0]);"
        "limit = pages * resource.getpagesize() + (512 << 20);"  # Room for growth would be twice that.
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit));"
        "reader = LocalLabelSet(sys.argv[1]); print(len(reader.fetch([0, 5000]))); reader.close()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_texts_that_no_ids_could_have_are_refused_unread(tmp_path: Path) -> None:
    source = reference(1, ids="text")
    path = build(tmp_path / "s" / "set", source)
    record = path / "commits" / "0.json"
    content = json.loads(record.read_bytes())
    content["files"]["texts"]["bytes"] = 2 + source.layout.examples * (6 * 4096 + 3)
    record.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")))
    reader = LocalLabelSet(path)
    assert "its texts have" in (reader.verify_all()[0].problem or "")
    reader.close()
