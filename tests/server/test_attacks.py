"""Requests that want what they may not have: each is refused, and the server answers the next one.

What bodies of safetensors and folders of a store are tried stands in ``tests/attacks``; keys, hosts and content types
in ``test_access``; peers that are slow, and too much at once, in ``test_load``.
"""

import gzip
import json
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from tests.attacks.bodies import BODIES
from tests.server.test_protocol import connected, rest, statuses

from logitcache.labels import wire
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running

SECRET = "the content of a file that nobody may read"

PATHS = (
    "../secret.txt",
    "..%2fsecret.txt",
    "%2e%2e/secret.txt",
    "%2e%2e%2fsecret.txt",
    "..%252fsecret.txt",
    "..%5csecret.txt",
    "....//secret.txt",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "//etc/passwd",
    "digits/../../secret.txt",
    "digits%00.txt",
    "%00",
    "%0d%0aX-Injected:%201",
    "%c0%ae%c0%ae/secret.txt",
    "%ff%fe",
    "digits/zarr.json",
    "digits%2fzarr.json",
    ".keys",
    ".keys/trainer.json",
    ".jobs",
    "DIGITS",
    "digits.",
    "digits%20",
    "-rf",
    "${HOME}",
    "%24%7Bjndi:ldap://x%7D",
    "file:///etc/passwd",
    "http://169.254.169.254/latest",
    "con",
    quote("‮sgititd"),
    "a" * 65,
    "a" * 5000,
)
"""Names, as they stand in a request's first line."""

ROUTES = (
    "GET /v1/label-sets/{}",
    "POST /v1/label-sets/{}/fetch",
    "POST /v1/label-sets/{}/missing",
    "GET /v1/label-sets/{}/examples/3",
    "PUT /v1/label-sets/{}/recording",
    "POST /v1/label-sets/{}/record",
    "POST /v1/label-sets/{}/recording/finish",
    "GET /v1/jobs/{}",
    "POST /v1/jobs/{}/cancel",
    "GET /{}",
)


@pytest.fixture(scope="module")
def server(finished_store: Path) -> Iterator[httpx.Client]:
    with running(create_app(Catalog(finished_store), record=True)) as url, httpx.Client(base_url=url) as client:
        yield client


def raw(server: httpx.Client, line: str, *, body: bytes = b"{}") -> bytes:
    """What is answered to a request whose path goes out as it stands."""
    head = f"{line} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    with connected(server) as connection:
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        return rest(connection)


@pytest.mark.parametrize("route", ROUTES)
def test_no_path_leads_out_of_the_store_or_to_a_failure(server: httpx.Client, finished_store: Path, route: str) -> None:
    (finished_store.parent / "secret.txt").write_text(SECRET)
    for path in PATHS:
        answer = raw(server, route.format(path))
        (status,) = statuses(answer) or [0]
        assert 400 <= status < 500, (path, answer[:300])
        assert SECRET.encode() not in answer
        assert b"root:" not in answer
        assert b"x-injected" not in answer.lower().partition(b"\r\n\r\n")[0]
        assert str(finished_store).encode() not in answer
        assert b"Traceback" not in answer
    assert server.get("/v1/label-sets/digits").status_code == 200


@pytest.mark.parametrize("what", BODIES)
@pytest.mark.parametrize("route", ["fetch", "missing", "record"])
def test_a_body_that_is_not_what_it_says_is_refused(server: httpx.Client, route: str, what: str) -> None:
    answer = server.post(
        f"/v1/label-sets/digits/{route}", content=BODIES[what], headers={"Content-Type": wire.MEDIA_TYPE}
    )
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["code"]


BOMB = b"\0" * (64 << 20)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip"])
def test_a_compressed_body_is_never_unpacked(server: httpx.Client, encoding: str) -> None:
    packed = zlib.compress(BOMB) if encoding == "deflate" else gzip.compress(BOMB)
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    answer = server.post("/v1/label-sets/digits/fetch", content=packed, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "request-refused")


def test_chunks_without_an_end_are_refused_at_the_bound(server: httpx.Client) -> None:
    sent = 0
    head = b"POST /v1/label-sets/digits/fetch HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with connected(server) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
        try:
            while sent < 64 << 20:
                connection.sendall(chunk)
                sent += 65_536
        except OSError:
            pass  # it was told, and the connection closed
    assert sent < 16 << 20  # the bound of 2 MiB, and what the sockets between hold
    assert server.get("/healthz").status_code == 200


COSTLY_JSON = (
    '{"ids": ' + "[" * 100_000,
    '{"ids": [' + "9" * 1_000_000 + "]}",
    '{"ids": [1e400]}',
    '{"ids": [NaN]}',
    '{"ids": [3], "ids": ["x"]}',
    '{"ids": [3], "digest": "sha256:' + "z" * 64 + '"}',
    '{"__proto__": 1, "ids": [3]}',
)


@pytest.mark.parametrize("body", COSTLY_JSON, ids=range(len(COSTLY_JSON)))
def test_json_that_costs_or_lies_is_refused(server: httpx.Client, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = server.post("/v1/label-sets/digits/fetch", content=body.encode(), headers=headers)
    assert 400 <= answer.status_code < 500
    assert len(answer.content) < 2000


@pytest.mark.parametrize("value", ["a\r\nX-Injected: 1", "a\nX-Injected: 1", "a%0d%0aX-Injected: 1", "ü", "x" * 1000])
def test_a_header_is_never_told_back(server: httpx.Client, value: str) -> None:
    head = f"GET /v1/label-sets/nothing HTTP/1.1\r\nHost: x\r\nX-Request-Id: {value}\r\nConnection: close\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(head.encode("utf-8"))
        answer = rest(connection)
    headers = answer.partition(b"\r\n\r\n")[0].lower()
    assert b"x-injected" not in headers
    assert value.encode() not in answer


def test_a_thousand_headers_are_too_many(server: httpx.Client) -> None:
    lines = "".join(f"X-{number}: {'v' * 100}\r\n" for number in range(1000))
    with connected(server) as connection:
        try:
            connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode())
            assert statuses(rest(connection)) == [400]
        except ConnectionResetError:
            pass  # told, and closed before it was read
    assert server.get("/healthz").status_code == 200


def test_an_error_that_nobody_foresaw_tells_nothing(finished_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError(f"{SECRET} at {finished_store}")

    monkeypatch.setattr(Catalog, "get", broken)
    with running(create_app(Catalog(finished_store))) as url:
        answer = httpx.get(f"{url}/v1/label-sets/digits")
    assert answer.status_code == 500
    assert SECRET not in answer.text
    assert str(finished_store) not in answer.text


def test_a_damaged_store_tells_no_path(own_store: Path) -> None:
    (own_store / "digits" / "zarr.json").write_bytes(b"{")
    with running(create_app(Catalog(own_store))) as url:
        answer = httpx.get(f"{url}/v1/label-sets/digits")
        told = json.dumps(answer.json()) + httpx.get(f"{url}/v1/label-sets").text + httpx.get(f"{url}/readyz").text
    assert answer.status_code >= 400
    assert str(own_store) not in told
    assert str(own_store.parent) not in told


def test_many_connections_that_say_nothing_keep_nobody_out(server: httpx.Client) -> None:
    idle = [socket.create_connection((server.base_url.host, server.base_url.port or 0)) for _ in range(500)]
    try:
        assert httpx.get(f"{server.base_url}/healthz").status_code == 200
    finally:
        for connection in idle:
            connection.close()
