"""Stores that people keep rows in, in this process: LMDB, HF datasets, and zarr-python on the label set's own files.

Each is set up as well as we know how; `log.md` tells which ways were tried and lost. A ``fetch`` is that of `peers`.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import zarr
from benchmarks.peers import NUMPY_FILES, Fetch, named
from benchmarks.rows import RECORD, Arrays

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: files that lie here need no hub
import datasets

CHUNK_ROWS = 32_768
"""Rows that are written at once."""


def chunks(records: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Where each run of `CHUNK_ROWS` rows begins, and the run."""
    for begin in range(0, len(records), CHUNK_ROWS):
        yield begin, records[begin : begin + CHUNK_ROWS]


def as_bytes(records: np.ndarray) -> list[bytes]:
    """Each row's bytes; ``tolist`` of a void view makes them in one call."""
    found: list[bytes] = records.view(f"V{RECORD.itemsize}").tolist()
    return found


def keys(ids: np.ndarray) -> list[bytes]:
    """Native-order 8-byte keys."""
    found: list[bytes] = ids.astype(np.uint64).view("V8").tolist()
    return found


def write_lmdb(path: Path, records: np.ndarray) -> Path:
    """One record a row under an 8-byte integer key, written in order so that pages are full."""
    map_bytes = 2 * records.nbytes + (64 << 20)
    with lmdb.open(str(path), subdir=False, map_size=map_bytes, max_dbs=1, sync=False) as environment:
        database = environment.open_db(b"rows", integerkey=True)
        for begin, chunk in chunks(records):
            with environment.begin(db=database, write=True) as transaction:
                pairs = zip(keys(np.arange(begin, begin + len(chunk))), as_bytes(chunk), strict=True)
                transaction.cursor().putmulti(pairs, append=True)
    return path


def open_lmdb(path: Path) -> Fetch:
    """LMDB in this process: a read transaction a batch, a ``get`` a row, no reading ahead, records joined once."""
    environment: Any = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False, max_dbs=1)
    database = environment.open_db(b"rows", integerkey=True)

    def fetch(ids: np.ndarray) -> np.ndarray:
        # Views in place of copies win in small batches only; see log.md.
        with environment.begin(db=database, buffers=len(ids) <= 1024) as transaction:
            return np.frombuffer(b"".join(map(transaction.get, keys(ids))), RECORD)

    return fetch


def write_arrow(path: Path, records: np.ndarray, table: Callable[[np.ndarray], Any]) -> Path:
    """An Arrow file as HF datasets writes it, of what ``table`` makes of some rows."""
    with datasets.arrow_writer.ArrowWriter(path=str(path)) as writer:
        for _, chunk in chunks(records):
            writer.write_table(table(chunk))
        writer.finalize()
    return path


def columns(records: np.ndarray) -> Any:
    """Rows as a table with a column an array, those of k numbers as lists of fixed length."""

    def column(array: np.ndarray) -> Any:
        flat = pa.array(np.ascontiguousarray(array).reshape(-1))
        return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])

    return pa.table({name: column(records[name]) for name in RECORD.names or ()})


def packed(records: np.ndarray) -> Any:
    """Rows as a table of one column of bytes."""
    return pa.table({"row": pa.array(as_bytes(records), pa.binary())})


def open_columns(path: Path) -> Fetch:
    """HF datasets, mapped, a column an array. ``with_format("arrow")``, because its ``"numpy"`` gives other dtypes."""
    stored = datasets.Dataset.from_file(str(path)).with_format("arrow")

    def array(column: Any) -> np.ndarray:
        whole = pa.concat_arrays(column.chunks)
        is_list = pa.types.is_fixed_size_list(whole.type)
        found: np.ndarray = (whole.flatten() if is_list else whole).to_numpy(zero_copy_only=False)
        return found.reshape(len(whole), -1) if is_list else found

    def fetch(ids: np.ndarray) -> Arrays:
        table = stored[ids]
        return {name: array(table.column(name)) for name in RECORD.names or ()}

    return fetch


def open_packed(path: Path) -> Fetch:
    """HF datasets, mapped, a record of bytes a row: not how people write it, but several times as fast."""
    stored = datasets.Dataset.from_file(str(path))

    def fetch(ids: np.ndarray) -> np.ndarray:
        return np.frombuffer(b"".join(stored[ids]["row"]), RECORD)

    return fetch


def open_zarr(label_set: Path) -> Fetch:
    """zarr-python on the label set's own files: what a Zarr reader pays that has no mapping of its own."""
    group = zarr.open_group(label_set, mode="r")
    stored: dict[str, Any] = {name: group[name] for name in NUMPY_FILES}

    def fetch(ids: np.ndarray) -> Arrays:
        return named({name: array.oindex[ids] for name, array in stored.items()})

    return fetch
