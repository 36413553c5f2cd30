"""Jobs over HTTP, with real precomputes in processes of their own: they wait, run, end, are cancelled, asked again."""

import errno
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.job_site import Asker, Site, until

from logitcache.labels.errors import JobNotFound, StorageFault, Unavailable
from logitcache.server.config import Config
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.server.jobs import queue, rules
from logitcache.server.jobs.folder import TAIL_BYTES, TAIL_LINES, JobFolder
from logitcache.server.jobs.job import Asked, Job, JobDetail, ProcessId
from logitcache.server.jobs.process import COMMAND, JobProcess, _began
from logitcache.server.jobs.queue import MOST_LISTED, Jobs
from logitcache.storage import LocalLabelSet
from logitcache.storage.lock import WriterLock

GRACE_S = 0.5


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


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site.make(tmp_path_factory.mktemp("site"))
    yield site
    site.clear_away()


@pytest.fixture(scope="module")
def asker(site: Site) -> Iterator[Asker]:
    """A client of a server that runs jobs; a cancelled process is given half a second."""
    jobs = Jobs(site.store, site.config, grace_s=GRACE_S)
    with running(create_app(Catalog(site.store), jobs)) as url, Asker(url) as asker:
        yield asker


@pytest.fixture(autouse=True)
def _nothing_is_held(site: Site) -> Iterator[None]:
    yield
    for teacher in ("one", "two", "stubborn", "greedy", "segfault"):
        site.release(teacher)


@pytest.fixture(scope="module")
def undisturbed(asker: Asker) -> dict[str, Any]:
    """A job that ran to its end, and its digest."""
    return asker.until_ended(asker.ask("undisturbed"))


def test_a_job_labels_its_dataset_and_the_result_is_served(asker: Asker, undisturbed: dict[str, Any]) -> None:
    assert (undisturbed["state"], undisturbed["attempt"], undisturbed["error"]) == ("succeeded", 1, None)
    until(lambda: asker.http.get("/v1/label-sets/undisturbed").status_code == 200, "the label set to be noticed")
    described = asker.http.get("/v1/label-sets/undisturbed").json()
    assert described["digest"] == undisturbed["digest"] is not None
    assert described["identity"]["k"] == 3
    assert undisturbed["progress"] == undisturbed["progress"] | {"rows_done": 9000, "rows_total": 9000}
    assert any(line.startswith("undisturbed: 9,000 rows in 3 shards") for line in undisturbed["log"])
    assert undisturbed["created"] <= undisturbed["started"] <= undisturbed["ended"]


def test_asking_for_the_same_again_gives_the_same_job_and_runs_nothing(
    asker: Asker, undisturbed: dict[str, Any]
) -> None:
    answer = asker.post("undisturbed", temperatures=[1.0], dtype="float16")
    assert answer.status_code == 200
    assert answer.headers["Location"] == f"/v1/jobs/{undisturbed['id']}"
    assert asker.job(undisturbed["id"]) == undisturbed


def test_a_job_that_succeeded_runs_again_when_told_so_and_finds_nothing_left(asker: Asker) -> None:
    id = asker.ask("twice")
    first = asker.until_ended(id)
    assert asker.ask("twice", again=True) == id
    second = asker.until_ended(id)
    assert (second["state"], second["attempt"], second["digest"]) == ("succeeded", 2, first["digest"])
    assert second["log"].index("--- attempt 2") == len(first["log"])
    assert any("nothing left to label" in line for line in second["log"])


def test_jobs_on_one_device_run_one_after_the_other_and_those_on_two_side_by_side(asker: Asker, site: Site) -> None:
    site.hold("one")
    site.hold("two")
    first, second, beside = asker.ask("first"), asker.ask("second"), asker.ask("beside", "two")
    site.until_held("one")
    site.until_held("two")
    states = {id: asker.job(id)["state"] for id in (first, second, beside)}
    assert states == {first: "running", second: "queued", beside: "running"}
    assert asker.post("second").status_code == 200
    metrics = asker.http.get("/metrics").text.splitlines()
    assert 'logitcache_jobs{state="running"} 2.0' in metrics
    assert 'logitcache_jobs{state="queued"} 1.0' in metrics
    assert sum(line.startswith("logitcache_jobs{") for line in metrics) == 5
    progress = asker.job(first)["progress"]
    assert (progress["activity"], progress["rows_total"]) == ("labelling first", 9000)
    assert 0 <= progress["rows_done"] <= 4096
    site.release("one")
    site.release("two")
    ends = {id: asker.until_ended(id) for id in (first, second, beside)}
    assert {job["state"] for job in ends.values()} == {"succeeded"}
    assert ends[second]["started"] >= ends[first]["ended"]
    listed = [job["id"] for job in asker.http.get("/v1/jobs").json()]
    assert listed[:3] == [beside, second, first]


