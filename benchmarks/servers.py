"""A server in a process of its own, for as long as a context lasts, and the processor time that it has used.

A Python module says where it listens: ``{"url": …}`` in a JSON line on stderr. Any other program is given a port, and
is ready when that accepts a connection.
"""

import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START_S = 60.0
"""How long a server may take until it listens."""

_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Server:
    """Where a server listens, and its process."""

    url: str
    pid: int


@contextmanager
def started(*module_and_arguments: str, log: Path) -> Iterator[Server]:
    """Run ``python -m MODULE ARGUMENTS`` until the context ends; what it logs goes into a file.

    A file and not a pipe, because reading a pipe would cost the process that is measured.

    Raises:
        RuntimeError: it ended, or `START_S` passed, before it said where it listens.
    """
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-m", *module_and_arguments], stderr=stderr, cwd=ROOT)
    with _ended(process):
        yield Server(_wait_for_url(process, log), process.pid)


def free_port() -> int:
    """A port of loopback on which nothing listens now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def listening(command: Sequence[str], port: int, log: Path) -> Iterator[Server]:
    """Run a program that listens on this port of loopback, until the context ends; what it says goes into a file.

    Raises:
        RuntimeError: it ended, or `START_S` passed, before it accepted a connection.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    with _ended(process):
        _wait_for_port(process, port, log)
        yield Server(f"http://127.0.0.1:{port}", process.pid)


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _wait_for_port(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} did not start; its log ends with: {log.read_text()[-2000:]}")


def _wait_for_url(process: subprocess.Popen[bytes], log: Path) -> str:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s and process.poll() is None:
        for line in log.read_text().splitlines(keepends=True):
            if line.startswith("{") and line.endswith("\n") and "url" in (event := json.loads(line)):
                return str(event["url"])
        time.sleep(0.02)
    raise RuntimeError(f"the server did not start; its log ends with: {log.read_text()[-2000:]}")


def cpu_clock(pid: int) -> Callable[[], float]:
    """The processor seconds of another process, all its threads together, in nanosecond steps.

    The clock of ``clock_getcpuclockid(3)``, because ``/proc/PID/stat`` counts in steps of 10 ms.

    Raises:
        OSError: there is no such process.
    """
    clock = ctypes.c_int()
    if code := _libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
        raise OSError(code, os.strerror(code))
    return lambda: time.clock_gettime(clock.value)
