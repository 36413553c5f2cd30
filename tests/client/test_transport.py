"""How bytes travel: what a connection may do between a request and its answer, right, wrong and late."""

import functools
import gc
import itertools
import logging
import shlex
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.client.raw_server import Connection, RawServer, always, answering

from logitcache.client import HttpLabelSet, connecting
from logitcache.client import transport as transports
from logitcache.client.connecting import AnswerLate, ConnectFailed, HostUnknown, ServerUntrusted
from logitcache.client.deadline import Deadline
from logitcache.client.transport import (
    MAX_TEXT_BYTES,
    MOST_IDLE,
    Answer,
    AnswerTooLong,
    ConnectionBroke,
    DirectTransport,
)
from logitcache.labels.errors import HostNotFound, InvalidRequest, MalformedMessage, ServerUnreachable, UntrustedServer

Serve = Callable[..., RawServer]

BODY = b"0123456789" * 2


def http(*lines: str, body: bytes = b"", status: str = "200 OK", version: str = "HTTP/1.1") -> bytes:
    return "\r\n".join((f"{version} {status}", *lines, "\r\n")).encode("latin-1") + body


PLAIN = http("Content-Type: a/b", f"Content-Length: {len(BODY)}", body=BODY)
CHUNKED = http(
    "Content-Type: a/b",
    "Transfer-Encoding: chunked",
    body=b"A;ext=1\r\n" + BODY[:10] + b"\r\na\r\n" + BODY[10:] + b"\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n",
)
TWO_COOKIES = http("Set-Cookie: a=1", f"Content-Length: {len(BODY)}", "Set-Cookie: b=2", body=BODY)
LONG_HEAD = http(f"X-Long: {'x' * 20_000}", f"Content-Length: {len(BODY)}", body=BODY)

KEPT = {
    "plain": PLAIN,
    "names in any case": http(f"CONTENT-LENGTH: {len(BODY)}", body=BODY),
    "white space around values": http(f"content-length: \t{len(BODY)} \t", "X:", body=BODY),
    "no reason": http(f"Content-Length: {len(BODY)}", status="200", body=BODY),
    "an empty reason": http(f"Content-Length: {len(BODY)}", status="200 ", body=BODY),
    "kept in so many words": http("Connection: keep-alive", f"Content-Length: {len(BODY)}", body=BODY),
    "a last line that ends without CR": PLAIN.replace(b"\r\n\r\n", b"\n\r\n"),
    "an empty line without CR": PLAIN.replace(b"\r\n\r\n", b"\r\n\n"),
    "bytes that are no ASCII": http("X: \xe4\xff", f"Content-Length: {len(BODY)}", body=BODY),
}
UNTIL_THE_END = {
    "no length": http("Content-Type: a/b", body=BODY),
    "HTTP/1.0": http("Content-Type: a/b", body=BODY, version="HTTP/1.0"),
}
CLOSED = UNTIL_THE_END | {
    "chunked, with trailers": CHUNKED,
    "chunked, said twice": CHUNKED.replace(b"Content-Type", b"Content-Length: 5\r\nContent-Type"),
    "HTTP/1.0 with a length": http(f"Content-Length: {len(BODY)}", body=BODY, version="HTTP/1.0"),
    "to be closed": http("Connection: close", f"Content-Length: {len(BODY)}", body=BODY),
    "to be closed, among others": http("Connection: TE, Close", f"Content-Length: {len(BODY)}", body=BODY),
    "after 100": http(status="100 Continue") + PLAIN,
    "after early hints": http("Link: </x>", status="103 Early Hints") + PLAIN,
    "after several": http("Content-Length: 0", status="102 P") + http(status="100 C") + http(status="103 H") + PLAIN,
    "a length said twice": http(f"Content-Length: {len(BODY)}", f"Content-Length: {len(BODY)}", body=BODY),
    "two cookies": TWO_COOKIES,
    "a long head": LONG_HEAD,
    "a folded line": http(f"X: a\r\n b: c\r\nContent-Length: {len(BODY)}", body=BODY),
    "a folded line after the length": http(
        f"Content-Length: {len(BODY)}", "Connection: keep-alive,\r\n close", body=BODY
    ),
    "a line that ends without CR, after the length": http(
        f"Content-Length: {len(BODY)}", "X: y\nConnection: close", body=BODY
    ),
    "lines that end without CR": PLAIN.replace(b"\r\n", b"\n"),
    "some lines that end without CR": PLAIN.replace(b"\r\nContent-Length", b"\nContent-Length"),
    "a length with zeros": http(f"Content-Length: {len(BODY):020}", body=BODY),
}


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(*arguments: Any, **options: Any) -> RawServer:
            server = RawServer(*arguments, **options)
            stack.callback(server.stop)
            return server

        yield start


