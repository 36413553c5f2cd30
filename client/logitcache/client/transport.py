"""How bytes travel: HTTP/1.1 over kept connections, every step of it within the call's deadline.

A request goes out in one piece. A response whose length stands in front, as our servers send it, is received straight
into the memory that its arrays will be views of; any other is left to the standard library. Before each receive the
time that is left is set, so that a trickle of bytes, or of header lines, ends in time. It knows nothing of label sets,
and connects directly: no proxies.
"""

import http.client
import io
import select
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from ssl import SSLContext
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import numpy as np

from logitcache.client.deadline import Deadline

KEEPALIVE_S = 100.0
"""Idle seconds after which a connection is not used again: below the 120 s after which our server closes it. One that a
proxy closed sooner is replaced."""

MOST_IDLE = 10
"""Connections that are kept for the next request."""

MAX_TEXT_BYTES = 16 << 20
"""A description or a problem above this is refused; a problem that names 65,536 missing ids takes about 3 MB."""

_HEAD_BYTES = 16 << 10


class ConnectFailed(Exception):
    """There is no connection."""


class ConnectionBroke(Exception):
    """The connection ended before the answer did, or what came is no HTTP."""


class AnswerLate(Exception):
    """The deadline passed."""


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
            method: of HTTP.
            path: what follows the address that the transport was made for.
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
    """A pool of kept connections to one address; see `Transport`. Not across a fork."""

    def __init__(self, base_url: str, ssl_context: SSLContext | None = None) -> None:
        url = urlsplit(base_url)
        self._address = url.hostname or "", url.port or (80 if ssl_context is None else 443)
        self._prefix, self._host = url.path, url.netloc
        self._ssl_context = ssl_context
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
        connection = self._taken(deadline)
        kept = False
        try:
            connection.send("\r\n".join((*lines, "\r\n")).encode("ascii") + (content or b""))
            answer, kept = connection.receive(method, most_bytes)
        finally:
            if not kept:
                connection.close()
        self._give_back(connection)
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
        return _Connection(self._address, self._ssl_context, deadline)

    def _give_back(self, connection: "_Connection") -> None:
        if connection.closed:
            return
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


class _Connection(io.RawIOBase):
    """One TCP or TLS connection, and the file of what arrives on it."""

    def __init__(self, address: tuple[str, int], ssl_context: SSLContext | None, deadline: Deadline) -> None:
        self.deadline, self.idle_since_s = deadline, 0.0
        self._head = bytearray(_HEAD_BYTES)
        try:
            self._socket = socket.create_connection(address, self._remaining_s())
            try:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if ssl_context is not None:
                    self._socket.settimeout(self._remaining_s())
                    self._socket = ssl_context.wrap_socket(self._socket, server_hostname=address[0])
            except BaseException:
                self._socket.close()
                raise
        except TimeoutError as error:
            raise AnswerLate(str(error)) from error
        except (OSError, UnicodeError) as error:
            raise ConnectFailed(str(error)) from error

    def _remaining_s(self) -> float:
        if not (remaining_s := self.deadline.remaining_s):
            raise AnswerLate("the time allowed for the call is over")
        return remaining_s

    def has_arrived(self) -> bool:
        """There is something to read, be it the end."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def send(self, request: bytes) -> None:
        """Send a request. Where a server refuses it before it has read all, its answer is what counts."""
        self._socket.settimeout(self._remaining_s())
        try:
            self._socket.sendall(request)
        except TimeoutError as error:
            raise AnswerLate(str(error)) from error
        except OSError as error:
            if not self.has_arrived():
                raise ConnectionBroke(str(error)) from error

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Receive what has arrived, or wait for it as long as the deadline allows; 0 at the end."""
        self._socket.settimeout(self._remaining_s())
        try:
            return self._socket.recv_into(buffer)
        except TimeoutError as error:
            raise AnswerLate(str(error)) from error
        except OSError as error:
            raise ConnectionBroke(str(error)) from error

    def receive(self, method: str, most_bytes: int) -> tuple[Answer, bool]:
        """The response, and whether the connection can be used again."""
        head, got, end = memoryview(self._head), 0, -1
        while end < 0 and got < len(head):
            if not (more := self.readinto(head[got:])):
                break
            end = self._head.find(b"\r\n\r\n", max(0, got - 3), got + more)
            got += more
        plain = _parse_plain(bytes(head[:end])) if end >= 0 else None
        if plain is None:
            return self._receive_other(bytes(head[:got]), method, most_bytes), False
        status, headers, length = plain
        _check_length(length, status, most_bytes)
        body = np.empty(length, np.uint8).data
        filled = min(got - end - 4, length)
        body[:filled] = head[end + 4 : end + 4 + filled]
        while filled < length:
            if not (more := self.readinto(body[filled:])):
                raise ConnectionBroke(f"it ended after {filled:,} of {length:,} bytes")
            filled += more
        kept = headers.get("connection", "").lower() != "close" and got - end - 4 <= length
        return Answer(status, headers, body), kept

    def _receive_other(self, begun: bytes, method: str, most_bytes: int) -> Answer:
        """A response that is chunked, has an interim one before it or no length, or is none; read by the library."""
        answer = http.client.HTTPResponse(_Replayed(begun, self), method=method)  # type: ignore[arg-type]
        try:
            answer.begin()
            most = most_bytes if 200 <= answer.status < 300 else MAX_TEXT_BYTES
            body = answer.read(most + 1)
        except (http.client.HTTPException, ValueError) as error:
            raise ConnectionBroke(f"{type(error).__name__}: {error}") from error
        _check_length(len(body), answer.status, most_bytes)
        headers = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, headers, memoryview(bytearray(body)))

    def close(self) -> None:
        """Hang up."""
        super().close()
        if hasattr(self, "_socket"):
            self._socket.close()


class _Replayed(io.RawIOBase):
    """What has arrived already, and then the rest: what the standard library takes for a socket."""

    def __init__(self, begun: bytes, connection: _Connection) -> None:
        self._begun, self._connection = begun, connection

    def makefile(self, _mode: str) -> io.BufferedReader:
        """The file to read from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes."""
        if not self._begun:
            return self._connection.readinto(buffer)
        count = min(len(self._begun), len(buffer))
        buffer[:count], self._begun = self._begun[:count], self._begun[count:]
        return count


def _parse_plain(head: bytes) -> tuple[int, dict[str, str], int] | None:
    """Status, headers and length of a response as our servers send them; None where it takes more to understand it."""
    first, *lines = head.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    status = rest[:3]
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip(" \t")
    length = headers.get("content-length", "")
    plain = (
        version == "HTTP/1.1"
        and status.isdecimal()
        and status not in ("204", "304")
        and 200 <= int(status) < 600
        and length.isdecimal()
        and len(length) < 16
        and "transfer-encoding" not in headers
        and len(headers) == len(lines)
    )
    return (int(status), headers, int(length)) if plain else None


def _check_length(length: int, status: int, most_bytes: int) -> None:
    most = most_bytes if 200 <= status < 300 else MAX_TEXT_BYTES
    if length > most:
        raise AnswerTooLong(f"more than the {most:,} bytes that its answer can have")
