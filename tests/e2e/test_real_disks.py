"""Disks that are really full or read-only, in the middle of a precompute, a recording, a job.

A small tmpfs, and an ext4 that goes read-only as it does after an error. Mounting needs root, so this stands among the
proofs.
"""

import contextlib
import gc
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.e2e import test_jobs as jobs
from tests.e2e.recorded import OPTIONS, all_of, all_of_folder, batches, rows_of, served
from tests.e2e.workload import workload
from tests.server.job_site import Site, until
from tests.storage.faults import Counting

from logitcache.client import record
from logitcache.client.recorder import Recorder
from logitcache.labels.errors import DiskFull, RowsMissing, StoreNotWritable
from logitcache.labels.soft_labels import SoftLabels
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


@dataclass(frozen=True)
class FailingDisk:
    """A file system in a file, ``place`` being where it is mounted."""

    image: Path
    place: Path

    def mount(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.place)], check=True)

    def fail(self) -> None:
        """It goes read-only with files open for writing, and what was not synced is lost."""
        subprocess.run(["mount", "-o", "remount,abort", str(self.place)], check=True)

    def mend(self) -> None:
        """Take it out and in again; nobody may have it open."""
        gc.collect()
        subprocess.run(["umount", str(self.place)], check=True)
        self.mount()


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[FailingDisk]:
    disk = FailingDisk(tmp_path / "image", tmp_path / "failing")
    disk.place.mkdir()
    with disk.image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-E", "root_owner=0:0", str(disk.image)], check=True)
    disk.mount()
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.place)], check=True)


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


