"""A server for tests that sends the very bytes that a test says, right or wrong, and never thinks about HTTP."""

import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from socket import socket
from socketserver import ThreadingTCPServer
from typing import Any

from logitcache.client.deadline import Deadline
from logitcache.client.transport import Answer, DirectTransport


class Connection:
    """One connection, the ``number``-th from 0, as its script sees it."""

    def __init__(self, server: "RawServer", number: int, connected: socket) -> None:
        self.server, self.number, self.socket = server, number, connected

    def request(self) -> bytes:
        """The next request, head and body; b"" where there is none any more."""
        got = b""
        while b"\r\n\r\n" not in got:
            if not (more := self.socket.recv(1 << 16)):
                return b""
            got += more
        head, _, body = got.partition(b"\r\n\r\n")
        length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0)
        while len(body) < length and (more := self.socket.recv(1 << 16)):
            body += more
        self.server.requests.append(head + b"\r\n\r\n" + body)
        return self.server.requests[-1]

    def send(self, answer: bytes) -> None:
        """Send these bytes."""
        self.socket.sendall(answer)

    def send_for_ever(self, piece: bytes, every_s: float = 0.0) -> None:
        """Send this again and again, until the client hangs up."""
        while not self.server.stopped.wait(every_s):
            self.send(piece)


Script = Callable[[Connection], None]


def answering(*answers: bytes) -> Script:
    """Send these, one for each request on a connection, and hang up after the last."""

    def script(connection: Connection) -> None:
        for answer in answers:
            if not connection.request():
                return
            connection.send(answer)

    return script


def always(answer: bytes) -> Script:
    """Send this to every request."""

    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(answer)

    return script


class RawServer(ThreadingTCPServer):
    """Runs ``script`` on each connection, in a thread each, and has a transport that asks it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        script: Script,
        *,
        tls: ssl.SSLContext | None = None,
        trust: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        prefix: str = "",
    ) -> None:
        super().__init__(("127.0.0.1", 0), None)  # type: ignore[arg-type]
        self.script, self.tls = script, tls
        self.requests: list[bytes] = []
        self.connections = 0
        self.stopped = threading.Event()
        self.address = f"{host}:{self.server_address[1]}"
        self.transport = DirectTransport(f"http{'s' * (tls is not None)}://{self.address}{prefix}", trust)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.002,), name="raw-server")
        self._thread.start()

    def exchange(
        self, content: bytes | None = None, *, most_bytes: int = 1 << 20, deadline: Deadline | None = None
    ) -> Answer:
        """Ask it."""
        method = "GET" if content is None else "POST"
        return self.transport.exchange(method, "/path", {"A": "b"}, content, most_bytes, deadline or Deadline(20.0))

    def process_request(self, request: Any, client_address: Any) -> None:
        """Number a connection."""
        self.connections += 1
        super().process_request(request, (self.connections - 1, client_address))

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Run the script."""
        with suppress(OSError):  # the client has gone, or trusts us not
            if self.tls is None:
                self.script(Connection(self, client_address[0], request))
                return
            with self.tls.wrap_socket(request.dup(), server_side=True) as connected:
                self.script(Connection(self, client_address[0], connected))

    def stop(self) -> None:
        """Go away."""
        self.stopped.set()
        self.transport.close()
        self.shutdown()
        self.server_close()
        self._thread.join()
