"""Damage of every kind is found before a row of it is served, named, moved aside, and repaired by writing again."""

import json
import shutil
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, Reference, build, commit_shards, writer_of
from tests.conformance import assert_rows_equal
from tests.server.job_site import until

from logitcache.labels.errors import NotALabelSet, RowsMissing
from logitcache.storage import LocalLabelSet, admission, gather, local, shards
from logitcache.storage.admission import OpenShard, Stamps, opened
from logitcache.storage.manifest import read_layout
from logitcache.storage.places import Places
from logitcache.storage.records import Commit

DAMAGED = 1
"""The shard that is damaged; its neighbours must stay served."""


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


def swap_with_the_next_shard(path: Path) -> None:
    other = path.with_name(path.name.replace(f"c.{DAMAGED}", f"c.{DAMAGED + 1}"))
    path.unlink()
    shutil.copyfile(other, path)


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link_elsewhere(path: Path) -> None:
    moved = path.rename(path.with_name("moved"))
    path.symlink_to(moved)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped-bit": flip_a_bit,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-4096]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + bytes(4096)),
    "zero-length": lambda path: path.write_bytes(b""),
    "all-zero": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,
    "swapped": swap_with_the_next_shard,
    "a-folder": make_a_folder,
    "a-symbolic-link": link_elsewhere,
}
KEYS = {"ids": "c.1", "fingerprint": "c.1.0", "indices": "c.1.0", "logits": "c.1.0", "scalars": "c.1.0"}
CASES = [(damage, "logits") for damage in DAMAGES] + [
    (damage, name) for damage in ("flipped-bit", "missing") for name in KEYS if name != "logits"
]


@pytest.mark.parametrize(("damage", "array"), CASES)
def test_damage_is_found_named_quarantined_and_repaired(
    label_set: Path, source: Reference, damage: str, array: str, caplog: pytest.LogCaptureFixture
) -> None:
    digest = json.loads((label_set / "generations" / "1.json").read_bytes())["digest"]
    DAMAGES[damage](label_set / array / KEYS[array])

    reader = LocalLabelSet(label_set)
    inside = DAMAGED * ROWS_PER_SHARD + 17
    with pytest.raises(RowsMissing, match=r"withdrawn as damaged: 1; run its precompute again") as caught:
        reader.fetch([3, inside])
    assert caught.value.unlabelled == [inside]
    assert_rows_equal(reader.fetch([3, 2 * ROWS_PER_SHARD]), source, np.array([3, 2 * ROWS_PER_SHARD]))
    assert list(reader.damaged()) == [DAMAGED]
    until(lambda: "shard 1" in caplog.text, "logged")  # the thread that verifies may have found it first
    assert not (label_set / "commits" / "1.json").exists()
    [quarantined] = (label_set / "quarantine").iterdir()
    assert "shard 1" in (quarantined / "problem.txt").read_text()
    assert (quarantined / "commit.json").exists()

    with writer_of(label_set, source) as writer:
        assert writer.missing == [DAMAGED]
        commit_shards(writer, source, [DAMAGED])
        generation = writer.seal()
    assert (generation.number, generation.digest) == (1, digest)
    reader._shards.refresh()
    assert_rows_equal(reader.fetch([inside]), source, np.array([inside]))
    assert reader.damaged() == {}
    reader.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"null", b"[" * 100_000, b'{"shard":1}', b"\xff\xfe"],
    ids=lambda content: repr(content[:12]),
)
def test_a_damaged_commit_withdraws_its_shard(label_set: Path, source: Reference, content: bytes) -> None:
    (label_set / "commits" / "1.json").write_bytes(content)
    reader = LocalLabelSet(label_set)
    with pytest.raises(RowsMissing, match="damaged"):
        reader.fetch([ROWS_PER_SHARD])
    assert len(reader.fetch([0])) == 1
    reader.close()
    with writer_of(label_set, source) as writer:
        assert writer.missing == [1]


def test_a_commit_with_another_hash_in_it_serves_nothing_of_its_shard(label_set: Path) -> None:
    path = label_set / "commits" / "1.json"
    text = path.read_text()
    at = text.index('"sha256":"') + 12
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    reader = LocalLabelSet(label_set)
    with pytest.raises(RowsMissing):
        reader.fetch([ROWS_PER_SHARD])
    reader.close()


