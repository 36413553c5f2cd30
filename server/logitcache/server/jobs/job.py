"""What a job is: the request that it was made of, and how far it has come.

Values only; `folder` writes them down, `process` runs them, `queue` moves them on.
"""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from logitcache.labels.errors import InvalidRequest
from logitcache.labels.identity import (
    MAX_TEMPERATURES,
    MAX_VIEWS,
    Dtype,
    canonical_json,
    check_name,
    declared,
    sha256_hex,
)
from logitcache.storage.packing import check_rows_per_shard

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[State, ...] = ("queued", "running", "succeeded", "failed", "cancelled")

MOST_CLASSES = 2**31 - 1

MOST_TEACHERS = 100
"""Of an ensemble."""

MOST_ATTEMPTS = 20
"""Of a job, that are told."""

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)

_ONE, _SEVERAL = "<one teacher>", "<several teachers>"


def _kind_of_teacher(teacher: Any) -> str:
    return _SEVERAL if isinstance(teacher, list) else _ONE


_Teacher = Annotated[
    Annotated[str, Tag(_ONE)] | Annotated[list[str], Field(min_length=1, max_length=MOST_TEACHERS), Tag(_SEVERAL)],
    Discriminator(_kind_of_teacher),
]


class JobRequest(BaseModel):
    """What to label, by the names that the server's configuration registers."""

    model_config = _STRICT

    label_set: str = Field(description="Name of the label set to make or to continue.", examples=["digits"])
    teacher: _Teacher = Field(
        description="A registered teacher, or several: the mean of their distributions is stored.",
        examples=["resnet", ["resnet", "vit"]],
    )
    dataset: str = Field(description="A registered dataset.", examples=["train"])
    top_k: int = Field(ge=1, le=MOST_CLASSES, description="Classes to store of each row.")
    temperatures: list[float] = Field(default=[], max_length=MAX_TEMPERATURES, description="Those declared besides 1.")
    dtype: Dtype = Field(default="float16", description="Of the stored logits.")
    batch_size: int | None = Field(default=None, ge=1, le=MOST_CLASSES, description="Examples a forward pass.")
    targets: bool | None = Field(
        default=None, description="Store the dataset's targets; by default where it gives whole numbers."
    )
    rows_per_shard: int | None = Field(
        default=None, le=2**40, description="Rows committed together; a multiple of 4096, or of 4096 times the views."
    )
    views: int | None = Field(
        default=None,
        ge=1,
        le=MAX_VIEWS,
        description="Make each item so many times, under seeds that the student replays, and store a row of each.",
        examples=[4],
    )
    seed: int | None = Field(default=None, ge=1, lt=2**63, description="Of the views; 1 unless given.")

    @property
    def teachers(self) -> list[str]:
        """The names of all its teachers."""
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher

    def checked(self) -> "JobRequest":
        """The same in its canonical form.

        Temperatures are sorted, distinct, 1 among them; several teachers are sorted, one stands without a list.

        Raises:
            InvalidName, InvalidRequest: a value that no precompute would take.
        """
        check_name(self.label_set)
        if self.views is None and self.seed is not None:
            raise InvalidRequest("seed is that of the views: give views, too")
        check_rows_per_shard(self.rows_per_shard, self.views or 1)
        names = sorted(self.teachers)
        for one, next_one in pairwise(names):
            if one == next_one:
                raise InvalidRequest(f"the teacher {one[:80]!r} is given twice: an ensemble takes each teacher once")
        teacher = names[0] if len(names) == 1 else names
        return self.model_copy(update={"teacher": teacher, "temperatures": list(declared(self.temperatures))})

    @property
    def job_id(self) -> str:
        """The same request is the same job: 16 hexadecimal digits of its hash.

        Views and seed count only where they are given, so that jobs from before there were any keep their ids.
        """
        absent = {name for name in ("views", "seed") if getattr(self, name) is None}
        return sha256_hex(canonical_json(self.model_dump(exclude=absent)))[:16]


class Asked(JobRequest):
    """The body of ``POST /v1/jobs``."""

    again: bool = Field(
        default=False, description="Run it once more although it succeeded: label what the dataset grew by."
    )

    def request(self) -> JobRequest:
        """What it asks for, in canonical form."""
        return JobRequest(**self.model_dump(exclude={"again"})).checked()


class ProcessId(BaseModel):
    """Which process: a number is used again sooner or later, so when it began belongs to it."""

    model_config = _STRICT

    pid: int = Field(gt=1)
    began: str


class JobError(BaseModel):
    """Why a job failed: a ``code`` of the error tree, and what to do."""

    model_config = _STRICT

    code: str
    message: str


