"""Nobody in who does not belong: keys and their scopes on every route, hosts, content types, headers."""

import io
import itertools
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from fastapi.routing import APIRoute
from tests.server.conftest import write_label_set

from logitcache.client import connect
from logitcache.labels.errors import InvalidRequest, KeyRefused, RowsMissing, ScopeTooSmall
from logitcache.server import logs
from logitcache.server.http.access import HEADERS, Access
from logitcache.server.http.app import ROUTERS, create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.server.keys import PREFIX, Keys, KeyScope, KnownKeys

SCOPES = get_args(KeyScope)

NEEDED = {
    ("GET", "/v1/label-sets"): "read",
    ("GET", "/v1/label-sets/{name}"): "read",
    ("POST", "/v1/label-sets/{name}/fetch"): "read",
    ("POST", "/v1/label-sets/{name}/missing"): "read",
    ("GET", "/v1/label-sets/{name}/examples/{id:anything}"): "read",
    ("PUT", "/v1/label-sets/{name}/recording"): "write",
    ("POST", "/v1/label-sets/{name}/record"): "write",
    ("POST", "/v1/label-sets/{name}/recording/finish"): "write",
    ("POST", "/v1/jobs"): "write",
    ("GET", "/v1/jobs"): "write",
    ("GET", "/v1/jobs/{id}"): "write",
    ("POST", "/v1/jobs/{id}/cancel"): "admin",
    ("GET", "/metrics"): "read",
    ("GET", "/docs"): "read",
    ("GET", "/openapi.json"): "read",
    ("GET", "/healthz"): None,
    ("GET", "/readyz"): None,
}
"""Every route, and the least scope that it takes."""

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    write_label_set(store / "digits")
    return store


@pytest.fixture
def keys(store: Path) -> dict[str, str]:
    """A key of each scope, by its scope."""
    return {scope: Keys(store).make(f"{scope}-key", scope) for scope in SCOPES}


@pytest.fixture
def server(store: Path, keys: dict[str, str]) -> Iterator[httpx.Client]:
    """A server that wants keys, and a client without one."""
    access = Access(KnownKeys(Keys(store)), frozenset({"labels.example.org"}))
    app = create_app(Catalog(store), record=True, access=access)
    with running(app) as url, httpx.Client(base_url=url) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def path_of(route: str) -> str:
    return re.sub(r"\{.*?\}", "digits", route)


def test_the_table_of_this_test_has_every_route() -> None:
    own = {
        (method, route.path)
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert own | {("GET", "/docs"), ("GET", "/openapi.json")} == set(NEEDED)


@pytest.mark.parametrize(("method", "route"), NEEDED)
def test_a_route_takes_its_scope_and_those_above_it_and_nobody_else(
    server: httpx.Client, keys: dict[str, str], method: str, route: str
) -> None:
    scope, path = NEEDED[method, route], path_of(route)
    asked = server.request(method, path, headers=JSON)
    assert asked.status_code == (200 if scope is None else 401)
    if scope is None:
        return
    assert asked.json()["code"] == "key-refused"
    assert asked.headers["www-authenticate"] == "Bearer"
    for held in SCOPES:
        asked = server.request(method, path, headers=JSON | bearer(keys[held]))
        if SCOPES.index(held) < SCOPES.index(scope):
            assert (asked.status_code, asked.json()["code"], asked.json()["needed"]) == (403, "scope-too-small", scope)
        else:
            assert asked.status_code not in (401, 403)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *itertools.product(
            ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PURGE"),
            (
                "/v1/new",
                "/v1/label-sets",
                "/v1/label-sets/digits",
                "/v1/label-sets/digits/new",
                "/healthz",
                "//v1/jobs",
            ),
        ),
        ("POST", "//v1/jobs"),
        ("GET", "/v1/new"),
        ("GET", "/"),
        ("GET", "//v1/label-sets"),
        ("GET", "/v1/jobsnew"),
        ("GET", "/metrics/new"),
    ],
)
def test_what_is_not_a_route_takes_the_largest_scope(
    server: httpx.Client, keys: dict[str, str], method: str, path: str
) -> None:
    asked = server.request(method, path, headers=JSON | bearer(keys["write"]))
    assert (asked.status_code, asked.json()["needed"]) == (403, "admin")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer"},
        {"Authorization": "Basic {key}"},
        {"Authorization": "{key}"},
        {"Authorization": "Bearer {key}x"},
        {"Authorization": "Bearer x{key}"},
        {"Authorization": "Bearer {key}, Bearer {key}"},
        {"Cookie": "key={key}"},
        {"X-API-Key": "{key}"},
        {"Authorization": "Bearer " + "x" * 10_000},
        {"Authorization": "Bearer \xff\xfe"},
    ],
)
def test_a_key_travels_in_one_header_and_whole(
    server: httpx.Client, keys: dict[str, str], headers: dict[str, str]
) -> None:
    sent = {name.encode(): value.replace("{key}", keys["admin"]).encode("latin-1") for name, value in headers.items()}
    assert server.get("/v1/label-sets", headers=sent).status_code == 401
    assert server.get(f"/v1/label-sets?key={keys['admin']}").status_code == 401