def test_a_damaged_generation_is_not_trusted_and_is_made_again(label_set: Path, source: Reference) -> None:
    path = label_set / "generations" / "1.json"
    text = path.read_text()
    path.write_text(text.replace("sha256:", "sha256:0", 1))
    reader = LocalLabelSet(label_set)
    assert reader.describe().digest is None
    reader.close()
    with writer_of(label_set, source) as writer:
        assert (writer.missing, writer.seal().number) == ([], 2)


def of_another_teacher(source: Reference) -> Reference:
    """The same data and shapes, labelled by somebody else."""
    teacher = replace(source.identity.teacher, weights="others")
    return replace(source, layout=replace(source.layout, identity=replace(source.identity, teacher=teacher)))


def test_the_manifest_of_another_teacher_does_not_make_these_rows_his(
    label_set: Path, source: Reference, tmp_path: Path
) -> None:
    other = of_another_teacher(source)
    manifest = build(tmp_path / "store" / "other", other) / "zarr.json"
    own = (label_set / "zarr.json").read_bytes()
    shutil.copy(manifest, label_set / "zarr.json")
    for attempt in (lambda: LocalLabelSet(label_set), lambda: writer_of(label_set, other)):
        with pytest.raises(NotALabelSet, match="not the one that this label set was sealed with"):
            attempt()
    (label_set / "zarr.json").write_bytes(own)
    with closing(LocalLabelSet(label_set)) as reader:
        assert all(report.ok for report in reader.verify_all())


@pytest.mark.parametrize("sealed", [True, False])
def test_shards_whose_manifest_is_gone_are_not_taken_for_those_of_another_teacher(
    label_set: Path, source: Reference, *, sealed: bool
) -> None:
    own = (label_set / "zarr.json").read_bytes()
    (label_set / "zarr.json").unlink()
    if not sealed:
        (label_set / "generations" / "1.json").unlink()
    for whoever in (source, of_another_teacher(source)):
        with pytest.raises(NotALabelSet, match=r"zarr\.json is missing, and shards that were committed"):
            writer_of(label_set, whoever)
    (label_set / "zarr.json").write_bytes(own)
    with writer_of(label_set, source) as writer:
        assert (writer.missing, writer.quarantined) == ([], {})


def test_damage_that_arises_after_verification_is_found_by_verifying_again(label_set: Path, source: Reference) -> None:
    reader = LocalLabelSet(label_set)
    assert all(report.ok for report in reader.verify_all())
    flip_a_bit(label_set / "indices" / "c.1.0")
    reports = reader.verify_all()
    assert [report.shard for report in reports if not report.ok] == [DAMAGED]
    with pytest.raises(RowsMissing, match="damaged"):
        reader.fetch([ROWS_PER_SHARD])
    reader.close()


