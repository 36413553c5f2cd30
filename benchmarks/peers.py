"""What logitcache is compared with: each peer stores the same rows in its own way and fetches a batch of them.

Each is set up as well as we know how; `log.md` tells which ways were tried and lost. A ``fetch`` takes int64 ids
(rows,) and returns something that gives each of `rows.FIELDS` as a NumPy array when indexed by its name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import lmdb
import numpy as np
import orjson
from benchmarks.rows import FIELDS, RECORD, Arrays, Source, records_of

Fetch = Callable[[np.ndarray], Any]

NUMPY_FILES = ("fingerprint", "indices", "logits", "scalars")


def write_numpy_files(folder: Path, source: Source) -> Path:
    """Each array as one ``.npy`` file: what a person writes who needs rows for one run."""
    folder.mkdir()
    kept: Arrays = {}
    for span, arrays in source.shards():
        for name in NUMPY_FILES:
            if name not in kept:
                shape = (source.rows, *arrays[name].shape[1:])
                kept[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", arrays[name].dtype, shape)
            kept[name][span.start : span.stop] = arrays[name]
    return folder


def memmap(folder: Path) -> Fetch:
    """One ``take`` an array from mapped files: the ceiling, without ids, checks, or knowing what is labelled."""
    # As plain arrays: the memmap class costs some microseconds at every operation.
    stored = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in NUMPY_FILES}

    def fetch(ids: np.ndarray) -> Arrays:
        taken = {name: array.take(ids, axis=0) for name, array in stored.items()}
        return {
            "fingerprint": taken["fingerprint"][:, 0],
            "logit_max": taken["scalars"][:, 0],
            "tail_logsumexp": taken["scalars"][:, 1:],
            "indices": taken["indices"],
            "logits": taken["logits"],
        }

    return fetch


def write_lmdb(path: Path, source: Source) -> Path:
    """One record a row under an 8-byte integer key, written in order so that pages are full."""
    with lmdb.open(str(path), subdir=False, map_size=_map_bytes(source.rows), max_dbs=1, sync=False) as environment:
        database = environment.open_db(b"rows", integerkey=True)
        for _, arrays in source.shards():
            with environment.begin(db=database, write=True) as transaction:
                values = records_of(arrays).view(f"V{RECORD.itemsize}").tolist()
                transaction.cursor().putmulti(zip(_keys(arrays["ids"]), values, strict=True), append=True)
    return path


def _map_bytes(rows: int) -> int:
    return 2 * rows * RECORD.itemsize + (64 << 20)


def _keys(ids: np.ndarray) -> list[bytes]:
    """Native-order 8-byte keys; ``tolist`` of a void view makes them in one call."""
    keys: list[bytes] = ids.astype(np.uint64).view("V8").tolist()
    return keys


def open_lmdb(path: Path) -> Fetch:
    """LMDB in this process: a read transaction a batch, a ``get`` a row, no reading ahead, records joined once."""
    environment: Any = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False, max_dbs=1)
    database = environment.open_db(b"rows", integerkey=True)

    def fetch(ids: np.ndarray) -> np.ndarray:
        # Views in place of copies win in small batches only; see log.md.
        with environment.begin(db=database, buffers=len(ids) <= 1024) as transaction:
            return np.frombuffer(b"".join(map(transaction.get, _keys(ids))), RECORD)

    return fetch


def json_endpoint(client: httpx.Client, route: str) -> Fetch:
    """The JSON endpoint of `json_endpoint`, read into arrays; the same code reads nested lists and flat ones."""

    def fetch(ids: np.ndarray) -> Arrays:
        response = client.post(route, content=orjson.dumps({"ids": ids}, option=orjson.OPT_SERIALIZE_NUMPY))
        response.raise_for_status()
        told = orjson.loads(response.content)
        return {name: np.array(told[name], RECORD[name].base).reshape(len(ids), *RECORD[name].shape) for name in FIELDS}

    return fetch
