"""Connections over TLS: kept, refused, cut off and late."""

import functools
import shlex
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.client.answers import BODY, PLAIN, Serve, assert_late, http
from tests.client.raw_server import Connection, RawServer, always

from logitcache.client import HttpLabelSet
from logitcache.client.connecting import ConnectFailed, ServerUntrusted
from logitcache.client.deadline import Deadline
from logitcache.labels.errors import InvalidRequest, MalformedMessage, UntrustedServer


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
