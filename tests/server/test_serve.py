"""Running the server: where it listens, what it refuses to do, how it stops. The process is real where it matters."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from logitcache.labels.errors import InvalidRequest, ServerFault, StoreNotFound
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import check_exposure, listening, running, serve, url_of

Process = subprocess.Popen[str]


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[Process, dict[str, Any]]]:
    """``python -m logitcache.server serve`` and the log line in which it says that it listens."""
    command = [sys.executable, "-m", "logitcache.server", "serve", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield process, json.loads(process.stderr.readline())
        finally:
            process.kill()


def test_port_0_serves_on_the_free_port_that_it_names(finished_store: Path) -> None:
    with serving("--store", str(finished_store), "--port", "0") as (_, line):
        assert line["event"] == f"listening on {line['url']}"
        assert line["label_sets"] == 2
        assert httpx.get(f"{line['url']}/readyz").status_code == 200


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_stops_it_with_its_exit_code_and_without_a_traceback(
    finished_store: Path, number: signal.Signals, code: int
) -> None:
    arguments = ("--store", str(finished_store), "--port", "0")
    with serving(*arguments) as (process, line), httpx.Client(base_url=line["url"]) as client:
        # This connection stays open and idle, which must not hold the stop up.
        client.get("/healthz")
        process.send_signal(number)
        _, rest = process.communicate(timeout=15)
    assert process.returncode == code
    assert "Traceback" not in rest
    assert '"stopped"' in rest


def test_sigterm_lets_a_request_under_way_finish(finished_store: Path) -> None:
    head = "POST /v1/label-sets/digits/fetch HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    body = '{"ids": [4096]}'
    with serving("--store", str(finished_store), "--port", "0") as (process, line):
        url = httpx.URL(line["url"])
        with socket.create_connection((url.host, url.port or 0), timeout=15) as connection:
            connection.sendall(f"{head}Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n".encode())
            # The server reads the body now: the request is under way.
            assert connection.recv(65_536).startswith(b"HTTP/1.1 100")
            process.send_signal(signal.SIGTERM)
            connection.sendall(body.encode())
            answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert process.wait(timeout=15) == 0
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"4096.0" in answer


def test_a_port_in_use_is_named_with_a_way_out() -> None:
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(InvalidRequest, match=rf"port {port} on 127.0.0.1 is in use .*--port 0"),
            listening("127.0.0.1", port),
        ):
            pass


def test_a_port_that_does_not_exist_is_named() -> None:
    with pytest.raises(InvalidRequest, match="70000"), listening("127.0.0.1", 70_000):
        pass


@pytest.mark.parametrize(("host", "port"), [("203.0.113.7", 0), ("no-such-host.invalid", 0), ("", 0)])
def test_an_address_that_cannot_be_listened_on_is_named(host: str, port: int) -> None:
    with pytest.raises(InvalidRequest, match=f"cannot listen on {host}"), listening(host, port, open_to_others=True):
        pass


def test_small_answers_are_not_held_back_for_an_acknowledgement() -> None:
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_exposure(host, open_to_others=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "203.0.113.7"])
def test_an_address_that_others_reach_needs_keys_or_to_be_told_that_there_are_none(host: str) -> None:
    with pytest.raises(InvalidRequest, match=r"no keys.*--auth none"):
        check_exposure(host, open_to_others=False)
    check_exposure(host, open_to_others=True)


def test_the_url_of_an_address_for_everyone_is_one_that_this_machine_can_open() -> None:
    with listening("0.0.0.0", 0, open_to_others=True) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_serving_a_store_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match=r"logitcache precompute"):
        serve(tmp_path / "nothing")


def test_a_server_in_the_background_stops_with_its_context(finished_store: Path) -> None:
    before = server_threads()
    with running(create_app(Catalog(finished_store))) as url:
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert server_threads() == before + 1
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
    assert server_threads() == before


def server_threads() -> int:
    return sum(thread.name == "logitcache-server" for thread in threading.enumerate())


def test_a_server_that_cannot_start_says_so() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("no lifespan here")

    with pytest.raises(ServerFault, match="did not start"), running(broken):
        os.abort()
