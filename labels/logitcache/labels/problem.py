"""Errors as RFC 9457 problem details, both ways.

A problem is a JSON object with ``type``, ``title``, ``status``, ``detail``, ``code``, ``retry``, ``request_id`` and the
error's own ``details``. It knows nothing of HTTP libraries.
"""

from typing import Any

from logitcache.labels import errors
from logitcache.labels.errors import BY_CODE, LogitcacheError

MEDIA_TYPE = "application/problem+json"
LONGEST_RETRY_S = 86_400.0
"""A longer ``retry_after_s`` is taken for nonsense."""

_MEMBERS = ("type", "title", "status", "detail", "code", "retry", "request_id", "retry_after_s")


def to_problem(error: LogitcacheError, request_id: str | None = None) -> dict[str, Any]:
    """The error as a problem object; ``details`` become extension members."""
    problem: dict[str, Any] = {
        "type": f"urn:logitcache:problem:{error.code}",
        "title": error.code.replace("-", " "),
        "status": int(error.details.get("status", error.status)),
        "detail": error.message,
        "code": error.code,
        "retry": error.retry,
        "request_id": request_id,
    }
    if error.retry_after_s is not None:
        problem["retry_after_s"] = error.retry_after_s
    return problem | {name: value for name, value in error.details.items() if name not in _MEMBERS}


def from_problem(problem: Any, status: int) -> LogitcacheError:
    """The error that a response's problem object stands for.

    Anything that is not a problem of ours (a proxy's page, say) becomes ``ServerBusy`` for the statuses that mean
    "later" (429, 502, 503, 504), ``RequestRefused`` for other 4xx and ``ServerFault`` for the rest.
    """
    if not isinstance(problem, dict):
        problem = {}
    detail = str(problem.get("detail") or f"the server answered with status {status}")
    details = {name: value for name, value in problem.items() if name not in _MEMBERS}
    kind = BY_CODE.get(str(problem.get("code")))
    if kind is None:
        if status in (429, 502, 503, 504):
            kind = errors.ServerBusy
        else:
            kind = errors.RequestRefused if 400 <= status < 500 else errors.ServerFault
        details = {"status": status}
    error = kind(detail)
    error.details = details
    if isinstance(problem.get("request_id"), str):
        error.request_id = problem["request_id"]
    asked = problem.get("retry_after_s")
    if isinstance(asked, int | float) and 0 <= asked <= LONGEST_RETRY_S:
        error.retry_after_s = float(asked)
    return error
