"""How bytes travel: HTTP/1.1 over kept connections, every step of it within the call's deadline.

A request goes out in one piece. A response whose length stands in front, as our servers send it, is received straight
into the memory that its arrays will be views of; any other is left to the standard library. Before each receive the
time that is left is set, so that a trickle of bytes, or of header lines, ends in time. It knows nothing of label sets,
and connects directly: no proxies.
"""

import http.client
import io
import logging
import re
import select
import socket
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from ssl import SSLContext, SSLSocket
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import numpy as np

from logitcache.client.connecting import AnswerLate, Endpoint, remaining_s
from logitcache.client.deadline import Deadline

KEEPALIVE_S = 100.0
"""Idle seconds after which a connection is not used again: below the 120 s after which our server closes it. One that a
proxy closed sooner is replaced."""

SILENCE_S = 10.0
"""Seconds without a byte of an answer after which a warning says what is waited for."""

MOST_IDLE = 10
"""Connections that are kept for the next request."""

MAX_TEXT_BYTES = 16 << 20
"""A description or a problem above this is refused; a problem that names 65,536 missing ids takes about 3 MB."""

_LOG = logging.getLogger("logitcache.client")

_HEAD_BYTES = 16 << 10

_HEAD_END = re.compile(rb"\n\r?\n")

_PLAIN_HEAD = re.compile(r"HTTP/1\.1 ([2-5][0-9]{2})(?: [^\r\n]*)?((?:\r\n[\w!#$%&'*+.^`|~-]+:[^\r\n]*)*)\r?", re.ASCII)
"""A head that all readers read alike: no line that is folded, ends otherwise, or is no header."""


class ConnectionBroke(Exception):
    """The connection ended before the answer did, or what came is no HTTP."""


class AnswerTooLong(Exception):
    """The answer has more bytes than it can have."""


@dataclass(frozen=True)
class Answer:
    """A response: ``headers`` by lower-case name, ``body`` in memory that can be written to."""

    status: int
    headers: Mapping[str, str]
    body: memoryview

    @property
    def is_success(self) -> bool:
        """The status says so."""
        return 200 <= self.status < 300


@runtime_checkable
class Transport(Protocol):
    """What `HttpLabelSet` sends its requests through. Safe to use from several threads."""

    def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        content: bytes | None,
        most_bytes: int,
        deadline: Deadline,
    ) -> Answer:
        """The response to one request.

        Args:
            method: GET, POST or PUT.
            path: what follows the address that the transport was made for, percent-encoded.
            headers: besides those of the transport itself.
            content: the request's body.
            most_bytes: of the body of a success; that of another answer may have `MAX_TEXT_BYTES`.
            deadline: for the request and its response.

        Raises:
            ConnectFailed, ConnectionBroke, AnswerLate, AnswerTooLong: as they say.
            RuntimeError: the transport is closed.
        """

    def close(self) -> None:
        """Close every connection; one in use is closed after its response."""


