"""uvicorn's HTTP with refusals and patience of our own: bytes that are no request, peers that stop, too many of them.

A connection is looked at every `SWEEP_S` seconds. One that has been slow for `SLOW_S`, in the middle of a request that
it sends or of an answer that it takes, is closed: what it holds belongs to the others.
"""

import json
import resource
import uuid
from asyncio import BaseTransport
from functools import lru_cache
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from logitcache.labels import problem
from logitcache.labels.errors import LogitcacheError, RequestRefused, ServerBusy
from logitcache.server import logs
from logitcache.server.http.access import HEADERS
from logitcache.server.http.load import Load
from logitcache.server.http.metrics import Metrics
from logitcache.server.http.record import Record

MAX_HEAD_BYTES = 64 << 10
"""Bytes that a request's first line and headers may have together."""

MAX_HEADERS = 100
"""Headers and trailers that a request may have: each takes a hundred bytes and more, however short it is."""

SWEEP_S = 5.0
"""How often connections are looked at."""

SLOW_S, SLOW_BYTES = 30.0, 512 << 10
"""A peer that gives or takes fewer bytes in so many seconds, and is not done, is closed: some 17 kB/s."""

SILENT_S = 120.0
"""A connection over which no request ever came is closed after so many seconds, as one between two requests is."""

SPARE_FILES = 256
"""Descriptors that are not for connections."""

_log = logs.logger(__name__)