def test_stamps_spare_the_hash_only_of_files_that_did_not_change(
    label_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Files as young as these could change again within one tick of the clock, and would not be stamped.
    monkeypatch.setattr(admission, "RACY_NS", 0)
    reader = LocalLabelSet(label_set)
    reader.verify_all()
    reader.close()
    hashed: list[int] = []
    check = admission.check_hashes

    def counted(files: OpenShard, commit: Commit, stopped: threading.Event) -> None:
        hashed.append(files.shard)
        check(files, commit, stopped)

    monkeypatch.setattr(shards, "check_hashes", counted)
    reader = LocalLabelSet(label_set)
    reader.fetch([0, ROWS_PER_SHARD, 2 * ROWS_PER_SHARD])
    reader.close()
    assert hashed == []
    flip_a_bit(label_set / "logits" / "c.2.0")
    reader = LocalLabelSet(label_set)
    with pytest.raises(RowsMissing):
        reader.fetch([2 * ROWS_PER_SHARD])
    reader.close()
    assert hashed == [2]


def test_files_that_changed_a_moment_ago_are_not_stamped(label_set: Path) -> None:
    reader = LocalLabelSet(label_set)
    reader.verify_all()
    reader.close()
    assert not (label_set / "stamps.json").exists()


def test_a_stamp_is_of_one_commit(label_set: Path, source: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "RACY_NS", 0)
    reader = LocalLabelSet(label_set)
    reader.verify_all()
    reader.close()
    # The files are those that were stamped; what is promised of them has changed.
    path = label_set / "commits" / "1.json"
    text = path.read_text()
    at = text.index('"sha256":"') + 12
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    (label_set / "generations" / "1.json").unlink()
    reader = LocalLabelSet(label_set)
    with pytest.raises(RowsMissing):
        reader.fetch([ROWS_PER_SHARD])
    reader.close()


def test_a_stamp_does_not_depend_on_the_order_of_a_commits_files(label_set: Path) -> None:
    layout, places = read_layout(label_set), Places(label_set)
    commit = Commit.read(places.commit(1), layout, 1)
    turned = replace(commit, parts=dict(reversed(commit.parts.items())))
    stamps = Stamps(places.stamps)
    stamps._known["1"] = "0" * 32
    with opened(places, layout, commit) as files, opened(places, layout, turned) as again:
        assert not stamps.match(files, commit)
        stamps._known["1"] = admission._mark(files, commit)
        assert stamps.match(again, turned)


def test_damaged_stamps_are_ignored(label_set: Path, source: Reference) -> None:
    for content in (
        b"",
        b"[]",
        b'{"0": 3}',
        b'{"0": ["x", [[1]]]}',
        b"\xff",
        b'{"0": ["x", [[Infinity]]]}',
        b"[" * 10**5,
    ):
        (label_set / "stamps.json").write_bytes(content)
        reader = LocalLabelSet(label_set)
        assert_rows_equal(reader.fetch([1]), source, np.array([1]))
        reader.close()


def test_in_background_mode_a_damaged_shard_is_withdrawn_when_it_is_found(label_set: Path) -> None:
    flip_a_bit(label_set / "logits" / "c.1.0")
    reader = LocalLabelSet(label_set, verify="background")
    verifier = reader._shards._verifier
    assert verifier is not None
    verifier.join()
    with pytest.raises(RowsMissing, match="damaged"):
        reader.fetch([ROWS_PER_SHARD])
    reader.close()


def test_a_damaged_shard_stays_where_it_is_while_another_process_writes(label_set: Path, source: Reference) -> None:
    with writer_of(label_set, source):
        flip_a_bit(label_set / "logits" / "c.1.0")
        reader = LocalLabelSet(label_set)
        with pytest.raises(RowsMissing, match="damaged"):
            reader.fetch([ROWS_PER_SHARD])
        assert (label_set / "commits" / "1.json").exists()
        reader._shards.refresh()
        with pytest.raises(RowsMissing, match="damaged"):
            reader.fetch([ROWS_PER_SHARD])
        reader.close()


def test_a_repair_that_gives_other_bytes_becomes_a_new_generation(label_set: Path, source: Reference) -> None:
    reader = LocalLabelSet(label_set)
    old = reader.describe().digest
    flip_a_bit(label_set / "scalars" / "c.1.0")
    reader.verify_all()
    other = replace(source, logits=source.logits + np.float64(1))  # the same examples, other rows
    with writer_of(label_set, source) as writer:
        commit_shards(writer, other, writer.missing)
        # Until it is sealed, what was committed belongs to no generation: it is not served.
        reader._shards.refresh()
        with pytest.raises(RowsMissing):
            reader.fetch([ROWS_PER_SHARD])
        generation = writer.seal()
    assert generation.number == 2
    reader._shards.refresh()
    assert reader.fetch([ROWS_PER_SHARD]).digest == generation.digest != old
    reader.close()


def test_rows_that_are_withdrawn_while_they_are_gathered_are_not_returned(
    label_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = LocalLabelSet(label_set)
    reader.verify_all()
    flip_a_bit(label_set / "logits" / "c.1.0")
    plain = gather.gather_rows
    calls: list[int] = []

    def withdrawn_meanwhile(*arguments: Any) -> dict[str, np.ndarray]:
        arrays = plain(*arguments)
        calls.append(1)
        if len(calls) == 1:
            reader.verify_all()
        return arrays

    monkeypatch.setattr(local, "gather_rows", withdrawn_meanwhile)
    with pytest.raises(RowsMissing, match="damaged"):
        reader.fetch([ROWS_PER_SHARD])
    assert calls == [1]
    reader.close()
