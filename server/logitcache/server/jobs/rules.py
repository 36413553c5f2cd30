"""The rules of the queue, as pure functions: whose turn it is, and what becomes of a job whose process is gone."""

import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from logitcache.labels.errors import JobKilled
from logitcache.server.config import JobOptions
from logitcache.server.jobs.job import Job, JobError, Outcome

DEFAULT_DEVICE = "default"
"""The queue of teachers that were registered without a device."""

LONGEST_WAIT_S = 3600.0
"""Before an attempt that follows by itself, however often others failed."""

_KEPT = "What is committed is kept: ask for the job again and it goes on from there"


def due(jobs: Iterable[Job], device_of: Callable[[Job], str]) -> list[Job]:
    """The queued jobs whose turn it is, in order of asking: one a device and one a label set.

    A job that waits for its turn holds its device and its label set against those behind it; one that waits because its
    process has just died does not.
    """
    jobs, now = list(jobs), datetime.now(UTC)
    running = [job for job in jobs if job.state == "running"]
    devices = {job.device for job in running}
    label_sets = {job.request.label_set for job in running}
    begin = []
    waiting = (job for job in jobs if job.state == "queued" and (job.not_before or now) <= now)
    for job in sorted(waiting, key=lambda job: (job.asked, job.id)):
        device = device_of(job)
        if device not in devices and job.request.label_set not in label_sets:
            begin.append(job)
        devices.add(device)
        label_sets.add(job.request.label_set)
    return begin


@dataclass(frozen=True)
class End:
    """How a job's process ended.

    Attributes:
        outcome: what it had to say itself; None if it could not.
        exit_code: None where no server saw it.
        under_way: what it was doing then, in words; empty where nothing is known.
        committed: shards that are committed by now.
    """

    outcome: Outcome | None = None
    exit_code: int | None = None
    under_way: str = ""
    committed: int = 0


def ended(job: Job, end: End, options: JobOptions) -> Job:
    """A job whose process is gone.

    One that was done before it could stop has succeeded, whoever cancelled it. One that died without a word is queued
    anew, unless it has died so often since something was committed last as the options allow. One that said what is
    wrong is not: the same would be wrong again.
    """
    said, killed_by = end.outcome, _signal_of(end.exit_code)
    if said is not None and said.digest is not None:
        return job.over("succeeded", digest=said.digest)
    if job.stop_asked is not None:
        # Our command line makes exit code 130 of the signal that told it to stop, and stopped by itself then.
        return job.over("cancelled", signal=killed_by if (end.exit_code or 0) < 0 else None)
    if said is not None and said.error is not None:
        return job.over("failed", error=said.error)
    restarts = 0 if end.committed > job.committed else job.restarts
    why = _why_gone(end, killed_by)
    if restarts >= options.retries:
        often = (
            f" {restarts + 1} attempts in a row ended like that, with nothing committed between." if restarts else ""
        )
        error = JobError(code=JobKilled.code, message=f"{why}.{often} {_KEPT}")
        return job.over("failed", error=error, signal=killed_by)
    wait_s = min(options.retry_after_s * 2**restarts, LONGEST_WAIT_S)
    return job.retried(restarts + 1, wait_s, JobError(code=JobKilled.code, message=why), killed_by)


def prunable(jobs: Iterable[Job], keep: int) -> list[Job]:
    """Ended jobs beyond the newest so many, the oldest first; none of a label set for which a job waits or runs."""
    jobs = list(jobs)
    if len(jobs) <= keep:
        return []
    busy = {job.request.label_set for job in jobs if job.ended is None}
    over = sorted((job.ended, job.id, job) for job in jobs if job.ended is not None)
    older = over[: max(0, len(over) - keep)]
    return [job for _, _, job in older if job.request.label_set not in busy]


def _signal_of(exit_code: int | None) -> str | None:
    """The name of the signal that ended a process, also where a shell or the command line made a number of it."""
    if exit_code is None or 0 <= exit_code <= 128:
        return None
    try:
        return signal.Signals(-exit_code if exit_code < 0 else exit_code - 128).name
    except ValueError:
        return None


def _why_gone(end: End, killed_by: str | None) -> str:
    doing = f" while {end.under_way}" if end.under_way else ""
    if end.exit_code is None:
        return f"its process was gone and had not said why{doing}: it was killed, or the machine went down"
    if killed_by == "SIGKILL":
        return (
            f"its process was killed by SIGKILL{doing}; the system does that when memory runs out, of which a smaller "
            "batch_size takes less"
        )
    if killed_by is not None:
        return f"its process was ended by {killed_by}{doing}"
    return f"its process ended with exit code {end.exit_code}{doing} and did not say why; its log may"
