"""Whether a batch can be answered without waiting: for a disk, for a look at the folder, for a shard's check."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, Reference, build, commit_shards, reference, writer_of
from tests.conformance import assert_rows_equal

from logitcache.labels.errors import DigestChanged, RowsMissing
from logitcache.storage import LocalLabelSet, gather, local, mapping, paging, shards
from logitcache.storage.shards import REFRESH_S, SETTLED_S


@pytest.fixture(autouse=True)
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does, a gather counts as fast, and a look at the folder as recent."""
    monkeypatch.setattr(paging, "FIXED_S", 1e9)
    monkeypatch.setattr(shards, "REFRESH_S", 1e9)
    monkeypatch.setattr(shards, "SETTLED_S", 1e9)


@pytest.fixture
def reader(label_set: Path) -> Iterator[LocalLabelSet]:
    """A reader that has fetched once from each shard."""
    reader = LocalLabelSet(label_set)
    reader.fetch([0, ROWS_PER_SHARD, 2 * ROWS_PER_SHARD])
    yield reader
    reader.close()


def test_nothing_is_at_hand_until_a_gather_was_fast(label_set: Path) -> None:
    reader = LocalLabelSet(label_set)
    reader.verify_all()
    assert not reader.is_at_hand(1)
    reader.fetch([0])
    assert reader.is_at_hand(1)
    reader.close()


