"""The rules of the queue, one by one: whose turn it is, how a job ended, what becomes of one that was lost."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from logitcache.labels.errors import InvalidName, InvalidRequest, NotRegistered
from logitcache.server.config import Config, RegisteredDataset, RegisteredTeacher
from logitcache.server.jobs.command import arguments, check_registered
from logitcache.server.jobs.job import Asked, Job, JobError, JobRequest, Outcome, ProcessId, parse_asked
from logitcache.server.jobs.rules import MOST_RESTARTS, due, ended

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


def test_what_the_process_said_is_the_outcome() -> None:
    job = ended(running(1), SUCCESS, 0)
    assert (job.state, job.digest, job.process) == ("succeeded", "sha256:aa", None)
    job = ended(running(1), FAILURE, 1)
    assert (job.state, job.error) == ("failed", FAILURE.error)


def test_a_job_that_was_cancelled_is_cancelled_unless_it_was_done_first() -> None:
    stopped = running(1).cancelling()
    assert [ended(stopped, outcome, -15).state for outcome in (None, FAILURE)] == ["cancelled", "cancelled"]
    assert ended(stopped, SUCCESS, 0).state == "succeeded"


@pytest.mark.parametrize(
    ("exit_code", "told"),
    [
        (-9, "memory runs out"),
        (137, "memory runs out"),
        (-11, "ended by SIGSEGV"),
        (130, "ended by SIGINT"),
        (3, "exit code 3"),
    ],
)
def test_a_process_that_said_nothing_was_killed_and_can_be_asked_for_again(exit_code: int | None, told: str) -> None:
    error = ended(running(1), None, exit_code).error
    assert error is not None
    assert error.code == "job-killed"
    assert told in error.message
    assert "committed is kept" in error.message
    unseen = ended(running(1).model_copy(update={"restarts": MOST_RESTARTS}), None, None).error
    assert unseen is not None
    assert "was gone" in unseen.message


def test_a_lost_job_keeps_its_place_and_is_queued_anew_a_bounded_number_of_times() -> None:
    job = running(1)
    for number in range(MOST_RESTARTS):
        job = ended(job, None, None)
        assert (job.state, job.attempt, job.asked) == ("queued", number + 2, queued(1).asked)
        job = job.running(ProcessId(pid=78, began="y"), "t")
    assert ended(job, None, None).state == "failed"
    asked_again = job.over("failed").queued_anew().running(ProcessId(pid=79, began="z"), "t")
    assert ended(asked_again, None, None).state == "queued"


def test_a_job_that_ended_while_no_server_was_there_is_not_lost() -> None:
    assert ended(running(1), SUCCESS, None).state == "succeeded"
    assert ended(running(1), FAILURE, None).state == "failed"
    assert ended(running(1).cancelling(), None, None).state == "cancelled"


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
        parse_asked(body)
