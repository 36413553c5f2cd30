"""A label set server for tests on a real socket, which can be told to fail the next requests.

It stands in for networks, proxies and servers that misbehave; the real server has tests of its own.
"""

import json
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from tests.client.rows import description, picked

from logitcache.labels import problem, wire
from logitcache.labels.errors import DigestChanged, LabelSetNotFound, LogitcacheError, RowsMissing
from logitcache.labels.label_set import Limits
from logitcache.labels.soft_labels import SoftLabels


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    owner: "FaultyServer"


class Exchange(BaseHTTPRequestHandler):
    """One request, and the ways to answer it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer takes the 40 ms of a delayed acknowledgement
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._exchange(b"")

    def do_POST(self) -> None:
        self._exchange(self.rfile.read(int(self.headers["Content-Length"])))

    def _exchange(self, body: bytes) -> None:
        owner = self.server.owner
        self.body = body
        owner.connections.add(self.client_address)
        owner.requests.append(self.path)
        fault = owner.faults.popleft() if self.command == "POST" and owner.faults else Exchange.serve
        try:
            (Exchange.drop if owner.stopped.is_set() else fault)(self)
        except OSError:
            self.close_connection = True  # the client has gone

    def serve(self) -> None:
        """The right answer."""
        try:
            if self.path == "/v1/label-sets/digits":
                self.send(200, "application/json", json.dumps(self.server.owner.describe().to_json()).encode())
            elif self.path == "/v1/label-sets/digits/fetch":
                self.send(200, wire.MEDIA_TYPE, self.server.owner.rows_for(self.body))
            else:
                raise LabelSetNotFound(f"there is no label set at {self.path}")
        except LogitcacheError as error:
            self.send(error.status, problem.MEDIA_TYPE, json.dumps(problem.to_problem(error, "request-7")).encode())

    def send(self, status: int, media_type: str, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drop(self) -> None:
        """Close the connection in place of an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def stop_half_way(self) -> None:
        """Close the connection in the middle of the body."""
        body = self.server.owner.rows_for(self.body)
        self.send_response(200)
        self.send_header("Content-Type", wire.MEDIA_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.drop()

    def stop_in_the_head(self) -> None:
        """Close the connection in the middle of a header line."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Ty")
        self.wfile.flush()
        self.drop()

    def trickle_body(self) -> None:
        """One byte at a time, with no end in sight."""
        self.send_response(200)
        self.send_header("Content-Type", wire.MEDIA_TYPE)
        self.send_header("Content-Length", "50000")
        self.end_headers()
        self._trickle(b"\x00")

    def trickle_headers(self) -> None:
        """A header line that never ends."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self._trickle(b"z")

    def _trickle(self, piece: bytes) -> None:
        self.close_connection = True
        while not self.server.owner.stopped.wait(0.02):
            self.wfile.write(piece)


class FaultyServer:
    """Serves ``soft`` as the label set "digits" at ``url``; ``faults`` are what the next fetches get, one each."""

    def __init__(self, soft: SoftLabels, *, limits: Limits | None = None, port: int = 0) -> None:
        self.soft, self.limits = soft, limits
        self.faults: deque[Callable[[Exchange], None]] = deque()
        self.requests: list[str] = []
        self.connections: set[Any] = set()
        self.fetched_ids: list[list[int]] = []
        self.digests: deque[str] = deque()
        self.fewer_rows = 0
        self.stopped = threading.Event()
        self._server = _Server(("127.0.0.1", port), Exchange)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), name="faulty-server")
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.base_url}/digits"

    def describe(self) -> Any:
        return description(self.soft, limits=self.limits)

    def rows_for(self, body: bytes) -> bytes:
        arrays, options = wire.parse(body)
        ids = arrays["ids"].astype(np.int64)
        self.fetched_ids.append(ids.tolist())
        digest = self.digests.popleft() if self.digests else self.soft.digest
        if options.get("digest", digest) != digest:
            raise DigestChanged("it changed", served=digest)
        known = (ids >= 0) & (ids < len(self.soft))
        masked = options["on_missing"] == "mask"
        if not known.all() and not masked:
            raise RowsMissing("some are missing", unknown=ids[~known].tolist(), unlabelled=[])
        arrays = picked(self.soft, np.where(known, ids, 0)[: len(ids) - self.fewer_rows])
        if masked:
            arrays["present"] = known
            for name in ("logits", "logit_max", "tail_logsumexp"):
                arrays[name][~known] = np.nan
        return wire.encode(arrays, wire.row_metadata(self.soft.temperatures, digest))

    def stop(self) -> None:
        """Go away: close the listening socket; who asks over an open connection finds it broken."""
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "FaultyServer":
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()


def with_digest(soft: SoftLabels, digest: str | None) -> SoftLabels:
    return replace(soft, digest=digest)


def busy(status: int = 503, **headers: str) -> Callable[[Exchange], None]:
    """An overloaded proxy's page, with these headers."""
    return lambda exchange: exchange.send(status, "text/html", b"<h1>try later</h1>", **headers)


def answering(status: int, media_type: str, body: bytes) -> Callable[[Exchange], None]:
    return lambda exchange: exchange.send(status, media_type, body)


def encoded(encoding: str) -> Callable[[Exchange], None]:
    """The right answer, said to be encoded so."""

    def fault(exchange: Exchange) -> None:
        body = exchange.server.owner.rows_for(exchange.body)
        exchange.send(200, wire.MEDIA_TYPE, body, Content_Encoding=encoding)

    return fault
