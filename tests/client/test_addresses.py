"""Which address of which name a connection is made to, and by when."""

import logging
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from tests.client.answers import BODY, PLAIN, Serve, assert_late, http, names
from tests.client.raw_server import Connection, always, answering

from logitcache.client import HttpLabelSet, connecting
from logitcache.client import transport as transports
from logitcache.client.connecting import ConnectFailed, HostUnknown
from logitcache.client.deadline import Deadline
from logitcache.client.transport import DirectTransport
from logitcache.labels.errors import HostNotFound, MalformedMessage, ServerUnreachable


@pytest.fixture
def black_hole() -> Iterator[tuple[str, int]]:
    """An address that answers no attempt to connect: its queue is full."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()


@pytest.mark.parametrize("addresses", [1, 6])
def test_addresses_that_do_not_answer_end_at_one_deadline(
    black_hole: tuple[str, int], addresses: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, *[black_hole] * addresses)
    transport = DirectTransport("http://example")
    assert_late(lambda: transport.exchange("GET", "", {}, None, 1, Deadline(0.3)), 0.3)


def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    serve: Serve, black_hole: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(always(PLAIN), host="two-addresses.example")
    names(monkeypatch, black_hole, ("127.0.0.1", server.server_address[1]))
    monkeypatch.setattr(connecting, "CONNECT_S", 0.1)
    assert server.exchange().status == 200
    names(monkeypatch, black_hole)
    with pytest.raises(ConnectFailed, match=r"no connection within 0\.1 s"):
        DirectTransport("http://example").exchange("GET", "", {}, None, 1, Deadline(20.0))


class LookUp:
    """In the place of the look-up of names: it waits for ``gate``, and gives or raises what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gate, self.asked = threading.Event(), 0
        self.address: tuple[str, int] | None = None
        self.error: Exception = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, *_: Any, **__: Any) -> list[Any]:
        self.asked += 1
        assert self.gate.wait(30)
        if self.address is None:
            raise self.error
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", self.address)]


@pytest.fixture
def look_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[LookUp]:
    looking = LookUp(monkeypatch)
    yield looking
    looking.gate.set()
    for thread in threading.enumerate():
        if thread.name == "logitcache-look-up":
            thread.join(30)
            assert not thread.is_alive()


NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_look_up_that_hangs_ends_at_the_deadline_and_is_one_thread_however_often_it_is_waited_for(
    look_up: LookUp, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(always(PLAIN), host="slow.example")
    for _ in range(5):
        assert_late(lambda: server.exchange(deadline=Deadline(0.05)), 0.05)
    assert look_up.asked == 1
    with monkeypatch.context() as patch:
        patch.setattr(connecting, "CONNECT_S", 0.05)
        with pytest.raises(ConnectFailed, match=r"look-up of 'slow\.example' takes more than 0\.05 s"):
            server.exchange()
    assert look_up.asked == 1
    look_up.address = ("127.0.0.1", server.server_address[1])
    look_up.gate.set()
    assert server.exchange().status == 200


@pytest.mark.parametrize("error", [NO_NAME, socket.gaierror(socket.EAI_NODATA, "No address"), UnicodeError("idna")])
def test_a_name_that_nobody_has_is_an_error_at_once_that_says_so(look_up: LookUp, error: Exception) -> None:
    look_up.error = error
    look_up.gate.set()
    label_set = HttpLabelSet("http://no-such-host.example:8000", "digits")
    with pytest.raises(HostNotFound, match=r"no host has the name 'no-such-host\.example' .*check how it is written"):
        label_set.describe()
    assert look_up.asked == 1


def test_a_name_that_cannot_be_looked_up_for_now_is_looked_up_again(look_up: LookUp, serve: Serve) -> None:
    server = serve(always(http("Content-Type: a/b", "Content-Length: 0")), host="later.example")
    look_up.gate.set()
    label_set = HttpLabelSet(f"http://{server.address}", "digits", retries=2)
    with pytest.raises(ServerUnreachable, match=r"look-up of 'later\.example' failed: .*Temporary failure"):
        label_set.describe()
    assert look_up.asked == 3
    look_up.address = ("127.0.0.1", server.server_address[1])
    with pytest.raises(MalformedMessage, match="a/b"):
        label_set.describe()
    label_set.close()


def test_the_name_of_a_server_that_was_there_may_be_gone_for_a_while(look_up: LookUp, serve: Serve) -> None:
    server = serve(answering(http("Content-Length: 0", "Connection: close")), host="container.example")
    look_up.address, look_up.error = ("127.0.0.1", server.server_address[1]), NO_NAME
    look_up.gate.set()
    assert server.exchange().status == 200
    look_up.address = None
    with pytest.raises(ConnectFailed) as told:
        server.exchange()
    assert not isinstance(told.value, HostUnknown)


def test_a_look_up_for_which_there_is_no_thread_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ConnectFailed, match="can't start new thread"):
        DirectTransport("http://example").exchange("GET", "", {}, None, 1, Deadline(20.0))


def test_a_server_that_keeps_silent_is_told_of_while_it_is_waited_for(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transports, "SILENCE_S", 0.05)
    told = threading.Event()

    def script(connection: Connection) -> None:
        connection.request()
        assert told.wait(20)
        connection.send(PLAIN)

    class Noticing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    logger, handler = logging.getLogger("logitcache.client"), Noticing(logging.WARNING)
    logger.addHandler(handler)
    server = serve(script)
    try:
        assert bytes(server.exchange().body) == BODY
    finally:
        logger.removeHandler(handler)
    assert f"{server.address} has sent nothing for 0.05 s; waiting for its answer for 20 s more" in caplog.text


def test_the_first_address_that_takes_a_connection_is_used(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(always(PLAIN), host="two-addresses.example")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        names(monkeypatch, unused.getsockname(), ("127.0.0.1", server.server_address[1]))
        assert server.exchange().status == 200


@pytest.mark.parametrize("url", ["http://a..b", f"http://{'a' * 300}.example", "http://127.0.0.1:1"])
def test_a_host_that_is_not_there_is_no_connection(url: str) -> None:
    with pytest.raises(ConnectFailed, match=r"\w"):
        DirectTransport(url).exchange("GET", "", {}, None, 1, Deadline(20.0))


def test_a_name_without_addresses_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    names(monkeypatch)
    with pytest.raises(ConnectFailed, match="no address"):
        DirectTransport("http://example").exchange("GET", "", {}, None, 1, Deadline(20.0))


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_a_port_that_is_not_told_is_that_of_the_scheme(scheme: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = names(monkeypatch)
    with pytest.raises(ConnectFailed):
        DirectTransport(f"{scheme}://example", ssl.create_default_context() if port == 443 else None).exchange(
            "GET", "", {}, None, 1, Deadline(20.0)
        )
    assert asked == [("example", port)]
