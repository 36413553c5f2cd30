"""How bytes travel: what a connection may do between a request and its answer, right, wrong and late."""

import gc
import itertools
import socket
import ssl
import threading
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tests.client.answers import BODY, PLAIN, Serve, assert_late, http, names
from tests.client.raw_server import Connection, always, answering

from logitcache.client import transport as transports
from logitcache.client.connecting import AnswerLate
from logitcache.client.deadline import Deadline
from logitcache.client.transport import (
    MAX_TEXT_BYTES,
    MOST_IDLE,
    Answer,
    AnswerTooLong,
    ConnectionBroke,
    DirectTransport,
)

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
