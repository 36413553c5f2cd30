"""Two processes or threads at one label set at a time: the orders of events that could go wrong, made to happen."""

import errno
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, Reference, build, commit_shards, reference, writer_of
from tests.conformance import assert_rows_equal

from logitcache.labels.errors import DatasetChanged, DigestChanged, RowsMissing, StorageFault
from logitcache.storage import LocalLabelSet, admission, gather, local, looking, shards
from logitcache.storage.lock import WriterLock

PREAD = os.pread

SECOND = ROWS_PER_SHARD
"""First id of shard 1."""


@pytest.fixture
def no_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the background thread, so that nothing is checked but what a request asks for."""
    monkeypatch.setattr(shards.Shards, "_start_verifier", lambda self: None)


def damage(label_set: Path, shard: int) -> None:
    chunk = label_set / "logits" / f"c.{shard}.0"
    content = bytearray(chunk.read_bytes())
    content[11] ^= 2
    aside = chunk.with_name("aside")
    aside.write_bytes(content)
    aside.rename(chunk)


def repair(label_set: Path, source: Reference) -> None:
    with writer_of(label_set, source) as writer:
        commit_shards(writer, source, writer.missing)
        writer.seal()


@pytest.mark.usefixtures("no_verifier")
def test_a_request_waits_for_the_check_of_its_own_shard(label_set: Path, source: Reference) -> None:
    damage(label_set, 1)
    reader = LocalLabelSet(label_set)
    with pytest.raises(RowsMissing, match="damaged: 1"):
        reader.fetch([SECOND])
    assert reader.describe().shards.verified == 0
    assert_rows_equal(reader.fetch([2 * SECOND]), source, np.array([2 * SECOND]))
    assert reader.describe().shards.verified == 1
    reader.close()


@pytest.mark.usefixtures("no_verifier")
def test_in_background_mode_a_request_does_not_wait(label_set: Path) -> None:
    damage(label_set, 1)
    reader = LocalLabelSet(label_set, verify="background")
    assert len(reader.fetch([SECOND])) == 1
    reader.close()


def blocked_hashing(monkeypatch: pytest.MonkeyPatch, shard: int) -> tuple[threading.Event, threading.Event]:
    """Make hashing of one shard begin, say so, and wait until it may go on."""
    began, may_end = threading.Event(), threading.Event()
    check = admission.check_hashes

    def waiting(files: Any, commit: Any, stopped: threading.Event) -> None:
        if files.shard == shard:
            began.set()
            assert may_end.wait(30)
        check(files, commit, stopped)

    monkeypatch.setattr(shards, "check_hashes", waiting)
    return began, may_end


@pytest.mark.parametrize("verify", ["strict", "background"])
def test_rows_of_other_shards_are_served_while_one_is_hashed(
    label_set: Path, source: Reference, monkeypatch: pytest.MonkeyPatch, verify: Any
) -> None:
    began, may_end = blocked_hashing(monkeypatch, 1)
    reader = LocalLabelSet(label_set, verify=verify)
    assert began.wait(30)
    reader._shards._looked_at = 0.0
    # Were a lock held, these would never come back.
    assert_rows_equal(reader.fetch([5, 2 * SECOND]), source, np.array([5, 2 * SECOND]))
    assert reader.describe().shards.committed == 3
    assert reader.damaged() == {}
    may_end.set()
    assert_rows_equal(reader.fetch([SECOND]), source, np.array([SECOND]))
    reader.close()


def test_a_shard_that_is_repaired_while_it_is_hashed_is_served_as_repaired(
    label_set: Path, source: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(label_set, 1)
    began, may_end = blocked_hashing(monkeypatch, 1)
    reader = LocalLabelSet(label_set)
    assert began.wait(30)
    repair(label_set, source)
    may_end.set()
    assert reader._shards._verifier is not None
    reader._shards._verifier.join()
    assert (label_set / "commits" / "1.json").exists(), "the repaired shard was quarantined"
    assert len(list((label_set / "quarantine").iterdir())) == 1
    assert_rows_equal(reader.fetch([SECOND]), source, np.array([SECOND]))
    assert reader.damaged() == {}
    reader.close()


@pytest.mark.usefixtures("no_verifier")
def test_a_shard_that_is_repaired_before_the_reader_gets_the_lock_is_left_alone(
    label_set: Path, source: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(label_set, 1)
    reader = LocalLabelSet(label_set)

    def lock_after_a_repair(path: Path) -> WriterLock:
        monkeypatch.setattr(shards, "WriterLock", WriterLock)
        repair(label_set, source)
        return WriterLock(path)

    monkeypatch.setattr(shards, "WriterLock", lock_after_a_repair)
    with pytest.raises(RowsMissing):
        reader.fetch([SECOND])
    assert (label_set / "commits" / "1.json").exists()
    assert len(list((label_set / "quarantine").iterdir())) == 1
    reader._shards.refresh()
    assert_rows_equal(reader.fetch([SECOND]), source, np.array([SECOND]))
    reader.close()


@pytest.mark.usefixtures("no_verifier")
def test_what_was_wrong_is_told_though_another_process_withdrew_the_shard_first(label_set: Path) -> None:
    damage(label_set, 1)
    reader = LocalLabelSet(label_set)
    (label_set / "commits" / "1.json").unlink()
    reader._shards.admit([1])
    assert "the bytes of logits hash to" in reader.damaged()[1]
    assert not (label_set / "quarantine").exists()
    reader.close()


def test_a_shard_withdrawn_and_committed_again_between_two_looks_is_mapped_anew(
    label_set: Path, source: Reference
) -> None:
    reader = LocalLabelSet(label_set)
    old = reader.fetch([SECOND])
    damage(label_set, 1)
    other = replace(source, logits=source.logits[:, ::-1].copy())
    repair(label_set, other)
    reader._shards.refresh()
    new = reader.fetch([SECOND])
    assert_rows_equal(new, other, np.array([SECOND]))
    assert new.digest != old.digest
    reader.close()


def test_rows_gathered_before_a_repair_are_not_given_out_after_it(
    label_set: Path, source: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = LocalLabelSet(label_set)
    reader.verify_all()
    other = replace(source, logits=source.logits[:, ::-1].copy())
    plain = gather.gather_rows
    calls: list[int] = []

    def repaired_meanwhile(*arguments: Any) -> dict[str, np.ndarray]:
        arrays = plain(*arguments)
        calls.append(1)
        if len(calls) == 1:
            damage(label_set, 1)
            repair(label_set, other)
            reader._shards.refresh()
            reader._shards.admit([1])
        return arrays

    monkeypatch.setattr(local, "gather_rows", repaired_meanwhile)
    assert_rows_equal(reader.fetch([SECOND]), other, np.array([SECOND]))
    assert len(calls) == 2
    reader.close()


@pytest.mark.usefixtures("no_verifier")
def test_verifying_reports_a_shard_that_another_reader_withdraws_meanwhile(
    label_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, check, done = LocalLabelSet(label_set), admission.check_hashes, list[int]()

    def then_another_reader(files: Any, commit: Any, stopped: threading.Event) -> None:
        check(files, commit, stopped)
        done.append(files.shard)
        if done == [0, 1]:
            damage(label_set, 2)
            other = LocalLabelSet(label_set)
            other.verify_all()
            other.close()

    monkeypatch.setattr(shards, "check_hashes", then_another_reader)
    reports = reader.verify_all(threads=1)
    assert [report.shard for report in reports] == [0, 1, 2]
    assert [report.ok for report in reports] == [True, True, False]
    reader.close()


def test_verifying_reports_what_the_background_thread_has_withdrawn(label_set: Path) -> None:
    damage(label_set, 1)
    reader = LocalLabelSet(label_set)
    assert reader._shards._verifier is not None
    reader._shards._verifier.join()
    assert [report.ok for report in reader.verify_all()] == [True, False, True]
    reader.close()


def test_a_shard_that_was_restored_is_found_sound_by_verifying(label_set: Path, source: Reference, sound: Path) -> None:
    damage(label_set, 1)
    with writer_of(label_set.with_name("other"), source):
        pass
    holder = WriterLock(label_set / "lock")
    reader = LocalLabelSet(label_set)
    with pytest.raises(RowsMissing):
        reader.fetch([SECOND])
    holder.release()
    (label_set / "logits" / "c.1.0").unlink()
    shutil.copyfile(sound / "logits" / "c.1.0", label_set / "logits" / "c.1.0")
    assert all(report.ok for report in reader.verify_all())
    assert_rows_equal(reader.fetch([SECOND]), source, np.array([SECOND]))
    reader.close()


def test_a_file_that_cannot_be_read_is_a_fault_of_the_disk_and_not_of_the_shard(
    label_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.pread

    def failing(handle: int, count: int, offset: int) -> bytes:
        if count > 4096:
            raise OSError(errno.EMFILE, "Too many open files")
        return read(handle, count, offset)

    monkeypatch.setattr(os, "pread", failing)
    reader = LocalLabelSet(label_set)
    with pytest.raises(StorageFault, match="Too many open files"):
        reader.fetch([SECOND])
    problems = [report.problem or "" for report in reader.verify_all()]
    assert [problem.endswith("cannot be read: Too many open files") for problem in problems] == [True] * 3
    monkeypatch.undo()
    assert len(reader.fetch([SECOND])) == 1
    reader.close()


class TestWhatADiskHasLost:
    """The disk gives an error for one file, as of a sector that cannot be read, now or for good."""

    @pytest.fixture
    def lost(self, label_set: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """The logits of shard 1."""
        chunk, read = label_set / "logits" / "c.1.0", os.pread
        inode = chunk.stat().st_ino

        def failing(handle: int, count: int, offset: int) -> bytes:
            if os.fstat(handle).st_ino == inode:
                raise OSError(errno.EIO, "Input/output error")
            return read(handle, count, offset)

        monkeypatch.setattr(os, "pread", failing)
        return chunk

    def test_its_shard_is_withdrawn_and_comes_back_if_the_disk_gives_it_back(
        self, label_set: Path, lost: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reader = LocalLabelSet(label_set)
        with pytest.raises(RowsMissing, match="damaged: 1"):
            reader.fetch([SECOND])
        assert "Input/output error" in reader.damaged()[1]
        assert [report.ok for report in reader.verify_all()] == [True, False, True]
        assert lost.exists()
        monkeypatch.undo()
        assert all(report.ok for report in reader.verify_all())
        assert len(reader.fetch([SECOND])) == 1
        reader.close()

    def test_what_was_served_is_not_any_more_nor_believed_by_the_next(
        self, label_set: Path, monkeypatch: pytest.MonkeyPatch, lost: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with monkeypatch.context() as readable:
            readable.setattr(os, "pread", PREAD)
            readable.setattr(admission, "RACY_NS", 0)
            reader = LocalLabelSet(label_set)
            assert all(report.ok for report in reader.verify_all())
        assert len(reader.fetch([SECOND])) == 1
        assert [report.ok for report in reader.verify_all()] == [True, False, True]
        assert "cannot be read" in caplog.text
        with pytest.raises(RowsMissing, match="damaged: 1"):
            reader.fetch([SECOND])
        reader.close()
        # Its stamp is forgotten, so the next one looks.
        following = LocalLabelSet(label_set)
        with pytest.raises(RowsMissing, match="damaged: 1"):
            following.fetch([SECOND])
        following.close()

    def test_a_run_labels_it_anew(self, label_set: Path, lost: Path, source: Reference) -> None:
        with writer_of(label_set, source) as writer:
            assert writer.missing == [1]
            assert "Input/output error" in writer.quarantined[1]
            commit_shards(writer, source, [1])
            writer.seal()
        reader = LocalLabelSet(label_set)
        assert_rows_equal(reader.fetch([SECOND]), source, np.array([SECOND]))
        reader.close()


def test_what_could_not_be_looked_at_is_looked_at_again(label_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long_ago = time.time() - 100
    reader = LocalLabelSet(label_set)
    reader.verify_all()
    (label_set / "commits" / "1.json").rename(label_set / "aside.json")
    for folder in ("commits", "generations"):
        os.utime(label_set / folder, (long_ago, long_ago))
    with monkeypatch.context() as failing:
        failing.setattr(shards, "look", raising(StorageFault("Too many open files")))
        with pytest.raises(StorageFault):
            reader._shards.refresh()
    reader._shards.refresh()
    with pytest.raises(RowsMissing):
        reader.fetch([SECOND])
    reader.close()


def test_a_manifest_that_cannot_be_read_for_a_moment_is_not_another_label_set(
    label_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = LocalLabelSet(label_set)
    os.utime(label_set / "zarr.json")
    with monkeypatch.context() as failing:
        failing.setattr(looking, "read_layout", raising(StorageFault("Too many open files")))
        with pytest.raises(StorageFault, match="Too many"):
            reader._shards.refresh()
    reader._shards.refresh()
    assert not reader.is_replaced
    assert len(reader.fetch([SECOND])) == 1
    reader.close()


def raising(error: Exception) -> Any:
    def raises(*_: Any) -> None:
        raise error

    return raises


def test_a_scrub_that_failed_is_tried_again(
    label_set: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = LocalLabelSet(label_set)
    verify, tried = reader._shards.verify_all, threading.Semaphore(0)

    def failing_first(**options: Any) -> Any:
        if not caplog.records:
            raise StorageFault("Too many open files")
        reports = verify(**options)
        tried.release()
        return reports

    monkeypatch.setattr(reader._shards, "verify_all", failing_first)
    scrubber = threading.Thread(target=reader._shards._scrub, args=(0.01,))
    scrubber.start()
    assert tried.acquire(timeout=30)
    assert "was not scrubbed: Too many open files" in caplog.text
    reader.close()
    scrubber.join()


def test_a_withdrawn_file_is_neither_read_nor_held(label_set: Path) -> None:
    reader = LocalLabelSet(label_set)
    reader.verify_all()
    assert len(reader.fetch([SECOND])) == 1
    os.truncate(label_set / "logits" / "c.1.0", 0)
    assert [report.ok for report in reader.verify_all()] == [True, False, True]
    # Read through its mapping it would end the process.
    soft = reader.fetch([SECOND, 0], on_missing="mask")
    assert soft.present is not None
    assert soft.present.tolist() == [False, True]
    mapped = Path("/proc/self/maps").read_text()
    assert f"{label_set}/logits/c.0.0" in mapped
    assert not [line for line in mapped.splitlines() if "quarantine" in line and str(label_set) in line]
    reader.close()


def test_closing_waits_for_the_shard_that_is_being_hashed(label_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, may_end = blocked_hashing(monkeypatch, 0)
    reader = LocalLabelSet(label_set)
    assert began.wait(30)
    closing = threading.Thread(target=reader.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    may_end.set()
    closing.join()
    assert not any(thread.name == "logitcache-verify" for thread in threading.enumerate())


def test_a_repair_never_labels_other_examples(label_set: Path, source: Reference) -> None:
    damage(label_set, 1)
    with writer_of(label_set, source) as writer:
        arrays = source.arrays(source.layout.span(1))
        changed = arrays["fingerprint"].copy()
        changed[7] += np.uint64(1)
        with pytest.raises(DatasetChanged, match=r"examples 4,096 to 8,191 .* before shard 1 was damaged"):
            writer.commit(1, arrays | {"fingerprint": changed}, {})
        assert list((label_set / "staging").iterdir()) == []
        writer.commit(1, arrays, {})
        assert writer.seal().number == 1


def test_a_scrub_finds_what_rotted_after_it_was_verified(label_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = LocalLabelSet(label_set, scrub_s=0.05)
    assert len(reader.fetch([SECOND])) == 1
    damage(label_set, 1)
    found = threading.Event()
    withdraw = reader._shards._withdraw

    def noticed(*arguments: Any) -> None:
        withdraw(*arguments)
        found.set()

    monkeypatch.setattr(reader._shards, "_withdraw", noticed)
    assert found.wait(30)
    with pytest.raises(RowsMissing, match="damaged: 1"):
        reader.fetch([SECOND])
    reader.close()
    assert not any(thread.name == "logitcache-scrub" for thread in threading.enumerate())


def test_several_shards_damaged_at_once_are_all_moved_aside(label_set: Path, caplog: pytest.LogCaptureFixture) -> None:
    for shard in range(3):
        damage(label_set, shard)
    reader = LocalLabelSet(label_set)
    with pytest.raises(RowsMissing):
        reader.fetch([0, SECOND, 2 * SECOND])
    reader.close()
    assert list((label_set / "commits").iterdir()) == []
    assert len(list((label_set / "quarantine").iterdir())) == 3
    assert "stay where they are" not in caplog.text


def test_another_label_set_in_the_same_folder_is_not_served_as_this_one(label_set: Path, tmp_path: Path) -> None:
    reader = LocalLabelSet(label_set)
    reader.fetch([SECOND])
    label_set.rename(tmp_path / "old")
    # Same shape, same number of shards: only the manifest tells that another teacher made it.
    build(label_set, reference(3, seed=9))
    reader._shards.refresh()
    with pytest.raises(DigestChanged, match="removed or replaced while it was open"):
        reader.fetch([SECOND])
    with pytest.raises(DigestChanged, match="open it again"):
        reader.describe()
    reader.close()
    fresh = LocalLabelSet(label_set)
    assert fresh.describe().identity.teacher.weights == "seed 9"
    fresh.close()