class Progress(BaseModel):
    """How far a job's process is in what it is doing now."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    activity: str
    rows_done: int
    rows_total: int
    rows_per_s: float
    seconds_left: float | None = Field(description="null until something is done.")


class Outcome(BaseModel):
    """What a job's process had to say at its end: a digest, or an error."""

    digest: str | None = None
    error: JobError | None = None


class Attempt(BaseModel):
    """An attempt that is over: when, how, by which signal if by one, and why it did not succeed."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    started: AwareDatetime
    ended: AwareDatetime
    state: State
    signal: str | None = Field(default=None, description="That ended its process, as SIGKILL.")
    error: JobError | None = None


class JobState(BaseModel):
    """A job as the API tells it. Times are UTC; ``attempt`` counts from 1 and grows each time it is queued anew."""

    model_config = ConfigDict(frozen=True)

    id: str
    request: JobRequest
    state: State = "queued"
    attempt: int = 1
    created: AwareDatetime
    not_before: AwareDatetime | None = Field(
        default=None, description="Its process died, and the next attempt begins by itself, but not before then."
    )
    started: AwareDatetime | None = Field(default=None, description="When this attempt's process began.")
    stop_asked: AwareDatetime | None = Field(default=None, description="When its process was told to stop.")
    ended: AwareDatetime | None = None
    digest: str | None = Field(default=None, description="Of the label set, once succeeded.")
    error: JobError | None = Field(default=None, description="Why it failed.")


class JobDetail(JobState):
    """A job, its attempts so far, how far it is, and the end of its log."""

    attempts: list[Attempt] = Field(description=f"Those that are over, the last {MOST_ATTEMPTS}, the latest last.")
    progress: Progress | None
    log: list[str] = Field(description="The last lines that its process printed.")


class Job(JobState):
    """A job as its state file holds it.

    ``asked`` is its place in the queue, ``restarts`` how often in a row it was queued anew because its process had died
    and nothing was committed meanwhile, ``committed`` how many shards were when this attempt began, ``device`` the
    queue in which it runs.
    """

    asked: AwareDatetime
    restarts: int = 0
    committed: int = 0
    process: ProcessId | None = None
    device: str | None = None
    attempts: list[Attempt] = []

    @model_validator(mode="after")
    def _runs_as_a_process(self) -> "Job":
        if (self.state == "running") != (self.process is not None):
            raise ValueError("a job has a process while it runs, and only then")
        return self

    @classmethod
    def of(cls, request: JobRequest, at: datetime | None = None) -> "Job":
        """A new job, queued."""
        asked = at or datetime.now(UTC)
        return cls(id=request.job_id, request=request, created=asked, asked=asked)

    def asked_anew(self, at: datetime | None = None) -> "Job":
        """The next attempt, because it was asked for again."""
        return self._queued(asked=at or datetime.now(UTC))

    def retried(self, restarts: int, after_s: float, error: JobError, signal: str | None = None) -> "Job":
        """The next attempt, which a server queues by itself: its process died. It keeps its place."""
        over = self.over("failed", error=error, signal=signal)
        wait = timedelta(seconds=after_s)
        return over._queued(asked=self.asked, restarts=restarts, not_before=datetime.now(UTC) + wait)

    def _queued(self, **given: Any) -> "Job":
        return Job(
            id=self.id,
            request=self.request,
            attempt=self.attempt + 1,
            created=self.created,
            attempts=self.attempts,
            **given,
        )

    def running(self, process: ProcessId, device: str, committed: int = 0) -> "Job":
        """Its process began, with so many shards committed before."""
        begun = {"process": process, "device": device, "committed": committed}
        return self.model_copy(update={"state": "running", "started": datetime.now(UTC), "not_before": None} | begun)

    def cancelling(self, at: datetime | None = None) -> "Job":
        """Its process is to be stopped."""
        return self.model_copy(update={"stop_asked": self.stop_asked or at or datetime.now(UTC)})

    def over(
        self,
        state: State,
        *,
        digest: str | None = None,
        error: JobError | None = None,
        signal: str | None = None,
        at: datetime | None = None,
    ) -> "Job":
        """It ended; if it had begun, that was an attempt."""
        ended = at or datetime.now(UTC)
        attempts = self.attempts
        if self.started is not None:
            tried = Attempt(
                attempt=self.attempt, started=self.started, ended=ended, state=state, signal=signal, error=error
            )
            attempts = [*attempts, tried][-MOST_ATTEMPTS:]
        end = {"state": state, "ended": ended, "process": None, "digest": digest, "error": error, "not_before": None}
        return self.model_copy(update=end | {"attempts": attempts})

    def detail(self, progress: Progress | None, log: list[str]) -> JobDetail:
        """What the API tells of it alone."""
        told = {name: getattr(self, name) for name in JobState.model_fields}
        return JobDetail(**told, attempts=self.attempts, progress=progress, log=log)
