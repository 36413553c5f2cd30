"""Logs: one structured line an event, JSON for machines and readable for a person at a terminal.

Modules log through `logger`; nothing appears until `configure` is called, which `logitcache serve` does, so that an app
inside another program leaves that program's logging alone. uvicorn's own lines take the same way.
"""

import logging
import sys
from contextvars import ContextVar
from typing import Any, Literal, TextIO

import structlog

ROOTS = ("logitcache", "uvicorn")
"""What `configure` lets through: these trees of loggers."""

REQUEST_ID: ContextVar[str | None] = ContextVar("logitcache_request_id", default=None)
"""Id of the request that is being answered; it stands in every line that is logged meanwhile."""


def _with_request_id(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if (request_id := REQUEST_ID.get()) is not None:
        event.setdefault("request_id", request_id)
    return event


def logger(name: str) -> structlog.stdlib.BoundLogger:
    """A structured logger over the standard library's logger of that name."""
    bound: structlog.stdlib.BoundLogger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            _with_request_id,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return bound


def configure(stream: TextIO | None = None, *, level: Literal["debug", "info", "warning"] = "info") -> None:
    """Send the logs of logitcache and uvicorn to ``stream`` (stderr): JSON lines, or colours where it is a terminal.

    ``level`` is that of logitcache. uvicorn tells at INFO what we tell ourselves: of it, warnings are let through.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(readable=stream.isatty()))
    for name, least in zip(ROOTS, (level.upper(), "WARNING"), strict=True):
        root = logging.getLogger(name)
        root.handlers[:] = [handler]
        root.setLevel(least)
        root.propagate = False


def _formatter(*, readable: bool) -> structlog.stdlib.ProcessorFormatter:
    if readable:
        last: list[structlog.typing.Processor] = [
            structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        ]
    else:
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.ExtraAdder(), _with_request_id],
        processors=[
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.TimeStamper(fmt="iso"),
            *last,
        ],
    )
