"""A file layer that fails, or dies, at one chosen operation."""

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from logitcache.storage.files import Bytes, Files, explained

OPERATIONS = ("write", "fsync", "link", "rename", "remove", "make_folder")

Act = Callable[[], None]


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

    def _do(self, operation: str, path: Path, act: Act) -> None:
        self.log.append((operation, path.name))
        with explained(path):
            self.at(self.number, operation, path)
        self.number += 1
        act()

    def write(self, path: Path, data: Bytes, size: int | None = None) -> None:
        self._do("write", path, partial(super().write, path, data, size))

    def fsync(self, path: Path) -> None:
        self._do("fsync", path, partial(super().fsync, path))

    def link(self, staged: Path, final: Path) -> None:
        self._do("link", final, partial(super().link, staged, final))

    def rename(self, old: Path, new: Path) -> None:
        self._do("rename", new, partial(super().rename, old, new))

    def remove(self, path: Path) -> None:
        self._do("remove", path, partial(super().remove, path))

    def make_folder(self, path: Path) -> None:
        self._do("make_folder", path, partial(super().make_folder, path))

    def append(self, handle: int, path: Path, end: int, data: Bytes) -> None:
        self._do("append", path, partial(super().append, handle, path, end, data))

    def erase(self, handle: int, path: Path, at: int, size: int) -> None:
        self._do("erase", path, partial(super().erase, handle, path, at, size))

    def cut(self, handle: int, path: Path, end: int) -> None:
        self._do("cut", path, partial(super().cut, handle, path, end))


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
        if current >= number and needs_room(operation, path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return Counting(at)


def needs_room(operation: str, path: Path) -> bool:
    """A full disk refuses this."""
    return operation in ("write", "append") or (operation == "make_folder" and not path.exists())


def killed(number: int) -> Counting:
    """This process is killed before the operation of that number; a write leaves half its bytes."""

    def at(current: int, operation: str, path: Path) -> None:
        if current == number:
            leave_half(operation, path)
            os.kill(os.getpid(), signal.SIGKILL)

    return Counting(at)


class Killed(BaseException):
    """Raised in the place of SIGKILL, within the test's own process."""


FAULTS = (
    "ENOSPC",
    "ENOSPC from then on",
    "EIO",
    "EIO from then on",
    "EROFS from then on",
    "short, then ENOSPC",
    "short",
    "killed before",
    "killed inside",
    "killed after",
)
"""What may happen to one operation; "short" is a write that takes some bytes only, as the system may."""

OF_WRITES = ("short, then ENOSPC", "short", "killed inside")
"""Faults that only a write or an append can have."""


class Faulty(Counting):
    """One operation, by its number, ends as its fault says.

    After `Killed` no operation does anything any more, whatever code it passes on its way: as after a real kill.

    Attributes:
        happened: the fault befell an operation that can have it.
    """

    def __init__(self, chosen: int, fault: str) -> None:
        super().__init__(lambda *_: None)
        self.chosen, self.fault = chosen, fault
        self.happened = self._dead = False
        self._puts: int | None = None

    def _do(self, operation: str, path: Path, act: Act) -> None:
        if self._dead:
            raise Killed
        number, self.number = self.number, self.number + 1
        self.log.append((operation, path.name))
        if not self._befalls(number, operation, path):
            act()
            return
        self.happened = self.fault not in OF_WRITES
        if self.fault in OF_WRITES:
            self._puts = 0
            try:
                act()
            finally:
                self._puts = None
        elif self.fault.startswith("killed"):
            if self.fault == "killed after":
                act()
            self._die()
        else:
            # A write whose sync fails has been done.
            if self.fault == "EIO" and operation in ("write", "append", "cut"):
                act()
            code = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EROFS": errno.EROFS}[self.fault.split()[0]]
            with explained(path):
                raise OSError(code, os.strerror(code))

    def _befalls(self, number: int, operation: str, path: Path) -> bool:
        if number < self.chosen or (number > self.chosen and "from then on" not in self.fault):
            return False
        if self.fault in OF_WRITES:
            return operation in ("write", "append")
        return not self.fault.startswith("ENOSPC") or needs_room(operation, path) or operation == "link"

    def _die(self) -> None:
        self._dead = True
        raise Killed

    def put(self, handle: int, data: memoryview, at: int) -> int:
        if self._puts is None:
            return super().put(handle, data, at)
        self.happened, self._puts = True, self._puts + 1
        if self._puts > 1 and self.fault == "short, then ENOSPC":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().put(handle, data[: len(data) // 3 + 1], at)
        if self.fault == "killed inside":
            self._die()
        return written