def test_few_examples_are_at_hand_and_many_are_not(reader: LocalLabelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader.is_at_hand(local.FEW_EXAMPLES)
    assert not reader.is_at_hand(local.FEW_EXAMPLES + 1)
    monkeypatch.setattr(local, "FEW_BYTES", 5 * reader.layout.row_spec.nbytes(1, 1))
    assert reader.is_at_hand(5)
    assert not reader.is_at_hand(6)


def test_nothing_is_at_hand_when_the_folder_is_to_be_looked_at(
    reader: LocalLabelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SETTLED_S", 0.0)
    assert not reader.is_at_hand(1)
    monkeypatch.setattr(shards, "SETTLED_S", 60.0)
    reader._shards._looked_at = time.monotonic() - 61.0
    assert not reader.is_at_hand(1)
    reader._shards.refresh()
    assert reader.is_at_hand(1)


def test_what_is_at_hand_is_answered_before_the_next_look_is_due() -> None:
    assert 0 < SETTLED_S < REFRESH_S


def test_nothing_is_at_hand_while_a_shard_is_withdrawn(label_set: Path, reader: LocalLabelSet) -> None:
    (label_set / "commits" / "1.json").unlink()
    reader._shards.refresh()
    assert not reader.is_at_hand(1)
    with pytest.raises(RowsMissing):
        reader.fetch([ROWS_PER_SHARD])
    assert reader.fetch([0]).logit_max.shape == (1,)


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_at_hand_of_a_folder_that_was_removed_or_replaced(
    label_set: Path, reader: LocalLabelSet, replaced: bool
) -> None:
    shutil.rmtree(label_set)
    if replaced:
        build(label_set, reference(3, seed=9))
    reader._shards.refresh()
    assert not reader.is_at_hand(1)
    with pytest.raises(DigestChanged):
        reader.fetch([0])


def test_few_sequences_are_at_hand_by_their_usual_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = LocalLabelSet(build(tmp_path / "s" / "set", reference(1, alignment="causal")))
    reader.fetch([0])
    layout = reader.layout
    monkeypatch.setattr(local, "FEW_BYTES", layout.row_spec.nbytes(3 * layout.rows // layout.examples, 3))
    assert layout.rows > layout.examples
    assert reader.is_at_hand(3)
    assert not reader.is_at_hand(4)
    reader.close()


def test_texts_are_at_hand_once_they_are_indexed(tmp_path: Path) -> None:
    source = reference(2, ids="text")
    reader = LocalLabelSet(build(tmp_path / "s" / "set", source))
    reader.verify_all()
    reader._paging.note(0.0, 1)
    assert not reader.is_at_hand(1)
    reader.fetch(source.at([5]))
    assert reader.is_at_hand(1)
    reader._shards._signature = None
    reader._shards.refresh()  # another look, other commits: the index is behind them
    assert not reader.is_at_hand(1)
    assert_rows_equal(reader.fetch(source.at([5, ROWS_PER_SHARD])), source, np.array([5, ROWS_PER_SHARD]))
    assert reader.is_at_hand(1)
    reader.close()


def test_what_is_not_in_memory_is_not_at_hand(reader: LocalLabelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SAMPLED_S", 0.0)
    monkeypatch.setattr(mapping.MappedArray, "in_memory", lambda _self, row: row < 2 * ROWS_PER_SHARD)
    looks = [reader.is_at_hand(1) for _ in range(30)]
    assert True in looks  # not every look meets the third shard
    assert False in looks


def test_rows_all_over_are_looked_at_and_none_that_is_not_used(
    reader: LocalLabelSet, source: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at: list[int] = []

    def noted(_self: mapping.MappedArray, row: int) -> bool:
        looked_at.append(row)
        return True

    monkeypatch.setattr(mapping.MappedArray, "in_memory", noted)
    monkeypatch.setattr(shards, "SAMPLED_S", 0.0)
    assert all(reader.is_at_hand(1) for _ in range(200))
    rows = np.array(looked_at)
    assert rows.max() < source.layout.rows
    tenths = np.histogram(rows, bins=10, range=(0, source.layout.rows))[0]
    assert tenths.min() > len(rows) / 20


def test_rows_that_were_in_memory_a_moment_ago_are_believed_to_be_and_others_never(
    reader: LocalLabelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = iter([False, True, True, True, False])
    monkeypatch.setattr(mapping.MappedArray, "in_memory", lambda _self, _row: next(resident))
    monkeypatch.setattr(shards, "SAMPLED_S", 1e9)
    reader._shards._sampled_at = float("-inf")
    assert [reader.is_at_hand(1) for _ in range(4)] == [False, True, True, True]
    reader._shards._sampled_at = float("-inf")
    assert not reader.is_at_hand(1)


def test_a_label_set_whose_last_shard_just_came_is_served_before_it_is_sealed(tmp_path: Path) -> None:
    source = reference(2)
    path = tmp_path / "s" / "set"
    with writer_of(path, source) as writer:
        commit_shards(writer, source, [0])
        reader = LocalLabelSet(path)
        reader.fetch([0])
        assert not reader.is_at_hand(1)
        commit_shards(writer, source, [1])
        reader._shards.refresh()
        soft = reader.fetch([ROWS_PER_SHARD])
        assert_rows_equal(soft, source, np.array([ROWS_PER_SHARD]))
        assert soft.digest is None
        assert reader.is_at_hand(1)
        for digest in ("sha256:" + "0" * 64, writer.seal().digest):
            with pytest.raises(DigestChanged):
                reader.fetch([0], digest=digest)  # it has not looked since
        with pytest.raises(RowsMissing):
            reader.fetch([len(source.ids)])
    reader._shards.refresh()
    assert reader.fetch([0], digest=digest).digest == digest
    reader.close()


@pytest.mark.parametrize("ids", ["ordinal", "text"])
def test_rows_withdrawn_while_they_are_gathered_are_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Any
) -> None:
    source = reference(2, ids=ids)
    path = build(tmp_path / "s" / "set", source)
    reader = LocalLabelSet(path)
    wanted = source.at([3, ROWS_PER_SHARD])
    reader.fetch(wanted)
    plain = gather.gather_rows
    calls: list[int] = []

    def withdrawn_meanwhile(*arguments: Any) -> dict[str, np.ndarray]:
        arrays = plain(*arguments)
        calls.append(1)
        if len(calls) == 1:
            (path / "commits" / "1.json").unlink()
            reader._shards.refresh()
        return arrays

    monkeypatch.setattr(local, "gather_rows", withdrawn_meanwhile)
    soft = reader.fetch(wanted, on_missing="mask")
    assert soft.present is not None
    assert soft.present.tolist() == [True, False]
    assert np.isnan(soft.logits[1].astype(float)).all()
    assert len(calls) == 2
    reader.close()