def test_ten_thousand_wrong_keys_are_refused_and_the_right_one_is_still_let_in(
    store: Path, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.server.keys.TRUSTED_S", 1e9)
    known = KnownKeys(Keys(store))
    known.read_again()
    right = keys["read"]
    wrong = [PREFIX + right[len(PREFIX) :][::-1], *(f"{right[:-4]}{number:04}" for number in range(10_000))]
    assert [secret for secret in wrong if secret != right and known.find(secret)] == []
    assert known.find(right) is not None


def test_wrong_keys_by_the_thousand_do_not_keep_others_out(server: httpx.Client, keys: dict[str, str]) -> None:
    statuses = {server.get("/v1/label-sets", headers=bearer(f"{PREFIX}{number}")).status_code for number in range(1000)}
    assert statuses == {401}
    assert server.get("/v1/label-sets", headers=bearer(keys["read"])).status_code == 200


def test_a_key_is_made_and_revoked_without_a_restart(store: Path, server: httpx.Client, keys: dict[str, str]) -> None:
    late = Keys(store).make("late", "read")
    event = threading.Event()
    while server.get("/v1/label-sets", headers=bearer(late)).status_code != 200:
        event.wait(0.05)
    Keys(store).revoke("late")
    while server.get("/v1/label-sets", headers=bearer(late)).status_code != 401:
        event.wait(0.05)
    assert server.get("/v1/label-sets", headers=bearer(keys["read"])).status_code == 200


def test_when_the_last_key_is_revoked_nobody_is_let_in(store: Path, server: httpx.Client, keys: dict[str, str]) -> None:
    for name in Keys(store).names():
        Keys(store).revoke(name)
    event = threading.Event()
    while server.get("/v1/label-sets", headers=bearer(keys["admin"])).status_code != 401:
        event.wait(0.05)
    assert server.get("/v1/label-sets").status_code == 401


def test_keys_that_cannot_be_read_let_nobody_in(store: Path, server: httpx.Client, keys: dict[str, str]) -> None:
    (store / ".keys" / "zzz.json").write_text("{}")
    event = threading.Event()
    while (asked := server.get("/v1/label-sets", headers=bearer(keys["admin"]))).status_code == 200:
        event.wait(0.05)
    assert (asked.status_code, asked.json()["code"]) == (500, "storage-fault")


def test_a_body_that_nobody_with_a_key_sent_is_not_waited_for(server: httpx.Client) -> None:
    at = server.base_url
    with socket.create_connection((at.host, at.port or 0), timeout=10) as connection:
        connection.sendall(b"GET /v1/label-sets HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in answer


def test_while_the_store_is_away_nobody_is_told_that_their_key_is_wrong(
    store: Path, server: httpx.Client, keys: dict[str, str], tmp_path: Path
) -> None:
    event = threading.Event()
    for away, elsewhere in ((store, tmp_path / "store-away"), (store / ".keys", store / "keys-away")):
        assert server.get("/metrics", headers=bearer(keys["read"])).status_code == 200
        away.rename(elsewhere)
        while (asked := server.get("/metrics", headers=bearer(keys["read"]))).status_code == 200:
            event.wait(0.05)
        assert (asked.status_code, asked.json()["code"], asked.headers["retry-after"]) == (503, "unavailable", "5")
        assert str(tmp_path) not in asked.text
        assert server.get("/healthz").status_code == 200
        elsewhere.rename(away)
        while server.get("/metrics", headers=bearer(keys["read"])).status_code != 200:
            event.wait(0.05)


def test_a_disk_that_hangs_under_the_keys_holds_up_what_needs_them_alone_and_not_for_long(
    server: httpx.Client, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, go_on, read = threading.Event(), threading.Event(), Keys.read

    def hang(self: Keys) -> Any:
        hanging.set()
        go_on.wait()
        return read(self)

    assert server.get("/v1/label-sets", headers=bearer(keys["read"])).status_code == 200
    monkeypatch.setattr(Keys, "read", hang)
    monkeypatch.setattr("logitcache.server.http.access.READ_S", 0.5)
    try:
        event = threading.Event()
        while (asked := server.get("/v1/label-sets", headers=bearer(keys["read"]))).status_code == 200:
            event.wait(0.05)
        assert (asked.status_code, asked.headers["retry-after"]) == (503, "1")
        assert hanging.is_set()
        with ThreadPoolExecutor(4) as threads:
            asking = [threads.submit(server.get, "/v1/label-sets") for _ in range(4)]
            assert server.get("/healthz").status_code == 200
            assert {each.result().status_code for each in asking} == {503}
    finally:
        go_on.set()
    while server.get("/v1/label-sets", headers=bearer(keys["read"])).status_code != 200:
        event.wait(0.05)


def test_the_store_holds_no_key_and_its_folder_is_its_owners_alone(store: Path, keys: dict[str, str]) -> None:
    files = [path for path in store.rglob("*") if path.is_file()]
    held = b"".join(path.read_bytes() for path in files)
    assert [key for key in keys.values() if key.encode() in held or key[len(PREFIX) :].encode() in held] == []
    assert (store / ".keys").stat().st_mode & 0o777 == 0o700


def test_a_key_is_never_logged(server: httpx.Client, keys: dict[str, str], log: io.StringIO) -> None:
    logs.configure(log, level="debug")
    wrong = PREFIX + "w" * 43
    for key in (keys["read"], wrong):
        for path in ("/v1/label-sets", "/v1/jobs", "/nothing"):
            server.get(path, headers=bearer(key))
            server.post(path, headers=bearer(key) | JSON, content=b"{")
    told = log.getvalue()
    assert "key-refused" in told
    assert [key for key in (*keys.values(), wrong) if key in told] == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8000",
        "localhost",
        "localhost.",
        "a.localhost:1",
        "[::1]:80",
        "192.0.2.7",
        "server:8000",
        "LABELS.example.org",
    ],
)
def test_a_server_answers_under_its_own_names(server: httpx.Client, host: str) -> None:
    assert server.get("/healthz", headers={"Host": host}).status_code == 200


def test_a_server_answers_under_its_machines_name(server: httpx.Client) -> None:
    assert server.get("/healthz", headers={"Host": socket.gethostname()}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:80", "localhost.evil.example", "1.2.3", "a.b:c"]
)
def test_a_name_that_is_not_the_servers_is_refused(server: httpx.Client, keys: dict[str, str], host: str) -> None:
    asked = server.get("/v1/label-sets", headers={"Host": host} | bearer(keys["admin"]))
    assert (asked.status_code, asked.json()["code"]) == (421, "request-refused")
    assert "--allow-host" in asked.json()["detail"]


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
@pytest.mark.parametrize(("method", "route"), [each for each in NEEDED if each[0] != "GET"])
def test_what_a_form_can_send_changes_nothing(
    server: httpx.Client, keys: dict[str, str], method: str, route: str, content_type: str | None
) -> None:
    headers = bearer(keys["admin"]) | ({"Content-Type": content_type} if content_type else {})
    asked = server.request(method, path_of(route), headers=headers)
    assert (asked.status_code, asked.json()["code"]) == (415, "request-refused")


def test_every_answer_has_the_headers_of_security_and_none_lets_other_origins_in(
    server: httpx.Client, keys: dict[str, str]
) -> None:
    answers = [
        server.request(
            method, path_of(route), headers=JSON | bearer(keys["admin"]) | {"Origin": "https://evil.example"}
        )
        for method, route in NEEDED
    ]
    answers += [server.get("/v1/label-sets"), server.get("/nothing"), server.get("/healthz", headers={"Host": "a.b"})]
    answers.append(
        server.options("/v1/jobs", headers=JSON | bearer(keys["admin"]) | {"Origin": "https://evil.example"})
    )
    assert {answer.status_code for answer in answers} >= {200, 401, 404, 405, 421}
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]
        for name, value in HEADERS[: -1 if answer.request.url.path == "/docs" else None]:
            assert answer.headers[name.decode()] == value.decode()


