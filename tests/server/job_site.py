"""A folder as a user has it (a configuration, code beside it, a store), and a client that asks for jobs and waits."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.server import job_specimens

from logitcache.server.config import Config
from logitcache.server.jobs.folder import FOLDER, JobFolder, read_jobs
from logitcache.server.jobs.job import Asked, Job
from logitcache.server.jobs.process import JobProcess
from logitcache.server.jobs.queue import Jobs

GRACE_S = 0.5

DEADLINE_S = 120.0
"""Jobs begin processes that import torch, on machines that are shared."""

CONFIG = """\
store = "label-sets"

[jobs]
retry_after_s = 0.1
retries = RETRIES
keep = KEEP

[teachers]
one = {spec = "mine:one", device = "cpu"}
two = {spec = "mine:two", device = "cpu:0"}
stubborn = {spec = "mine:stubborn", device = "cpu"}
greedy = {spec = "mine:greedy", device = "cpu"}
raising = {spec = "mine:raising", device = "cpu"}
segfault = {spec = "mine:segfault", device = "cpu"}
abort = {spec = "mine:abort", device = "cpu"}
exits = {spec = "mine:exits", device = "cpu:0"}
hungry = {spec = "mine:hungry"}
nowhere = {spec = "elsewhere:teacher"}

[datasets.points]
spec = "mine:points"
"""


def until(true: Callable[[], bool], what: str) -> None:
    """Return when it is true; fail when it does not become so."""
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s for {what}"
        time.sleep(0.01)


@dataclass(frozen=True)
class Site:
    """The folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, examples: int = 9000, *, retries: int = 2, keep: int = 1000) -> "Site":
        shutil.copy(job_specimens.__file__, folder / "mine.py")
        (folder / "logitcache.toml").write_text(CONFIG.replace("RETRIES", str(retries)).replace("KEEP", str(keep)))
        (folder / "examples").write_text(str(examples))
        (folder / "label-sets").mkdir()
        return cls(folder)

    @property
    def store(self) -> Path:
        return self.folder / "label-sets"

    @property
    def config(self) -> Config:
        return Config.read(self.folder / "logitcache.toml")

    def hold(self, teacher: str) -> None:
        """Make a teacher wait at its second shard."""
        (self.folder / f"hold-{teacher}").touch()
        (self.folder / f"held-{teacher}").unlink(missing_ok=True)

    def until_held(self, teacher: str) -> None:
        until((self.folder / f"held-{teacher}").exists, f"{teacher} to reach its second shard")

    def release(self, teacher: str) -> None:
        (self.folder / f"hold-{teacher}").unlink(missing_ok=True)

    def process(self, id: str) -> JobProcess:
        """The process of a running job, from its state file."""
        job = next(job for job in read_jobs(self.store / FOLDER) if job.id == id)
        assert job.process is not None
        return JobProcess(job.process)

    def shards(self, name: str) -> int:
        """How many shards of a label set are committed."""
        return len(list((self.store / name / "commits").glob("*.json")))

    def contents(self, name: str) -> dict[int, dict[str, str]]:
        """Of each shard of a label set that is committed, what each of its files hashes to."""
        commits = (json.loads(path.read_bytes()) for path in (self.store / name / "commits").glob("*.json"))
        return {commit["shard"]: {part: told["sha256"] for part, told in commit["files"].items()} for commit in commits}

    def clear_away(self) -> None:
        """End what a failed test left running."""
        for job in read_jobs(self.store / FOLDER):
            if job.process is not None:
                JobProcess(job.process).signal(signal.SIGKILL)


class Asker:
    """A client of a server's jobs."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=DEADLINE_S)

    def post(self, label_set: str, teacher: str = "one", **changes: Any) -> httpx.Response:
        body = {"label_set": label_set, "teacher": teacher, "dataset": "points", "top_k": 3, "rows_per_shard": 4096}
        return self.http.post("/v1/jobs", json=body | changes)

    def ask(self, label_set: str, teacher: str = "one", **changes: Any) -> str:
        """Ask for a job that must be queued by it; its id."""
        answer = self.post(label_set, teacher, **changes)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def job(self, id: str) -> dict[str, Any]:
        answer = self.http.get(f"/v1/jobs/{id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def cancel(self, id: str) -> dict[str, Any]:
        answer = self.http.post(f"/v1/jobs/{id}/cancel", json={})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def until(self, id: str, *states: str) -> dict[str, Any]:
        """The job, once it is in one of these states."""
        until(lambda: self.job(id)["state"] in states, f"job {id} to be {' or '.join(states)}")
        return self.job(id)

    def until_ended(self, id: str) -> dict[str, Any]:
        return self.until(id, "succeeded", "failed", "cancelled")

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()


@contextmanager
def watching(jobs: Jobs) -> Iterator[Jobs]:
    """The queue without HTTP, at work."""
    jobs.start()
    try:
        yield jobs
    finally:
        jobs.close()


def written(
    site: Site, label_set: str, teacher: str | list[str] = "one", state: Callable[[Job], Job] = lambda job: job
) -> Job:
    """A job that an earlier server left in the store, in some state."""
    (site.store / ".jobs").mkdir(exist_ok=True)
    request = Asked(label_set=label_set, teacher=teacher, dataset="points", top_k=3, rows_per_shard=4096).request()
    job = state(Job.of(request))
    JobFolder(site.store / ".jobs", job.id).write(job)
    return job
