"""A server that answers for days: its memory and its descriptors do not grow with what it answered.

Requests of all kinds are sent over several connections, many before their answers are read; some connections are closed
now and then. Anonymous memory (what is mapped of label sets is the page cache's) and open descriptors are read from
``/proc`` between rounds, and a line is fitted to what they were after the first quarter.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from tests.server.conftest import write_label_set

from logitcache.labels import wire
from logitcache.labels.ids import as_ids

CONNECTIONS, AT_ONCE = 4, 50
REQUESTS = int(os.environ.get("SOAK_REQUESTS", "10_000_000"))
"""Of the proof."""

ROUNDS = 40
"""In which they are sent; memory is read after each."""

MOST_MB_A_MILLION, MOST_FILES_A_MILLION = 1.0, 1.0
"""Slopes that would be called growth."""


def post(path: str, body: bytes, kind: str = wire.MEDIA_TYPE) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@contextmanager
def served(store: Path) -> Iterator[tuple[int, str]]:
    """A server of the store, whose log goes to a file: its process and its URL."""
    log = store / "log.txt"
    command = [sys.executable, "-m", "logitcache.server", "serve", "--store", str(store), "--port", "0"]
    with log.open("wb") as written, subprocess.Popen(command, stderr=written) as process:
        try:
            pause = threading.Event()
            while b"\n" not in log.read_bytes():
                pause.wait(0.05)
            yield process.pid, json.loads(log.read_bytes().splitlines()[0])["url"]
        finally:
            process.terminate()


def mixture(rng: np.random.Generator) -> list[bytes]:
    """Requests, nine tenths of them batches: as a training loop asks, and what else comes."""
    fetches = [
        post("/v1/label-sets/digits/fetch", bytes(wire.encode_ids(as_ids(rng.integers(0, 10_000, 64).tolist()))))
        for _ in range(90)
    ]
    others = [
        post("/v1/label-sets/digits/fetch", b'{"ids": [3, 1, 4]}', "application/json"),
        post("/v1/label-sets/digits/missing", bytes(wire.encode_ids(as_ids([3, 99_999])))),
        post("/v1/label-sets/digits/fetch", bytes(wire.encode_ids(as_ids([99_999])))),
        post("/v1/label-sets/nothing/fetch", b'{"ids": [1]}', "application/json"),
        post("/v1/label-sets/digits/fetch", b"no JSON", "application/json"),
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/label-sets/digits HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/label-sets/digits/examples/3 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /made-up-%d HTTP/1.1\r\nHost: x\r\n\r\n" % rng.integers(10**9),
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
    ]
    return fetches + others


def ask(url: str, requests: int, seed: int) -> int:
    """Send so many over a connection, `AT_ONCE` before their answers are read; how many answers came."""
    at, rng = urlsplit(url), np.random.default_rng(seed)
    kinds, answered = mixture(rng), 0
    with socket.create_connection((at.hostname or "", at.port or 0), timeout=60) as connection:
        rest = b""
        while answered < requests:
            count = min(AT_ONCE, requests - answered)
            connection.sendall(b"".join(kinds[kind] for kind in rng.integers(0, len(kinds), count)))
            for _ in range(count):
                rest = behind_one(connection, rest)
            answered += count
    return answered


def behind_one(connection: socket.socket, rest: bytes) -> bytes:
    """Read an answer; what was read behind it."""
    while b"\r\n\r\n" not in rest:
        rest += received(connection)
    head, _, body = rest.partition(b"\r\n\r\n")
    (length,) = (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += received(connection)
    return body[length:]


def received(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    assert data, "the server closed the connection"
    return data


def anonymous_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def slope(millions: np.ndarray, values: list[float]) -> float:
    """Of a least-squares line through the last three quarters."""
    first = len(values) // 4
    return float(np.polyfit(millions[first:], values[first:], 1)[0])


@pytest.mark.parametrize(
    ("requests", "bars"),
    # A few seconds show that it runs; their slope is that of warming up.
    [(8_000, False), pytest.param(REQUESTS, True, marks=[pytest.mark.proof, pytest.mark.timeout(4 * 3600)])],
)
def test_memory_and_descriptors_do_not_grow_with_what_was_answered(tmp_path: Path, requests: int, bars: bool) -> None:
    write_label_set(tmp_path / "digits")
    a_round = requests // ROUNDS
    with served(tmp_path) as (pid, url):
        memory, files, answered = [], [], 0
        for number in range(ROUNDS):
            with ThreadPoolExecutor(CONNECTIONS) as threads:
                each = [
                    threads.submit(ask, url, a_round // CONNECTIONS, number * CONNECTIONS + client)
                    for client in range(CONNECTIONS)
                ]
                answered += sum(one.result() for one in each)
            memory.append(anonymous_mb(pid))
            files.append(float(sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())))
    millions = (1 + np.arange(ROUNDS)) * answered / ROUNDS / 1e6
    found = slope(millions, memory), slope(millions, files)
    print(
        f"\n{answered:,} requests answered: anonymous memory {memory[0]:.1f} MB after the first round and "
        f"{memory[-1]:.1f} MB after the last, {found[0]:+.3f} MB a million; "
        f"descriptors {files[0]:.0f} and {files[-1]:.0f}, {found[1]:+.3f} a million"
    )
    assert answered == a_round // CONNECTIONS * CONNECTIONS * ROUNDS
    if bars:
        assert found[0] <= MOST_MB_A_MILLION
        assert found[1] <= MOST_FILES_A_MILLION
