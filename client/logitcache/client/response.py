"""What an HTTP response says: the error that it stands for, or its body's media type.

It knows media types and problem details, and nothing of label sets or of when to ask again.
"""

import json
from typing import Any

from logitcache.client.retrying import seconds_to_wait
from logitcache.client.transport import Answer
from logitcache.labels import problem
from logitcache.labels.errors import BY_CODE, LogitcacheError, MalformedMessage, ServerBusy

JSON = "application/json"


def check_answer(answer: Answer, url: str, accept: str) -> None:
    """Raise what a response stands for, unless it is a success of the media type asked for."""
    media_type = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not answer.is_success:
        raise _error(answer, url, media_type)
    if media_type != accept:
        raise MalformedMessage(
            f"{url} answered with {media_type or 'no media type'} and not {accept}: is that a logitcache server?"
        )
    if (encoding := answer.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise MalformedMessage(
            f"{url} sends a body compressed as {encoding[:40]!r}, though it was asked not to; a proxy in between that "
            "compresses must be told to leave these answers as they are"
        )


def _error(answer: Answer, url: str, media_type: str) -> LogitcacheError:
    told: Any = None
    if media_type in (problem.MEDIA_TYPE, JSON):
        try:
            told = parse_json(answer.body)
        except MalformedMessage:
            told = None
    if not isinstance(told, dict):
        told = {"detail": f"{url} answered with status {answer.status} and no reason that we can read"}
    error = problem.from_problem(told, answer.status)
    if told.get("retry") is True and told.get("code") not in BY_CODE:
        error = ServerBusy(error.message, **error.details)  # a newer server's word for "later"
    error.request_id = error.request_id or answer.headers.get("x-request-id")
    asked = seconds_to_wait(str(told["retry_after_s"])) if "retry_after_s" in told else None
    error.retry_after_s = seconds_to_wait(answer.headers.get("retry-after")) if asked is None else asked
    return error


def parse_json(body: memoryview) -> Any:
    """The JSON value in a body; `MalformedMessage` if there is none."""
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"the body is not JSON: {error}") from None
