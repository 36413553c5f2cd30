"""Servers and workers that die: a job is found again, heard of late, or begun anew, and its label set is that of a run
that nothing disturbed.

The default suite tries each case once; `make proof` kills the worker, the server or both at twenty random moments.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.server.job_site import Asker, Site, until

PROOF_KILLS, PROOF_SHARDS = 20, 20
PROOF_SEED = 20261
"""Seed of the random moments, written down before the run."""

VICTIMS = ("worker", "server", "both")
STARTS_S = 2.5
"""About how long a job's process takes to begin labelling."""


class Served:
    """`logitcache serve --config` in a process of its own."""

    def __init__(self, site: Site) -> None:
        command = [sys.executable, "-m", "logitcache.server", "serve", "--port=0"]
        self.process = subprocess.Popen(
            [*command, f"--config={site.folder / 'logitcache.toml'}"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert self.process.stderr is not None
        lines = map(json.loads, self.process.stderr)
        self.asker = Asker(next(line["url"] for line in lines if "url" in line))
        # What it logs later must not fill the pipe.
        self._reader = threading.Thread(target=self.process.stderr.read, daemon=True)
        self._reader.start()

    def end(self, number: signal.Signals) -> int:
        """End it, and wait until it has."""
        self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join()
        self.asker.http.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextmanager
def served(site: Site) -> Iterator[Served]:
    """A server that is killed at the end, if it is still there."""
    server = Served(site)
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site.make(tmp_path)
    yield site
    site.clear_away()


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return undisturbed(Site.make(tmp_path_factory.mktemp("undisturbed")))


def undisturbed(site: Site) -> str:
    """Digest of a run that nothing disturbed: the command line, and no server."""
    options = ["--teacher=mine:one", "--dataset=mine:points", "--top-k=3", "--rows-per-shard=4096", "--device=cpu"]
    command = [sys.executable, "-m", "logitcache.server", "precompute", "undisturbed", *options]
    subprocess.run([*command, f"--store={site.store}"], cwd=site.folder, check=True, capture_output=True, timeout=120)
    generation = json.loads(next((site.store / "undisturbed" / "generations").glob("*.json")).read_text())
    return str(generation["digest"])


def test_a_job_whose_server_is_killed_goes_on_and_the_next_server_finds_it(site: Site, digest: str) -> None:
    site.hold("one")
    with served(site) as server:
        id = server.asker.ask("points")
        site.until_held("one")
        process = site.process(id)
        server.end(signal.SIGKILL)
    assert process.is_alive()
    with served(site) as server:
        found = server.asker.job(id)
        assert (found["state"], found["attempt"]) == ("running", 1)
        assert server.asker.post("points").status_code == 200
        site.release("one")
        job = server.asker.until_ended(id)
    assert (job["state"], job["attempt"], job["digest"]) == ("succeeded", 1, digest)


def test_a_job_that_ends_while_no_server_is_there_is_heard_of_by_the_next(site: Site, digest: str) -> None:
    site.hold("one")
    with served(site) as server:
        id, waiting = server.asker.ask("points"), server.asker.ask("waiting", top_k=2)
        site.until_held("one")
        process = site.process(id)
        assert server.end(signal.SIGTERM) == 0
    site.release("one")
    until(lambda: not process.is_alive(), "the job to end by itself")
    with served(site) as server:
        job = server.asker.job(id)
        assert (job["state"], job["attempt"], job["digest"]) == ("succeeded", 1, digest)
        assert server.asker.until_ended(waiting)["state"] == "succeeded"


def test_a_job_that_is_killed_with_its_server_is_begun_anew_by_the_next(site: Site, digest: str) -> None:
    site.hold("one")
    with served(site) as server:
        id = server.asker.ask("points")
        site.until_held("one")
        # The first shard is committed while the teacher is held in the second.
        until((site.store / "points" / "commits" / "0.json").exists, "the first shard to be committed")
        server.end(signal.SIGKILL)
        site.process(id).signal(signal.SIGKILL)
    site.release("one")
    with served(site) as server:
        job = server.asker.until_ended(id)
    assert (job["state"], job["attempt"], job["digest"]) == ("succeeded", 2, digest)
    assert "labelling points: 4,904 rows" in job["log"], "what was committed is not labelled again"


def test_a_job_that_a_new_server_found_can_be_cancelled_and_killed(site: Site) -> None:
    site.hold("one")
    with served(site) as server:
        id = server.asker.ask("points")
        site.until_held("one")
        server.end(signal.SIGKILL)
    with served(site) as server:
        server.asker.cancel(id)
        assert server.asker.until_ended(id)["state"] == "cancelled"
        assert server.asker.ask("points") == id
        until(lambda: server.asker.job(id)["state"] == "running", "the second attempt to begin")
        site.process(id).signal(signal.SIGKILL)
        until(lambda: server.asker.job(id)["attempt"] == 3, "the third, which follows by itself")
        ends = [(tried["state"], tried["signal"]) for tried in server.asker.job(id)["attempts"]]
        assert ends == [("cancelled", None), ("failed", "SIGKILL")]


def test_two_servers_of_one_store_run_a_job_once_and_the_second_goes_on_when_the_first_is_killed(
    site: Site, digest: str
) -> None:
    site.hold("one")
    with served(site) as first, served(site) as second:
        id = second.asker.ask("points")
        assert first.asker.post("points").status_code == 200
        site.until_held("one")
        process = site.process(id)
        first.end(signal.SIGKILL)
        waiting = second.asker.ask("waiting", top_k=2)
        assert second.asker.cancel(waiting)["state"] == "cancelled"
        assert process.is_alive()
        site.release("one")
        job = second.asker.until_ended(id)
        assert second.asker.job(waiting)["state"] == "cancelled"
    assert (job["state"], job["attempt"], job["digest"]) == ("succeeded", 1, digest)


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_killed_worker_server_or_both_at_random_moments_the_digest_is_that_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    examples = PROOF_SHARDS * 4096 - 96
    digest = undisturbed(Site.make(folder(tmp_path, "whole"), examples))
    rng = random.Random(PROOF_SEED)
    seen = []
    for number in range(PROOF_KILLS):
        site = Site.make(folder(tmp_path, str(number)), examples)
        victims = VICTIMS[number % len(VICTIMS)]
        server = Served(site)
        try:
            id = server.asker.ask("points")
            wait_for_a_moment(site, rng, number)
            committed = site.shards("points")
            if victims != "worker":
                server.end(signal.SIGKILL)
            if victims != "server":
                kill_worker(site, id)
            if victims != "worker":
                server = Served(site)
            job = server.asker.until_ended(id)
            assert (job["state"], job["digest"]) == ("succeeded", digest), f"{victims} killed, moment {number}"
            seen.append((victims, committed, job["attempt"]))
        finally:
            server.end(signal.SIGKILL)
            site.clear_away()
    assert len({count for _, count, _ in seen if 0 < count < PROOF_SHARDS}) >= PROOF_KILLS // 3
    told = "; ".join(f"{victims} at {count} shards: attempt {attempt}" for victims, count, attempt in seen)
    print(f"\n{told}; digest {digest[:19]} each time")


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


def wait_for_a_moment(site: Site, rng: random.Random, number: int) -> None:
    """Every fourth is while the job's process starts, the others lie all over its progress, and not over the clock."""
    if number % 4 == 0:
        time.sleep(rng.uniform(0, STARTS_S))
        return
    least = PROOF_SHARDS * number // PROOF_KILLS

    def committed() -> bool:
        said = [file.read_text() for file in (site.store / ".jobs").glob("*/outcome.json")]
        assert not any("error" in text for text in said), said
        return site.shards("points") >= least

    until(committed, f"{least} shards")
    time.sleep(rng.uniform(0, 0.05))


def kill_worker(site: Site, id: str) -> None:
    """Kill the job's process, if it has one at this moment."""
    try:
        process = site.process(id)
    except AssertionError:
        return
    process.signal(signal.SIGKILL)
