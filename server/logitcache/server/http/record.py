"""What is noted about one request while it is answered.

The middleware opens it, routes add to it, logs and metrics read it. It travels in the ASGI scope, because a pure ASGI
middleware and a route share nothing else.
"""

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from logitcache.storage.served import ServedTally

_KEY = "logitcache.record"

UNMATCHED = "unmatched"
"""Route of requests that no route took: their paths are the client's words, and never become a metric's label."""


@dataclass
class Record:
    """One request.

    ``rows`` and ``label_set`` are set by routes, and ``tally`` by those that fetch; ``misses``, ids without labels, by
    them or by the error; ``code`` and ``detail`` by the answer to an error, ``answering`` once the response has begun.
    ``held_bytes`` are those that it counts for in the server's load. ``seconds`` end when the answer was sent,
    ``ready_s`` when the last of it was given to be sent.
    """

    request_id: str
    method: str
    route: str = UNMATCHED
    status: int = 500
    seconds: float = 0.0
    ready_s: float = 0.0
    body_bytes: int = 0
    rows: int = 0
    misses: int = 0
    label_set: str | None = None
    tally: ServedTally | None = None
    code: str | None = None
    detail: str | None = None
    answering: bool = False
    held_bytes: int = 0

    @classmethod
    def of(cls, scope: MutableMapping[str, Any]) -> "Record":
        """The record of the request that this scope belongs to."""
        record: Record = scope[_KEY]
        return record

    def put_in(self, scope: MutableMapping[str, Any]) -> None:
        """Make this the record of the request that this scope belongs to."""
        scope[_KEY] = self
