"""A way to a real server that fails as a test says: what networks, proxies, resolvers and restarts do to a client."""

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from tests.client.raw_server import Connection, RawServer

Fault = Callable[["Network", Connection, bytes], bool | None]
"""What happens to a request in place of its answer; the last argument is what the server answered. True goes on with
the connection, which ends otherwise."""

FOR_EVER = 10**9

_LOOK_UP = socket.getaddrinfo


class Network(RawServer):
    """The way to the server at ``upstream``, under the name ``name``. `break_` says what the next requests meet."""

    def __init__(self, upstream: str, name: str) -> None:
        self._upstream = upstream.removeprefix("http://")
        self._fault: Fault | None = None
        self._no_name: Callable[[], list[Any]] | None = None
        self._left = 0
        self.asked = 0
        """Requests and look-ups since it was told to break."""
        self._change = threading.Lock()
        super().__init__(self._pass, host=name)
        self.name, self.url = name, f"http://{self.address}"

    def break_(self, fault: "Fault | Unnamed", times: int = FOR_EVER) -> None:
        """The next so many requests, or look-ups of its name, meet this fault; those before met none."""
        with self._change:
            self._left, self.asked = times, 0
            self._fault, self._no_name = (hang_up, fault.look_up) if isinstance(fault, Unnamed) else (fault, None)

    def mend(self) -> None:
        """From now on nothing fails."""
        with self._change:
            self._fault = self._no_name = None

    def look_up(self) -> list[Any]:
        """Its addresses, or what stands in their way."""
        with self._change:
            no_name = self._no_name
            self.asked += no_name is not None
            self._left -= no_name is not None
            if self._left < 0:
                self._fault = self._no_name = no_name = None
        if no_name is not None:
            return no_name()
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", self.server_address[1]))]

    def _pass(self, connection: Connection) -> None:
        upstream = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            while request := connection.request():
                answer = _asked(upstream, request)
                with self._change:
                    fault = self._fault
                    if self._no_name is None:
                        self.asked += 1
                        self._left -= fault is not None
                        if self._left < 0:
                            self._fault = fault = None
                if fault is None:
                    connection.send(answer)
                elif not fault(self, connection, answer):
                    return
        finally:
            upstream.close()


def _asked(upstream: http.client.HTTPConnection, request: bytes) -> bytes:
    """The server's answer, as bytes with a length."""
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if not line.startswith("Host:"))
    method, path, _ = first.split(" ")
    upstream.request(method, path, body, headers)
    answer = upstream.getresponse()
    content = answer.read()
    kept = [(name, value) for name, value in answer.getheaders() if name.lower() in ("content-type", "x-request-id")]
    return told(answer.status, content, *kept)


def told(status: int, content: bytes, *headers: tuple[str, str]) -> bytes:
    """An answer of these bytes, whose length is told as it is."""
    lines = [
        f"HTTP/1.1 {status} x",
        *(f"{name}: {value}" for name, value in headers),
        f"Content-Length: {len(content)}",
    ]
    return "\r\n".join((*lines, "\r\n")).encode() + content


def page(status: int, *headers: tuple[str, str]) -> Fault:
    """A proxy's page of HTML."""
    answer = told(status, b"<html><h1>not here</h1></html>", ("Content-Type", "text/html"), *headers)

    def fault(_network: Network, connection: Connection, _answer: bytes) -> bool:
        connection.send(answer)
        return True

    return fault


def hang_up(_network: Network, _connection: Connection, _answer: bytes) -> None:
    """The connection ends in place of an answer, which the server gave."""


