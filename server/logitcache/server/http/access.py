"""Who may ask for what: the one middleware that every request passes before any of it is looked at further.

What a route needs is decided here, by method and path alone, and what is not named here needs the largest scope: a
route that somebody adds is closed until somebody opens it. Keys travel in ``Authorization: Bearer`` and nowhere else.

Two more things are refused here, since browsers can be made to send them for somebody else: a Host that is not this
server's (DNS rebinding), and a change of state without a content type that a form cannot have (cross-site requests).
No cross-origin header is ever sent.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from anyio import CapacityLimiter, to_thread
from starlette.types import ASGIApp, Receive, Scope, Send

from logitcache.labels.errors import KeyRefused, LogitcacheError, RequestRefused, ScopeTooSmall
from logitcache.server.http.messages import media_type
from logitcache.server.http.problems import problem_response
from logitcache.server.keys import KeyScope, KnownKeys

READ_S = 5.0
"""How long a request waits for the keys to be read: a busy machine may take more than a moment."""

OPEN = frozenset({"/healthz", "/readyz"})
"""Paths that need no key: what asks them has none, and is told nothing but that the server is up."""

_READS = frozenset({"GET", "HEAD"})

_READABLE = frozenset({"/metrics", "/openapi.json", "/docs", "/v1/label-sets"})
"""Paths that may be read, besides those of label sets and jobs."""

_LABEL_SETS: Mapping[tuple[str, str], KeyScope] = {
    ("POST", "fetch"): "read",
    ("POST", "missing"): "read",
    ("PUT", "recording"): "write",
    ("POST", "record"): "write",
    ("POST", "recording/finish"): "write",
}
"""By method and what follows a label set's name."""

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]
"""Of every response: nothing here is a page, but for `PAGES`."""

PAGES = frozenset({"/docs"})
"""Paths whose page loads scripts of its own: they have no content security policy."""

MOST_KEY_BYTES = 200
"""A longer Authorization header is no key of ours."""


def headers_of(path: str) -> list[tuple[bytes, bytes]]:
    """What every response to this path has among its headers."""
    return HEADERS[:-1] if path in PAGES else HEADERS


def needed(method: str, path: str) -> KeyScope | None:
    """The scope that a request needs; None if it needs no key."""
    if method in _READS:
        if path in OPEN:
            return None
        if path == "/v1/jobs" or path.startswith("/v1/jobs/"):
            return "write"  # their logs tell what the operator's own code printed
        return "read" if path in _READABLE or path.startswith("/v1/label-sets/") else "admin"
    if (method, path) == ("POST", "/v1/jobs"):
        return "write"
    return _LABEL_SETS.get((method, _asked_of_label_set(path)), "admin")


def _asked_of_label_set(path: str) -> str:
    """What follows a label set's name in a path; nothing where it has none."""
    before, _, rest = path.partition("/v1/label-sets/")
    return "" if before else rest.partition("/")[2]


@dataclass(frozen=True)
class Access:
    """Whom a server lets in.

    Attributes:
        keys: that it knows; None wants no key of anyone.
        hosts: names that it may be asked by, besides IP addresses, names without a dot, and this machine's own: no
            page of somebody else can be under one of these.
    """

    keys: KnownKeys | None = None
    hosts: frozenset[str] = field(default_factory=frozenset)

    def check(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Refuse a request that may not be answered.

        Raises:
            RequestRefused: it is for another host, or would change something under a content type that is not ours.
            KeyRefused, ScopeTooSmall: as they say.
            Unavailable: the keys were read too long ago.
        """
        self._check_host(headers.get(b"host", b"").decode("latin-1"))
        scope = needed(method, path)
        if self.keys is not None and scope is not None:
            key = self.keys.find(_secret(headers.get(b"authorization", b"")))
            if key is None:
                raise KeyRefused(
                    "this server wants a key that it knows, in a header `Authorization: Bearer KEY`: ask who runs it "
                    "for one (`logitcache keys make NAME`), and give it to the SDK as LOGITCACHE_KEY"
                )
            if not key.allows(scope):
                raise ScopeTooSmall(f"this needs a key of scope {scope}; {key.name!r} has {key.scope}", needed=scope)
        # Other methods make a browser ask first; a batch's route looks at its own type, and changes nothing.
        if method == "POST" and _asked_of_label_set(path) not in ("fetch", "missing"):
            media_type(headers.get(b"content-type"))

    def _check_host(self, host: str) -> None:
        name = _without_port(host).rstrip(".").lower()
        if "." not in name and ":" not in name:
            return
        if name in self.hosts or name.endswith(".localhost") or name == socket.gethostname().lower():
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise RequestRefused(
                f"this server does not go by the name {name[:80]!r}; if it should, start it with --allow-host",
                status=421,
            ) from None


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and host.count(":") == 1 else host


def _secret(header: bytes) -> str:
    kind, _, secret = header[:MOST_KEY_BYTES].decode("latin-1").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else ""


class Guarded:
    """Wraps an app: what `Access` refuses does not reach it."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access
        self._reading: asyncio.Future[None] | None = None
        self._reader = CapacityLimiter(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._look(scope["method"], scope["path"])
            self._access.check(scope["method"], scope["path"], dict(scope["headers"]))
        except LogitcacheError as error:
            challenge = {"WWW-Authenticate": "Bearer"} if isinstance(error, KeyRefused) else None
            await problem_response(scope, error, challenge)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    async def _look(self, method: str, path: str) -> None:
        """Have the keys read again, in a thread, where they are needed and old; one that hangs is waited for shortly.

        Raises:
            Unavailable, StorageFault: as `KnownKeys.read_again`.
        """
        keys = self._access.keys
        if keys is None or not keys.are_old or needed(method, path) is None:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.ensure_future(to_thread.run_sync(keys.read_again, limiter=self._reader))
        reading = self._reading
        await asyncio.wait({reading}, timeout=READ_S)
        if reading.done():
            reading.result()
