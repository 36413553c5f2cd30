"""Requests byte by byte: what a connection carries in order, what is refused and when, and clients that go away."""

import gc
import http.client
import json
import re
import socket
from pathlib import Path

import httpx
import pytest

from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS, ProblemProtocol
from logitcache.server.http.serve import running

HOST = b"Host: x\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"
LAST = b"GET /healthz HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n"
POST = b"POST /v1/label-sets/digits/fetch HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
IDS = b'{"ids": [4096]}'
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
ONE_CHUNK = b"%x\r\n%s\r\n" % (len(IDS), IDS)


def connected(server: httpx.Client) -> socket.socket:
    return socket.create_connection((server.base_url.host, server.base_url.port or 0), timeout=10)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def exchanged(server: httpx.Client, *pieces: bytes) -> bytes:
    """All that is answered to these bytes; the server has to close the connection."""
    with connected(server) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return rest(connection)


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", answer)]


def test_requests_sent_at_once_are_answered_in_their_order(server: httpx.Client) -> None:
    lengths = POST + b"Content-Length: %d\r\n\r\n%s" % (len(IDS), IDS)
    answer = exchanged(server, HEALTH + lengths + b"GET /nothing HTTP/1.1\r\n" + HOST + b"\r\n" + LAST)
    assert statuses(answer) == [200, 200, 404, 200]
    assert answer.index(b"4096.0") < answer.index(b"/nothing")


def test_what_was_asked_before_garbage_is_answered(server: httpx.Client) -> None:
    answer = exchanged(server, HEALTH + b"\x01 garbage\r\n\r\n")
    assert statuses(answer) == [200]
    assert answer.endswith(b"ok\n")


def test_bytes_behind_a_body_are_not_taken_for_it(server: httpx.Client) -> None:
    answer = exchanged(server, POST + b"Content-Length: %d\r\n\r\n%s" % (len(IDS) - 2, IDS))
    assert statuses(answer) == [400]
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["detail"].startswith("the body is not JSON")


def test_a_refusal_never_stands_in_the_place_of_another_answer(server: httpx.Client) -> None:
    assert exchanged(server, HEALTH + CHUNKED + b"not a length\r\n") == b""


@pytest.mark.parametrize("piece", [b"not a length\r\n", ONE_CHUNK + b"not a length\r\n"])
def test_a_chunked_body_that_cannot_be_read_is_refused(server: httpx.Client, piece: bytes) -> None:
    answer = exchanged(server, CHUNKED, piece)
    assert statuses(answer) == [400]
    assert b"application/problem+json" in answer


def test_a_chunked_body_may_come_in_any_pieces_and_end_with_trailers(server: httpx.Client) -> None:
    whole = CHUNKED + ONE_CHUNK[:-2] + b"\r\n5\r\n     \r\n0\r\nX-Trailer: x\r\n\r\n"
    answers = exchanged(server, *(whole[at : at + 7] for at in range(0, len(whole), 7)), LAST)
    assert statuses(answers) == [200, 200]
    assert b"[4096.0]" in answers


