"""The rules of the queue, as pure functions: whose turn it is, and what becomes of a job whose process is gone."""

import signal
from collections.abc import Callable, Iterable

from logitcache.labels.errors import JobKilled
from logitcache.server.jobs.job import Job, JobError, Outcome

DEFAULT_DEVICE = "default"
"""The queue of teachers that were registered without a device."""

MOST_RESTARTS = 3
"""How often a job is queued anew by itself: one that takes the machine down with it must not do so for ever."""

_KEPT = "What is committed is kept: ask for the job again and it goes on from there"


def due(jobs: Iterable[Job], device_of: Callable[[Job], str]) -> list[Job]:
    """The queued jobs whose turn it is, in order of asking: one a device and one a label set.

    A job that waits holds its device and its label set against those behind it.
    """
    jobs = list(jobs)
    running = [job for job in jobs if job.state == "running"]
    devices = {job.device for job in running}
    label_sets = {job.request.label_set for job in running}
    begin = []
    for job in sorted((job for job in jobs if job.state == "queued"), key=lambda job: (job.asked, job.id)):
        device = device_of(job)
        if device not in devices and job.request.label_set not in label_sets:
            begin.append(job)
        devices.add(device)
        label_sets.add(job.request.label_set)
    return begin


def ended(job: Job, outcome: Outcome | None, exit_code: int | None) -> Job:
    """A job whose process is gone; ``exit_code`` is None where no server saw how it went.

    One that was done before it could stop has succeeded, whoever cancelled it. One that went unseen and said nothing is
    queued anew, unless that happened `MOST_RESTARTS` times before.
    """
    if outcome is not None and outcome.digest is not None:
        return job.over("succeeded", digest=outcome.digest)
    if job.stop_asked is not None:
        return job.over("cancelled")
    error = outcome.error if outcome is not None else None
    if error is None and exit_code is None and job.restarts < MOST_RESTARTS:
        return job.queued_anew(restarts=job.restarts + 1)
    return job.over("failed", error=error or JobError(code=JobKilled.code, message=_why_gone(exit_code)))


def _why_gone(exit_code: int | None) -> str:
    if exit_code is None:
        return f"its process was gone and had not said why, so it was killed or the machine went down. {_KEPT}"
    number = -exit_code if exit_code < 0 else exit_code - 128
    if number == signal.SIGKILL:
        return (
            "its process was killed by SIGKILL, which is what the system does when memory runs out: its log says how "
            f"far it was. {_KEPT}, or ask with a smaller batch_size"
        )
    try:
        return f"its process was ended by {signal.Signals(number).name}. {_KEPT}"
    except ValueError:
        return f"its process ended with exit code {exit_code} and did not say why; its log may. {_KEPT}"
