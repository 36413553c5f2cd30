"""Gathering rows out of stored arrays into those of an answer. Pure functions of arrays; bounds are the caller's."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Bool, Int64

from logitcache.labels.soft_labels import RowSpec

Arrays = Mapping[str, np.ndarray]

LONG_RUN = 32
"""Rows an example, on average, from which copying each run apart is faster than gathering row by row."""


def runs(first: Int64[np.ndarray, " examples"], splits: Int64[np.ndarray, " splits"]) -> Int64[np.ndarray, " rows"]:
    """Rows ``first[i]``, ``first[i] + 1``, … of each example i, as many as ``splits`` says, example after example."""
    counts = np.diff(splits)
    rows: np.ndarray = np.repeat(first - splits[:-1], counts) + np.arange(int(splits[-1]))
    return rows


def gather_rows(
    stored: Arrays, spec: RowSpec, rows: Int64[np.ndarray, " rows"], into: Arrays | None = None
) -> dict[str, np.ndarray]:
    """The fields of an answer that are one a row, copied out of the stored arrays: new arrays, or ``into`` those."""
    # Bounds are checked already; with mode="raise" NumPy would gather into a buffer first.
    return _gathered(lambda array, out: array.take(rows, 0, out, "clip"), stored, spec, into or {})


def gather_runs(
    stored: Arrays,
    spec: RowSpec,
    first: Int64[np.ndarray, " examples"],
    splits: Int64[np.ndarray, " splits"],
    into: Arrays | None = None,
) -> dict[str, np.ndarray]:
    """As `gather_rows`, of the rows that `runs` tells."""
    if int(splits[-1]) < LONG_RUN * len(first):
        return gather_rows(stored, spec, runs(first, splits), into)
    begins, ends = splits[:-1].tolist(), splits[1:].tolist()

    def copied(array: np.ndarray, out: np.ndarray | None) -> np.ndarray:
        out = np.empty((ends[-1], *array.shape[1:]), array.dtype) if out is None else out
        for start, begin, end in zip(first.tolist(), begins, ends, strict=True):
            out[begin:end] = array[start : start + end - begin]
        return out

    return _gathered(copied, stored, spec, into or {})


def _gathered(
    copied: Callable[[np.ndarray, np.ndarray | None], np.ndarray], stored: Arrays, spec: RowSpec, into: Arrays
) -> dict[str, np.ndarray]:
    found = {name: copied(stored[name], into.get(name)) for name in spec.arrays}
    scalars = copied(stored["scalars"], None)
    for name, column in spec.scalars.items():
        found[name] = scalars[:, column]
        if into:
            into[name][...] = found[name]
            found[name] = into[name]
    return found


def mark_missing(arrays: Arrays, served: Bool[np.ndarray, " examples"]) -> None:
    """Make of the rows of examples without labels what nobody can train on."""
    arrays["fingerprint"][~served] = 0
    if "row_splits" in arrays:
        return
    for name in ("logits", "logit_max", "tail_logsumexp", "target_logit"):
        if name in arrays:
            arrays[name][~served] = np.nan
    arrays["indices"][~served] = 0
    if "target" in arrays:
        arrays["target"][~served] = -1
