"""Answers as they travel, byte for byte, and what it means that one is late."""

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.client.raw_server import RawServer

from logitcache.client.connecting import AnswerLate

Serve = Callable[..., RawServer]

BODY = b"0123456789" * 2


def http(*lines: str, body: bytes = b"", status: str = "200 OK", version: str = "HTTP/1.1") -> bytes:
    return "\r\n".join((f"{version} {status}", *lines, "\r\n")).encode("latin-1") + body


PLAIN = http("Content-Type: a/b", f"Content-Length: {len(BODY)}", body=BODY)


def assert_late(attempt: Callable[[], Any], timeout_s: float = 0.2) -> AnswerLate:
    began = time.monotonic()
    with pytest.raises(AnswerLate) as told:
        attempt()
    assert timeout_s <= time.monotonic() - began < timeout_s + 1.0
    return told.value


def names(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> list[Any]:
    """Every name has these addresses; what was looked up."""
    asked: list[Any] = []

    def look_up(*name: Any, **_: Any) -> list[Any]:
        asked.append(name)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", address) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return asked
