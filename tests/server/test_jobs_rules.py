"""The rules of the queue, one by one: whose turn it is, how a job ended, what becomes of one that was lost."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from logitcache.labels.errors import InvalidName, InvalidRequest, NotRegistered
from logitcache.server.complaints import parse_json
from logitcache.server.config import Config, JobOptions, RegisteredDataset, RegisteredTeacher
from logitcache.server.jobs.command import arguments, check_registered
from logitcache.server.jobs.inbox import Wish
from logitcache.server.jobs.job import (
    MOST_ATTEMPTS,
    Asked,
    Job,
    JobError,
    JobRequest,
    Outcome,
    ProcessId,
)
from logitcache.server.jobs.rules import LONGEST_WAIT_S, End, due, ended, prunable

BEGAN = datetime(2026, 11, 1, tzinfo=UTC)
SUCCESS = Outcome(digest="sha256:aa")
FAILURE = Outcome(error=JobError(code="teacher-fault", message="the teacher's own trouble"))


def queued(minute: int, label_set: str = "", teacher: str = "t") -> Job:
    """A job that was asked for at some minute, for a label set of its own unless told."""
    request = JobRequest(label_set=label_set or f"set-{minute}", teacher=teacher, dataset="d", top_k=2)
    asked = BEGAN + timedelta(minutes=minute)
    return Job(id=request.job_id, request=request, created=asked, asked=asked)


def running(minute: int, device: str = "t", **options: Any) -> Job:
    return queued(minute, **options).running(ProcessId(pid=77, began="x"), device)


def turns(*jobs: Job) -> list[Job]:
    """Whose turn it is where each teacher has a device of its own name."""
    return due(jobs, lambda job: job.request.teachers[0])


def test_one_job_a_device_in_order_of_asking() -> None:
    first, second, other = queued(1), queued(2), queued(3, teacher="other")
    assert turns(second, other, first) == [first, other]
    assert turns(running(1), second, other) == [other]


def test_one_job_a_label_set_whatever_the_devices() -> None:
    first, second = queued(1, "same"), queued(2, "same", "other")
    assert turns(second, first) == [first]
    assert turns(running(1, label_set="same"), second) == []


def test_a_job_that_waits_for_its_label_set_keeps_its_place_on_its_device() -> None:
    blocked, behind = queued(2, "same", "other"), queued(3, teacher="other")
    assert turns(running(1, label_set="same"), blocked, behind) == []


def test_jobs_that_ended_are_nobodys_turn() -> None:
    assert turns(queued(1).over("cancelled"), queued(2).over("succeeded"), queued(3).over("failed")) == []


NEVER = JobOptions(retries=0)
OFTEN = JobOptions(retries=2, retry_after_s=5)


def test_what_the_process_said_is_the_outcome() -> None:
    job = ended(running(1), End(SUCCESS, 0), OFTEN)
    assert (job.state, job.digest, job.process) == ("succeeded", "sha256:aa", None)
    job = ended(running(1), End(FAILURE, 1), OFTEN)
    assert (job.state, job.error) == ("failed", FAILURE.error), "the same would be wrong again"


def test_a_job_that_was_cancelled_is_cancelled_unless_it_was_done_first() -> None:
    stopped = running(1).cancelling()
    assert [ended(stopped, End(said, -15), OFTEN).state for said in (None, FAILURE)] == ["cancelled", "cancelled"]
    assert ended(stopped, End(SUCCESS, 0), OFTEN).state == "succeeded"


def test_a_cancelled_job_that_had_to_be_killed_says_so_and_one_that_stopped_by_itself_does_not() -> None:
    stopped = running(1).cancelling()
    signals = [ended(stopped, End(None, code), OFTEN).attempts[0].signal for code in (-9, 130, None)]
    assert signals == ["SIGKILL", None, None]


@pytest.mark.parametrize(
    ("exit_code", "told", "signal"),
    [
        (-9, "memory runs out", "SIGKILL"),
        (137, "memory runs out", "SIGKILL"),
        (-11, "ended by SIGSEGV", "SIGSEGV"),
        (-6, "ended by SIGABRT", "SIGABRT"),
        (130, "ended by SIGINT", "SIGINT"),
        (3, "exit code 3", None),
        (255, "exit code 255", None),
        (0, "exit code 0", None),
        (None, "was gone", None),
    ],
)
def test_a_process_that_said_nothing_died_of_something_while_it_did_something(
    exit_code: int | None, told: str, signal: str | None
) -> None:
    job = ended(running(1), End(None, exit_code, "labelling examples 512 to 767"), NEVER)
    assert job.error is not None
    assert (job.state, job.error.code) == ("failed", "job-killed")
    assert told in job.error.message
    assert "while labelling examples 512 to 767" in job.error.message
    assert "committed is kept" in job.error.message
    (attempt,) = job.attempts
    assert (attempt.attempt, attempt.state, attempt.signal, attempt.error) == (1, "failed", signal, job.error)


def test_a_job_that_died_keeps_its_place_and_is_tried_again_a_bounded_number_of_times() -> None:
    job = running(1)
    for number in range(OFTEN.retries):
        job = ended(job, End(None, -11), OFTEN)
        assert (job.state, job.attempt, job.asked, job.error) == ("queued", number + 2, queued(1).asked, None)
        assert job.not_before is not None
        wait = job.not_before - job.attempts[-1].ended
        assert timedelta(0) <= wait - timedelta(seconds=5 * 2**number) < timedelta(seconds=1)
        job = job.running(ProcessId(pid=78, began="y"), "t")
    over = ended(job, End(None, None), OFTEN)
    assert (over.state, [attempt.attempt for attempt in over.attempts]) == ("failed", [1, 2, 3])
    assert over.error is not None
    assert "3 attempts in a row" in over.error.message
    asked_again = over.asked_anew().running(ProcessId(pid=79, began="z"), "t")
    assert ended(asked_again, End(), OFTEN).state == "queued"


def test_an_attempt_that_committed_something_makes_the_retries_anew() -> None:
    job = running(1)
    for committed in range(1, 3 * MOST_ATTEMPTS):
        job = ended(job, End(None, -9, committed=committed), OFTEN)
        assert (job.state, job.restarts) == ("queued", 1)
        job = job.running(ProcessId(pid=78, began="y"), "t", committed)
    assert len(job.attempts) == MOST_ATTEMPTS
    for _ in range(OFTEN.retries - 1):
        job = ended(job, End(None, -9, committed=committed), OFTEN).running(
            ProcessId(pid=78, began="y"), "t", committed
        )
    assert ended(job, End(None, -9, committed=committed), OFTEN).state == "failed"


def test_the_wait_before_another_attempt_is_bounded() -> None:
    patient = JobOptions(retries=100, retry_after_s=3600)
    job = ended(running(1).model_copy(update={"restarts": 99}), End(), patient)
    assert job.not_before is not None
    assert job.not_before - datetime.now(UTC) <= timedelta(seconds=LONGEST_WAIT_S)


def test_a_job_that_waits_after_its_process_died_lets_others_pass() -> None:
    waiting = ended(running(1, label_set="same"), End(), OFTEN)
    other = queued(2, "same")
    assert turns(waiting, other) == [other]
    due_by_now = waiting.model_copy(update={"not_before": BEGAN})
    assert turns(other, due_by_now) == [due_by_now]


def test_a_job_that_ended_while_no_server_was_there_is_not_lost() -> None:
    assert ended(running(1), End(SUCCESS), OFTEN).state == "succeeded"
    assert ended(running(1), End(FAILURE), OFTEN).state == "failed"
    assert ended(running(1).cancelling(), End(), OFTEN).state == "cancelled"


def test_the_oldest_jobs_that_ended_are_forgotten_unless_their_label_set_is_at_work() -> None:
    over = [queued(minute).over("failed", at=BEGAN + timedelta(hours=minute)) for minute in (3, 1, 2, 4)]
    again, waits = queued(5, label_set="set-1"), queued(6)
    assert prunable(over, 4) == []
    assert [job.request.label_set for job in prunable(over, 2)] == ["set-1", "set-2"]
    assert [job.request.label_set for job in prunable([*over, again, waits], 2)] == ["set-2"]


def wishes(asked: Job) -> dict[str, Wish]:
    """Ask for a job as it was first, again, even if it succeeded; and cancel it."""
    return {
        "ask": Wish(id=asked.id, at=asked.asked + timedelta(hours=1), request=asked.request),
        "again": Wish(id=asked.id, at=asked.asked + timedelta(hours=1), request=asked.request, again=True),
        "cancel": Wish(id=asked.id, at=asked.asked + timedelta(hours=1)),
    }


@pytest.mark.parametrize(
    ("job", "becomes"),
    [
        (queued(1), {"ask": "queued", "again": "queued", "cancel": "cancelled"}),
        (running(1), {"ask": "running", "again": "running", "cancel": "running"}),
        (queued(1).over("failed"), {"ask": "queued", "again": "queued", "cancel": "failed"}),
        (queued(1).over("cancelled"), {"ask": "queued", "again": "queued", "cancel": "cancelled"}),
        (queued(1).over("succeeded"), {"ask": "succeeded", "again": "queued", "cancel": "succeeded"}),
    ],
)
def test_what_a_wish_makes_of_a_job_and_the_second_time_nothing(job: Job, becomes: dict[str, str]) -> None:
    for name, wish in wishes(job).items():
        once = wish.applied(job)
        assert once is not None
        assert once.state == becomes[name]
        assert (once.stop_asked is not None) == (name == "cancel" and job.state == "running")
        assert wish.applied(once) is once
        read = Wish.model_validate_json(wish.model_dump_json()).applied(job)
        assert read is not None
        assert read.state == once.state


def test_a_wish_of_before_the_job_was_asked_for_last_is_of_no_effect() -> None:
    job = queued(60).over("failed")
    for wish in wishes(queued(0)).values():
        early = wish.model_copy(update={"at": job.asked - timedelta(minutes=1)})
        assert early.applied(job) is job


def test_a_wish_comes_after_what_it_was_made_of_whatever_the_clock_says() -> None:
    ahead = queued(1).model_copy(update={"asked": datetime.now(UTC) + timedelta(days=1)})
    cancelled = Wish.to_cancel(ahead).applied(ahead)
    assert cancelled is not None
    assert cancelled.state == "cancelled"
    asked = Wish.to_have(ahead.request, False, cancelled).applied(cancelled)
    assert asked is not None
    assert (asked.state, asked.attempt) == ("queued", 2)
    assert Wish.to_cancel(ahead).applied(None) is None


def ask(**changes: Any) -> Asked:
    return Asked.model_validate({"label_set": "a", "teacher": "t", "dataset": "d", "top_k": 2} | changes)


def test_the_same_request_is_the_same_job_however_it_is_written() -> None:
    plain = ask(temperatures=[2.0, 4.0]).request()
    assert plain.job_id == ask(temperatures=[4.0, 1.0, 2.0, 2.0], dtype="float16", again=True).request().job_id
    others: list[dict[str, Any]] = [
        {"top_k": 3},
        {"label_set": "b"},
        {"teacher": "u"},
        {"batch_size": 8},
        {"temperatures": [2.0]},
    ]
    ids = {ask(**{"temperatures": [2.0, 4.0]} | change).request().job_id for change in others}
    assert len(ids | {plain.job_id}) == len(others) + 1


OLD: dict[str, Any] = {"label_set": "digits", "teacher": "resnet", "dataset": "train", "top_k": 10}
OLD_TEMPERATURES: dict[str, Any] = {"temperatures": [2.0, 4.0]}
OLD_REST: dict[str, Any] = {"dtype": "float32", "batch_size": 64, "targets": True, "rows_per_shard": 8192}


@pytest.mark.parametrize(
    ("changes", "id"),
    [
        ({}, "6d9ec1cd1ffb4fc1"),
        (OLD_TEMPERATURES, "4adaa1d22c159cb0"),
        (OLD_TEMPERATURES | OLD_REST, "b1691fff53b0519a"),
        ({"views": None, "seed": None, "teacher": ["resnet"]}, "6d9ec1cd1ffb4fc1"),
    ],
)
def test_a_request_from_before_there_were_views_and_ensembles_is_the_job_that_it_was(
    changes: dict[str, Any], id: str
) -> None:
    assert ask(**OLD | changes).request().job_id == id


def test_views_seed_and_each_teacher_make_another_job_and_the_order_of_teachers_does_not() -> None:
    one: dict[str, Any] = {"teacher": ["b", "a"], "views": 2, "seed": 5}
    job = ask(**one).request()
    assert job.teachers == ["a", "b"]
    assert job.job_id == ask(**one | {"teacher": ["a", "b"]}).request().job_id
    others: list[dict[str, Any]] = [
        {"teacher": ["a", "c"]},
        {"teacher": "a"},
        {"views": 3},
        {"seed": 6},
        {"seed": None},
        {"views": None, "seed": None},
    ]
    ids = {ask(**one | change).request().job_id for change in others}
    assert len(ids | {job.job_id}) == len(others) + 1


CONFIG = Config(
    teachers={
        "one": RegisteredTeacher(spec="m:one", device="cuda:0"),
        "two": RegisteredTeacher(spec="m:two", device="cuda:0"),
        "elsewhere": RegisteredTeacher(spec="m:elsewhere"),
    },
    datasets={"train": RegisteredDataset(spec="m:train")},
)


def test_a_job_says_on_its_command_line_what_was_asked_for_and_nothing_else() -> None:
    def words(**changes: Any) -> list[str]:
        return arguments(ask(teacher="one", dataset="train", **changes).request(), CONFIG, Path("/store"))

    plain = words()
    assert "--teacher=m:one" in plain
    assert not [word for word in plain if word.startswith(("--views", "--seed"))]
    added = {"--teacher=m:two", "--views=2", "--seed=5"}
    given = ask(teacher=["two", "one"], dataset="train", views=2, seed=5).request()
    assert set(arguments(given, CONFIG, Path("/store"))) == set(plain) | added


def test_every_teacher_that_is_not_registered_is_named_with_what_is_near() -> None:
    with pytest.raises(NotRegistered) as raised:
        check_registered(ask(teacher=["oen", "one", "wto"], dataset="train").request(), CONFIG)
    assert "no teacher 'oen'" in raised.value.message
    assert "no teacher 'wto'" in raised.value.message
    assert "no teacher 'one'" not in raised.value.message
    assert "did you mean 'one'?" in raised.value.message
    assert raised.value.details["available"] == ["elsewhere", "one", "two"]


def test_teachers_of_several_devices_are_no_ensemble() -> None:
    check_registered(ask(teacher=["one", "two"], dataset="train").request(), CONFIG)
    with pytest.raises(InvalidRequest, match=r"'elsewhere' none, 'one' cuda:0.*register them with the same one"):
        check_registered(ask(teacher=["one", "elsewhere"], dataset="train").request(), CONFIG)


@pytest.mark.parametrize(
    ("changes", "kind", "told"),
    [
        ({"label_set": "../up"}, InvalidName, "cannot be a label set's name"),
        ({"temperatures": [0.0]}, InvalidRequest, "temperature"),
        ({"rows_per_shard": 5000}, InvalidRequest, "4,096"),
        ({"rows_per_shard": 4096, "views": 2}, InvalidRequest, "8,192.*for 2 views"),
        ({"seed": 5}, InvalidRequest, "seed is that of the views: give views, too"),
        ({"teacher": ["t", "u", "t"]}, InvalidRequest, "the teacher 't' is given twice"),
    ],
)
def test_what_no_precompute_would_take_is_refused_at_once(changes: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        ask(**changes).request()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"{", "not JSON"),
        (b"[]", "body"),
        (b'{"label_set": "a", "teacher": "t", "dataset": "d"}', "top_k: Field required"),
        (b'{"label_set": "a", "teacher": "t", "dataset": "d", "top_k": "2"}', "top_k"),
        (b'{"label_set": "a", "teacher": "t", "dataset": "d", "top_k": 0}', "top_k"),
        (b'{"label_set": "a", "teacher": "t", "dataset": "d", "top_k": 2, "spec": "os:system"}', "spec: Extra inputs"),
        (b'{"label_set": "a", "teacher": {"spec": "os:x"}, "dataset": "d", "top_k": 2}', "teacher"),
        (b'{"label_set": "a", "teacher": 1, "dataset": "d", "top_k": 2}', "^teacher: Input"),
        (b'{"label_set": "a", "teacher": [], "dataset": "d", "top_k": 2}', "^teacher: .*at least 1"),
        (b'{"label_set": "a", "teacher": ["t", 1], "dataset": "d", "top_k": 2}', "^teacher.1: Input"),
        (b'{"label_set": "a", "teacher": "t", "dataset": "d", "top_k": 2, "views": 0}', "^views: .* 1"),
        (b'{"label_set": "a", "teacher": "t", "dataset": "d", "top_k": 2, "views": 4097}', "^views: .* 4096"),
        (b'{"label_set": "a", "teacher": "t", "dataset": "d", "top_k": 2, "views": 2.0}', "^views: .*integer"),
        (b'{"label_set": "a", "teacher": "t", "dataset": "d", "top_k": 2, "views": 2, "seed": 0}', "^seed: .* 1"),
        (
            b'{"label_set": "a", "teacher": "t", "dataset": "d", "top_k": 2, "views": 2, "seed": 9223372036854775808}',
            "^seed",
        ),
    ],
)
def test_a_body_that_is_no_request_is_refused_and_its_field_named(body: bytes, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        parse_json(Asked, body)
