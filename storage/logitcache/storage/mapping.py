"""All shards of one array as one NumPy array: an address range with each chunk file mapped into its place.

A range as large as the complete array is reserved without memory behind it; what is not mapped reads as zeros, so a
caller must know which shards are. Gathering random rows is then one ``np.take``, whatever the number of shards.
It trusts the files it is given: `admission` checks them before.
"""

import contextlib
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt64

from logitcache.labels.errors import StorageFault

_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAPS_FILES = sys.platform == "linux" and 4096 % mmap.PAGESIZE == 0
"""Chunk files are whole 4 KiB pages. With larger pages, or another system's constants, they are read in instead."""

_HUGE_PAGE = 1 << 21
"""Addresses begin at a multiple of this, so that the kernel can map 2 MiB of a file at once where a chunk file has as
many (measured: half the time for random rows out of 4 M)."""

_MOST_RANGES = 1024
"""Ranges that one call of ``process_madvise`` takes."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def zeros(count: int) -> Int64[np.ndarray, " count"]:
    """Zeros to write to; memory is taken a page at a time, where they are written.

    Raises:
        StorageFault: there are no addresses for so many.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
    try:
        memory = mmap.mmap(-1, count * 8, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise StorageFault(f"cannot reserve {count * 8:,} bytes of address space: {error}") from error
    # A kernel without huge pages refuses, and need not be told.
    with contextlib.suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int64)


class MappedArray:
    """An array of ``chunks`` equal chunks, each ``chunk_bytes`` long, of rows of one dtype and shape.

    ``rows`` is read-only to callers and stays valid, and the mappings with it, as long as anything refers to it.
    """

    def __init__(self, dtype: np.dtype[Any], row_shape: tuple[int, ...], chunks: int, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        protection = mmap.PROT_READ if _MAPS_FILES else mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (_MAP_NORESERVE if sys.platform == "linux" else 0)
        try:
            self._range = mmap.mmap(-1, chunks * chunk_bytes + _HUGE_PAGE, flags=flags, prot=protection)
        except (OSError, OverflowError, ValueError) as error:
            raise StorageFault(f"cannot reserve {chunks * chunk_bytes:,} bytes of address space: {error}") from error
        whole = np.frombuffer(self._range, np.uint8)
        begin = -whole.ctypes.data % _HUGE_PAGE
        self._bytes = whole[begin : begin + chunks * chunk_bytes]
        self._address = self._bytes.ctypes.data
        self._row_bytes = dtype.itemsize * math.prod(row_shape)
        self.rows = self._bytes.view(dtype).reshape(-1, *row_shape)
        if self.rows.flags.writeable:
            self.rows.flags.writeable = False

    def place(self, chunk: int, handle: int) -> None:
        """Put an open file of exactly ``chunk_bytes`` in a chunk's place; the handle may be closed afterwards.

        Raises:
            StorageFault: the system refuses another mapping.
        """
        start = chunk * self._chunk_bytes
        if not _MAPS_FILES:
            self._bytes[start : start + self._chunk_bytes] = np.frombuffer(
                os.pread(handle, self._chunk_bytes, 0), np.uint8
            )
            return
        address = self._address + start
        placed = _libc.mmap(address, self._chunk_bytes, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, handle, 0)
        if placed != address:
            code = ctypes.get_errno()
            raise StorageFault(
                f"cannot map another chunk file: {os.strerror(code)}; a process may hold vm.max_map_count mappings: "
                "raise it, or use larger shards",
                errno=code,
            )
        # Rows are asked for in random order: reading ahead would fetch a hundred pages for one
        # (measured: 650 ms with it and 70 ms without, for 1,024 cold rows).
        _libc.madvise(address, self._chunk_bytes, mmap.MADV_RANDOM)

    def clear(self, chunk: int) -> None:
        """Put zeros in a chunk's place: its file is not held any more, nor read, whatever becomes of it."""
        start = chunk * self._chunk_bytes
        if not _MAPS_FILES:
            self._bytes[start : start + self._chunk_bytes] = 0
            return
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED
        # Refused for want of mappings, the file stays; those who read look first whether they may.
        _libc.mmap(self._address + start, self._chunk_bytes, mmap.PROT_READ, flags, -1, 0)

    def pages(
        self, first: Int64[np.ndarray, " runs"], counts: Int64[np.ndarray, " runs"] | int
    ) -> UInt64[np.ndarray, "runs 2"]:
        """Address and length of the pages that hold ``counts`` rows from each of the ``first`` ones."""
        row_bytes = self._row_bytes
        begin = first * row_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        end = -((first + counts) * row_bytes // -mmap.PAGESIZE) * mmap.PAGESIZE
        return np.stack([begin + self._address, end - begin], axis=1).astype(np.uint64)

    def in_memory(self, row: int) -> bool:
        """The page of this row is in memory, as far as the kernel tells: of other users' files it says so of all."""
        resident = ctypes.create_string_buffer(b"\1", 1)
        _libc.mincore(self._address + row * self._row_bytes // mmap.PAGESIZE * mmap.PAGESIZE, 1, resident)
        return resident.raw != b"\0"


def will_need(pages: Iterable[UInt64[np.ndarray, "_ 2"]]) -> None:
    """Have the kernel read these pages from the disk, all at once and without waiting for them.

    It is advice: where it is refused, the pages are read one by one as they are touched.
    """
    # Older C libraries lack the one, Pythons built with older headers the other.
    if not (_MAPS_FILES and hasattr(_libc, "process_madvise") and hasattr(os, "pidfd_open")):
        return
    ranges = np.concatenate(list(pages))
    try:
        itself = os.pidfd_open(os.getpid())
    except OSError:
        return  # an older kernel, a sandbox, or no file is left to open
    try:
        for begin in range(0, len(ranges), _MOST_RANGES):
            some = ranges[begin : begin + _MOST_RANGES]
            _libc.process_madvise(
                itself, some.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(len(some)), mmap.MADV_WILLNEED, 0
            )
    finally:
        os.close(itself)