@lru_cache(maxsize=1)
def most_connections() -> int:
    """Connections that are held at once: what this process may open, less what it needs for files.

    Its soft limit is raised to the hard one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(16, max(soft, wanted) - SPARE_FILES)


class ProblemProtocol(HttpToolsProtocol):
    """One connection."""

    _head_bytes = 0
    _received = 0
    _given = 0
    """Bytes of answers that were given to be sent; of these, some are not taken yet."""
    _unsent = 0
    _mark: tuple[float, str, int] | None = None
    """Since when this connection is waited for, in what, and how many bytes it had moved then."""

    def connection_made(self, transport: BaseTransport) -> None:
        """Take a connection, unless there are too many."""
        super().connection_made(transport)  # type: ignore[arg-type]
        if len(self.connections) > most_connections():
            busy = ServerBusy("the server has as many connections as it may; come back")
            busy.retry_after_s = 1.0
            self._refuse(busy, "503 Service Unavailable", "retry-after: 1\r\n")

    def pause_writing(self) -> None:
        """The peer has not taken its answer yet: what is left of it is under way."""
        super().pause_writing()
        self._count_unsent(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has, but for a little."""
        super().resume_writing()
        self._count_unsent(0)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed; what was left is dropped."""
        super().connection_lost(exc)
        self._count_unsent(0)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Answer a request. Where that comes before all of its body, the connection is closed behind the answer: to
        find the next request, the rest of the body would have to be read for nothing, however long it is.
        """

        async def watched(scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                if message["type"] == "http.response.start" and cycle.more_body:
                    cycle.keep_alive = False
                await send(message)
                self._given += len(message.get("body", b""))

            await app(scope, receive, sent)

        super()._start_asgi_task(cycle, watched)

    def on_response_complete(self) -> None:
        """An answer was given; what was asked is not kept while the connection waits for the next request."""
        if self.cycle.response_complete and self.scope is self.cycle.scope:
            self.scope = self.cycle.scope = {}  # type: ignore[typeddict-item]
            self.headers = []
        super().on_response_complete()

    def _of_app(self, name: str) -> Any:
        """What the application keeps under this name; None where it is not ours."""
        return getattr(getattr(self.config.app, "state", None), name, None)

    def _count_unsent(self, count: int) -> None:
        load: Load | None = self._of_app("load")
        if load is not None and count != self._unsent:
            load.add(count - self._unsent)
            self._unsent = count

    def look(self, now_s: float) -> None:
        """Close the connection if its peer has been too slow for too long; called now and then."""
        doing, moved, most_s = self._waited_for()
        if doing is None:
            self._mark = None
        elif self._mark is None or self._mark[1] != doing or moved - self._mark[2] >= SLOW_BYTES:
            self._mark = now_s, doing, moved
        elif now_s - self._mark[0] >= most_s:
            self._mark = None
            _log.info("connection closed", why=f"too slow: {doing}", seconds=most_s)
            if doing == "sending a request" and self.cycle is None:
                self._refuse(RequestRefused("the request did not come in time", status=408), "408 Request Timeout")
            else:
                self.transport.abort()

    def _waited_for(self) -> tuple[str | None, int, float]:
        """What the peer is waited for in, if it is: how many bytes of it have moved, and how long it may take."""
        cycle = self.cycle
        if unsent := self.transport.get_write_buffer_size():
            return "taking an answer", self._given - unsent, SLOW_S
        if cycle is not None and not cycle.response_complete:
            # While nobody reads its body, the peer is not to blame.
            waits = cycle.more_body and not self.flow.read_paused
            return "sending a request" if waits else None, self._received, SLOW_S
        if self._head_bytes:
            return "sending a request", self._received, SLOW_S
        return ("silent", 0, SILENT_S) if cycle is None else (None, 0, SILENT_S)

    def data_received(self, data: bytes) -> None:
        """Take bytes that arrived, unless headers or trailers have no end: the parser would keep them all."""
        self._head_bytes += len(data)
        self._received += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"its first line and headers are longer than {MAX_HEAD_BYTES:,} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, or a trailer.

        Raises:
            ValueError: there are too many; the parser makes a refusal of it.
        """
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError(f"it has more than {MAX_HEADERS} headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer.

        Raises:
            ValueError: the request could be read in two ways; the parser makes a refusal of it.
        """
        names = [name for name, _ in self.headers]
        if names.count(b"host") != 1 and self.parser.get_http_version() != "1.0":
            raise ValueError("one Host header is wanted")  # RFC 9112, 3.2
        # One that came in one piece was parsed before it could be counted.
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > MAX_HEAD_BYTES:
            raise ValueError(f"its first line and headers are longer than {MAX_HEAD_BYTES:,} bytes")
        if b"#" in self.url:
            raise ValueError("a path ends before #, and could name another example")
        if self.parser.should_upgrade() and not {b"content-length", b"transfer-encoding"}.isdisjoint(names):
            raise ValueError("the parser takes the body behind an Upgrade for another protocol's")
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            raise ValueError("HTTP/1.1 is spoken here")
        if any(name == b"transfer-encoding" and value.strip().lower() != b"chunked" for name, value in self.headers):
            raise ValueError("chunked is the one transfer coding that is undone here")
        super().on_headers_complete()
        if self.parser.should_upgrade():
            self.cycle.keep_alive = False  # the parser has dropped what came behind it

    def on_body(self, body: bytes) -> None:
        """A piece of the body, which `messages.read_body` bounds."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """What follows is another request."""
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are not HTTP, after what was asked for before them; and close the connection."""
        cycle = self.cycle
        under_way = cycle is not None and not cycle.response_complete
        if under_way and not cycle.more_body:
            cycle.keep_alive = False  # so it closes after the last answer that is owed
            return
        if under_way and (cycle.response_started or self.pipeline):
            self.transport.close()  # this answer would stand in the place of another
            return
        why = msg[:200]
        refused = RequestRefused("these bytes are not an HTTP/1.1 request that can be answered; mend the client")
        self._refuse(refused, "400 Bad Request", why=why)

    def _refuse(self, error: LogitcacheError, status: str, headers: str = "", why: str = "") -> None:
        """Answer with a problem where there is no request to answer, and close the connection."""
        request_id = uuid.uuid4().hex
        body = json.dumps(problem.to_problem(error, request_id)).encode()
        _log.info("request refused", request_id=request_id, status=int(status[:3]), code=error.code, why=why)
        metrics: Metrics | None = self._of_app("metrics")
        if metrics is not None:
            metrics.observe(Record(request_id, "", status=int(status[:3]), code=error.code))
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: {problem.MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n{headers}"
        ).encode()
        head += b"".join(name + b": " + value + b"\r\n" for name, value in HEADERS)
        self.transport.write(head + b"\r\n" + body)
        self.transport.close()
