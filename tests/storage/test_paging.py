"""Rows that are not in memory: asked for ahead, all at once, as long as gathering shows that they are on the disk."""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from logitcache.storage.mapping import MappedArray, will_need
from logitcache.storage.paging import FEW_FAULTS, FIXED_S, WARM_BYTES_PER_S, Paging

PAGES, ROW = 64, 16
ROWS_A_PAGE = mmap.PAGESIZE // ROW

_libc = ctypes.CDLL(None, use_errno=True)


def resident(array: MappedArray) -> np.ndarray:
    """Which pages of a mapped array are in memory."""
    found = np.zeros(PAGES, np.uint8)
    address = ctypes.c_void_p(array.rows.ctypes.data)
    code = _libc.mincore(address, ctypes.c_size_t(PAGES * mmap.PAGESIZE), found.ctypes.data_as(ctypes.c_void_p))
    assert code == 0, os.strerror(ctypes.get_errno())
    return found & 1


@pytest.fixture
def cold(tmp_path: Path) -> MappedArray:
    """A mapped file none of whose pages is in memory."""
    path = tmp_path / "chunk"
    path.write_bytes(np.arange(PAGES * mmap.PAGESIZE // 8, dtype=np.int64).tobytes())
    array = MappedArray(np.dtype(np.int64), (ROW // 8,), 1, PAGES * mmap.PAGESIZE)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        array.place(0, file.fileno())
    assert not resident(array).any()
    return array


def test_pages_are_those_that_hold_the_rows(cold: MappedArray) -> None:
    begin = cold.rows.ctypes.data
    first = np.array([0, ROWS_A_PAGE - 1, ROWS_A_PAGE, 5 * ROWS_A_PAGE])
    expected = [[0, 1], [0, 2], [1, 1], [5, 1]]
    pages = cold.pages(first, np.array([1, 2, ROWS_A_PAGE, 1])).astype(np.int64)
    assert ((pages - [begin, 0]) // mmap.PAGESIZE).tolist() == expected
    assert not (pages % mmap.PAGESIZE).any()


def test_pages_that_will_be_needed_are_read_and_no_others(cold: MappedArray) -> None:
    wanted = np.array([3, 17, 40])
    will_need([cold.pages(wanted * ROWS_A_PAGE, 1)])
    assert cold.rows[wanted * ROWS_A_PAGE, 0].tolist() == (wanted * ROWS_A_PAGE * (ROW // 8)).tolist()
    assert np.flatnonzero(resident(cold)).tolist() == wanted.tolist()


def test_more_pages_than_one_call_takes_are_read(cold: MappedArray) -> None:
    will_need([cold.pages(np.zeros(3000, np.int64), 1), cold.pages(np.array([9 * ROWS_A_PAGE]), 1)])
    assert cold.rows[[0, 9 * ROWS_A_PAGE], 0].tolist() == [0, 9 * ROWS_A_PAGE * (ROW // 8)]  # both are read by now
    assert np.flatnonzero(resident(cold)).tolist() == [0, 9]


def test_arrays_begin_where_huge_pages_do(cold: MappedArray) -> None:
    assert cold.rows.ctypes.data % (2 << 20) == 0


class Faults:
    """Stands for the count of pages that this process read from the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ru_majflt = 100
        monkeypatch.setattr("logitcache.storage.paging.resource.getrusage", lambda _who: self)


def test_a_label_set_is_cold_until_a_gather_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    Faults(monkeypatch)
    paging = Paging()
    assert paging.cold
    paging.note(2 * FIXED_S + 1e6 / WARM_BYTES_PER_S, 1_000_000)
    assert paging.cold
    paging.note(1e6 / WARM_BYTES_PER_S, 1_000_000)
    assert not paging.cold


def test_a_slow_gather_makes_it_cold_only_if_pages_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    paging = Paging()
    paging.note(0.0, 1)
    faults.ru_majflt += FEW_FAULTS + 1  # some have been read since the process began
    paging.note(1.0, 1)
    paging.note(0.0, 1)
    paging.note(1.0, 1)
    assert not paging.cold  # another thread had the processor
    faults.ru_majflt += FEW_FAULTS + 1
    paging.note(1.0, 1)
    assert paging.cold


def test_whether_a_row_is_in_memory_is_told(cold: MappedArray) -> None:
    row = 7 * ROWS_A_PAGE
    assert not cold.in_memory(row)
    assert cold.rows[row, 0] == row * (ROW // 8)
    assert cold.in_memory(row)
    assert cold.in_memory(row + ROWS_A_PAGE - 1)
    assert not cold.in_memory(row + ROWS_A_PAGE)
