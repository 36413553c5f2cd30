"""Disks that are really full or read-only: a small tmpfs. Mounting needs root, so this stands among the proofs."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.e2e.workload import workload

from logitcache.labels.errors import DiskFull, RowsMissing, StoreNotWritable
from logitcache.server.labelling import space
from logitcache.server.labelling.precompute import precompute
from logitcache.storage import LocalLabelSet

SHARDS = 50
SHARD_BYTES = 4096 * (8 + 8 + 4 * 2 + 4 * 2 + 4 * 4 + 4)

pytestmark = pytest.mark.proof


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for some twenty of the fifty shards."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={20 * SHARD_BYTES}", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(autouse=True)
def size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKLOAD_EXAMPLES", str(SHARDS * 4096))


def test_too_little_space_is_refused_before_the_first_forward(small_disk: Path) -> None:
    with pytest.raises(DiskFull, match=r"for 50 more shards, .* are free: make room"):
        precompute(workload(small_disk / "store").request)


def test_a_disk_that_fills_up_on_the_way_keeps_what_is_committed_and_goes_on_with_room(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = workload(small_disk / "store")
    # As if another program took the space meanwhile.
    monkeypatch.setattr(space, "free_bytes", lambda path: 1 << 40)
    with pytest.raises(DiskFull, match="what is committed is kept"):
        precompute(asked.request)
    reader = LocalLabelSet(asked.path)
    labelled = reader.describe().labelled
    assert 10 * 4096 <= labelled < 20 * 4096
    ids = np.arange(0, labelled, 2)
    assert len(reader.fetch(ids)) == len(ids)
    reader.close()
    assert list((asked.path / "staging").iterdir()) == []
    subprocess.run(["mount", "-o", f"remount,size={60 * SHARD_BYTES}", str(small_disk)], check=True)
    whole = precompute(asked.request)
    assert whole.labelled == SHARDS * 4096 - labelled
    assert whole.digest == precompute(workload(tmp_path / "elsewhere").request).digest
    print(f"\nfull after {labelled // 4096} of {SHARDS} shards; with room the digest is that of an undisturbed run")


def test_a_read_only_store_is_read_and_checked_but_not_written(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKLOAD_EXAMPLES", str(3 * 4096))
    asked = workload(small_disk / "store")
    precompute(asked.request)
    chunk = asked.path / "logits" / "c.1.0"
    content = bytearray(chunk.read_bytes())
    content[9] ^= 1
    chunk.write_bytes(content)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    reader = LocalLabelSet(asked.path)
    assert len(reader.fetch([0, 4095, 8192])) == 3
    with pytest.raises(RowsMissing, match="damaged"):
        reader.fetch([4096])
    reader.close()
    for request in (asked.request, asked.with_changes(name="new").request):
        with pytest.raises(StoreNotWritable, match=r"Read-only file system; choose another --store"):
            precompute(request)
    assert not (asked.path / "quarantine").exists()