@pytest.mark.parametrize("name", [*KEPT, *CLOSED])
def test_an_answer_is_understood_and_its_connection_kept_only_where_its_end_is_beyond_doubt(
    serve: Serve, name: str
) -> None:
    answer = KEPT.get(name) or CLOSED[name]
    server = serve(answering(answer) if name in UNTIL_THE_END else always(answer))
    for _ in range(2):
        found = server.exchange(b"x")
        assert (found.status, found.is_success, bytes(found.body)) == (200, True, BODY)
    assert server.connections == (1 if name in KEPT else 2)


def test_headers_are_told_by_lower_case_name(serve: Serve) -> None:
    for answer in (PLAIN, CHUNKED):
        assert serve(answering(answer)).exchange().headers["content-type"] == "a/b"


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (http(status="204 No Content"), 204, b""),
        (http("Content-Length: 5", status="304 Not Modified"), 304, b""),
        (http("Content-Length: 0"), 200, b""),
        (http("Content-Length: 4", status="404 Not Found", body=b"gone"), 404, b"gone"),
        (http(status="502 Bad Gateway", body=b"<h1>bad</h1>"), 502, b"<h1>bad</h1>"),
        (http("Transfer-Encoding: chunked", status="503 Busy", body=b"3\r\nno!\r\n0\r\n\r\n"), 503, b"no!"),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_other_statuses_come_with_what_they_have(serve: Serve, answer: bytes, status: int, body: bytes) -> None:
    found = serve(answering(answer)).exchange()
    assert (found.status, found.is_success, bytes(found.body)) == (status, status < 300, body)


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED])
def test_a_body_can_be_written_to_and_is_aligned(serve: Serve, answer: bytes) -> None:
    body = np.frombuffer(serve(answering(answer)).exchange().body, np.uint8)
    body[0] = 7
    assert body.ctypes.data % 8 == 0


class Piecemeal(ssl.SSLContext):
    """Makes connections that receive, and send, no more bytes at once than ``sizes`` say, the last from then on."""

    sizes: tuple[int, ...] = (1,)

    def wrap_socket(self, sock: socket.socket, *_: Any, **__: Any) -> Any:
        sizes = itertools.chain(self.sizes, itertools.repeat(self.sizes[-1]))

        class Limited(socket.socket):
            def recv_into(self, buffer: Any, *_: Any) -> int:
                return super().recv_into(memoryview(buffer)[: next(sizes)])

            def send(self, data: Any, *_: Any) -> int:
                return super().send(data[: next(sizes)] if self.gettimeout() else b"")

        return Limited(fileno=sock.detach())


def piecemeal(*sizes: int) -> Piecemeal:
    context = Piecemeal(ssl.PROTOCOL_TLS_CLIENT)
    context.sizes = sizes
    return context


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED, LONG_HEAD, CLOSED["after several"]])
def test_a_request_and_its_answer_may_travel_byte_by_byte(serve: Serve, answer: bytes) -> None:
    server = serve(always(answer), trust=piecemeal(1))
    assert bytes(server.exchange(b"content").body) == BODY
    assert server.requests == [
        f"POST /path HTTP/1.1\r\nHost: {server.address}\r\nA: b\r\nContent-Length: 7\r\n\r\ncontent".encode()
    ]


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED, CLOSED["lines that end without CR"]])
def test_an_answer_may_be_split_at_any_byte(serve: Serve, answer: bytes) -> None:
    server = serve(always(answer))
    for place in range(1, len(answer)):
        server.transport = DirectTransport(f"http://{server.address}", piecemeal(1 << 20, place, 1 << 20))
        assert bytes(server.exchange().body) == BODY
        server.transport.close()