def test_trailers_without_an_end_are_refused(server: httpx.Client) -> None:
    trailer = b"X-Trailer: " + b"x" * 1000 + b"\r\n"
    with connected(server) as connection:
        connection.sendall(CHUNKED + ONE_CHUNK)
        connection.sendall(b"0\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(100_000):
                connection.sendall(trailer)
    assert server.get("/healthz").status_code == 200


def test_headers_without_number_are_refused_and_a_hundred_are_taken(server: httpx.Client) -> None:
    short = b"ab:cd\r\n"
    assert statuses(exchanged(server, LAST[:-2] + short * (MAX_HEADERS - 2) + b"\r\n")) == [200]
    answer = exchanged(server, LAST[:-2] + short * (MAX_HEADERS - 1) + b"\r\n")
    assert statuses(answer) == [400]
    assert b"application/problem+json" in answer


def test_trailers_without_number_are_refused(server: httpx.Client) -> None:
    answer = exchanged(server, CHUNKED + ONE_CHUNK[:-2] + b"\r\n0\r\n" + b"ab:cd\r\n" * MAX_HEADERS + b"\r\n")
    assert statuses(answer) == [400]


def test_what_was_asked_is_not_kept_once_it_is_answered(finished_store: Path) -> None:
    with running(create_app(Catalog(finished_store))) as url, connected(httpx.Client(base_url=url)) as connection:
        connection.sendall(HEALTH[:-2] + b"X-Marked: mark-of-this-test\r\n\r\n")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
        # By type, since asking some objects for their class runs code of theirs.
        protocols = [each for each in gc.get_objects() if issubclass(type(each), ProblemProtocol)]
        held = [each for each in protocols if each.cycle is not None]
        assert held
        for each in held:
            assert "mark-of-this-test" not in repr((each.headers, each.scope, each.cycle.scope))


UNREAD = b"Content-Length: 1000000000\r\n\r\n"


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\n" + HOST, 200),
        (b"GET /nothing HTTP/1.1\r\n" + HOST, 404),
        (b"PUT /healthz HTTP/1.1\r\n" + HOST, 405),
        (POST, 413),
        (POST.replace(b"/json", b"/xml"), 415),
        (POST.replace(b"Host: x", b"Host: evil.example"), 421),
    ],
)
def test_a_connection_ends_with_an_answer_that_came_before_the_body(
    server: httpx.Client, asked: bytes, status: int
) -> None:
    answer = exchanged(server, asked + UNREAD)
    assert statuses(answer) == [status]
    assert b"connection: close" in answer


def test_an_answer_to_a_body_that_is_there_and_was_not_read_leaves_the_connection_open(server: httpx.Client) -> None:
    refused = POST.replace(b"/json", b"/xml") + b"Content-Length: %d\r\n\r\n%s" % (len(IDS), IDS)
    assert statuses(exchanged(server, refused, LAST)) == [415, 200]


def test_what_is_refused_before_it_is_a_request_is_counted(finished_store: Path) -> None:
    app = create_app(Catalog(finished_store))
    with running(app) as url:
        exchanged(httpx.Client(base_url=url), b"\x01 garbage\r\n\r\n")
    labels = {"method": "other", "route": "unmatched", "status": "400"}
    assert app.state.metrics.registry.get_sample_value("logitcache_requests_total", labels) == 1
    assert app.state.metrics.registry.get_sample_value("logitcache_errors_total", {"code": "request-refused"}) == 1


