"""The routes of jobs: each a few lines over the queue. Without a configuration they say how to give one."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from starlette.concurrency import run_in_threadpool

from logitcache.labels.errors import NotRegistered, RequestRefused, TooManyRows
from logitcache.server.complaints import parse_json
from logitcache.server.http import openapi
from logitcache.server.http.load import enough_threads
from logitcache.server.http.messages import JSON, media_type, read_body
from logitcache.server.jobs.job import Asked, JobDetail, JobState
from logitcache.server.jobs.queue import Jobs

jobs = APIRouter(
    prefix="/v1/jobs",
    tags=["jobs"],
    responses=openapi.OF_WRITING | openapi.problems(404),
    dependencies=[Depends(enough_threads)],
)

MOST_BYTES = 64 << 10
"""A longer request for a job is refused: each unknown field in it would be a complaint of its own."""


async def _jobs(request: Request) -> Jobs:
    found: Jobs | None = request.app.state.jobs
    if found is None:
        raise NotRegistered(
            "this server runs no jobs, because no teacher and dataset are registered: start it with "
            "`logitcache serve --config FILE`, and register them there as [teachers.NAME] and [datasets.NAME]",
            available=[],
        )
    return found


InQueue = Annotated[Jobs, Depends(_jobs)]


@jobs.post("", status_code=202, openapi_extra=openapi.JOB_BODY, responses=openapi.JOB_ANSWER)
async def ask_for_a_job(queue: InQueue, request: Request, response: Response) -> JobState:
    """Label a registered dataset with a registered teacher. Asking for the same again gives the same job: one that
    failed or was cancelled is queued anew, one that succeeded only with `again`."""
    if media_type(dict(request.scope["headers"]).get(b"content-type")) != JSON:
        raise RequestRefused(f"a job is asked for in JSON: send {JSON} and say so in Content-Type", status=415)
    try:
        body = await read_body(request, JSON, MOST_BYTES)
    except TooManyRows:
        raise RequestRefused("a request for a job takes some hundred bytes: send the names alone", status=413) from None
    job, queued = await run_in_threadpool(lambda: queue.ask(parse_json(Asked, body)))
    response.status_code = 202 if queued else 200
    response.headers["Location"] = f"{jobs.prefix}/{job.id}"
    return job


@jobs.get("")
def list_jobs(queue: InQueue) -> Sequence[JobState]:
    """The jobs asked for last, newest first."""
    return queue.newest()


@jobs.get("/{id}")
def describe_job(id: openapi.JobId, queue: InQueue) -> JobDetail:
    """How one job stands: its attempts, its progress, digest or error, and the end of its log."""
    return queue.get(id)


@jobs.post("/{id}/cancel", openapi_extra=openapi.CANCEL_BODY, responses=openapi.problems(415, 507))
def cancel_job(id: openapi.JobId, queue: InQueue) -> JobDetail:
    """Take a job out of the queue, or stop its process; what is committed is kept. One that has ended stays so."""
    return queue.cancel(id)