def test_what_an_earlier_answer_left_in_memory_is_not_read_again(serve: Serve) -> None:
    other = http("Content-Type: c/d", "X: a long line", "Content-Length: 3", body=b"abc")
    pieces = piecemeal(1 << 20, 1 << 20, 1 << 20, 5)  # a request, its answer, another request, its answer bit by bit
    server = serve(answering(PLAIN, other, PLAIN), trust=pieces)
    assert [bytes(server.exchange().body) for _ in range(3)] == [BODY, b"abc", BODY]
    assert server.connections == 1


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED[: -len(b"\r\n")], TWO_COOKIES, CLOSED["after several"]])
def test_an_answer_that_is_cut_off_anywhere_is_a_broken_connection_and_no_answer(serve: Serve, answer: bytes) -> None:
    server = serve(lambda connection: answering(answer[: connection.number])(connection))
    for _ in range(len(answer)):
        with pytest.raises(ConnectionBroke):
            server.exchange()
    assert server.connections == len(answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"\r\n\r\n",
        b"220 mail.example ESMTP\r\n\r\n" * 1000,
        b"\x15\x03\x01\x00\x02\x02" * 10_000,
        b"x" * 60_000 + b"\r\n\r\n",
        b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 20x OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
        http("Content-Length: 5", "Content-Length: 4", body=b"12345"),
        http("Content-Length: 5, 5", body=b"12345"),
        http("Content-Length: -5", body=b"12345"),
        http("Content-Length: +5", body=b"1234"),
        http("Content-Length: five", body=b"12345"),
        http("Transfer-Encoding: chunked", body=b"x\r\n12345\r\n0\r\n\r\n"),
        http("Transfer-Encoding: chunked", body=b"-5\r\n12345\r\n0\r\n\r\n"),
        http(f"X: {'x' * 70_000}", "Content-Length: 0"),
        http(*(f"X-{number}: x" for number in range(2000)), "Content-Length: 0"),
    ],
    ids=lambda answer: ascii(answer[:40]),
)
def test_what_is_no_answer_is_a_broken_connection_told_in_short(serve: Serve, answer: bytes) -> None:
    with pytest.raises(ConnectionBroke) as told:
        serve(answering(answer)).exchange()
    assert 0 < len(str(told.value)) <= 200


@pytest.mark.parametrize(
    "answer",
    [
        PLAIN,
        http("Content-Length: 999999999999999999999", body=BODY),
        CHUNKED,
        TWO_COOKIES,
        http(body=BODY),
        http(f"Content-Length: {MAX_TEXT_BYTES + 1}", status="404 Not Found"),
    ],
    ids=["plain", "endless", "chunked", "two cookies", "no length", "a problem"],
)
def test_more_bytes_than_an_answer_can_have_are_refused(serve: Serve, answer: bytes) -> None:
    server = serve(answering(answer))
    with pytest.raises(AnswerTooLong, match=f"{MAX_TEXT_BYTES:,}" if b"404" in answer else "19"):
        server.exchange(most_bytes=len(BODY) - 1)
    if b"404" not in answer and b"999" not in answer:
        assert bytes(server.exchange(most_bytes=len(BODY)).body) == BODY


def test_a_problem_may_be_longer_than_a_success(serve: Serve) -> None:
    for lines in (["Content-Length: 20"], []):
        found = serve(answering(http(*lines, status="409 Conflict", body=BODY))).exchange(most_bytes=1)
        assert bytes(found.body) == BODY


@pytest.mark.parametrize(
    ("begun", "piece"),
    [
        (http("Transfer-Encoding: chunked", body=b"-1\r\n"), b"x" * 60_000),
        (http("Transfer-Encoding: chunked", body=b"0\r\n"), b"X: " + b"x" * 60_000 + b"\r\n"),
        (http("Transfer-Encoding: chunked"), b"1;" + b"x" * 60_000 + b"\r\nx\r\n"),
    ],
    ids=["a chunk", "trailers", "chunks' extensions"],
)
def test_an_answer_without_an_end_is_given_up(serve: Serve, begun: bytes, piece: bytes) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(begun)
        connection.send_for_ever(piece)

    with pytest.raises(AnswerTooLong, match="framing"):
        serve(script).exchange()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("size", [50, 20_000], ids=["with the head", "after the head"])