def reset(_network: Network, connection: Connection, _answer: bytes) -> None:
    """The connection is reset in place of an answer."""
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _cut(answer: bytes) -> bytes:
    """The answer as far as half of its body."""
    head = answer.index(b"\r\n\r\n") + 4
    return answer[: head + (len(answer) - head) // 2]


def end_in_the_head(_network: Network, connection: Connection, answer: bytes) -> None:
    """The connection ends within the head."""
    connection.send(answer[:25])


def end_in_the_body(_network: Network, connection: Connection, answer: bytes) -> None:
    """The connection ends within the body."""
    connection.send(_cut(answer))


def reset_in_the_body(network: Network, connection: Connection, answer: bytes) -> None:
    """The connection is reset within the body."""
    connection.send(_cut(answer))
    reset(network, connection, answer)


def end_in_a_chunk(_network: Network, connection: Connection, answer: bytes) -> None:
    """The connection ends within a body that tells no length."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    chunked = b"\r\n".join((*lines, b"Transfer-Encoding: chunked", b"", b""))
    connection.send(chunked + b"%x\r\n" % len(body) + body[: len(body) // 2])


def no_http(_network: Network, connection: Connection, _answer: bytes) -> None:
    """Another protocol answers."""
    connection.send(b"220 mail.example ESMTP\r\n")


def _until_it_hangs_up(network: Network, connection: Connection, piece: bytes) -> None:
    while not network.stopped.wait(0.02):
        connection.socket.settimeout(0.0)
        try:
            if not connection.socket.recv(1):
                return
        except BlockingIOError:
            pass
        connection.socket.settimeout(None)
        connection.send(piece)


def stall(network: Network, connection: Connection, _answer: bytes) -> None:
    """Nothing comes."""
    _until_it_hangs_up(network, connection, b"")


def stall_in_the_body(network: Network, connection: Connection, answer: bytes) -> None:
    """Half of the body comes, and then nothing."""
    connection.send(_cut(answer))
    _until_it_hangs_up(network, connection, b"")


def trickle(network: Network, connection: Connection, _answer: bytes) -> None:
    """A head comes byte by byte, and has no end."""
    connection.send(b"HTTP/1.1 200 OK\r\nX: ")
    _until_it_hangs_up(network, connection, b"x")


def _altered(change: Callable[[bytes], bytes], **headers: str) -> Fault:
    def fault(_network: Network, connection: Connection, answer: bytes) -> bool:
        head, _, body = answer.partition(b"\r\n\r\n")
        kind = next(line for line in head.decode().split("\r\n") if line.lower().startswith("content-type"))
        sent = {"Content-Type": kind.partition(": ")[2]} | {name.replace("_", "-"): to for name, to in headers.items()}
        connection.send(told(int(head[9:12]), change(body), *sent.items()))
        return True

    return fault


short_and_said_so = _altered(lambda body: body[: len(body) // 2])
garbled = _altered(lambda body: bytes(byte ^ 0x55 for byte in body))
far_too_long = _altered(lambda body: body + bytes(20 << 20))


def of_another_digest(digest: str) -> Fault:
    """The answer of a label set that is another one by its digest alone."""
    return _altered(lambda body: body.replace(digest.encode(), b"sha256:" + b"0" * 64))


of_another_type = _altered(lambda body: body, Content_Type="application/octet-stream")
compressed = _altered(lambda body: body, Content_Encoding="gzip")


class Unnamed:
    """What happens where the server's name is looked up, or its address asked; the connection is gone, too."""

    def __init__(self, look_up: Callable[[], list[Any]]) -> None:
        self.look_up = look_up


def _failing(code: int) -> Unnamed:
    def look_up() -> list[Any]:
        raise socket.gaierror(code, "as the test says")

    return Unnamed(look_up)


no_resolver = _failing(socket.EAI_AGAIN)
no_such_name = _failing(socket.EAI_NONAME)


def _nobody() -> list[Any]:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", unused.getsockname())]


nobody_listens = Unnamed(_nobody)


@contextmanager
def names() -> Iterator[dict[str, Network]]:
    """Names of networks that are looked up by asking them; all others have no address."""
    known: dict[str, Network] = {}

    def look_up(host: Any, *arguments: Any, **options: Any) -> list[Any]:
        if host in known:
            return known[host].look_up()
        return _LOOK_UP(host, *arguments, **options)

    with mock.patch.object(socket, "getaddrinfo", look_up):
        yield known
