"""From a server's address to an open connection: the look-up of its name, TCP and TLS, each bounded in time.

It knows names, addresses and certificates, and nothing of HTTP. What cannot succeed by waiting, a name that nobody has
or a certificate that is refused, is told apart from a server that is away.
"""

import socket
import threading
from concurrent.futures import Future
from ssl import SSLCertVerificationError, SSLContext, SSLError
from typing import Any

from logitcache.client.deadline import Deadline

CONNECT_S = 10.0
"""Longest that one step may take: the look-up, the connection to one address, the handshake. So an address that takes
no connection does not keep the next one from being tried, and whoever waits is told why."""

_NO_SUCH_NAME = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}

_NO_TLS = {"WRONG_VERSION_NUMBER", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE", "HTTP_REQUEST"}
"""What OpenSSL's versions say of an answer that is none of TLS."""


class ConnectFailed(Exception):
    """There is no connection."""


class HostUnknown(ConnectFailed):
    """No host has this name."""


class ServerUntrusted(ConnectFailed):
    """Its certificate is refused, or it speaks no TLS. Nothing was sent to it."""


class AnswerLate(Exception):
    """The deadline passed."""


class Endpoint:
    """Where a server listens: a host and a port, and how to trust it. Safe to use from several threads."""

    def __init__(self, host: str, port: int, ssl_context: SSLContext | None) -> None:
        self._host, self._port, self._ssl_context = host, port, ssl_context
        self._lock = threading.Lock()
        self._look_up: Future[list[Any]] | None = None
        self._was_found = False

    def connect(self, deadline: Deadline) -> socket.socket:
        """A connection to the first of the host's addresses that takes it.

        Raises:
            HostUnknown, ServerUntrusted: waiting does not help.
            ConnectFailed: it may.
            AnswerLate: the deadline passed.
        """
        try:
            opened = self._opened(deadline)
            try:
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._ssl_context is None:
                    return opened
                opened.settimeout(_patience_s(deadline))
                return self._ssl_context.wrap_socket(opened, server_hostname=self._host)
            except BaseException:
                opened.close()
                raise
        except TimeoutError as error:
            remaining_s(deadline)
            raise ConnectFailed(f"it took no connection within {CONNECT_S:g} s") from error
        except (OSError, UnicodeError) as error:
            if isinstance(error, SSLCertVerificationError) or (isinstance(error, SSLError) and error.reason in _NO_TLS):
                raise ServerUntrusted(str(error)) from error
            raise ConnectFailed(str(error)) from error

    def _opened(self, deadline: Deadline) -> socket.socket:
        """As `socket.create_connection`, which allows each address the whole time anew."""
        refused = OSError("the name has no address")
        for family, kind, protocol, _, place in self._places(deadline):
            opened = socket.socket(family, kind, protocol)
            try:
                opened.settimeout(_patience_s(deadline))
                opened.connect(place)
                return opened
            except OSError as error:
                opened.close()
                refused = error
            except BaseException:
                opened.close()
                raise
        raise refused

    def _places(self, deadline: Deadline) -> list[Any]:
        """The host's addresses, looked up in one thread however many wait for it: nothing can end a look-up."""
        with self._lock:
            if self._look_up is None or self._look_up.done():
                self._look_up = _looked_up(self._host, self._port)
            look_up = self._look_up
        try:
            places = look_up.result(_patience_s(deadline))
        except TimeoutError as error:
            remaining_s(deadline)
            raise ConnectFailed(f"the look-up of {self._host!r} takes more than {CONNECT_S:g} s") from error
        except (socket.gaierror, UnicodeError) as error:
            # The name of a server that is started anew may be gone meanwhile, as names of containers are.
            if not self._was_found and (isinstance(error, UnicodeError) or error.errno in _NO_SUCH_NAME):
                raise HostUnknown(f"no host has the name {self._host[:80]!r} ({error})") from error
            raise ConnectFailed(f"the look-up of {self._host[:80]!r} failed: {error}") from error
        self._was_found = True
        return places


def remaining_s(deadline: Deadline) -> float:
    """Seconds that are left.

    Raises:
        AnswerLate: none.
    """
    if not (left_s := deadline.remaining_s):
        raise AnswerLate("the time allowed for the call is over")
    return left_s


def _patience_s(deadline: Deadline) -> float:
    return min(remaining_s(deadline), CONNECT_S)


def _looked_up(host: str, port: int) -> "Future[list[Any]]":
    """The addresses of a host, as soon as a thread of their own has them."""
    found: Future[list[Any]] = Future()

    def look_up() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            found.set_exception(error)

    try:
        threading.Thread(target=look_up, name="logitcache-look-up", daemon=True).start()
    except RuntimeError as error:  # too many threads, or the interpreter ends
        found.set_exception(OSError(str(error)))
    return found
