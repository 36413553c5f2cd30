"""Gathering rows out of stored arrays into those of an answer. Pure functions of arrays; bounds are the caller's."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Int64

from logitcache.labels.soft_labels import RowSpec

Arrays = Mapping[str, np.ndarray]


def runs(first: Int64[np.ndarray, " examples"], splits: Int64[np.ndarray, " splits"]) -> Int64[np.ndarray, " rows"]:
    """Rows ``first[i]``, ``first[i] + 1``, … of each example i, as many as ``splits`` says, example after example."""
    counts = np.diff(splits)
    rows: np.ndarray = np.repeat(first - splits[:-1], counts) + np.arange(int(splits[-1]))
    return rows


def gather_rows(
    stored: Arrays, spec: RowSpec, rows: Int64[np.ndarray, " rows"], into: Arrays | None = None
) -> dict[str, np.ndarray]:
    """The fields of an answer that are one a row, copied out of the stored arrays: new arrays, or ``into`` those."""
    into = into or {}
    # Bounds are checked already; with mode="raise" NumPy would gather into a buffer first.
    found = {name: stored[name].take(rows, 0, into.get(name), "clip") for name in spec.arrays}
    scalars = stored["scalars"].take(rows, 0, None, "clip")
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
