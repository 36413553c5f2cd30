"""Running the app: the socket, the refusals before it, the signals after it.

One uvicorn worker. The socket is bound here and not by uvicorn, so that a port in use is an error that names the port,
and port 0 is known before anyone is told.
"""

import errno
import gc
import ipaddress
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import uvicorn
from starlette.types import ASGIApp

from logitcache.labels.errors import InvalidRequest, ServerFault
from logitcache.server import logs
from logitcache.server.config import Config
from logitcache.server.http.access import Access
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.protocol import SWEEP_S, ProblemProtocol
from logitcache.server.http.workers import supervise
from logitcache.server.jobs.queue import Jobs
from logitcache.server.keys import Keys, KnownKeys
from logitcache.storage import label_set_names
from logitcache.storage.files import Files

KEEP_ALIVE_S = 120
"""How long an idle connection is kept: longer than a training step, so that a loop connects once."""

DRAIN_S = 8
"""How long requests under way may take to finish after SIGTERM: less than the 10 s after which Docker kills."""

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
    auth: Literal["keys", "none"] | None = None,
    allow_host: Sequence[str] = (),
    record: bool = False,
    workers: int = 1,
    config: Config | None = None,
) -> None:
    """Serve the label sets of a store until SIGTERM or Ctrl-C; requests under way are finished first.

    Keys are wanted where ``auth`` is "keys", or where it is not given and the store has keys, or the address is open to
    others. Besides IP addresses, names without a dot and this machine's own, a server is asked by those of
    ``allow_host`` alone.

    Several ``workers`` are as many processes at one address, which open the same label sets, add their metrics up, and
    of which one has the jobs; one that dies is replaced.

    With a configuration that registers teachers and datasets it runs jobs too, with ``record`` it takes what runs
    record; either makes the store's folder if there is none. The options are those given here, whatever the
    configuration says of them. Jobs go on when it ends.

    Raises:
        StoreNotFound: the folder does not exist.
        InvalidRequest: the address cannot be listened on; or several workers are to record; or the address is open to
            others, the store has no keys, and ``auth`` does not say "none".
        KeyboardInterrupt: ended by Ctrl-C.
    """
    runs_jobs = config is not None and bool(config.teachers and config.datasets)
    if (runs_jobs or record) and store.parent.is_dir():
        Files().make_folder(store)
        Files().fsync(store.parent)
    if record and workers > 1:
        raise InvalidRequest(
            f"a recording is one process's: serve with --workers 1 to record, not with {workers}", workers=workers
        )
    names = label_set_names(store)
    has_keys = auth != "none" and bool(Keys(store).read())
    with listening(host, port, open_to_others=auth == "none" or has_keys) as listener:
        logs.configure(level=log_level)
        url = url_of(listener)
        wants_keys = auth == "keys" or has_keys
        work = Work(
            listener,
            store,
            verify=verify,
            scrub_s=scrub_hours * 3600 or None,
            log_level=log_level,
            wants_keys=wants_keys,
            hosts=frozenset(name.lower().rstrip(".") for name in (host, *allow_host)),
            record=record,
            config=config if runs_jobs else None,
        )

        def ready() -> None:
            _log.info(
                f"listening on {url}",
                url=url,
                store=str(store),
                label_sets=len(names),
                keys=wants_keys,
                workers=workers,
            )

        try:
            if workers == 1:
                work.run(ready)
            else:
                supervise(work, workers, ready)
        finally:
            _log.info("stopped", url=url)


@dataclass(frozen=True)
class Work:
    """What one process of a server does; it can be sent to another process."""

    listener: socket.socket
    store: Path
    verify: Literal["strict", "background"]
    scrub_s: float | None
    log_level: Literal["debug", "info", "warning"]
    wants_keys: bool
    hosts: frozenset[str]
    record: bool
    config: Config | None

    def run(self, ready: Callable[[], object]) -> None:
        """Serve until SIGTERM or Ctrl-C; ``ready`` is called when it listens."""
        app = create_app(
            Catalog(self.store, verify=self.verify, scrub_s=self.scrub_s),
            None if self.config is None else Jobs(self.store, self.config),
            record=self.record,
            access=Access(KnownKeys(Keys(self.store)) if self.wants_keys else None, self.hosts),
        )
        server = _Server(app, ready)
        # uvicorn drains on SIGTERM and then raises it anew; a stop that was asked for is not a failure.
        signal.signal(signal.SIGTERM, _stop)
        # What is imported lives as long as the process: looking through it again and again would hold requests up.
        gc.collect()
        gc.freeze()
        server.run(sockets=[self.listener])


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

    async def on_tick(self, counter: int) -> bool:
        """Called every tenth of a second."""
        if counter % int(SWEEP_S * 10) == 0:
            now_s = time.monotonic()
            for connection in tuple(self.server_state.connections):
                if isinstance(connection, ProblemProtocol):
                    connection.look(now_s)
        return await super().on_tick(counter)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._ready()


@contextmanager
def listening(host: str, port: int, *, open_to_others: bool = False) -> Iterator[socket.socket]:
    """A socket that listens on this address; port 0 takes a free one. Others may reach it only if that is said.

    Raises:
        InvalidRequest: the port is in use or not permitted, or the host is not one of this machine's.
    """
    if not 0 <= port < 2**16:
        raise InvalidRequest(f"port {port} does not exist: ports are 0 to 65535, and 0 takes a free one", port=port)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        check_exposure(str(address[0]), open_to_others=open_to_others)
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


def check_exposure(address: str, *, open_to_others: bool) -> None:
    """Refuse an address to which others can connect, unless there are keys or it was said that none are wanted.

    Raises:
        InvalidRequest: the address is not a loopback one.
    """
    if open_to_others or ipaddress.ip_address(address).is_loopback:
        return
    raise InvalidRequest(
        f"{address} can be reached from other machines, and the store has no keys: make one with `logitcache keys make "
        "NAME`; or serve on 127.0.0.1, or say `--auth none` if the network itself keeps others out",
        host=address,
    )
