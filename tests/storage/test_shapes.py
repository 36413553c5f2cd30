"""Every kind of label set through the local reader: causal rows, ids of the dataset's own, targets, growth."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import (
    ROWS_PER_SHARD,
    SHAPES,
    Id,
    Reference,
    build,
    commit_shards,
    complete_and_partial,
    grow,
    grown,
    reference,
    writer_of,
)
from tests.conformance import ShapesConformance, assert_rows_equal
from tests.storage.faults import Counting, failing

from logitcache.labels import wire
from logitcache.labels.errors import (
    DatasetFault,
    DigestChanged,
    InvalidRequest,
    RowsMissing,
    ShapeMismatch,
    StorageFault,
    TooManyRows,
)
from logitcache.labels.label_set import UNLABELLED, Limits, OnMissing
from logitcache.storage import LocalLabelSet

KINDS = SHAPES | {
    "causal, integers, wide": {"alignment": "causal", "ids": "integer", "classes": 70_000, "k": 3, "longest": 12},
}


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest) -> Reference:
    options = KINDS[request.param]
    # A wide reference is dense: its rows are few.
    return reference(3, **options) if "classes" not in options else small_and_wide(**options)


def small_and_wide(**options: Any) -> Reference:
    """Three shards of a few rows each, made by growing twice."""
    narrow = reference(1, short_by=ROWS_PER_SHARD - 100, **options)
    return grown(grown(narrow, 3, longest=20), 2, longest=20, seed=2)


@pytest.fixture(scope="module")
def store(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_and_partial(tmp_path_factory.mktemp("store"), source)


@pytest.fixture
def complete(store: Path) -> Iterator[LocalLabelSet]:
    reader = LocalLabelSet(store / "complete")
    yield reader
    reader.close()


@pytest.fixture
def partial(store: Path) -> Iterator[LocalLabelSet]:
    reader = LocalLabelSet(store / "partial")
    yield reader
    reader.close()


class TestShapes(ShapesConformance):
    """The local reader reads label sets of every shape."""

    def test_the_body_for_the_wire_holds_what_fetch_gives(
        self, complete: LocalLabelSet, partial: LocalLabelSet, source: Reference
    ) -> None:
        ids = source.at([4, 0, 4])
        last = source.at([len(source.ids) - 1])
        asked: list[tuple[LocalLabelSet, list[Id], OnMissing]] = [
            (complete, ids, "error"),
            (complete, ids, "mask"),
            (partial, ids + last, "mask"),
        ]
        for reader, wanted, on_missing in asked:
            soft = reader.fetch(wanted, on_missing=on_missing)
            sent = wire.decode_rows(reader.fetch_body(wanted, on_missing=on_missing)[0])
            assert (sent.digest, sent.arrays().keys()) == (soft.digest, soft.arrays().keys())
            for name, array in soft.arrays().items():
                assert np.array_equal(sent.arrays()[name], array, equal_nan=array.dtype.kind == "f"), name
            if on_missing == "mask":
                assert soft.present is not None
                assert soft.present.tolist() == [True, True, True, False][: len(wanted)]


def refreshed(reader: LocalLabelSet) -> LocalLabelSet:
    """Look at the folder now, without waiting for the half second."""
    reader._shards.refresh()
    return reader


def files_of(path: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of every file that rows depend on."""
    found = {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if file.is_file() and inside.name != "zarr.json" and inside.parts[0] not in ("stamps.json", "lock"):
            found[str(inside)] = (file.stat().st_ino, file.read_bytes())
    return found


@pytest.fixture(params=["pointwise, texts", "causal, texts, targets", "causal"])
def growing(request: pytest.FixtureRequest) -> tuple[Reference, Reference]:
    begun = reference(2, **KINDS[request.param])
    return begun, grown(begun, 50)


def test_an_append_leaves_every_old_byte_and_file_as_it_was(
    growing: tuple[Reference, Reference], tmp_path: Path
) -> None:
    begun, whole = growing
    path = build(tmp_path / "s" / "set", begun)
    before = files_of(path)
    grow(path, whole)
    after = files_of(path)
    assert {name: after[name] for name in before} == before
    new = {name.rpartition("/")[2] for name in after.keys() - before.keys()}
    added = range(begun.layout.shards, whole.layout.shards)
    names = {name for shard in added for name in (f"c.{shard}", f"c.{shard}.0", f"{shard}.json")}
    assert {f"c.{shard}.0" for shard in added} < new <= names | {"2.json"}


def test_pinned_readers_keep_their_content_and_others_follow(
    growing: tuple[Reference, Reference], tmp_path: Path
) -> None:
    begun, whole = growing
    path = build(tmp_path / "s" / "set", begun)
    reader = LocalLabelSet(path)
    old = reader.describe().digest
    with writer_of(path, whole) as writer:
        writer.grow(whole.layout)
        assert refreshed(reader).describe().examples == whole.layout.examples
        new = np.arange(begun.layout.examples, whole.layout.examples)
        commit_shards(writer, whole, writer.missing)
        # Committed, and not sealed: nothing of it is served under the old digest.
        assert refreshed(reader).describe().digest == old
        with pytest.raises(RowsMissing) as caught:
            reader.fetch(whole.at(new[:2]))
        assert (caught.value.unknown, caught.value.unlabelled) == ([], whole.at(new[:2]))
        writer.seal()
    description = refreshed(reader).describe()
    assert [(each.number, each.examples) for each in description.generations] == [
        (1, begun.layout.examples),
        (2, whole.layout.examples),
    ]
    everything = np.random.default_rng(0).permutation(whole.layout.examples)
    soft = reader.fetch(whole.at(everything))
    assert soft.digest == description.digest != old
    assert_rows_equal(soft, whole, everything)
    pinned = reader.fetch(begun.at([5, 1]), digest=old)
    assert pinned.digest == old
    assert_rows_equal(pinned, begun, [5, 1])
    with pytest.raises(RowsMissing) as caught:
        reader.fetch(whole.at(new[:1]), digest=old)
    assert caught.value.unknown == whole.at(new[:1])
    reader.close()
    again = LocalLabelSet(path)
    assert_rows_equal(again.fetch(begun.at([5, 1]), digest=old), begun, [5, 1])
    again.close()


def test_a_label_set_that_was_grown_at_once_or_in_steps_reads_the_same(tmp_path: Path) -> None:
    source = reference(1, ids="integer")
    path = build(tmp_path / "s" / "set", source)
    for step in range(5):
        source = grown(source, 700 * step + 1, seed=step)
        grow(path, source)
    reader = LocalLabelSet(path)
    everything = np.random.default_rng(0).permutation(source.layout.examples)
    assert_rows_equal(reader.fetch(source.at(everything)), source, everything)
    assert len(reader.describe().generations) == 6
    reader.close()


def test_an_append_that_is_cut_off_anywhere_is_finished_by_the_next_writer(
    growing: tuple[Reference, Reference], tmp_path: Path
) -> None:
    begun, whole = growing
    expected = files_of(grow(build(tmp_path / "s" / "whole", begun), whole))
    counting = Counting(lambda number, operation, path: None)
    append(build(tmp_path / "s" / "counted", begun), whole, counting)
    for number in range(len(whole.layout.identity.ids), len(counting.log), 7):
        path = build(tmp_path / "s" / f"at-{number}", begun)
        old = LocalLabelSet(path)
        with pytest.raises(StorageFault):
            append(path, whole, failing(number, 5))
        # Whatever was reached, the old generation is served.
        ordinals = np.arange(0, begun.layout.examples, 7)
        assert_rows_equal(
            refreshed(old).fetch(begun.at(ordinals), digest=old.describe().generations[0].digest), begun, ordinals
        )
        fresh = LocalLabelSet(path)
        assert_rows_equal(fresh.fetch(begun.at(ordinals)), begun, ordinals)
        for reader in (old, fresh):
            reader.close()
        append(path, whole, None)
        content = {name: data for name, (_, data) in files_of(path).items()}
        assert content == {name: data for name, (_, data) in expected.items()}, f"operation {number}"


def append(path: Path, whole: Reference, files: Any) -> None:
    """Begin or go on with an append."""
    with writer_of(path, whole, files=files) as writer:
        if writer.layout != whole.layout:
            writer.grow(whole.layout)
        commit_shards(writer, whole, writer.missing)
        writer.seal()


def test_another_label_set_in_the_place_of_a_grown_one_is_refused(tmp_path: Path) -> None:
    begun = reference(2)
    path = build(tmp_path / "s" / "set", begun)
    reader = LocalLabelSet(path)
    reader.fetch([0])
    path.rename(tmp_path / "old")
    # The same identity and more examples, but other rows.
    build(path, grown(dataclasses.replace(begun, logits=begun.logits[:, ::-1].copy()), 10))
    assert reader.is_replaced
    with pytest.raises(DigestChanged, match="open it again"):
        reader.fetch([0])
    reader.close()


def test_a_pinned_generation_whose_shard_was_repaired_with_other_bytes_is_refused(tmp_path: Path) -> None:
    begun = reference(2)
    whole = grown(begun, 10)
    path = build(tmp_path / "s" / "set", begun)
    reader = LocalLabelSet(path)
    old = reader.describe().digest
    grow(path, whole)
    (path / "logits" / "c.1.0").unlink()
    reader.verify_all()
    other = dataclasses.replace(whole, logits=whole.logits + np.float64(1))
    with writer_of(path, other) as writer:
        commit_shards(writer, other, writer.missing)
        writer.seal()
    refreshed(reader)
    assert_rows_equal(reader.fetch([3], digest=old), begun, [3])
    with pytest.raises(DigestChanged, match="labelled again with other bytes"):
        reader.fetch([ROWS_PER_SHARD + 3], digest=old)
    assert_rows_equal(reader.fetch([ROWS_PER_SHARD + 3]), other, [ROWS_PER_SHARD + 3])
    reader.close()


@pytest.mark.parametrize("kind", ["integer", "text"])
def test_an_id_that_two_examples_have_is_refused_with_both(tmp_path: Path, kind: Any) -> None:
    source = reference(2, ids=kind)
    ids = list(source.ids)
    ids[ROWS_PER_SHARD + 7] = ids[3]
    with writer_of(tmp_path / "s" / "set", dataclasses.replace(source, ids=tuple(ids))) as writer:
        commit_shards(writer, dataclasses.replace(source, ids=tuple(ids)), [0])
        with pytest.raises(DatasetFault, match=f"examples 3 and {ROWS_PER_SHARD + 7:,} have the same id") as caught:
            commit_shards(writer, dataclasses.replace(source, ids=tuple(ids)), [1])
        assert caught.value.details["examples"] == [3, ROWS_PER_SHARD + 7]
        commit_shards(writer, source, [1])
        writer.seal()
    ids = list(source.ids)
    ids[9] = ids[3]
    with (
        writer_of(tmp_path / "s" / "other", dataclasses.replace(source, ids=tuple(ids))) as writer,
        pytest.raises(DatasetFault, match="examples 3 and 9 have the same id"),
    ):
        commit_shards(writer, dataclasses.replace(source, ids=tuple(ids)), [0])


def test_duplicates_are_found_across_a_resume(tmp_path: Path) -> None:
    source = reference(2, ids="text")
    build(tmp_path / "s" / "set", source, [0])
    ids = (*source.ids[:ROWS_PER_SHARD], source.ids[0], *source.ids[ROWS_PER_SHARD + 1 :])
    with (
        writer_of(tmp_path / "s" / "set", source) as writer,
        pytest.raises(DatasetFault, match="examples 0 and 4,096 have the same id, 'train/"),
    ):
        commit_shards(writer, dataclasses.replace(source, ids=ids), [1])


def test_texts_are_kept_and_covered_by_the_commit(tmp_path: Path) -> None:
    source = reference(1, ids="text")
    path = build(tmp_path / "s" / "set", source)
    with writer_of(path, source) as writer:
        assert writer.stored_texts(0) == list(source.ids)
        with pytest.raises(ShapeMismatch, match="as many texts"):
            writer._commits.clear()
            writer._ids = type(writer._ids)()
            writer.commit(0, source.arrays(source.layout.span(0)), {}, ["too", "few"])
    text = path / "texts" / "0.json"
    text.write_bytes(text.read_bytes().replace(b"train", b"trail", 1))
    reader = LocalLabelSet(path)
    (report,) = reader.verify_all()
    assert not report.ok
    assert "texts" in (report.problem or "")
    reader.close()


def test_a_shard_whose_ids_are_damaged_is_withdrawn_and_not_looked_up(tmp_path: Path) -> None:
    source = reference(2, ids="integer")
    path = build(tmp_path / "s" / "set", source)
    stored = bytearray((path / "ids" / "c.1").read_bytes())
    stored[:8], stored[8:16] = stored[8:16], stored[:8]  # two ids exchanged: each would get the other's labels
    (path / "ids" / "c.1").write_bytes(stored)
    reader = LocalLabelSet(path, verify="background")
    with pytest.raises(RowsMissing) as caught:
        reader.fetch(source.at([ROWS_PER_SHARD, ROWS_PER_SHARD + 1]))
    assert caught.value.unlabelled == source.at([ROWS_PER_SHARD, ROWS_PER_SHARD + 1])
    assert_rows_equal(reader.fetch(source.at([5])), source, [5])
    reader.close()


def test_while_shards_are_missing_an_id_that_is_not_found_may_be_among_them(tmp_path: Path) -> None:
    source = reference(2, ids="text")
    reader = LocalLabelSet(build(tmp_path / "s" / "set", source, [0]))
    assert reader.states(["no such"]).tolist() == [UNLABELLED]
    with writer_of(tmp_path / "s" / "set", source) as writer:
        commit_shards(writer, source, [1])
    assert refreshed(reader).states(source.at([ROWS_PER_SHARD])).tolist() == [0]
    with pytest.raises(RowsMissing, match="no example of it has such an id"):
        reader.fetch(["no such"])
    reader.close()


def test_an_answer_above_the_limit_of_bytes_is_refused_before_it_is_made(tmp_path: Path) -> None:
    source = reference(1, alignment="causal")
    path = build(tmp_path / "s" / "set", source)
    reader = LocalLabelSet(path, limits=Limits(ids=1000, response_bytes=2000))
    longest = int(source.row_counts.argmax())
    with pytest.raises(TooManyRows, match="ask for fewer rows of each"):
        reader.fetch([longest, longest])
    assert len(reader.fetch([longest], rows=(0, 20))) == 20
    reader.close()
    least = LocalLabelSet(path, limits=Limits(ids=1000, response_bytes=1))
    assert len(least.fetch([longest], rows=(0, 1))) == 1
    with pytest.raises(TooManyRows):
        least.fetch([longest], rows=(0, 2))
    least.close()
    generous = LocalLabelSet(path)
    assert len(generous.fetch([longest, longest])) == 2 * source.row_counts[longest]
    with pytest.raises(TooManyRows, match="ask for fewer rows of each"):
        generous.fetch([longest, longest], limits=Limits(ids=1000, response_bytes=2000))
    generous.close()


def test_single_rows_above_the_limit_of_bytes_are_refused_before_they_are_gathered(tmp_path: Path) -> None:
    source = reference(1)
    path = build(tmp_path / "s" / "set", source)
    limits = Limits(ids=1000, response_bytes=10 * source.layout.row_spec.nbytes(1, 1))
    reader = LocalLabelSet(path, limits=limits)
    assert len(reader.fetch(np.arange(10))) == 10
    with pytest.raises(TooManyRows, match="11 rows of 11 examples"):
        reader.fetch(np.arange(11))
    with pytest.raises(TooManyRows, match="11 rows of 11 examples"):
        reader.fetch_body(np.arange(11), on_missing="mask")
    assert len(reader.states(np.arange(1000))) == 1000  # which takes a byte each
    reader.close()


def test_ranges_are_for_label_sets_with_many_rows_an_example(tmp_path: Path) -> None:
    reader = LocalLabelSet(build(tmp_path / "s" / "set", reference(1)))
    with pytest.raises(InvalidRequest, match="has one row"):
        reader.fetch([0], rows=(0, 1))
    reader.close()


def test_unused_slots_take_no_space(tmp_path: Path) -> None:
    source = reference(1, alignment="causal", short_by=4000)
    path = build(tmp_path / "s" / "set", source)
    description = LocalLabelSet(path).describe()
    on_disk = sum(file.stat().st_blocks * 512 for file in path.glob("*/c.*"))
    apparent = sum(file.stat().st_size for file in path.glob("*/c.*"))
    assert description.label_bytes <= on_disk < apparent / 4