def test_what_a_head_may_have_is_counted_anew_for_each_request(server: httpx.Client) -> None:
    connection = http.client.HTTPConnection(server.base_url.host, server.base_url.port, timeout=10)
    connection.connect()
    first = connection.sock
    for _ in range(5):
        headers = {"Content-Type": "application/json", "X-Long": "x" * (MAX_HEAD_BYTES // 2)}
        connection.request("POST", "/v1/label-sets/digits/fetch", IDS, headers)
        answer = connection.getresponse()
        assert (answer.status, b"[4096.0]" in answer.read()) == (200, True)
        connection.request("GET", "/healthz", headers={"X-Long": headers["X-Long"]})
        assert connection.getresponse().read() == b"ok\n"
    assert connection.sock is first
    connection.close()


def test_a_body_is_not_counted_as_a_head(server: httpx.Client) -> None:
    body = IDS[:-1] + b" " * (4 * MAX_HEAD_BYTES) + b"}"
    with connected(server) as connection:
        connection.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert connection.recv(65_536).startswith(b"HTTP/1.1 100")
        for at in range(0, len(body), 50_000):
            connection.sendall(body[at : at + 50_000])
        connection.sendall(LAST)
        assert statuses(rest(connection)) == [200, 200]


def test_http_1_0_needs_no_host_and_later_versions_do(server: httpx.Client) -> None:
    assert statuses(exchanged(server, b"GET /healthz HTTP/1.0\r\n\r\n")) == [200]
    assert statuses(exchanged(server, b"GET /healthz HTTP/1.1\r\n\r\n")) == [400]
    assert statuses(exchanged(server, b"GET /healthz HTTP/2.0\r\n\r\n")) == [400]


def test_an_id_with_a_number_sign_that_is_not_escaped_names_no_other_example(server: httpx.Client) -> None:
    answer = exchanged(server, b"GET /v1/label-sets/digits/examples/5#6 HTTP/1.1\r\n" + HOST + b"\r\n")
    assert statuses(answer) == [400]


UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"


def test_another_protocol_is_not_changed_to(server: httpx.Client) -> None:
    with connected(server) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n" + HOST + UPGRADE + b"\r\n")
        answer = rest(connection)
    assert statuses(answer) == [200]
    assert b"connection: close" in answer.lower()


def test_what_comes_behind_an_upgrade_or_connect_is_not_waited_for_in_vain(server: httpx.Client) -> None:
    for first in (b"GET /healthz HTTP/1.1\r\n" + HOST + UPGRADE, b"CONNECT /healthz HTTP/1.1\r\n" + HOST):
        answer = exchanged(server, first + b"\r\n" + LAST)
        assert len(statuses(answer)) == 1
        assert b"connection: close" in answer.lower()


@pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip", b"chunked, chunked", b"identity"])
def test_another_transfer_coding_is_refused(server: httpx.Client, coding: bytes) -> None:
    framed = b"Transfer-Encoding: " + coding + b"\r\n\r\n" + ONE_CHUNK
    assert statuses(exchanged(server, POST + framed))[0] == 400


@pytest.mark.parametrize("line", [b"GET /healthz HTTP/2.0", b"GET /healthz HTTP/0.9", b"GET /healthz HTTP/1.2"])
def test_another_version_is_refused(server: httpx.Client, line: bytes) -> None:
    assert statuses(exchanged(server, line + b"\r\n" + HOST + b"\r\n")) == [400]


@pytest.mark.parametrize(
    "framed", [b"Content-Length: 15\r\n\r\n" + IDS, b"Transfer-Encoding: chunked\r\n\r\n" + ONE_CHUNK]
)
def test_a_body_that_the_parser_would_lose_is_refused(server: httpx.Client, framed: bytes) -> None:
    assert statuses(exchanged(server, POST + UPGRADE + framed)) == [400]


@pytest.mark.parametrize("sent", [b"", IDS[:5]])
def test_a_client_that_goes_away_is_counted_as_gone(finished_store: Path, sent: bytes) -> None:
    app = create_app(Catalog(finished_store))
    with running(app) as url, connected(httpx.Client(base_url=url)) as connection:
        connection.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 15\r\n\r\n" + sent)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 100")
    # The server has stopped: whatever it was answering has been counted.
    labels = {"method": "POST", "route": "/v1/label-sets/{name}/fetch", "status": "499"}
    assert app.state.metrics.registry.get_sample_value("logitcache_requests_total", labels) == 1
    assert app.state.metrics.registry.get_sample_value("logitcache_errors_total", {"code": "client-gone"}) == 1


@pytest.mark.parametrize("name", ["%2e%2e", "digits%2ffetch", "digits%0a", "%ff", "Digits", "digits%20", "%00"])
@pytest.mark.parametrize("route", ["fetch", "missing"])
def test_a_name_in_the_path_is_looked_up_and_nothing_else(server: httpx.Client, name: str, route: str) -> None:
    answer = server.post(f"/v1/label-sets/{name}/{route}", json={"ids": [1]})
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("route", ["fetch", "missing"])
def test_a_batch_is_asked_for_with_post_alone(server: httpx.Client, method: str, route: str) -> None:
    answer = server.request(method, f"/v1/label-sets/digits/{route}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
