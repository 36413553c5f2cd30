"""How bytes travel: an httpx transport whose every read and write ends at the call's deadline.

httpx bounds each read apart, so a trickle of bytes, or of header lines, would keep a call alive for ever. Here
httpcore's pool runs over a network backend that asks `deadline.current`. It knows nothing of label sets, and connects
directly: no proxies.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ssl import SSLContext
from typing import Any

import httpcore
import httpx

from logitcache.client import deadline

KEEPALIVE_S = 100.0
"""Idle seconds after which a connection is not used again: below the 120 s after which our server closes it. One that a
proxy closed sooner is replaced at once."""

_EXCEPTIONS: tuple[tuple[type[Exception], type[httpx.TransportError]], ...] = (
    (httpcore.ConnectTimeout, httpx.ConnectTimeout),
    (httpcore.PoolTimeout, httpx.PoolTimeout),
    (httpcore.TimeoutException, httpx.ReadTimeout),
    (httpcore.ConnectError, httpx.ConnectError),
    (httpcore.RemoteProtocolError, httpx.RemoteProtocolError),
    (httpcore.WriteError, httpx.WriteError),
    (httpcore.NetworkError, httpx.ReadError),
    (httpcore.LocalProtocolError, httpx.LocalProtocolError),
)


class DeadlineTransport(httpx.BaseTransport):
    """HTTP/1.1 over a pool of kept connections; `deadline.Deadline.applied` bounds what runs inside it."""

    def __init__(self, ssl_context: SSLContext | None = None) -> None:
        self._pool = httpcore.ConnectionPool(
            ssl_context=ssl_context, keepalive_expiry=KEEPALIVE_S, network_backend=_Backend()
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; the response's body is read as it is iterated.

        Raises:
            httpx.TransportError: no connection, a broken one, or the deadline.
        """
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        with _as_httpx():
            response = self._pool.handle_request(
                httpcore.Request(
                    request.method,
                    url,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(response), extensions=response.extensions
        )

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx():
            yield from self._response.iter_stream()

    def close(self) -> None:
        with _as_httpx():
            self._response.close()


@contextmanager
def _as_httpx() -> Iterator[None]:
    """Turn httpcore's exceptions into their twins of httpx, which any other transport would raise."""
    try:
        yield
    except tuple(theirs for theirs, _ in _EXCEPTIONS) as error:
        twin = next(ours for theirs, ours in _EXCEPTIONS if isinstance(error, theirs))
        raise twin(str(error)) from error


class _Stream(httpcore.NetworkStream):
    """A connection that gives each operation no more than the time that is left."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _bounded(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _bounded(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        bounded = _bounded(timeout, httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, bounded))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """TCP alone; the connections it makes are `_Stream`s."""

    def __init__(self) -> None:
        self._backend = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        bounded = _bounded(timeout, httpcore.ConnectTimeout)
        return _Stream(self._backend.connect_tcp(host, port, bounded, local_address, socket_options))


def _bounded(timeout: float | None, expired: type[Exception]) -> float | None:
    limit = deadline.current()
    if limit is None:
        return timeout
    if not (remaining_s := limit.remaining_s):
        raise expired("the time allowed for the call is over")
    return remaining_s if timeout is None else min(timeout, remaining_s)