def test_bytes_after_an_answer_are_not_the_next_one(serve: Serve, *, at_once: bool, size: int) -> None:
    received, sent = threading.Event(), threading.Event()
    wrong = http("Content-Length: 5", body=b"wrong")
    right = http(f"Content-Length: {size}", body=b"r" * size)

    def script(connection: Connection) -> None:
        if connection.number == 0:
            connection.request()
            connection.send(right + wrong if at_once else right)
            assert received.wait(20)
            if not at_once:
                connection.send(wrong)
            sent.set()
        while connection.request():
            connection.send(right)

    server = serve(script)
    for _ in range(2):
        assert bytes(server.exchange().body) == b"r" * size
        received.set()
        assert sent.wait(20)
    assert server.connections == 2


def test_a_connection_that_was_closed_while_it_was_idle_is_replaced(serve: Serve) -> None:
    closed = threading.Event()

    def script(connection: Connection) -> None:
        answering(PLAIN)(connection)
        connection.socket.shutdown(socket.SHUT_RDWR)
        closed.set()

    server = serve(script)
    for number in range(1, 4):
        assert server.exchange().status == 200
        assert server.connections == number
        assert closed.wait(20)
        closed.clear()


def test_of_idle_connections_one_that_is_still_open_is_used(serve: Serve) -> None:
    asked, answered, closed = threading.Event(), threading.Event(), threading.Event()

    def script(connection: Connection) -> None:
        if connection.number == 0:
            connection.request()
            asked.set()
            assert answered.wait(20)
            connection.send(PLAIN)
            connection.socket.shutdown(socket.SHUT_RDWR)
            closed.set()
        else:
            always(PLAIN)(connection)

    server = serve(script)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.exchange)
        assert asked.wait(20)
        server.exchange()
        answered.set()
        first.result(20)
    assert closed.wait(20)
    server.exchange()
    assert server.connections == 2


def test_a_connection_that_was_idle_for_too_long_is_replaced(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(always(PLAIN))
    server.exchange()
    monkeypatch.setattr(transports, "KEEPALIVE_S", 0.0)
    server.exchange()
    assert server.connections == 2


def test_an_answer_to_half_a_request_counts(serve: Serve) -> None:
    def script(connection: Connection) -> None:
        connection.socket.recv(10)
        connection.send(http("Content-Length: 3", status="413 Too Large", body=b"big"))

    found = serve(script).exchange(bytes(8 << 20))
    assert (found.status, bytes(found.body)) == (413, b"big")


def test_a_connection_that_ends_within_a_request_is_broken(serve: Serve) -> None:
    with pytest.raises(ConnectionBroke):
        serve(lambda connection: connection.socket.recv(10)).exchange(bytes(8 << 20))


@pytest.mark.parametrize(
    ("begun", "piece"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"z"),
        (http(f"X: {'x' * 20_000}")[:-2], b"X: z\r\n"),
        (b"", http(status="100 Continue")),
        (http("Content-Length: 100000"), b"z"),
        (http(), b"z"),
        (http("Transfer-Encoding: chunked"), b"0"),
        (http("Transfer-Encoding: chunked"), b"1\r\nz\r\n"),
        (http("Transfer-Encoding: chunked", body=b"0\r\n"), b"X: z\r\n"),
    ],
    ids=["head", "long head", "interim", "body", "body without length", "chunk size", "chunks", "trailers"],
)
def test_a_trickle_ends_at_the_deadline(serve: Serve, begun: bytes, piece: bytes) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(begun)
        connection.send_for_ever(piece, 0.02)

    assert_late(lambda: serve(script).exchange(deadline=Deadline(0.2)))


def assert_late(attempt: Callable[[], Any], timeout_s: float = 0.2) -> AnswerLate:
    began = time.monotonic()
    with pytest.raises(AnswerLate) as told:
        attempt()
    assert timeout_s <= time.monotonic() - began < timeout_s + 1.0
    return told.value


class Settable(Deadline):
    """A deadline that is over when a test says so."""

    is_over = False

    @property
    def remaining_s(self) -> float:
        return 0.0 if self.is_over else 20.0


def test_a_kept_connection_has_the_deadline_of_the_exchange_that_it_is_in(serve: Serve) -> None:
    server, deadline = serve(always(PLAIN)), Settable(20.0)
    server.exchange(deadline=deadline)
    deadline.is_over = True
    assert server.exchange().status == 200
    with pytest.raises(AnswerLate):
        server.exchange(deadline=deadline)
    assert (server.connections, len(server.requests)) == (1, 2)
    server.transport = DirectTransport(f"http://{server.address}")
    with pytest.raises(AnswerLate, match="time allowed"):
        server.exchange(deadline=deadline)
    assert server.connections == 1


