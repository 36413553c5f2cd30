"""The writer's lock: who holds it, for which folder, and for how long."""

import errno
import fcntl
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, commit_shards, reference, writer_of

from logitcache.labels.errors import LabelSetLocked, StorageFault
from logitcache.storage import LocalLabelSet
from logitcache.storage.lock import WriterLock

TINY: dict[str, Any] = {"k": 1, "classes": 3, "temperatures": (1.0,), "short_by": 4000}


def test_a_writer_whose_folder_was_replaced_writes_nothing_into_the_other(tmp_path: Path) -> None:
    ours, others = reference(3, seed=1, **TINY), reference(3, seed=1, **TINY)
    others = replace(others, logits=others.logits + 1)
    path = tmp_path / "store" / "set"
    old = writer_of(path, ours)
    commit_shards(old, ours, [0])
    shutil.rmtree(path)
    with writer_of(path, others) as new:
        commit_shards(new, others, [0])
        for shard in (1, 2):
            with pytest.raises(StorageFault, match="removed or replaced"):
                commit_shards(old, ours, [shard])
        commit_shards(new, others, [1, 2])
        new.seal()
    old.close()
    reader = LocalLabelSet(path)
    assert np.allclose(
        reader.fetch(np.arange(ROWS_PER_SHARD * 2)).logit_max, others.logits[: ROWS_PER_SHARD * 2].max(1)
    )
    assert sorted(file.name for file in (path / "staging").iterdir()) == []
    reader.close()


def test_a_writer_whose_folder_was_replaced_seals_and_grows_nothing(tmp_path: Path) -> None:
    source = reference(2, **TINY)
    path = tmp_path / "store" / "set"
    with writer_of(path, source) as old:
        commit_shards(old, source, [0, 1])
        shutil.rmtree(path)
        with writer_of(path, source), pytest.raises(StorageFault, match="removed or replaced"):
            old.seal()
        assert list((path / "generations").iterdir()) == []


def test_a_lock_that_was_removed_while_it_was_taken_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, take = tmp_path / "lock", fcntl.flock

    def removed(handle: int, how: int) -> None:
        path.unlink()
        take(handle, how)

    with monkeypatch.context() as patch:
        patch.setattr("logitcache.storage.lock.fcntl.flock", removed)
        with pytest.raises(LabelSetLocked, match="was removed while"):
            WriterLock(path)
    with WriterLock(path):
        assert path.exists()


def hold_with_a_child(path: Path, ready: int, over: int) -> None:
    held = WriterLock(path)
    if os.fork() == 0:
        os.write(ready, b"1")
    os.read(over, 1)
    assert held is not None
    os._exit(0)


def test_a_forked_child_that_outlives_a_killed_writer_does_not_hold_its_lock(tmp_path: Path) -> None:
    is_ready, ready = os.pipe()
    over, is_over = os.pipe()
    context = multiprocessing.get_context("fork")
    writer = context.Process(target=hold_with_a_child, args=(tmp_path / "lock", ready, over))
    writer.start()
    assert os.read(is_ready, 1) == b"1"
    with pytest.raises(LabelSetLocked, match=str(writer.pid)):
        WriterLock(tmp_path / "lock")
    writer.kill()
    writer.join()
    # The child is still there, waiting for a byte that has not been written.
    WriterLock(tmp_path / "lock").release()
    os.write(is_over, b"1")
    for handle in (is_ready, ready, over, is_over):
        os.close(handle)


def test_a_lock_that_cannot_be_noted_holds_and_one_that_fails_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("logitcache.storage.lock.os.pwrite", full)
        with WriterLock(tmp_path / "lock"), pytest.raises(LabelSetLocked):
            WriterLock(tmp_path / "lock")
    with monkeypatch.context() as patch:
        patch.setattr("logitcache.storage.lock.fcntl.flock", full)
        with pytest.raises(StorageFault):
            WriterLock(tmp_path / "lock")
    open_files = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert str(tmp_path / "lock") not in open_files
