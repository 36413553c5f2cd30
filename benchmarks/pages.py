"""Pages of files in memory: which there are, and how to be rid of them although processes have mapped them.

What was found on Linux 6.18: ``posix_fadvise(POSIX_FADV_DONTNEED)`` skips every page that some process has mapped, and
so does ``/proc/sys/vm/drop_caches``; both leave such a file in memory as a whole. ``process_madvise(MADV_PAGEOUT)``
takes mapped pages out of memory, those of another process too (as root, or with CAP_SYS_NICE), but only pages that are
mapped once. So `evict` unmaps this process's pages by ``madvise(MADV_DONTNEED)``, has the other process page out its
own, and drops the rest; `resident` counts what is there afterwards. Files on tmpfs have no other place, and stay.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

_PROCESS_MADVISE = 440
_MADV_PAGEOUT = 21
_MOST_RANGES = 1024
_MOST_BYTES = 1 << 30  # one call takes 2 GiB, less a page, and passes over the rest without a word
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


def evict(files: Sequence[Path], other: int) -> None:
    """Take these files, which this process and one other may have mapped for reading, out of memory.

    Files are to be written out before. What is still there tells `resident`.

    Raises:
        PermissionError: the other process may not be told to: be root.
    """
    names = {str(path) for path in files}
    for span in _mapped(os.getpid(), names):
        if _libc.madvise(span.start, span.length, mmap.MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise")
    _page_out(other, _mapped(other, names))
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _mapped(pid: int, names: set[str]) -> list[_Range]:
    """Address ranges in which a process has mapped one of these files."""
    ranges = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name in names:
            start, stop = (int(address, 16) for address in span.split("-"))
            ranges.append(_Range(start, stop - start))
    return ranges


def _page_out(pid: int, ranges: list[_Range]) -> None:
    process = os.pidfd_open(pid)
    try:
        rest = list(ranges)
        while rest:
            some = [rest.pop()]
            size = some[0].length
            while rest and len(some) < _MOST_RANGES and size + rest[-1].length <= _MOST_BYTES:
                size += rest[-1].length
                some.append(rest.pop())
            array = (_Range * len(some))(*some)
            length = ctypes.c_size_t(len(some))
            if _libc.syscall(_PROCESS_MADVISE, process, array, length, _MADV_PAGEOUT, 0) < 0:
                code = ctypes.get_errno()
                raise OSError(code, f"process_madvise: {os.strerror(code)}")
    finally:
        os.close(process)


def resident(files: Iterable[Path]) -> float:
    """Which part of these files' pages is in memory, from 0 to 1, as ``mincore`` tells it."""
    found = pages = 0
    for path in files:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            array = np.frombuffer(mapping, np.uint8)
            told = np.zeros(-(-len(array) // mmap.PAGESIZE), np.uint8)
            if _libc.mincore(array.ctypes.data, len(array), told.ctypes.data):
                raise OSError(ctypes.get_errno(), "mincore")
            found, pages = found + int((told & 1).sum()), pages + len(told)
            del array
    return found / pages


def bytes_read(pid: int) -> int:
    """Bytes that a process has had read from a disk so far, its page faults included."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines["read_bytes"])


def read_ahead_kib(path: Path) -> int | None:
    """How much the kernel may read ahead on the device where a file lies; None where it does not tell."""
    device = path.stat().st_dev
    told = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(told.read_text()) if told.exists() else None


def anonymous_bytes(pid: int | str = "self") -> int:
    """Memory of a process that no file is behind."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
