"""The outer middleware: a request id, an access log line, metrics, and a problem for what nobody caught.

Pure ASGI: it sees the response as it is sent, adds headers, and neither buffers nor copies a body.
"""

import asyncio
import logging
import os
import re
import time
from collections.abc import Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from logitcache.labels.errors import ServerBusy
from logitcache.server.http.access import headers_of
from logitcache.server.http.load import Load
from logitcache.server.http.metrics import Metrics
from logitcache.server.http.problems import problem_response, unforeseen
from logitcache.server.http.record import UNMATCHED, Record
from logitcache.server.logs import REQUEST_ID, logger

CLIENT_GONE = 499
"""Status in log and metrics when the client hung up before it had its answer (nginx's convention; nothing is sent)."""

COME_BACK_S = 1.0
"""When to ask again for what the end of a server cut off."""

FRAMEWORKS_OWN = frozenset({"/docs", "/openapi.json"})
"""Paths that FastAPI answers by itself, without telling the scope which route took them."""

QUIET = frozenset({"/healthz", "/readyz", "/metrics", "/v1/label-sets/{name}/fetch", "/v1/label-sets/{name}/missing"})
"""Routes whose success is logged at debug level only, and counted in the metrics as all others: probes and training
steps come by the thousand and would bury what is rare."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_log = logger(__name__)


class Observed:
    """Wraps an app: every request gets a `Record`, and every record ends in the log and in the metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, load: Load) -> None:
        self._app = app
        self._metrics = metrics
        self._load = load

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, and note it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(request_id(scope), scope["method"])
        record.put_in(scope)
        began = time.perf_counter()
        token = REQUEST_ID.set(record.request_id)
        try:
            await _answer(self._app, record, scope, receive, _noting(record, began, headers_of(scope["path"]), send))
        finally:
            self._load.add(-record.held_bytes)
            record.seconds = time.perf_counter() - began
            record.route = _route(scope)
            self._metrics.observe(record)
            _access(record)
            REQUEST_ID.reset(token)


def _route(scope: Scope) -> str:
    if scope["path"] in FRAMEWORKS_OWN:
        return str(scope["path"])
    return str(getattr(scope.get("route"), "path", UNMATCHED))


def request_id(scope: Scope) -> str:
    """The client's ``X-Request-Id`` if it is one that can stand in a log line, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _REQUEST_ID.fullmatch(given) else os.urandom(16).hex()


async def _answer(app: ASGIApp, record: Record, scope: Scope, receive: Receive, send: Send) -> None:
    """Run the app; an exception that reaches us is logged and answered, unless an answer is half sent already.

    What is cancelled is so because the server ends, and its time to finish is over.
    """
    try:
        await app(scope, receive, send)
    except ClientDisconnect:
        record.status, record.code = CLIENT_GONE, "client-gone"
    except asyncio.CancelledError:
        if record.answering:
            raise
        ending = ServerBusy("the server is shutting down, and could not finish this request; come back")
        ending.retry_after_s = COME_BACK_S
        await problem_response(scope, ending, {"Connection": "close"})(scope, receive, send)
    except Exception:
        _log.exception("request failed", method=record.method, path=scope["path"])
        if record.answering:
            raise
        await problem_response(scope, unforeseen(record.request_id))(scope, receive, send)


def _noting(record: Record, began: float, added: Sequence[tuple[bytes, bytes]], send: Send) -> Send:
    async def noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.answering, record.status = True, message["status"]
            own = (b"x-request-id", record.request_id.encode())
            message["headers"] = [*message.get("headers", ()), own, *added]
        elif message["type"] == "http.response.body":
            record.body_bytes += len(message.get("body", b""))
            record.ready_s = time.perf_counter() - began
        await send(message)

    return noting


def _access(record: Record) -> None:
    quiet = (record.route in QUIET and record.status < 400) or record.code == ServerBusy.code  # `Load` tells of those
    if quiet and not _log.isEnabledFor(logging.DEBUG):
        return
    tell = _log.debug if quiet else _log.error if record.status >= 500 else _log.info
    optional = {"label_set": record.label_set, "code": record.code, "detail": record.detail}
    tell(
        "request",
        method=record.method,
        route=record.route,
        status=record.status,
        ms=round(record.seconds * 1000, 2),
        bytes=record.body_bytes,
        rows=record.rows,
        **{name: value for name, value in optional.items() if value is not None},
    )
