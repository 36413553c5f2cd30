"""What a shard may be committed with: whatever would make rows another example's is refused, and nothing is written."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, Reference, build, commit_shards, reference, writer_of
from tests.conformance import assert_rows_equal

from logitcache.labels.errors import DatasetChanged, ShapeMismatch, ShardDamaged
from logitcache.labels.identity import canonical_json, sha256_hex
from logitcache.labels.ids import text_keys
from logitcache.storage import LocalLabelSet
from logitcache.storage.contents import contents, sha256_of
from logitcache.storage.id_index import repeated
from logitcache.storage.records import Commit, Part


def refused(tmp_path: Path, source: Reference, texts: Any = None, **changed: np.ndarray) -> str:
    """Why the first shard is not committed with these arrays in place of its own."""
    span = source.layout.span(0)
    with writer_of(tmp_path / "s" / "set", source) as writer:
        with pytest.raises(ShapeMismatch) as caught:
            writer.commit(0, source.arrays(span) | changed, {}, texts or source.texts(span))
        assert list((tmp_path / "s" / "set" / "staging").iterdir()) == []
        assert writer.missing == [*range(source.layout.shards)]
    return caught.value.message


def test_ids_that_are_not_the_ordinals_are_refused(tmp_path: Path) -> None:
    source = reference(2)
    ids = np.arange(ROWS_PER_SHARD)
    ids[[3, 4]] = ids[[4, 3]]
    assert "not the ordinals" in refused(tmp_path, source, ids=ids)


def test_ids_that_are_not_the_keys_of_their_texts_are_refused(tmp_path: Path) -> None:
    source = reference(1, ids="text")
    texts = list(map(str, source.ids))
    texts[3], texts[4] = texts[4], texts[3]
    assert "not the keys of its texts" in refused(tmp_path, source, texts)


@pytest.mark.parametrize("wrong", ["overlapping", "exchanged", "empty", "too few"])
def test_rows_that_do_not_follow_each_other_are_refused(tmp_path: Path, wrong: str) -> None:
    source = reference(1, alignment="causal")
    arrays = source.arrays(source.layout.span(0))
    starts, counts = arrays["row_start"].copy(), arrays["row_count"].copy()
    if wrong == "overlapping":
        starts[5] -= 1
    elif wrong == "exchanged":
        starts[[5, 6]] = starts[[6, 5]]
    elif wrong == "empty":
        counts[5], counts[6] = 0, counts[5] + counts[6]
        starts[6] = starts[5]
    else:
        counts[-1] -= 1
    message = refused(tmp_path, source, row_start=starts, row_count=counts)
    assert ("rows, not" if wrong == "too few" else "do not follow each other") in message


@pytest.mark.parametrize("damaged", ["a file", "the commit", "a hash in the commit"])
@pytest.mark.parametrize("changed", ["target", "ids", "fingerprint"])
def test_a_repair_never_takes_another_target_id_or_input(tmp_path: Path, changed: str, damaged: str) -> None:
    """Teachers may give other rows the second time; the dataset may not."""
    source = reference(2, ids="integer", targets=True)
    path = build(tmp_path / "s" / "set", source)
    commit = path / "commits" / "1.json"
    if damaged == "a file":
        (path / "logits" / "c.1.0").unlink()
    elif damaged == "the commit":
        commit.write_bytes(b"")
    else:
        part = json.loads(commit.read_bytes())["files"]["logits"]["sha256"]
        commit.write_bytes(commit.read_bytes().replace(part.encode(), part[::-1].encode()))
    with writer_of(path, source) as writer:
        arrays = source.arrays(source.layout.span(1))
        other = arrays[changed].copy()
        other[7] = (other[7] + 1) % 5
        with pytest.raises(DatasetChanged, match="before shard 1 was damaged"):
            writer.commit(1, arrays | {changed: other}, {})
        writer.commit(1, arrays | {"logits": arrays["logits"] * 2}, {})
        assert writer.seal().number == 2


def test_what_is_larger_in_quarantine_than_it_can_be_is_not_read(tmp_path: Path) -> None:
    source = reference(2, ids="integer")
    path = build(tmp_path / "s" / "set", source)
    (path / "commits" / "1.json").write_bytes(b"")
    writer_of(path, source).close()
    (aside,) = path.glob("quarantine/*-shard-1/ids.*")
    os.truncate(aside, 1 << 42)  # a hole that takes an hour to read
    with writer_of(path, source) as writer:
        commit_shards(writer, source, [1])
        assert writer.seal().number == 1


def test_a_repair_is_held_to_the_examples_that_were_sealed_and_not_to_those_withdrawn_before(tmp_path: Path) -> None:
    begun = reference(2, ids="integer")
    sealed = dataclasses.replace(begun, ids=tuple(int(id) - 2**62 for id in begun.ids))
    path = tmp_path / "s" / "set"
    for source, shards in ((begun, [0]), (sealed, None), (sealed, None)):
        build(path, source, shards)
        (path / "logits" / "c.0.0").unlink()
    with writer_of(path, begun) as writer, pytest.raises(DatasetChanged, match="before shard 0 was damaged"):
        commit_shards(writer, begun, [0])
    build(path, sealed)
    reader = LocalLabelSet(path)
    assert reader.describe().generation == 1
    assert_rows_equal(reader.fetch(sealed.at([5])), sealed, [5])
    reader.close()


def test_texts_that_were_committed_for_other_ids_are_told(tmp_path: Path) -> None:
    """A folder whose hashes all agree, and which we did not write."""
    source = reference(1, ids="text")
    other = dataclasses.replace(source, ids=source.ids[::-1])
    path = build(tmp_path / "s" / "set", source)
    with writer_of(path, source) as writer:
        files = contents(source.layout, 0, source.arrays(source.layout.span(0)), source.texts(source.layout.span(0)))
        data = canonical_json(list(other.ids))
        files["texts"] = memoryview(data), len(data)
        (path / "texts" / "0.json").write_bytes(data)
        commit = writer._commits[0]
        part = dataclasses.replace(commit.parts["texts"], bytes=len(data), sha256=sha256_of(files["texts"]))
        writer._commits[0] = dataclasses.replace(commit, parts=commit.parts | {"texts": part})
        with pytest.raises(ShardDamaged, match="not those of its ids"):
            writer.stored_texts(0)


def test_rows_that_were_committed_outside_their_shard_are_not_served(tmp_path: Path) -> None:
    """A folder whose hashes all agree, and which we did not write."""
    source = reference(2, alignment="causal")
    path = build(tmp_path / "s" / "set", source, [0])
    chunk, record = path / "row_start" / "c.0", path / "commits" / "0.json"
    starts = np.frombuffer(chunk.read_bytes(), np.uint32).copy()
    starts[5] = ROWS_PER_SHARD
    chunk.write_bytes(starts.tobytes())
    part = Part(starts.nbytes, sha256_hex(starts.tobytes()))
    parts = Commit.read(record, source.layout, 0).parts | {"row_start": part}
    record.write_bytes(Commit.of(source.layout, 0, parts)[1])
    reader = LocalLabelSet(path)
    assert_rows_equal(reader.fetch([4]), source, [4])
    with pytest.raises(ShardDamaged, match="lie outside their shard"):
        reader.fetch([5])
    reader.close()


def test_of_two_examples_with_one_id_the_earlier_is_named_first() -> None:
    keys = np.random.default_rng(0).integers(0, 5000, 5000)
    for pairs in (repeated(keys), repeated(text_keys(map(str, keys)))):
        assert len(pairs) == 10
        assert all(one < other and keys[one] == keys[other] for one, other in pairs)


def test_a_shard_that_rotted_since_it_was_verified_is_set_aside_when_its_ids_are_read(tmp_path: Path) -> None:
    source = reference(2, ids="integer")
    path = build(tmp_path / "s" / "set", source)
    with writer_of(path, source) as writer:
        # As if the disk had given other bytes after the stamp was made: no time of the file tells.
        writer._stamps.match = lambda files, commit: True  # type: ignore[method-assign]
        stored = bytearray((path / "ids" / "c.1").read_bytes())
        stored[0] ^= 1
        (path / "ids" / "c.1").write_bytes(stored)
        writer._commits = writer._take_up()
        assert (writer.missing, list(writer.quarantined)) == ([1], [1])
        commit_shards(writer, source, [1])
        assert writer.seal().number == 1


def test_what_is_masked_has_no_fingerprint_and_no_target(tmp_path: Path) -> None:
    """A fetch gathers some row for it before it is masked: nothing of that row may stay."""
    source = reference(2, ids="integer", targets=True)
    reader = LocalLabelSet(build(tmp_path / "s" / "set", source, [0]))
    soft = reader.fetch(source.at([3, ROWS_PER_SHARD]), on_missing="mask")
    assert soft.present is not None
    assert soft.present.tolist() == [True, False]
    assert soft.fingerprint.tolist() == [int(source.fingerprints[3]), 0]
    assert soft.target is not None
    assert soft.target.tolist() == [source.targets[3], -1]
    reader.close()
