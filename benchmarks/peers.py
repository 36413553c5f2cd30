"""Rows in plain NumPy files, mapped: what people write for one run, and what other peers' stores are written from.

A ``fetch`` takes int64 ids (rows,) and returns something that gives each array when indexed by its name: `rows.FIELDS`,
or `sequences.FIELDS`. Here it checks nothing but bounds. `store_peers` has the stores in this process, `remote_peers`
what is behind a socket; `log.md` tells which ways were tried and lost.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.rows import RECORD, Arrays, Source, records_of
from benchmarks.sequences import Sequences

Fetch = Callable[[np.ndarray], Any]

NUMPY_FILES = ("fingerprint", "indices", "logits", "scalars")


def write_records(path: Path, source: Source) -> np.ndarray:
    """Whole rows as one structured ``.npy`` file; gives them, mapped."""
    records: np.ndarray = np.lib.format.open_memmap(path, "w+", RECORD, (source.rows,))
    for span, arrays in source.shards():
        records[span.start : span.stop] = records_of(arrays)
    return np.asarray(records)


def write_numpy_files(folder: Path, source: Source) -> Path:
    """Each array as one ``.npy`` file."""
    folder.mkdir()
    kept: Arrays = {}
    for span, arrays in source.shards():
        for name in NUMPY_FILES:
            if name not in kept:
                shape = (source.rows, *arrays[name].shape[1:])
                kept[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", arrays[name].dtype, shape)
            kept[name][span.start : span.stop] = arrays[name]
    return folder


def mapped(path: Path) -> np.ndarray:
    """A mapped ``.npy`` file as a plain array: the memmap class costs some microseconds at every operation."""
    return np.asarray(np.load(path, mmap_mode="r"))


def named(taken: Arrays) -> Arrays:
    """What was taken from `NUMPY_FILES`, by `rows.FIELDS`; nothing is copied."""
    return {
        "fingerprint": taken["fingerprint"][:, 0],
        "logit_max": taken["scalars"][:, 0],
        "tail_logsumexp": taken["scalars"][:, 1:],
        "indices": taken["indices"],
        "logits": taken["logits"],
    }


def memmap(folder: Path) -> Fetch:
    """One ``take`` an array from mapped files: without ids, checks, or knowing what is labelled."""
    stored = {name: mapped(folder / f"{name}.npy") for name in NUMPY_FILES}

    def fetch(ids: np.ndarray) -> Arrays:
        return named({name: array.take(ids, axis=0) for name, array in stored.items()})

    return fetch


def memmap_of_records(path: Path) -> Fetch:
    """One ``take`` for all: a row's bytes lie together, so it costs one miss where the arrays cost four."""
    # As bytes without structure: NumPy copies records field by field.
    stored = mapped(path).view(f"V{RECORD.itemsize}")

    def fetch(ids: np.ndarray) -> np.ndarray:
        return stored.take(ids).view(RECORD)

    return fetch


def write_sequence_files(folder: Path, sequences: Sequences) -> Path:
    """Each array as one ``.npy`` file (sequences, length, ...), and ``sequences.bin``: whole sequences one after the
    other, padded at the end, so that a body as long as ours can be cut out of it anywhere.
    """
    folder.mkdir()
    stored: Arrays = {}
    for name in (names := sequences.record.names or ()):
        shape, dtype = sequences.record[name].shape, sequences.record[name].base
        stored[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (sequences.count, *shape))
    with (folder / "sequences.bin").open("wb") as file:
        for shard in range(sequences.layout.shards):
            span, records = sequences.layout.span(shard), sequences.records(shard)
            records.tofile(file)
            for name in names:
                stored[name][span.start : span.stop] = records[name]
        file.write(bytes(1 << 16))
    return folder


def memmap_of_sequences(folder: Path, sequences: Sequences) -> Fetch:
    """One ``take`` of whole sequences an array from mapped files."""
    stored = {name: mapped(folder / f"{name}.npy") for name in sequences.record.names or ()}

    def fetch(ids: np.ndarray) -> Arrays:
        return sequences.flat({name: array.take(ids, axis=0) for name, array in stored.items()})

    return fetch
