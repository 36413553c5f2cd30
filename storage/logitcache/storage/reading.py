"""Opening and reading a store's files as if somebody hostile had written them.

A file is opened only if it is a regular one that is reached from the label set's folder, or that of keys or jobs,
through folders: no symbolic link is followed, at no level below the store, and no pipe or device is waited for. What is
read as a whole is bounded before it is read. Hard links look like any file and cannot be told apart. It knows nothing
of what the files hold.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from logitcache.labels.errors import StorageFault

_FOLDER = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_DIRECTORY
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY

_BLOCK_BYTES = 1 << 20

_LOST = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""What a disk or a file system says of bytes that it cannot give back."""

LARGE_BYTES = 64 << 20
"""Above this, what is kept in memory must be on the disk, too: a file of holes claims a size that costs nobody."""


def open_file(root: Path, path: Path, refused: type[StorageFault] = StorageFault) -> int:
    """A handle, to read from, of a file below the folder ``root``.

    Raises:
        FileNotFoundError: it, or a folder on the way, is not there.
        StorageFault: it cannot be opened; as ``refused``, which may be a subclass: it is a symbolic link, no regular
            file, or behind what is no folder; or the disk has lost it (``details["errno"]`` is there then).
    """
    *folders, name = path.relative_to(root).parts
    with _opened(root, folders, refused) as folder:
        handle = _open(name, _FILE, folder, path, refused)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise refused(f"{path} is not a regular file: logitcache writes no such thing", path=str(path))
    return handle


def read_file(root: Path, path: Path, most: int, refused: type[StorageFault] = StorageFault) -> bytes:
    """Content of a file of at most so many bytes; a longer one is refused unread. Errors as of `open_file`."""
    handle = open_file(root, path, refused)
    try:
        size = os.fstat(handle).st_size
        if size > most:
            raise refused(f"{path} has {size:,} bytes: it is too long to be logitcache's", path=str(path))
        return b"".join(blocks(handle, size, path, refused))
    finally:
        os.close(handle)


def is_foreign(error: StorageFault) -> bool:
    """What is there is nothing that logitcache wrote; otherwise it could not be looked at, which may pass."""
    return "errno" not in error.details


def names(root: Path, folder: Path) -> list[str]:
    """Names in ``root`` or a folder below it; none when there is no such folder.

    Raises:
        StorageFault: it is a symbolic link, no folder, or cannot be listed.
    """
    try:
        with _opened(root, folder.relative_to(root).parts, StorageFault) as handle:
            return os.listdir(handle)  # noqa: PTH208 - of a handle: its path could lead elsewhere by now
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _fault(folder, error) from error


def status(path: Path) -> os.stat_result | None:
    """What the system knows of a file, or of a symbolic link itself; None where nothing is.

    Raises:
        StorageFault: it cannot be looked at.
    """
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _fault(path, error) from error


def refuse_links(root: Path) -> None:
    """Refuse a folder that is a symbolic link, or holds one: what is behind it is not the store's.

    Raises:
        FileNotFoundError: there is no such folder.
        StorageFault: it is one, or no folder, or cannot be listed.
    """
    with _opened(root, [], StorageFault) as handle:
        try:
            with os.scandir(handle) as entries:
                link = next((entry.name for entry in entries if entry.is_symlink()), None)
        except OSError as error:
            raise _fault(root, error) from error
    if link is not None:
        raise _is_link(root / link, StorageFault)


def blocks(handle: int, size: int, path: Path, refused: type[StorageFault] = StorageFault) -> Iterator[bytes]:
    """The first ``size`` bytes of an open file, or what there is of them; it may be truncated or appended to meanwhile,
    which is an end and not SIGBUS as in a mapping.

    Raises:
        StorageFault: it cannot be read; as ``refused``: the disk has lost some of them.
    """
    offset = 0
    try:
        while offset < size and (block := os.pread(handle, min(_BLOCK_BYTES, size - offset), offset)):
            yield block
            offset += len(block)
    except OSError as error:
        raise _fault(path, error, refused) from error


def refuse_holes(handle: int, used: int, path: Path, refused: type[StorageFault]) -> None:
    """Refuse a large file with holes where bytes must be that differ, such as ids: it would fill memory from nothing.

    Raises:
        StorageFault: as ``refused``: its first ``used`` bytes are more than `LARGE_BYTES`, and not all on the disk.
    """
    if used <= LARGE_BYTES or not hasattr(os, "SEEK_HOLE"):
        return
    try:
        hole = os.lseek(handle, 0, os.SEEK_HOLE)
    except OSError as error:
        raise _fault(path, error) from error
    if hole < used:
        raise refused(f"{path} is a hole from byte {hole:,} on, where {used:,} bytes should be", path=str(path))


def parsed(data: bytes) -> Any:
    """JSON as we write it: no NaN, no infinity, no member twice.

    Raises:
        ValueError: it is something else, not UTF-8, or nested too deeply.
    """
    try:
        value = json.loads(data.decode(), object_pairs_hook=_members, parse_constant=_no_number)
        if b"\\ud" in data.lower():
            json.dumps(value, ensure_ascii=False).encode()  # refuses half a surrogate pair
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands there twice")
    return members


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


@contextmanager
def _opened(root: Path, folders: "tuple[str, ...] | list[str]", refused: type[StorageFault]) -> Iterator[int]:
    """A handle of a folder; what is below the store is entered name by name."""
    path = root
    handle = _open(root, _FOLDER, None, path, refused)
    try:
        for name in folders:
            path = path / name
            inner = _open(name, _FOLDER, handle, path, refused)
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def _open(name: str | Path, flags: int, folder: int | None, path: Path, refused: type[StorageFault]) -> int:
    try:
        return os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise _irregular(name, folder, path, refused) from None
        raise _fault(path, error, refused) from error


def _irregular(name: str | Path, folder: int | None, path: Path, refused: type[StorageFault]) -> StorageFault:
    try:
        mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    except OSError:
        mode = 0
    if stat.S_ISLNK(mode):
        return _is_link(path, refused)
    return refused(f"{path} is neither a file nor a folder", path=str(path))


def _is_link(path: Path, refused: type[StorageFault]) -> StorageFault:
    return refused(
        f"{path} is a symbolic link, which is not followed, wherever it leads: put what it stands for in its place "
        "(the store itself may be a link)",
        path=str(path),
    )


def _fault(path: Path, error: OSError, refused: type[StorageFault] = StorageFault) -> StorageFault:
    # Out of handles or memory is this process's trouble: nothing must be condemned for it.
    kind = refused if error.errno in _LOST else StorageFault
    return kind(f"{path} cannot be read: {error.strerror or error}", path=str(path), errno=error.errno)
