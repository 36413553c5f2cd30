"""Every refusal as problem+json: our own errors, those of the framework, and those that nobody foresaw.

One function makes the response; the handlers only turn what they caught into a `LogitcacheError` that says what to do.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import Scope

from logitcache.labels import problem
from logitcache.labels.errors import (
    LogitcacheError,
    RequestRefused,
    RowsMissing,
    ServerFault,
)
from logitcache.server.complaints import invalid_request
from logitcache.server.http.record import Record

IDS = frozenset({"ids", "unknown", "unlabelled"})
"""Members of problems that name examples."""

RETRY_AFTER_S = 5.0
"""When to ask again after an error that can pass and says no time of its own."""


def add_handlers(app: FastAPI) -> None:
    """Answer every error that a route or the framework raises with a problem."""

    @app.exception_handler(LogitcacheError)
    async def ours(request: Request, error: LogitcacheError) -> JSONResponse:
        return problem_response(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(request.scope, invalid_request(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem_response(request.scope, _refused(request, error), error.headers)


def problem_response(scope: Scope, error: LogitcacheError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that ended in this error; its record is told.

    Where the store is on the server's disk is for the log alone: it is told by its last name.
    """
    record = Record.of(scope)
    record.code, record.detail = error.code, error.message[:1000]
    if isinstance(error, RowsMissing):
        record.misses = len(error.ids)
    if error.status == 503 and error.retry_after_s is None:
        error.retry_after_s = RETRY_AFTER_S
    content = problem.to_problem(error, record.request_id)
    content = _within(content, scope["app"].state.catalog.store)
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return JSONResponse(content, content["status"], headers, media_type=problem.MEDIA_TYPE)


def _within(told: Any, store: Path) -> Any:
    """The same without where the store is; ids of examples as they are, though they be paths."""
    if isinstance(told, str):
        for folder in (store, store.parent):
            told = told.replace(str(folder), folder.name) if folder.name else told
        return told
    if isinstance(told, list):
        return [_within(value, store) for value in told]
    if isinstance(told, dict):
        return {name: value if name in IDS else _within(value, store) for name, value in told.items()}
    return told


def unforeseen(request_id: str) -> ServerFault:
    """What a client is told of an exception that nobody foresaw: nothing but where to look."""
    return ServerFault(f"the server failed on this request; its log has the reason under request id {request_id}")


def _refused(request: Request, error: HTTPException) -> LogitcacheError:
    method, path = request.method, request.url.path[:200]
    if error.status_code == 404:
        message = f"there is nothing at {path}; the routes are listed at /docs"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{path} does not take {method}; use {allowed}"
    else:
        message = str(error.detail)
    return RequestRefused(message, status=error.status_code)