def test_cancelled_while_labelling_it_keeps_what_is_committed_and_goes_on_when_asked_again(
    asker: Asker, site: Site, undisturbed: dict[str, Any]
) -> None:
    site.hold("one")
    running, waiting = asker.ask("stopped"), asker.ask("never-began")
    site.until_held("one")
    process = site.process(running)
    assert asker.cancel(waiting)["state"] == "cancelled"
    assert asker.cancel(running)["stop_asked"] is not None
    stopped = asker.until_ended(running)
    assert (stopped["state"], stopped["error"]) == ("cancelled", None)
    assert not process.is_alive()
    assert site.shards("stopped") == 1
    assert not (site.store / "never-began").exists()
    assert asker.cancel(running) == stopped
    site.release("one")
    assert asker.ask("stopped") == running
    resumed = asker.until_ended(running)
    assert site.contents("stopped") == site.contents("undisturbed")
    assert (resumed["state"], resumed["attempt"], resumed["digest"]) == ("succeeded", 2, undisturbed["digest"])
    assert asker.cancel(running) == resumed


def test_cancelled_while_its_process_starts_it_leaves_nothing(asker: Asker, site: Site) -> None:
    id = asker.ask("early")
    asker.until(id, "running")
    asker.cancel(id)
    assert asker.until_ended(id)["state"] == "cancelled"
    assert site.shards("early") == 0


def test_a_process_that_does_not_stop_is_killed_after_its_grace(asker: Asker, site: Site) -> None:
    site.hold("stubborn")
    id = asker.ask("stubborn", "stubborn")
    site.until_held("stubborn")
    asker.cancel(id)
    killed = asker.until_ended(id)
    assert (killed["state"], [tried["signal"] for tried in killed["attempts"]]) == ("cancelled", ["SIGKILL"])
    assert site.shards("stubborn") == 1


def test_killed_as_when_memory_runs_out_it_is_tried_again_a_few_times_and_goes_on_when_asked_again(
    asker: Asker, site: Site
) -> None:
    site.hold("greedy")
    id = asker.ask("greedy", "greedy")
    killed = asker.until_ended(id)
    assert (killed["state"], killed["error"]["code"]) == ("failed", "job-killed")
    assert "memory" in killed["error"]["message"]
    # The first attempt committed a shard, and two more did not.
    attempts = [(tried["attempt"], tried["state"], tried["signal"]) for tried in killed["attempts"]]
    assert attempts == [(number, "failed", "SIGKILL") for number in (1, 2, 3)]
    assert "while labelling examples 4,096 to 4,351" in killed["attempts"][0]["error"]["message"]
    assert killed["log"][:2] == ["labelling greedy: 9,000 rows", "--- attempt 2"]
    assert site.shards("greedy") == 1
    site.release("greedy")
    assert asker.ask("greedy", "greedy") == id
    resumed = asker.until_ended(id)
    whole = asker.until_ended(asker.ask("never-killed", "greedy"))
    assert (resumed["state"], resumed["error"], resumed["digest"]) == ("succeeded", None, whole["digest"])
    assert [tried["state"] for tried in resumed["attempts"]] == ["failed"] * 3 + ["succeeded"]


def test_a_process_that_crashes_once_is_tried_again_and_its_job_succeeds(asker: Asker, site: Site) -> None:
    site.hold("segfault")
    id = asker.ask("crashing", "segfault")
    until(lambda: bool(asker.job(id)["attempts"]), "the first attempt to crash")
    site.release("segfault")
    job = asker.until_ended(id)
    assert (job["state"], job["error"]) == ("succeeded", None)
    first, *_, last = job["attempts"]
    assert (first["state"], first["signal"], last["state"]) == ("failed", "SIGSEGV", "succeeded")
    assert "SIGSEGV while labelling examples 4,096 to 4,351" in first["error"]["message"]