class DirectTransport:
    """A pool of kept connections to one address, percent-encoded ASCII; see `Transport`. Not across a fork."""

    def __init__(self, base_url: str, ssl_context: SSLContext | None = None) -> None:
        url = urlsplit(base_url)
        self._endpoint = Endpoint(url.hostname or "", url.port or (80 if ssl_context is None else 443), ssl_context)
        self._prefix, self._host = url.path, url.netloc
        self._lock = threading.Lock()
        self._idle: list[_Connection] = []
        self._closed = False

    def exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        content: bytes | None,
        most_bytes: int,
        deadline: Deadline,
    ) -> Answer:
        """See `Transport.exchange`."""
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if content is not None:
            lines.append(f"Content-Length: {len(content)}")
        request = "\r\n".join((*lines, "\r\n")).encode("ascii") + (content or b"")
        connection = self._taken(deadline)
        kept = False
        try:
            connection.send(request)
            answer, kept = connection.receive(most_bytes)
        finally:
            if kept:
                self._give_back(connection)
            else:
                connection.close()
        return answer

    def _taken(self, deadline: Deadline) -> "_Connection":
        """A connection that was kept, or a new one."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the transport is closed")
            while self._idle:
                connection = self._idle.pop()
                if time.monotonic() - connection.idle_since_s < KEEPALIVE_S and not connection.has_arrived():
                    connection.deadline = deadline
                    return connection
                connection.close()
        return _Connection(self._endpoint.connect(deadline), self._host, deadline)

    def _give_back(self, connection: "_Connection") -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MOST_IDLE:
                connection.idle_since_s = time.monotonic()
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """See `Transport.close`."""
        with self._lock:
            self._closed = True
            for connection in self._idle:
                connection.close()
            self._idle.clear()


class _Connection:
    """One TCP or TLS connection to ``name``, and the deadline of the exchange that it is in."""

    def __init__(self, opened: socket.socket, name: str, deadline: Deadline) -> None:
        self._socket, self._name, self.deadline, self.idle_since_s = opened, name, deadline, 0.0
        self._head = bytearray(_HEAD_BYTES)
        self.close = weakref.finalize(self, opened.close)  # hangs up, also where a transport is forgotten

    def has_arrived(self) -> bool:
        """There is something to read, be it the end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0)) or (isinstance(self._socket, SSLSocket) and self._socket.pending() > 0)

    def send(self, request: bytes) -> None:
        """Send a request. Where a server refuses it before it has read all, its answer is what counts."""
        rest = memoryview(request)
        try:
            while rest:
                self._socket.settimeout(remaining_s(self.deadline))
                rest = rest[self._socket.send(rest) :]
        except TimeoutError as error:
            raise AnswerLate(str(error)) from error
        except OSError as error:
            if not self.has_arrived():
                raise ConnectionBroke(str(error)) from error

    def receive_into(self, buffer: Any) -> int:
        """Receive what has arrived, or wait for it as long as the deadline allows; 0 at the end."""
        while True:
            self._socket.settimeout(min(remaining_s(self.deadline), SILENCE_S))
            try:
                return self._socket.recv_into(buffer)
            except TimeoutError:
                if left_s := self.deadline.remaining_s:
                    told = "%s has sent nothing for %g s; waiting for its answer for %.0f s more"
                    _LOG.warning(told, self._name, SILENCE_S, left_s)
            except OSError as error:
                raise ConnectionBroke(str(error)) from error

    def receive(self, most_bytes: int) -> tuple[Answer, bool]:
        """The response, and whether the connection can be used again."""
        head, got, end = memoryview(self._head), 0, None
        while end is None and got < len(head) and (more := self.receive_into(head[got:])):
            end = _HEAD_END.search(self._head, max(0, got - 2), got + more)
            got += more
        plain = None if end is None else _parse_plain(self._head[: end.start()])
        if end is None or plain is None:
            return self._receive_other(bytes(head[:got]), most_bytes), False
        status, headers, length = plain
        _check_length(length, status, most_bytes)
        body, begun = np.empty(length, np.uint8).data, head[end.end() : got]
        filled = min(len(begun), length)
        body[:filled] = begun[:filled]
        while filled < length:
            if not (more := self.receive_into(body[filled:])):
                raise ConnectionBroke(f"it ended after {filled:,} of {length:,} bytes")
            filled += more
        kept = "close" not in headers.get("connection", "").lower() and len(begun) <= length
        return Answer(status, headers, body), kept

    def _receive_other(self, begun: bytes, most_bytes: int) -> Answer:
        """A response that is chunked, has an interim one before it or no length, or is none; read by the library."""
        source = _Replayed(begun, self, 2 * max(most_bytes, MAX_TEXT_BYTES))
        answer = http.client.HTTPResponse(source)  # type: ignore[arg-type]
        try:
            answer.begin()
            while answer.status < 200:  # the library passes over 100 alone, and not over early hints
                answer.headers = None  # type: ignore[assignment]
                answer.begin()
            lengths = set() if answer.chunked else set(answer.headers.get_all("content-length", ()))
            if len(lengths) > 1 or (lengths and answer.length is None):
                raise ConnectionBroke(f"its answer says that it has {' and '.join(sorted(lengths))[:80]} bytes")
            source.may_end = answer.length is None and not answer.chunked
            body = answer.read((most_bytes if 200 <= answer.status < 300 else MAX_TEXT_BYTES) + 1)
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionBroke(f"{type(error).__name__}: {error}"[:200]) from error
        _check_length(len(body), answer.status, most_bytes)
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, headers, memoryview(bytearray(body)))


class _Replayed(io.RawIOBase):
    """What has arrived already, and then the rest: what the standard library takes for a socket.

    The library would take a response that is cut off for a whole one. Until ``may_end`` says that the end of the
    connection is that of the response, it is an error; and so are more than ``most_bytes``, framing included.
    """

    def __init__(self, begun: bytes, connection: _Connection, most_bytes: int) -> None:
        self._begun, self._connection, self._left = begun, connection, most_bytes
        self.may_end = False

    def makefile(self, _mode: str) -> io.BufferedReader:
        """The file to read from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes."""
        if self._begun:
            count = min(len(self._begun), len(buffer))
            buffer[:count], self._begun = self._begun[:count], self._begun[count:]
        elif not (count := self._connection.receive_into(buffer)) and not self.may_end:
            raise ConnectionBroke("it ended before the answer did")
        self._left -= count
        if self._left < 0:
            raise AnswerTooLong("more bytes than its answer can have, framing included")
        return count


def _parse_plain(head: bytes | bytearray) -> tuple[int, dict[str, str], int] | None:
    """Status, headers and length of a response as our servers send them; None where it takes more to understand it."""
    match = _PLAIN_HEAD.fullmatch(head.decode("latin-1"))
    if match is None:
        return None
    headers: dict[str, str] = {}
    lines = match[2].split("\r\n")[1:]
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip(" \t")
    length = headers.get("content-length", "")
    plain = (
        length.isdecimal()
        and len(length) < 16
        and "transfer-encoding" not in headers
        and len(headers) == len(lines)
        and match[1] not in ("204", "304")
    )
    return (int(match[1]), headers, int(length)) if plain else None


def _check_length(length: int, status: int, most_bytes: int) -> None:
    most = most_bytes if 200 <= status < 300 else MAX_TEXT_BYTES
    if length > most:
        raise AnswerTooLong(f"more than the {most:,} bytes that its answer can have")