def test_a_connection_whose_answer_is_late_is_hung_up_at_once_and_not_used_again(serve: Serve) -> None:
    hung_up = threading.Event()

    def script(connection: Connection) -> None:
        connection.request()
        if connection.number == 0:
            assert not connection.request()
            hung_up.set()
        connection.send(http("Content-Length: 1", body=b"%d" % connection.number))

    server = serve(script)
    with pytest.raises(AnswerLate) as held:
        server.exchange(deadline=Deadline(0.05))
    assert hung_up.wait(20), held
    assert bytes(server.exchange().body) == b"1"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of localhost that signed itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout key"
    names = "-out certificate -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run(shlex.split(f"{command} {names}"), cwd=folder, check=True, capture_output=True)
    both = folder / "both"
    both.write_text((folder / "certificate").read_text() + (folder / "key").read_text())
    return both


@pytest.fixture
def serve_tls(serve: Serve, certificate: Path) -> Serve:
    def start(script: Any, *, trust: ssl.SSLContext | None = None, **options: Any) -> RawServer:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
        trust = trust or ssl.create_default_context(cafile=certificate)
        return serve(script, tls=tls, trust=trust, **{"host": "localhost"} | options)

    return start


def test_a_connection_over_tls_is_kept(serve_tls: Serve) -> None:
    server = serve_tls(always(PLAIN))
    for _ in range(3):
        assert bytes(server.exchange(b"x" * 100_000).body) == BODY
    assert server.connections == 1