ENDS = {
    "segfault": ("job-killed", "SIGSEGV", "ended by SIGSEGV while labelling examples 4,096 to 4,351"),
    "abort": ("job-killed", "SIGABRT", "ended by SIGABRT while labelling examples 4,096 to 4,351"),
    "exits": ("job-killed", None, "exit code 3 while labelling examples 4,096 to 4,351 and did not say why"),
    "hungry": ("teacher-fault", None, "raised MemoryError on examples 4,096 to 4,351"),
}
"""By teacher: the code of the job's error, the signal that ended its process, and what is said of it."""


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[JobDetail, str]]:
    """Jobs that were tried once, by teacher, and what their folders hold for whoever runs the server."""
    site = Site.make(tmp_path_factory.mktemp("crashed"), retries=0)
    site.hold("segfault")
    ids = {teacher: written(site, teacher, teacher).id for teacher in ENDS}
    with watching(Jobs(site.store, site.config)) as jobs:
        until(lambda: all(jobs.get(id).ended for id in ids.values()), "all to end")
        return {
            teacher: (jobs.get(id), (site.store / ".jobs" / id / "traceback.txt").read_text())
            for teacher, id in ids.items()
        }


@pytest.mark.parametrize("teacher", ENDS)
def test_however_a_process_ends_the_job_says_how_and_with_its_last_lines(
    crashed: dict[str, tuple[JobDetail, str]], teacher: str
) -> None:
    job, _ = crashed[teacher]
    code, signal, told = ENDS[teacher]
    assert job.error is not None
    assert (job.state, job.error.code, [tried.signal for tried in job.attempts]) == ("failed", code, [signal])
    assert told in job.error.message
    assert job.log[0] == f"labelling {teacher}: 9,000 rows"


@pytest.mark.parametrize("teacher", ["segfault", "abort", "hungry"])
def test_where_it_ended_is_written_down_for_whoever_runs_the_server_and_not_told(
    crashed: dict[str, tuple[JobDetail, str]], teacher: str
) -> None:
    job, trace = crashed[teacher]
    assert "at_the_second_shard" in trace
    for hidden in ("Traceback", "at_the_second_shard", "/"):
        assert hidden not in job.model_dump_json(include={"error", "log", "attempts"}).replace("rows/s", "")


def test_a_teacher_that_raises_is_the_jobs_error(asker: Asker, site: Site) -> None:
    failed = asker.until_ended(asker.ask("raising", "raising"))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "teacher-fault")
    assert "the teacher's own trouble" in failed["error"]["message"]
    assert any("the same command goes on from there" in line for line in failed["log"])
    assert site.shards("raising") == 1


def test_another_job_for_a_label_set_that_is_there_is_refused_by_its_precompute(
    asker: Asker, undisturbed: dict[str, Any]
) -> None:
    failed = asker.until_ended(asker.ask("undisturbed", top_k=4))
    assert failed["id"] != undisturbed["id"]
    assert (failed["state"], failed["error"]["code"]) == ("failed", "identity-changed")
    assert "k was 3 and is now 4" in failed["error"]["message"]


def test_a_spec_that_names_nothing_is_told_without_where_the_server_keeps_things(asker: Asker, site: Site) -> None:
    failed = asker.until_ended(asker.ask("nowhere", "nowhere"))
    assert failed["error"]["code"] == "spec-not-found"
    assert "'elsewhere'" in failed["error"]["message"]
    assert str(site.folder) not in failed["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "status", "code", "told"),
    [
        ({"teacher": "oen"}, 404, "not-registered", "did you mean 'one'?"),
        ({"dataset": "mine:points"}, 404, "not-registered", "did you mean 'points'?"),
        ({"teacher": "mine:one"}, 404, "not-registered", "no teacher 'mine:one'"),
        ({"label_set": "../../etc"}, 422, "invalid-name", "'../../etc'"),
        ({"store": "/tmp"}, 422, "invalid-request", "store: Extra inputs"),
        ({"top_k": "3"}, 422, "invalid-request", "top_k"),
        ({"rows_per_shard": 5000}, 422, "invalid-request", "4,096"),
        ({"temperatures": [-1]}, 422, "invalid-request", "temperature"),
        ({"teacher": ["one", "wto"]}, 404, "not-registered", "no teacher 'wto'"),
        ({"teacher": ["one", "two"]}, 422, "invalid-request", "'one' cpu, 'two' cpu:0"),
        ({"teacher": []}, 422, "invalid-request", "teacher: "),
        ({"seed": 5}, 422, "invalid-request", "give views, too"),
        ({"views": 2}, 422, "invalid-request", "8,192 up to"),
        ({"views": 0}, 422, "invalid-request", "views: "),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_makes_no_job(
    asker: Asker, changes: dict[str, Any], status: int, code: str, told: str
) -> None:
    before = asker.http.get("/v1/jobs").json()
    answer = asker.post(**{"label_set": "refused"} | changes)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert told in answer.json()["detail"]
    assert asker.http.get("/v1/jobs").json() == before


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"{}", "application/vnd.safetensors", 415),
        (b" " * (1 << 17), "application/json", 413),
        (b" " * (3 << 20), "application/json", 413),
    ],
)
def test_a_body_that_is_not_a_request_is_a_problem(asker: Asker, content: bytes, kind: str, status: int) -> None:
    answer = asker.http.post("/v1/jobs", content=content, headers={"Content-Type": kind})
    assert (answer.status_code, answer.json()["code"]) == (status, "request-refused")


