"""Rows that are not in memory: asked for ahead, all at once, as long as gathering shows that they are on the disk."""

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, build, reference

from logitcache.storage import LocalLabelSet, mapping, shards
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


def test_more_pages_than_one_call_takes_are_asked_for_in_several(
    cold: MappedArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    class CLibrary:
        """Notes the ranges that it is given, each an address and a length."""

        def process_madvise(self, _itself: int, ranges: Any, count: Any, advice: int, flags: int) -> int:
            assert (advice, flags) == (mmap.MADV_WILLNEED, 0)
            numbers = ctypes.cast(ranges, ctypes.POINTER(ctypes.c_uint64 * (2 * count.value))).contents
            asked.append([*numbers])
            return 0

    monkeypatch.setattr(mapping, "_libc", CLibrary())
    rows = np.arange(3000) % PAGES * ROWS_A_PAGE
    will_need([cold.pages(rows, 1), cold.pages(rows[:1], 1)])
    assert max(map(len, asked)) <= 2 * 1024  # more than the kernel takes
    everything = np.array([number for numbers in asked for number in numbers]).reshape(-1, 2)
    assert everything[:, 0].tolist() == [cold.rows[row].ctypes.data for row in [*rows.tolist(), 0]]
    assert set(everything[:, 1].tolist()) == {mmap.PAGESIZE}


def open_files() -> int:
    return len([*Path("/proc/self/fd").iterdir()])


def refuse(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Take away what asking for pages needs, as systems do that are older or that allow less."""
    if how == "no such call of Python":
        monkeypatch.delattr(os, "pidfd_open")
    elif how == "no such call of the C library":
        monkeypatch.setattr(mapping, "_libc", object())
    elif how == "refused":

        def refused(_pid: int) -> int:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "pidfd_open", refused)
    else:
        monkeypatch.setattr(os, "pidfd_open", lambda _pid: os.open(os.devnull, os.O_RDONLY))


@pytest.mark.parametrize(
    "how", ["no such call of Python", "no such call of the C library", "refused", "refused by the kernel"]
)
def test_where_pages_cannot_be_asked_for_they_are_read_as_they_are_touched(
    cold: MappedArray, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    refuse(monkeypatch, how)
    before = open_files()
    will_need([cold.pages(np.array([3 * ROWS_A_PAGE]), 1)])
    assert not resident(cold).any()
    assert cold.rows[3 * ROWS_A_PAGE, 0] == 3 * ROWS_A_PAGE * (ROW // 8)
    assert open_files() == before


def test_asking_for_pages_leaves_no_file_open(cold: MappedArray) -> None:
    before = open_files()
    will_need([cold.pages(np.array([0]), 1)])
    assert open_files() == before


@pytest.mark.parametrize("columns", [1, 3, 1000])
def test_rows_that_do_not_divide_a_page_are_in_the_pages_told(columns: int) -> None:
    rows = 4096
    array = MappedArray(np.dtype(np.uint16), (columns,), 2, rows * columns * 2)
    first, counts = np.array([0, 1, 2000, 2 * rows - 1]), np.array([1, 7, 3, 1])
    for start, count, (begin, length) in zip(first, counts, array.pages(first, counts).tolist(), strict=True):
        part = array.rows[start : start + count]
        assert begin <= part.ctypes.data < begin + mmap.PAGESIZE
        assert begin + length - mmap.PAGESIZE < part.ctypes.data + part.nbytes <= begin + length
    assert array.pages(first, counts)[-1].sum() == array.rows.ctypes.data + array.rows.nbytes


def test_where_files_cannot_be_mapped_they_are_read_into_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "_MAPS_FILES", False)
    array = MappedArray(np.dtype(np.int64), (2,), 3, mmap.PAGESIZE)
    assert array.rows.ctypes.data % (2 << 20) == 0
    content = np.arange(mmap.PAGESIZE // 8).reshape(-1, 2)
    path = tmp_path / "chunk"
    path.write_bytes(content.tobytes())
    with path.open("rb") as file:
        array.place(2, file.fileno())
    path.write_bytes(bytes(mmap.PAGESIZE))  # what was read in does not follow the file
    assert np.array_equal(array.rows[2 * len(content) :], content)
    assert not array.rows[: 2 * len(content)].any()
    assert not array.rows.flags.writeable
    will_need([array.pages(np.array([0]), 1)])


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
    faults.ru_majflt += FEW_FAULTS
    paging.note(1.0, 1)
    assert not paging.cold  # another thread had the processor
    faults.ru_majflt += FEW_FAULTS + 1
    paging.note(1.0, 1)
    assert paging.cold


def test_pages_that_were_read_before_are_not_held_against_a_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    paging = Paging()
    paging.note(1.0, 1)
    faults.ru_majflt += 1000  # reading its own pages, as long as it was cold
    paging.note(0.0, 1)
    paging.note(1.0, 1)
    assert not paging.cold


def test_whether_a_row_is_in_memory_is_told(cold: MappedArray) -> None:
    row = 7 * ROWS_A_PAGE
    assert not cold.in_memory(row)
    assert cold.rows[row, 0] == row * (ROW // 8)
    assert cold.in_memory(row)
    assert cold.in_memory(row + ROWS_A_PAGE - 1)
    assert not cold.in_memory(row + ROWS_A_PAGE)


def page_of(array: np.ndarray, row: int) -> int:
    return (int(array.ctypes.data) + row * array.strides[0]) // mmap.PAGESIZE * mmap.PAGESIZE


@pytest.mark.parametrize("alignment", ["pointwise", "causal"])
def test_a_cold_batch_asks_for_the_pages_that_it_reads_and_a_warm_one_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignment: Any
) -> None:
    source = reference(2, alignment=alignment, targets=True)
    reader = LocalLabelSet(build(tmp_path / "s" / "set", source, [0]))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(shards, "will_need", lambda pages: asked.extend(map(tuple, np.concatenate([*pages]).tolist())))
    last = len(source.ids) - 1  # not labelled: where its rows would be is nowhere
    ranges = np.array([[0, 1], [2**61, 2**61 + 5], [0, 1]]) if alignment == "causal" else None
    soft = reader.fetch([20, last, 0], rows=ranges, on_missing="mask")
    assert soft.present is not None
    assert soft.present.tolist() == [True, False, True]
    pages = {begin + offset for begin, length in asked for offset in range(0, length, mmap.PAGESIZE)}
    slot = int(source.layout.example_slots(np.array([last]))[0])
    nowhere = {"example": slot, "row": ROWS_PER_SHARD if alignment == "causal" else slot}
    for name, array in reader._shards.rows.items():
        per = source.layout.arrays[name].per
        rows = [0, int(source.first_rows[20])] if per == "row" else [0, 20]
        here = {page for page in pages if array.ctypes.data <= page < array.ctypes.data + array.nbytes}
        read, waste = ({page_of(array, row) for row in some} for some in (rows, [nowhere[per]]))
        assert here - waste == (read - waste if name != "ids" else set()), name
        pages -= here
    assert not pages
    reader._paging.note(0.0, 1)
    asked.clear()
    reader.fetch([20, 0])
    assert not asked
    reader.close()