def test_a_disk_that_goes_read_only_in_a_precompute_keeps_what_is_committed_and_goes_on_when_it_is_mended(
    failing_disk: FailingDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKLOAD_EXAMPLES", str(6 * 4096))
    asked = workload(failing_disk.place / "store")

    def at(number: int, operation: str, path: Path) -> None:
        if operation == "write" and path.name.startswith("commit.3."):
            failing_disk.fail()

    with pytest.raises(StoreNotWritable, match="Read-only file system"):
        precompute(asked.request, files=Counting(at))
    failing_disk.mend()
    reader = LocalLabelSet(asked.path)
    assert all(report.ok for report in reader.verify_all())
    committed = reader.describe().shards.committed
    assert committed == 3
    reader.close()
    whole = precompute(asked.request)
    assert whole.labelled == (6 - committed) * 4096
    assert whole.digest == precompute(workload(tmp_path / "elsewhere").request).digest
    print(f"\nread-only after {committed} of 6 shards; mended, the digest is that of an undisturbed run")


RECORDED = 100_000


def recorded_until(recorder: Recorder, some: list[np.ndarray], error: type[Exception]) -> list[np.ndarray]:
    """Record batches until one is refused with this error: those that were acknowledged."""
    for number, batch in enumerate(some):
        recorder.add(batch, rows_of(batch), step=1)
        try:
            recorder.flush()
        except error as refused:
            print(f"\nafter {number} of {len(some)} batches: {type(refused).__name__}: {refused}")
            return some[:number]
    raise AssertionError(f"no {error.__name__} in {len(some)} batches")


def assert_acknowledged(url: str, acknowledged: list[np.ndarray], expected: SoftLabels) -> None:
    """The server answers, with all that it acknowledged, bit for bit."""
    assert httpx.get(f"{url}/healthz").status_code == 200
    ids = np.concatenate(acknowledged)
    soft = all_of(f"{url}/run-1", ids)
    for name in ("indices", "logits", "logit_max", "tail_logsumexp"):
        assert getattr(soft, name).tobytes() == getattr(expected, name)[ids].tobytes(), name


def answered(url: str, status: int) -> bool:
    """The server has answered with this status."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return any(line.startswith("logitcache_requests_total") and f'status="{status}"' in line for line in lines)


def test_a_disk_that_fills_up_in_a_recording_is_told_over_http_and_goes_on_with_room(
    small_disk: Path, tmp_path: Path
) -> None:
    expected, digest = all_of_folder(tmp_path / "expected", RECORDED)
    some = batches(3, 1024, RECORDED)
    with served(small_disk) as server:
        recorder = record(f"{server.url}/run-1", **OPTIONS, examples=RECORDED, timeout_s=20)
        acknowledged = recorded_until(recorder, some, DiskFull)
        assert answered(server.url, 507)
        assert_acknowledged(server.url, acknowledged, expected)
        subprocess.run(["mount", "-o", f"remount,size={32 << 20}", str(small_disk)], check=True)
        for batch in some[len(acknowledged) + 1 :]:
            recorder.add(batch, rows_of(batch), step=1)
        recorder.flush()
        assert_acknowledged(server.url, some, expected)
        # And no room for the shards.
        fill(small_disk / "ballast", 0)
        with pytest.raises(DiskFull):
            recorder.finish()
        assert_acknowledged(server.url, some, expected)
        (small_disk / "ballast").unlink()
        assert recorder.finish() == digest
        recorder.close()
        assert_acknowledged(server.url, some, expected)
    print(f"full after {len(acknowledged)} of {len(some)} batches, and again while it was sealed; the same digest")


def test_a_disk_that_goes_read_only_in_a_recording_is_told_over_http_and_goes_on_when_it_is_mended(
    failing_disk: FailingDisk, tmp_path: Path
) -> None:
    expected, digest = all_of_folder(tmp_path / "expected", RECORDED)
    some = batches(3, 1024, RECORDED)
    with served(failing_disk.place) as server:
        recorder = record(f"{server.url}/run-1", **OPTIONS, examples=RECORDED, timeout_s=60)
        for batch in some[:40]:
            recorder.add(batch, rows_of(batch), step=1)
            recorder.flush()
        failing_disk.fail()
        assert recorded_until(recorder, some[40:], StoreNotWritable) == []
        assert_acknowledged(server.url, some[:40], expected)
        server.kill()
        failing_disk.mend()
        server.start()
        assert_acknowledged(server.url, some[:40], expected)
        for batch in some[41:]:
            recorder.add(batch, rows_of(batch), step=1)
        assert recorder.finish() == digest
        recorder.close()
        server.kill()
    print(f"read-only after 40 of {len(some)} batches; mended, nothing acknowledged was lost, and the same digest")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A folder with a configuration, whose store is still to be mounted."""
    (tmp_path / "site").mkdir()
    site = Site.make(tmp_path / "site")
    yield site
    site.clear_away()


@pytest.mark.parametrize("left_bytes", [0, 96 << 10], ids=["no room at all", "room for small files"])
def test_a_disk_that_fills_up_in_a_job_ends_it_with_the_reason_and_asked_again_it_goes_on(
    site: Site, tmp_path: Path, left_bytes: int
) -> None:
    (tmp_path / "other").mkdir()
    digest = jobs.undisturbed(Site.make(tmp_path / "other"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(site.store)], check=True)
    try:
        site.hold("one")
        with jobs.served(site) as server:
            id = server.asker.ask("points")
            site.until_held("one")
            until((site.store / "points" / "commits" / "0.json").exists, "the first shard to be committed")
            fill(site.store / "ballast", left_bytes)
            process = site.process(id)
            site.release("one")
            until(lambda: not process.is_alive(), "the job's process to end")
            assert server.asker.http.get("/healthz").status_code == 200
            if not left_bytes:
                (site.store / "ballast").unlink()
            job = server.asker.until_ended(id)
            # Where not even the reason could be written down, the server tries again by itself.
            assert (job["state"], job["attempt"]) == (("failed", 1) if left_bytes else ("succeeded", 2)), job
            print(f"\n{job['error']}; last lines: {job['log'][-3:]}")
            assert any("no space left" in line for line in job["log"]), job
            if left_bytes:
                assert job["error"]["code"] == "disk-full"
                (site.store / "ballast").unlink()
                assert server.asker.post("points").status_code == 202
                job = server.asker.until_ended(id)
            assert (job["state"], job["digest"]) == ("succeeded", digest), job
            assert "labelling points: 4,904 rows" in job["log"], "what was committed is not labelled again"
    finally:
        subprocess.run(["umount", "--lazy", str(site.store)], check=True)


def fill(path: Path, left_bytes: int) -> None:
    """Take all the room of a file system but so much."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size - left_bytes))


def test_a_disk_that_goes_read_only_in_a_job_loses_nothing_and_the_next_server_goes_on_when_it_is_mended(
    site: Site, failing_disk: FailingDisk, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    digest = jobs.undisturbed(Site.make(tmp_path / "other"))
    site.store.rmdir()
    site.store.symlink_to(failing_disk.place, target_is_directory=True)
    site.hold("one")
    with jobs.served(site) as server:
        id = server.asker.ask("points")
        site.until_held("one")
        until((site.store / "points" / "commits" / "0.json").exists, "the first shard to be committed")
        process = site.process(id)
        failing_disk.fail()
        site.release("one")
        until(lambda: not process.is_alive(), "the job's process to end")
        assert server.asker.http.get("/healthz").status_code == 200
        refused = server.asker.post("other")
        assert refused.status_code >= 500, refused.text
        print(f"\nread-only, a job that is asked for is refused: {refused.status_code} {refused.json()['detail']}")
        server.end(signal.SIGTERM)
    failing_disk.mend()
    with jobs.served(site) as server:
        job = server.asker.until_ended(id)
        if job["state"] == "failed":
            print(job["error"])
            assert server.asker.post("points").status_code == 202
            job = server.asker.until_ended(id)
        assert (job["state"], job["digest"]) == ("succeeded", digest), job
        assert "labelling points: 4,904 rows" in job["log"], "what was committed is not labelled again"
