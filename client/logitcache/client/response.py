"""What an HTTP response says: its body, read within bounds, and the error that it stands for.

It knows media types and problem details, and nothing of label sets or of when to ask again.
"""

import json
from typing import Any

import httpx

from logitcache.client.deadline import Deadline
from logitcache.client.retrying import seconds_to_wait
from logitcache.labels import problem
from logitcache.labels.errors import BY_CODE, LogitcacheError, MalformedMessage, ServerBusy

JSON = "application/json"


def read_body(response: httpx.Response, most_bytes: int, deadline: Deadline) -> bytearray:
    """The whole body, in memory that can be written to: torch warns about arrays that cannot."""
    body = bytearray()
    try:
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > most_bytes:
                raise MalformedMessage(
                    f"{response.url} sends more than the {most_bytes:,} bytes that its answer can have"
                )
            if not deadline.remaining_s:
                raise httpx.ReadTimeout("the time allowed for the call is over")
    except httpx.DecodingError as error:
        raise MalformedMessage(f"{response.url} sends a body that cannot be decompressed: {error}") from error
    return body


def check_answer(response: httpx.Response, body: bytearray, accept: str) -> None:
    """Raise what a response stands for, unless it is a success of the media type asked for."""
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not response.is_success:
        raise _error(response, body, media_type)
    if media_type != accept:
        raise MalformedMessage(
            f"{response.url} answered with {media_type or 'no media type'} and not {accept}: "
            "is that a logitcache server?"
        )


def _error(response: httpx.Response, body: bytearray, media_type: str) -> LogitcacheError:
    told: Any = None
    if media_type in (problem.MEDIA_TYPE, JSON):
        try:
            told = parse_json(body)
        except MalformedMessage:
            told = None
    if not isinstance(told, dict):
        told = {"detail": f"{response.url} answered with status {response.status_code} and no reason that we can read"}
    error = problem.from_problem(told, response.status_code)
    if told.get("retry") is True and told.get("code") not in BY_CODE:
        error = ServerBusy(error.message, **error.details)  # a newer server's word for "later"
    error.request_id = error.request_id or response.headers.get("x-request-id")
    asked = seconds_to_wait(str(told["retry_after_s"])) if "retry_after_s" in told else None
    error.retry_after_s = seconds_to_wait(response.headers.get("retry-after")) if asked is None else asked
    return error


def parse_json(body: bytearray) -> Any:
    """The JSON value in a body; `MalformedMessage` if there is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"the body is not JSON: {error}") from None
