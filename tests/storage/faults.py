"""A file layer that fails, or dies, at one chosen operation."""

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from logitcache.storage.files import Bytes, Files, explained

OPERATIONS = ("write", "fsync", "link", "rename", "remove", "make_folder")


def leave_half(operation: str, path: Path) -> None:
    """What an operation that was cut short may leave."""
    if operation in ("write", "append"):
        with path.open("ab") as file:
            file.write(b"half of it")


@dataclass
class Counting(Files):
    """Counts operations, and calls ``at(number, operation, path)`` before each of them."""

    at: Callable[[int, str, Path], None]
    number: int = 0
    log: list[tuple[str, str]] = field(default_factory=list)

    def _count(self, operation: str, path: Path) -> None:
        self.log.append((operation, path.name))
        with explained(path):
            self.at(self.number, operation, path)
        self.number += 1

    def write(self, path: Path, data: Bytes, size: int | None = None) -> None:
        self._count("write", path)
        super().write(path, data, size)

    def fsync(self, path: Path) -> None:
        self._count("fsync", path)
        super().fsync(path)

    def link(self, staged: Path, final: Path) -> None:
        self._count("link", final)
        super().link(staged, final)

    def rename(self, old: Path, new: Path) -> None:
        self._count("rename", new)
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self._count("remove", path)
        super().remove(path)

    def make_folder(self, path: Path) -> None:
        self._count("make_folder", path)
        super().make_folder(path)

    def append(self, handle: int, path: Path, end: int, data: Bytes) -> None:
        self._count("append", path)
        super().append(handle, path, end, data)

    def cut(self, handle: int, path: Path, end: int) -> None:
        self._count("cut", path)
        super().cut(handle, path, end)


def failing(number: int, code: int) -> Counting:
    """Raise this error of the operating system at the operation of that number; a write leaves half its bytes."""

    def at(current: int, operation: str, path: Path) -> None:
        if current == number:
            leave_half(operation, path)
            raise OSError(code, os.strerror(code))

    return Counting(at)


def failing_once(operation: str, after: int, code: int) -> Counting:
    """Raise this error at such an operation after so many of them, and never again; a write leaves half its bytes."""
    left = [None] * after

    def at(number: int, current: str, path: Path) -> None:
        if current != operation:
            return
        if left:
            left.pop()
        elif not failed:
            failed.append(path)
            leave_half(operation, path)
            raise OSError(code, os.strerror(code))

    failed: list[Path] = []
    return Counting(at)


def full_disk(number: int) -> Counting:
    """The disk is full from the operation of that number on, for whatever needs room."""

    def at(current: int, operation: str, path: Path) -> None:
        if current >= number and (
            operation in ("write", "append") or (operation == "make_folder" and not path.exists())
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return Counting(at)


def killed(number: int) -> Counting:
    """This process is killed before the operation of that number; a write leaves half its bytes."""

    def at(current: int, operation: str, path: Path) -> None:
        if current == number:
            leave_half(operation, path)
            os.kill(os.getpid(), signal.SIGKILL)

    return Counting(at)
