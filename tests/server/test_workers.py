"""Several processes that serve as one: the same commits, counters that add up, a worker that dies, a stop."""

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.conftest import EXAMPLES, IDENTITY, ROWS_PER_SHARD, shard_arrays
from tests.server.test_serve import serving

from logitcache.labels.errors import InvalidRequest, ServerFault
from logitcache.server.http.serve import serve
from logitcache.server.http.workers import supervise
from logitcache.storage.layout import Layout
from logitcache.storage.writer import LabelSetWriter

WORKERS = 2


def until(claim: Callable[[], Any]) -> None:
    """Wait until it holds; pytest's own time limit ends the wait."""
    pause = threading.Event()
    while not claim():
        pause.wait(0.05)


@contextmanager
def workers(store: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    with serving("--store", str(store), "--port", "0", "--workers", str(WORKERS)) as (process, told):
        assert told["workers"] == WORKERS
        try:
            yield process, told["url"]
        finally:
            process.terminate()
            process.wait()


def children(process: "subprocess.Popen[str]") -> set[int]:
    """Its worker processes: those of its children that serve."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {int(pid) for pid in found if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def answered_by(url: str) -> int:
    """A request over a connection of its own; how many requests all workers have counted, this one's own not yet."""
    with httpx.Client(base_url=url) as client:
        text = client.get("/metrics").text
    counts = re.findall(r"^logitcache_requests_total\{.*\} (\S+)$", text, re.MULTILINE)
    return int(sum(map(float, counts)))


def test_they_count_together_and_serve_the_same_commits(own_store: Path) -> None:
    with workers(own_store) as (process, url):
        assert len(children(process)) == WORKERS
        for _ in range(60):  # over connections of their own, which the workers take by turns
            httpx.post(f"{url}/v1/label-sets/digits/fetch", json={"ids": [3, 1, 4]}).raise_for_status()
        with httpx.Client(base_url=url) as client:
            text = client.get("/metrics").text
        assert 'logitcache_rows_served_total{label_set="digits"} 180.0' in text
        assert 'logitcache_label_set_shards{label_set="half",state="committed"} 1.0' in text
        assert answered_by(url) >= 61


def test_what_is_committed_is_served_by_all_of_them(own_store: Path) -> None:
    ids = [5000]

    def status(url: str) -> int:
        return httpx.post(f"{url}/v1/label-sets/half/fetch", json={"ids": ids}).status_code

    with workers(own_store) as (_, url):
        assert {status(url) for _ in range(20)} == {404}
        with LabelSetWriter(own_store / "half", Layout.pointwise(IDENTITY, EXAMPLES, ROWS_PER_SHARD)) as writer:
            for shard in writer.missing:
                writer.commit(shard, shard_arrays(writer.layout.span(shard)), {"retained_mass": {}})
            writer.seal()
        until(lambda: {status(url) for _ in range(20)} == {200})


def test_a_worker_that_dies_is_replaced_and_its_counts_are_kept(own_store: Path) -> None:
    with workers(own_store) as (process, url):
        before = children(process)
        for _ in range(30):
            httpx.get(f"{url}/v1/label-sets").raise_for_status()
        counted = answered_by(url)
        os.kill(min(before), signal.SIGKILL)
        until(lambda: len(children(process) - before) == 1)
        until(lambda: httpx.get(f"{url}/healthz").status_code == 200)
        assert answered_by(url) > counted


def test_sigterm_stops_all_of_them(finished_store: Path) -> None:
    with workers(finished_store) as (process, url):
        pids = children(process)
        assert httpx.get(f"{url}/healthz").status_code == 200
        process.terminate()
        assert process.wait() == 0
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def test_workers_do_not_outlive_their_supervisor(finished_store: Path) -> None:
    with workers(finished_store) as (process, _):
        pids = children(process)
        process.kill()
        until(lambda: not [pid for pid in pids if Path(f"/proc/{pid}").exists()])


class Dying:
    """Work that ends as soon as it begins."""

    log_level = "warning"

    def run(self, ready: Callable[[], object]) -> None:
        os._exit(3)


def test_workers_that_die_again_and_again_end_the_server() -> None:
    with pytest.raises(ServerFault, match="died within"):
        supervise(Dying(), 2, ready=lambda: None)  # type: ignore[arg-type]


def test_recording_with_several_is_refused(finished_store: Path) -> None:
    with pytest.raises(InvalidRequest, match="--workers 1"):
        serve(finished_store, port=0, workers=2, record=True)
