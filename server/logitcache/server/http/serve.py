"""Running the app: the socket, the refusals before it, the signals after it.

One uvicorn worker. The socket is bound here and not by uvicorn, so that a port in use is an error that names the port,
and port 0 is known before anyone is told.
"""

import errno
import gc
import ipaddress
import json
import signal
import socket
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NoReturn

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from logitcache.labels import problem
from logitcache.labels.errors import InvalidRequest, RequestRefused, ServerFault
from logitcache.server import logs
from logitcache.server.config import Config
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.jobs.queue import Jobs
from logitcache.storage import label_set_names
from logitcache.storage.files import Files

KEEP_ALIVE_S = 120
"""How long an idle connection is kept: longer than a training step, so that a loop connects once."""

DRAIN_S = 8
"""How long requests under way may take to finish after SIGTERM: less than the 10 s after which Docker kills."""

MAX_HEAD_BYTES = 64 << 10
"""Bytes that a request's first line and headers may have together."""

BACKLOG = 1024
"""Connections that may wait to be accepted."""

_log = logs.logger(__name__)


def serve(
    store: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    verify: Literal["strict", "background"] = "strict",
    scrub_hours: float = 24.0,
    log_level: Literal["debug", "info", "warning"] = "info",
    auth: Literal["none"] | None = None,
    record: bool = False,
    config: Config | None = None,
) -> None:
    """Serve the label sets of a store until SIGTERM or Ctrl-C; requests under way are finished first.

    With a configuration that registers teachers and datasets it runs jobs too, with ``record`` it takes what runs
    record; either makes the store's folder if there is none. The options are those given here, whatever the
    configuration says of them. Jobs go on when it ends.

    Raises:
        StoreNotFound: the folder does not exist.
        InvalidRequest: the address cannot be listened on, or is open to others and ``auth`` does not say "none".
        KeyboardInterrupt: ended by Ctrl-C.
    """
    runs_jobs = config is not None and bool(config.teachers and config.datasets)
    if (runs_jobs or record) and store.parent.is_dir():
        Files().make_folder(store)
    names = label_set_names(store)
    with listening(host, port, auth) as listener:
        logs.configure(level=log_level)
        url = url_of(listener)
        catalog = Catalog(store, verify=verify, scrub_s=scrub_hours * 3600 or None)
        server = _Server(
            create_app(catalog, Jobs(store, config) if config is not None and runs_jobs else None, record=record),
            ready=lambda: _log.info(f"listening on {url}", url=url, store=str(store), label_sets=len(names)),
        )
        # uvicorn drains on SIGTERM and then raises it anew; a stop that was asked for is not a failure.
        signal.signal(signal.SIGTERM, _stop)
        # What is imported lives as long as the process: looking through it again and again would hold requests up.
        gc.collect()
        gc.freeze()
        try:
            server.run(sockets=[listener])
        finally:
            _log.info("stopped", url=url)


def _stop(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    """The app on a free port of this machine, in a thread of this process, for as long as the context lasts.

    Yields:
        Its base URL, once it answers.

    Raises:
        ServerFault: it did not start.
    """
    ready = threading.Event()
    with listening("127.0.0.1", 0) as listener:
        server = _Server(app, ready=ready.set)

        def run() -> None:
            try:
                # uvicorn leaves the process when it cannot start; here it is only this thread's to leave.
                with suppress(SystemExit):
                    server.run(sockets=[listener])
            finally:
                ready.set()

        thread = threading.Thread(target=run, name="logitcache-server", daemon=True)
        thread.start()
        try:
            ready.wait()
            if not server.started:
                raise ServerFault("the server did not start; the log has the reason")
            yield url_of(listener)
        finally:
            server.should_exit = True
            thread.join()


class ProblemProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, but for what it refuses before there is a request: that is a problem like all others."""

    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Take bytes that arrived, unless headers or trailers have no end: the parser would keep them all."""
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"its first line and headers are longer than {MAX_HEAD_BYTES:,} bytes")

    def on_headers_complete(self) -> None:
        """Begin to answer.

        Raises:
            ValueError: the request could be read in two ways; the parser makes a refusal of it.
        """
        names = [name for name, _ in self.headers]
        if names.count(b"host") != 1 and self.parser.get_http_version() != "1.0":
            raise ValueError("one Host header is wanted")  # RFC 9112, 3.2
        if b"#" in self.url:
            raise ValueError("a path ends before #, and could name another example")
        if self.parser.should_upgrade() and not {b"content-length", b"transfer-encoding"}.isdisjoint(names):
            raise ValueError("the parser takes the body behind an Upgrade for another protocol's")
        super().on_headers_complete()

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
        request_id = uuid.uuid4().hex
        refused = RequestRefused("these bytes are not an HTTP/1.1 request that can be answered; mend the client")
        body = json.dumps(problem.to_problem(refused, request_id)).encode()
        _log.info("request refused", request_id=request_id, status=400, code=refused.code, why=msg[:200])
        head = (
            f"HTTP/1.1 400 Bad Request\r\ncontent-type: {problem.MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn as configured here; it says when it is ready."""

    def __init__(self, app: ASGIApp, ready: Callable[[], object]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="on",
                http=ProblemProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()


@contextmanager
def listening(host: str, port: int, auth: Literal["none"] | None = None) -> Iterator[socket.socket]:
    """A socket that listens on this address; port 0 takes a free one. An address open to others needs ``auth="none"``.

    Raises:
        InvalidRequest: the port is in use or not permitted, or the host is not one of this machine's.
    """
    if not 0 <= port < 2**16:
        raise InvalidRequest(f"port {port} does not exist: ports are 0 to 65535, and 0 takes a free one", port=port)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        check_exposure(str(address[0]), auth)
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
        # asyncio does this for sockets that it binds itself. Without it Nagle's algorithm and delayed acknowledgements
        # hold the last piece of every second answer back for 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except UnicodeError:
        raise InvalidRequest(f"{host[:80]!r} is no name of a host", port=port) from None
    except OSError as error:
        raise InvalidRequest(_why_not(host, port, error), host=host, port=port) from None
    with listener:
        yield listener


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another process; choose another, or `--port 0` for any free one"
    if error.errno == errno.EACCES:
        return f"this user may not listen on port {port}; choose one above 1023, or `--port 0` for any free one"
    return f"cannot listen on {host} port {port}: {error}; choose an address of this machine, 127.0.0.1 for example"


def url_of(listener: socket.socket) -> str:
    """The URL at which a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if listener.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_exposure(address: str, auth: Literal["none"] | None) -> None:
    """Refuse an address to which others can connect, unless told that no keys are wanted.

    Raises:
        InvalidRequest: the address is not a loopback one and ``auth`` is not "none".
    """
    if auth == "none" or ipaddress.ip_address(address).is_loopback:
        return
    raise InvalidRequest(
        f"{address} can be reached from other machines, and this version has no keys: anyone who connects could read "
        "every label set. Serve on 127.0.0.1, or say `--auth none` if the network itself keeps others out",
        host=address,
    )