def refused_bytes(server: httpx.Client) -> bytes:
    with socket.create_connection((server.base_url.host, server.base_url.port or 0), timeout=10) as connection:
        connection.sendall(b"\x01 garbage\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_what_is_no_http_is_answered_with_them_too(server: httpx.Client) -> None:
    answer = refused_bytes(server)
    assert all(name + b": " + value in answer for name, value in HEADERS)


def test_the_sdk_shows_its_key_and_hides_it_elsewhere(
    server: httpx.Client, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.base_url}/digits".replace("//digits", "/digits")
    with pytest.raises(KeyRefused, match="LOGITCACHE_KEY"):
        connect(url)
    labels = connect(url, key=keys["read"])
    assert len(labels.fetch([3, 1, 4])) == 3
    assert keys["read"] not in repr(labels) + str(vars(labels.stats))
    monkeypatch.setenv("LOGITCACHE_KEY", keys["read"])
    assert len(connect(url).fetch([3])) == 1
    with pytest.raises(RowsMissing):
        connect(url).fetch([10_000])
    monkeypatch.setenv("LOGITCACHE_KEY", "wrong")
    with pytest.raises(KeyRefused):
        connect(url)
    assert len(connect(url, key=keys["read"]).fetch([3])) == 1


def test_the_sdk_is_told_which_scope_it_lacks(server: httpx.Client, keys: dict[str, str]) -> None:
    from logitcache.client import record

    url = f"{str(server.base_url).rstrip('/')}/recorded"
    terms: dict[str, Any] = {"run": "r", "steps": range(1, 2), "classes": 10, "top_k": 3, "examples": 4}
    with pytest.raises(ScopeTooSmall, match="'read-key' has read"):
        record(url, key=keys["read"], **terms)


@pytest.mark.parametrize("key", ["two words", "line\r\nX-Injected: 1", "ümlaut", "tab\t"])
def test_a_key_that_would_break_a_header_is_refused_and_not_told(server: httpx.Client, key: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        connect(f"{str(server.base_url).rstrip('/')}/digits", key=key)
    assert key not in str(refused.value)