def test_a_label_set_is_asked_over_tls_with_the_certificates_of_the_environment(
    serve_tls: Serve, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    label_set = HttpLabelSet(f"HTTPS://{serve_tls(always(PLAIN)).address}", "digits")
    with pytest.raises(MalformedMessage, match="answered with a/b"):
        label_set.describe()
    label_set.close()


def test_bytes_after_an_answer_over_tls_are_not_the_next_one(serve_tls: Serve) -> None:
    right = http("Content-Length: 20000", body=b"r" * 20_000)
    server = serve_tls(always(right + http("Content-Length: 5", body=b"wrong")))
    for _ in range(2):
        assert bytes(server.exchange().body) == b"r" * 20_000
    assert server.connections == 2


@pytest.mark.parametrize("wrong", ["signer", "host"])
def test_a_certificate_of_nobody_or_of_another_host_is_refused(serve_tls: Serve, wrong: str) -> None:
    options: dict[str, Any] = {"trust": ssl.create_default_context()} if wrong == "signer" else {"host": "127.0.0.1"}
    with pytest.raises(ServerUntrusted, match="CERTIFICATE_VERIFY_FAILED"):
        serve_tls(always(PLAIN), **options).exchange()


@pytest.mark.parametrize("speaks", ["TLS", "plain HTTP"])
def test_a_server_that_cannot_be_trusted_is_an_error_at_once_that_says_what_to_do(
    serve_tls: Serve, serve: Serve, speaks: str
) -> None:
    def script(connection: Connection) -> None:
        connection.socket.recv(1 << 16)
        connection.send(PLAIN)

    server = serve_tls(always(PLAIN)) if speaks == "TLS" else serve(script)
    label_set = HttpLabelSet(f"https://{server.address}", "digits")
    with pytest.raises(UntrustedServer, match=r"cannot trust https://.*nothing was sent.*SSL_CERT_FILE.*http://"):
        label_set.describe()
    assert (server.connections, server.requests) == (1, [])
    label_set.close()


def test_a_handshake_that_is_cut_off_is_a_server_that_goes_away(serve: Serve) -> None:
    server = serve(lambda connection: connection.socket.recv(10), trust=ssl.create_default_context())
    with pytest.raises(ConnectFailed) as told:
        server.exchange()
    assert not isinstance(told.value, ServerUntrusted)


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_certificates_of_the_environment_that_cannot_be_read_are_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if content is not None:
        (tmp_path / "certificates").write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificates"))
    with pytest.raises(InvalidRequest, match="SSL_CERT_FILE"):
        HttpLabelSet("https://localhost", "digits")


class Shrinking(Deadline):
    """A deadline of which these seconds are left, one after the other, and then none."""

    def __init__(self, *left_s: float) -> None:
        super().__init__(left_s[0])
        self._left_s = list(left_s)

    @property
    def remaining_s(self) -> float:
        return self._left_s.pop(0) if self._left_s else 0.0


def test_a_handshake_has_the_time_that_connecting_left(serve: Serve) -> None:
    hung_up = threading.Event()

    def script(connection: Connection) -> None:
        while connection.socket.recv(1 << 16):
            pass
        hung_up.set()

    for left_s in (0.2, 0.0):
        server = serve(script, trust=ssl.create_default_context())
        held = assert_late(functools.partial(server.exchange, deadline=Shrinking(20.0, 20.0, left_s)), left_s)
        assert hung_up.wait(20), held
        hung_up.clear()


@pytest.mark.parametrize("over", ["tcp", "tls"])
def test_a_server_that_reads_slowly_cannot_stretch_the_deadline(serve: Serve, serve_tls: Serve, over: str) -> None:
    def script(connection: Connection) -> None:
        while not connection.server.stopped.wait(0.01):
            for _ in range(8):
                connection.socket.recv(1 << 14)

    server = (serve_tls if over == "tls" else serve)(script)
    assert_late(lambda: server.exchange(bytes(48 << 20), deadline=Deadline(0.2)))


def names(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> list[Any]:
    """Every name has these addresses; what was looked up."""
    asked: list[Any] = []

    def look_up(*name: Any, **_: Any) -> list[Any]:
        asked.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked


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


def test_a_request_is_these_bytes(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(always(PLAIN), host="[::1]", prefix="/a%20b/%C3%BC")
    port = server.server_address[1]
    asked = names(monkeypatch, ("127.0.0.1", port))
    for content in (None, b"", b"abc"):
        server.exchange(content)
    head = f"/a%20b/%C3%BC/path HTTP/1.1\r\nHost: [::1]:{port}\r\nA: b\r\n"
    assert [request.decode() for request in server.requests] == [
        f"GET {head}\r\n",
        f"POST {head}Content-Length: 0\r\n\r\n",
        f"POST {head}Content-Length: 3\r\n\r\nabc",
    ]
    assert asked == [("::1", port)]


def test_a_small_request_waits_for_no_acknowledgement(serve: Serve) -> None:
    server = serve(always(PLAIN))
    server.exchange()
    [connection] = server.transport._idle
    assert connection._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_each_thread_has_a_connection_and_no_more_are_kept_than_allowed(serve: Serve) -> None:
    threads = MOST_IDLE + 3
    together = threading.Barrier(threads)

    def script(connection: Connection) -> None:
        while request := connection.request():
            together.wait(20)
            content = request.partition(b"\r\n\r\n")[2]
            connection.send(http(f"Content-Length: {len(content)}", body=content))

    server = serve(script)
    contents = [b"%d" % number for number in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        for connections in (threads, threads + 3):
            found: Iterable[Answer] = pool.map(server.exchange, contents)
            assert [bytes(answer.body) for answer in found] == contents
            assert server.connections == connections


def test_closing_hangs_up_at_once_or_after_the_answer_that_is_under_way(serve: Serve) -> None:
    asked, closed, hung_up = threading.Event(), threading.Event(), threading.Semaphore(0)

    def script(connection: Connection) -> None:
        while request := connection.request():
            if request.startswith(b"POST"):
                asked.set()
                assert closed.wait(20)
            connection.send(PLAIN)
        hung_up.release()

    server = serve(script)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(server.exchange, b"x")
        assert asked.wait(20)
        server.exchange()
        server.transport.close()
        assert hung_up.acquire(timeout=20)
        closed.set()
        assert under_way.result(20).status == 200
    assert hung_up.acquire(timeout=20)
    with pytest.raises(RuntimeError, match="closed"):
        server.exchange()
    server.transport.close()


@pytest.mark.parametrize("in_a_cycle", [False, True])
def test_a_transport_that_is_forgotten_hangs_up_without_a_warning(serve: Serve, *, in_a_cycle: bool) -> None:
    hung_up = threading.Event()

    def script(connection: Connection) -> None:
        always(PLAIN)(connection)
        hung_up.set()

    server = serve(script)
    transport = DirectTransport(f"http://{server.address}")
    transport.exchange("GET", "", {}, None, 100, Deadline(20.0))
    if in_a_cycle:
        vars(transport)["itself"] = transport
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        del transport
        gc.collect()
    assert hung_up.wait(20)
    assert told == []