@pytest.mark.parametrize("id", ["0123456789abcdef", "lock", "..%2Flock", "%00", "x" * 1000])
def test_an_id_of_no_job_is_not_found(asker: Asker, id: str) -> None:
    for answer in (asker.http.get(f"/v1/jobs/{id}"), asker.http.post(f"/v1/jobs/{id}/cancel", json={})):
        assert answer.status_code == 404
        assert answer.json()["code"] in ("job-not-found", "request-refused")


def test_without_a_configuration_the_routes_say_how_to_give_one(server: httpx.Client) -> None:
    for answer in (server.get("/v1/jobs"), server.get("/v1/jobs/x"), server.post("/v1/jobs", json={})):
        assert (answer.status_code, answer.json()["code"]) == (404, "not-registered")
        assert "logitcache serve --config" in answer.json()["detail"]


@contextmanager
def servers(site: Site, count: int) -> Iterator[list[Jobs]]:
    """So many on one store; the first runs its jobs."""
    started: list[Jobs] = []
    try:
        for _ in range(count):
            started.append(Jobs(site.store, site.config, grace_s=GRACE_S))
            started[-1].start()
        yield started
    finally:
        for jobs in started:
            jobs.close()
        site.clear_away()


def test_what_another_server_of_the_store_is_asked_the_one_that_runs_the_jobs_does(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    site.hold("one")
    asked = Asked(label_set="a", teacher="one", dataset="points", top_k=3, rows_per_shard=4096)
    with servers(site, 2) as (first, second):
        job, queued = second.ask(asked)
        assert (job.state, queued) == ("queued", True)
        for jobs in (first, second):
            # Both know it at once, though none may have begun it.
            assert jobs.get(job.id).request == job.request
            assert [known.id for known in jobs.newest()] == [job.id]
            assert sum(jobs.counts().values()) == 1
            assert not jobs.ask(asked)[1]
        site.until_held("one")
        assert second.get(job.id).state == first.get(job.id).state == "running"
        assert second.cancel(job.id).stop_asked is not None
        assert first.get(job.id).stop_asked is not None
        until(lambda: second.get(job.id).state == "cancelled", "the job to be cancelled")
        assert list((site.store / ".jobs" / "inbox").iterdir()) == []
        assert second.ask(asked)[1]
        assert second.cancel(job.id).state in ("cancelled", "running")
        until(lambda: first.get(job.id).state == "cancelled", "the second attempt to be cancelled")
        # Closing, the first leaves a wish that came too late for it to the next.
        first.close()
        assert second.ask(asked)[1]
        until(lambda: second.get(job.id).state == "running", "the second server to take over")
        second.cancel(job.id)
        until(lambda: second.get(job.id).state == "cancelled", "the job to be cancelled")


def test_several_servers_that_are_asked_the_same_at_once_run_it_once(tmp_path: Path) -> None:
    site = Site.make(tmp_path, 100)
    asked = [Asked(label_set=name, teacher=name, dataset="points", top_k=3) for name in ("one", "two")]
    with servers(site, 3) as several, ThreadPoolExecutor(12) as threads:
        answers = [threads.submit(jobs.ask, request) for request in asked for jobs in several for _ in range(2)]
        ids = {answer.result()[0].id for answer in answers}
        assert len(ids) == len(asked)
        until(lambda: all(several[2].get(id).state == "succeeded" for id in ids), "the jobs")
        for id in ids:
            told = several[1].get(id)
            assert (told.attempt, len(told.attempts), "--- attempt 2" in told.log) == (1, 1, False)


def test_what_was_asked_while_no_server_ran_jobs_is_done_by_the_next(tmp_path: Path) -> None:
    site = Site.make(tmp_path, 100)
    asked = Asked(label_set="a", teacher="nowhere", dataset="points", top_k=3)
    with WriterLock(folder_of(site) / "lock"), servers(site, 1) as (waiting,):
        job, _ = waiting.ask(asked)
        cancelled, _ = waiting.ask(asked.model_copy(update={"label_set": "b"}))
        assert waiting.cancel(cancelled.id).state == "cancelled"
    (folder_of(site) / "inbox" / "0.json").write_text("{")
    with servers(site, 1) as (next_one,):
        assert next_one.get(cancelled.id).state == "cancelled"
        assert next_one.counts()["cancelled"] == 1
        until(lambda: next_one.get(job.id).state == "failed", "the job to be tried")
    assert list((folder_of(site) / "inbox").iterdir()) == []


def folder_of(site: Site) -> Path:
    (site.store / ".jobs").mkdir(exist_ok=True)
    return site.store / ".jobs"


def test_a_wish_that_cannot_be_written_down_is_refused(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    (folder_of(site) / "inbox").touch()
    with WriterLock(folder_of(site) / "lock"), servers(site, 1) as (waiting,):
        with pytest.raises(StorageFault, match="cannot be written down") as refused:
            waiting.ask(Asked(label_set="a", teacher="one", dataset="points", top_k=3))
        assert str(site.folder) not in refused.value.message
        assert waiting.newest() == []


def test_a_process_that_another_container_began_is_not_begun_a_second_time(tmp_path: Path) -> None:
    """Its number means nothing here, but the lock that it holds is seen."""
    site = Site.make(tmp_path, 100)
    elsewhere = ProcessId(pid=2**22 + 1, began="another boot/1")
    job = written(site, "a", state=lambda job: job.running(elsewhere, "cpu"))
    folder = JobFolder(folder_of(site), job.id)
    alive = WriterLock(folder.path / "alive.lock")
    with servers(site, 1) as (jobs,):
        behind, _ = jobs.ask(Asked(label_set="b", teacher="two", dataset="points", top_k=3))
        until(lambda: jobs.get(behind.id).ended is not None, "another job to come and go")
        assert (jobs.get(job.id).state, jobs.get(job.id).attempt) == ("running", 1)
        alive.release()
        until(lambda: jobs.get(job.id).state == "succeeded", "the job to be begun anew")
        assert jobs.get(job.id).attempt == 2


def test_of_jobs_that_ended_the_newest_are_kept(tmp_path: Path) -> None:
    site = Site.make(tmp_path, keep=3)
    over = [written(site, f"set-{number}", state=lambda job: job.over("cancelled")) for number in range(6)]
    for job in over:
        JobFolder(folder_of(site), job.id).log.write_text("its log\n")
    with servers(site, 2) as (first, second):
        assert {job.id for job in first.newest()} == {job.id for job in over[3:]}
        assert {job.id for job in second.newest()} == {job.id for job in over[3:]}
        with pytest.raises(JobNotFound):
            second.get(over[0].id)
    assert {folder.name for folder in folder_of(site).iterdir()} == {job.id for job in over[3:]} | {"lock"}


def test_the_tail_of_a_log_is_bounded_in_lines_and_bytes(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "0123456789abcdef")
    folder.path.mkdir()
    assert folder.log_tail() == []
    folder.log.write_text("".join(f"line {number}\n" for number in range(1000)))
    assert folder.log_tail() == [f"line {number}" for number in range(1000 - TAIL_LINES, 1000)]
    folder.log.write_text("é" * TAIL_BYTES)
    (line,) = folder.log_tail()
    assert len(line.encode()) <= TAIL_BYTES + 3
    folder.log.write_bytes(b"a" * TAIL_BYTES + b"\nlast \xff\n")
    assert folder.log_tail() == ["last �"]


def test_progress_that_is_no_number_is_none(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, "0123456789abcdef")
    folder.path.mkdir()
    text = '{"activity": "a", "rows_done": 1, "rows_total": 2, "rows_per_s": 1.5, "seconds_left": null}'
    (folder.path / "progress.json").write_text(text)
    assert folder.progress() is not None
    (folder.path / "progress.json").write_text(text.replace("1.5", "NaN"))
    assert folder.progress() is None


def test_a_job_that_cannot_be_written_down_is_none(asker: Asker, site: Site) -> None:
    asked = Asked(label_set="unwritten", teacher="one", dataset="points", top_k=3, rows_per_shard=4096)
    folder = site.store / ".jobs" / asked.request().job_id
    folder.touch()
    answer = asker.post("unwritten")
    assert (answer.status_code, answer.json()["code"]) == (500, "storage-fault")
    assert str(site.folder) not in answer.text
    assert asker.http.get(f"/v1/jobs/{folder.name}").status_code == 404
    folder.unlink()
    asker.until(asker.ask("unwritten"), "succeeded")


def test_a_job_whose_teacher_is_no_longer_registered_fails_when_its_turn_comes(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    job = written(site, "a")
    with watching(Jobs(site.store, Config())) as jobs:
        error = jobs.get(job.id).error
    assert error is not None
    assert error.code == "not-registered"


def test_an_ensemble_whose_teachers_were_given_several_devices_meanwhile_fails_when_its_turn_comes(
    tmp_path: Path,
) -> None:
    site = Site.make(tmp_path)
    job = written(site, "a", ["one", "two"])
    with watching(Jobs(site.store, site.config)) as jobs:
        error = jobs.get(job.id).error
    assert error is not None
    assert error.code == "invalid-request"
    assert "'one' cpu, 'two' cpu:0" in error.message


def test_the_queue_goes_on_behind_a_job_that_cannot_begin(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    file = site.folder / "logitcache.toml"
    file.write_text(file.read_text().replace("one = ", "other = "))
    gone = [written(site, "gone"), written(site, "gone-too")]
    behind = written(site, "behind", "nowhere")
    with watching(Jobs(site.store, site.config)) as jobs:
        until(lambda: jobs.get(behind.id).state == "failed", "the job behind it to run")
        errors = [jobs.get(job.id).error for job in gone]
    assert [error and error.code for error in errors] == ["not-registered"] * 2


def test_one_jobs_trouble_is_not_that_of_the_others(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    troubled, other = written(site, "troubled"), written(site, "other", "two")
    # It can neither be cleared away for the job to begin, nor written down that it cannot.
    (site.store / ".jobs" / troubled.id / "outcome.json").mkdir()
    with watching(Jobs(site.store, site.config)) as jobs:
        until(lambda: jobs.get(other.id).state == "succeeded", "the other job")
        assert jobs.get(troubled.id).state == "queued"


def test_a_job_that_was_found_and_ends_without_a_word_is_queued_anew(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, start_new_session=True) as begun:
        began = _began(begun.pid)
        assert began is not None
        id = ProcessId(pid=begun.pid, began=began)
        job = written(site, "found", state=lambda job: job.running(id, "cpu"))
        with watching(Jobs(site.store, site.config)) as jobs:
            assert (jobs.get(job.id).state, jobs.get(job.id).attempt) == ("running", 1)
            begun.kill()
            until(lambda: jobs.get(job.id).state == "succeeded", "the next attempt")
            assert jobs.get(job.id).attempt == 2


ODD = """
class Odd(Teacher):
    def at_the_second_shard(self):
        if self.name == "odd":
            raise OSError("weights-\\udcff.bin")
        import subprocess
        left = subprocess.Popen(["/bin/sleep", "600"])
        Path("left").write_text(str(left.pid))
        os.kill(os.getpid(), signal.SIGKILL)


def odd():
    return Odd("odd")


def leaving():
    return Odd("leaving")
"""
"""A teacher whose error is no Unicode, and one that leaves a process behind when it is killed."""


def test_an_error_that_is_no_unicode_is_told_and_what_a_killed_job_leaves_behind_is_ended(tmp_path: Path) -> None:
    site = Site.make(tmp_path, retries=0)
    with (site.folder / "mine.py").open("a") as mine, (site.folder / "logitcache.toml").open("a") as config:
        mine.write(ODD)
        config.write('[teachers.odd]\nspec = "mine:odd"\n[teachers.leaving]\nspec = "mine:leaving"\n')
    odd, leaving = written(site, "odd", "odd"), written(site, "leaving", "leaving")
    with watching(Jobs(site.store, site.config)) as jobs:
        until(lambda: jobs.get(odd.id).state == jobs.get(leaving.id).state == "failed", "both to fail")
        errors = [jobs.get(job.id).error for job in (odd, leaving)]
    assert [error and error.code for error in errors] == ["teacher-fault", "job-killed"]
    left = int((site.folder / "left").read_text())
    until(lambda: _began(left) is None, "what it left behind to be gone")


AUGMENTED = """
class Augmented(Points):
    def __getitem__(self, index):
        return super().__getitem__(index) + torch.rand(FEATURES)


def augmented():
    return Augmented()


def tokens():
    return [{"input_ids": torch.arange(4)}]


def negated():
    teacher = Teacher("negated")
    with torch.no_grad():
        teacher.net.weight.neg_()
    return teacher
"""

TYPED = (
    *("--teacher=mine:one", "--teacher=mine:negated", "--dataset=mine:augmented", "--device=cpu"),
    *("--views=2", "--seed=7", "--top-k=3", "--rows-per-shard=8192"),
)


def test_a_job_with_views_and_two_teachers_makes_the_bytes_that_the_command_line_makes(tmp_path: Path) -> None:
    site = Site.make(tmp_path, 4200)
    with (site.folder / "mine.py").open("a") as mine, (site.folder / "logitcache.toml").open("a") as config:
        mine.write(AUGMENTED)
        config.write('[teachers.negated]\nspec = "mine:negated"\ndevice = "cpu"\n')
        config.write('[datasets.augmented]\nspec = "mine:augmented"\n[datasets.tokens]\nspec = "mine:tokens"\n')
    wanted: dict[str, Any] = {"teacher": ["one", "negated"], "views": 2, "rows_per_shard": 8192}
    jobs = Jobs(site.store, site.config)
    with running(create_app(Catalog(site.store), jobs)) as url, Asker(url) as asker:
        refused = asker.until_ended(asker.ask("refused", **wanted | {"dataset": "tokens"}))
        job = asker.until_ended(asker.ask("asked", **wanted | {"dataset": "augmented", "seed": 7}))
    assert (refused["state"], refused["error"]["code"]) == ("failed", "invalid-request")
    assert "token sequences have one view, as they are: leave --views out" in refused["error"]["message"]
    assert (job["state"], job["request"]["teacher"]) == ("succeeded", ["negated", "one"])
    subprocess.run(
        [*COMMAND, "precompute", "typed", *TYPED, f"--store={site.store}"],
        cwd=site.folder,
        check=True,
        capture_output=True,
    )
    with closing(LocalLabelSet(site.store / "asked")) as asked, closing(LocalLabelSet(site.store / "typed")) as typed:
        identity = asked.describe().identity
        assert (identity.views, identity.seed) == (2, 7)
        assert identity.teacher.name == "mean of mine:negated, mine:one"
        assert asked.describe().digest == typed.describe().digest == job["digest"]
    chunks = [file.relative_to(site.store / "asked") for file in (site.store / "asked").glob("*/c.*")]
    assert len(chunks) >= 2 * len({"logits", "indices", "scalars", "fingerprint"})
    for chunk in chunks:
        assert (site.store / "asked" / chunk).read_bytes() == (site.store / "typed" / chunk).read_bytes()


def test_state_files_that_no_server_wrote_keep_none_from_starting(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    processless = written(site, "processless", state=lambda job: job.model_copy(update={"state": "running"}))
    naive, other = written(site, "naive", "two"), written(site, "other", "two")
    file = site.store / ".jobs" / naive.id / "job.json"
    file.write_text(file.read_text().replace('Z"', '"'))
    with watching(Jobs(site.store, site.config)) as jobs:
        assert [job.id for job in jobs.newest()] == [other.id]
        until(lambda: jobs.get(other.id).state == "succeeded", "the one that is whole")
        with pytest.raises(JobNotFound):
            jobs.cancel(processless.id)


def test_where_the_server_keeps_things_is_told_neither_in_errors_nor_in_the_log(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    (site.folder / "sub").mkdir()
    config = Config.read(site.folder / "sub" / ".." / "logitcache.toml")
    job = written(site, "nowhere", "nowhere")
    with watching(Jobs(site.store, config)) as jobs:
        until(lambda: jobs.get(job.id).state == "failed", "a teacher that is not there")
        told = jobs.get(job.id)
    assert told.error is not None
    assert "elsewhere" in told.error.message
    assert told.log
    assert str(site.folder) not in told.model_dump_json()


def test_a_store_that_cannot_be_locked_is_not_called_another_server(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    (site.store / ".jobs" / "lock").mkdir(parents=True)
    with watching(Jobs(site.store, site.config)) as jobs:
        asked = Asked(label_set="a", teacher="one", dataset="points", top_k=3)
        with pytest.raises(Unavailable, match="its log"):
            jobs.ask(asked)


def test_again_labels_what_the_dataset_grew_by_as_a_new_generation(tmp_path: Path) -> None:
    site = Site.make(tmp_path, 4200)
    jobs = Jobs(site.store, site.config)
    asked = Asked(label_set="growing", teacher="one", dataset="points", top_k=3, rows_per_shard=4096)
    with watching(jobs):
        job, _ = jobs.ask(asked)
        until(lambda: jobs.get(job.id).state == "succeeded", "the first generation")
        first = jobs.get(job.id)
        (site.folder / "examples").write_text("5000")
        assert jobs.ask(asked.model_copy(update={"again": True}))[1]
        until(lambda: jobs.get(job.id).state == "succeeded", "the second generation")
        second = jobs.get(job.id)
    assert (second.attempt, second.progress and second.progress.rows_total) == (2, 800)
    generations = sorted((site.store / "growing" / "generations").glob("*.json"))
    assert [json.loads(file.read_text())["digest"] for file in generations] == [first.digest, second.digest]


def test_the_list_is_bounded_and_a_damaged_state_file_is_passed_over(tmp_path: Path) -> None:
    site = Site.make(tmp_path)
    jobs = Jobs(site.store, Config())
    for number in range(MOST_LISTED + 5):
        asked = Asked(label_set=f"set-{number}", teacher="one", dataset="points", top_k=3)
        job = Job.of(asked.request()).over("cancelled")
        JobFolder(site.store / ".jobs", job.id).write(job)
    (site.store / ".jobs" / job.id / "job.json").write_text("{")
    (site.store / ".jobs" / ("0" * 16)).mkdir()
    jobs.start()
    try:
        assert len(jobs.newest()) == MOST_LISTED
        assert jobs.counts()["cancelled"] == MOST_LISTED + 4
    finally:
        jobs.close()


def test_jobs_that_cannot_be_read_now_are_not_taken_for_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site.make(tmp_path)
    job = written(site, "a", state=lambda job: job.over("cancelled"))
    away, read_bytes, refused = [True], Path.read_bytes, threading.Event()

    def short_of_files(self: Path) -> bytes:
        if away[0] and self.name == "job.json":
            refused.set()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return read_bytes(self)

    monkeypatch.setattr(queue, "TROUBLE_S", 0.01)
    monkeypatch.setattr(Path, "read_bytes", short_of_files)
    with watching(Jobs(site.store, site.config)) as jobs:
        assert refused.is_set()
        with pytest.raises(StorageFault):
            jobs.get(job.id)
        away[0] = False
        until(lambda: jobs.counts()["cancelled"] == 1, "the job to be found again")
        assert jobs.get(job.id).state == "cancelled"


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENOMEM])
def test_a_job_for_which_there_is_no_room_now_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    site = Site.make(tmp_path)
    job = written(site, "a")
    errors, queued = [number, number, errno.ENOENT], list[str]()

    def begin(*_: Any) -> JobProcess:
        queued.append(Job.model_validate_json((site.store / ".jobs" / job.id / "job.json").read_bytes()).state)
        failed = errors.pop(0)
        raise OSError(failed, os.strerror(failed))

    monkeypatch.setattr(queue, "TROUBLE_S", 0.01)
    monkeypatch.setattr(JobProcess, "begin", begin)
    with watching(Jobs(site.store, site.config)) as jobs:
        until(lambda: jobs.get(job.id).state == "failed", "what cannot pass to be told")
        error = jobs.get(job.id).error
    assert queued == ["queued"] * 3
    assert error is not None
    assert "No such file" in error.message


def test_the_queue_outlives_whatever_one_look_at_it_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site.make(tmp_path)
    file = site.folder / "logitcache.toml"
    file.write_text(file.read_text().replace("one = ", "other = "))
    job = written(site, "gone")
    due, errors = rules.due, [RuntimeError("a mistake of ours")] * 3

    def mistaken(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return due(*arguments)

    monkeypatch.setattr(queue, "TROUBLE_S", 0.01)
    monkeypatch.setattr(rules, "due", mistaken)
    with watching(Jobs(site.store, site.config)) as jobs:
        until(lambda: jobs.get(job.id).state == "failed", "the queue to go on")
