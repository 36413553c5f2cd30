"""The queue of jobs without HTTP: servers that share a store, what stood in it before, what a machine refuses."""

import errno
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.server.job_site import GRACE_S, Site, until, watching, written

from logitcache.labels.errors import JobNotFound, StorageFault, Unavailable
from logitcache.server.config import Config
from logitcache.server.jobs import queue, rules
from logitcache.server.jobs.folder import TAIL_BYTES, TAIL_LINES, JobFolder
from logitcache.server.jobs.job import Asked, Job, ProcessId
from logitcache.server.jobs.process import JobProcess, _began
from logitcache.server.jobs.queue import MOST_LISTED, Jobs
from logitcache.storage.lock import WriterLock


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
    away, os_open, refused = [True], os.open, threading.Event()

    def short_of_files(path: Any, *rest: Any, **options: Any) -> int:
        if away[0] and path == "job.json":
            refused.set()
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return os_open(path, *rest, **options)

    monkeypatch.setattr(queue, "TROUBLE_S", 0.01)
    monkeypatch.setattr(os, "open", short_of_files)
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
