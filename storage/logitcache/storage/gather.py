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


def gather_rows(stored: Arrays, spec: RowSpec, rows: Int64[np.ndarray, " rows"], into: Arrays) -> None:
    """Copy these rows of the stored arrays into the fields of an answer that are one a row."""
    # Bounds are checked already; with mode="raise" NumPy would gather into a buffer first.
    for name in ("indices", "logits", "tokens", "target"):
        if name in into:
            np.take(stored[name], rows, 0, into[name], mode="clip")
    scalars = np.take(stored["scalars"], rows, 0, mode="clip")
    into["logit_max"][:] = scalars[:, 0]
    into["tail_logsumexp"][:] = scalars[:, 1 : 1 + len(spec.temperatures)]
    if spec.targets:
        into["target_logit"][:] = scalars[:, -1]


def mark_missing(arrays: Arrays, served: Bool[np.ndarray, " examples"]) -> None:
    """Say which examples have labels; what stands in the rows of those without can be trained on by nobody."""
    arrays["present"][:] = served
    arrays["fingerprint"][~served] = 0
    if "row_splits" in arrays:
        return
    for name in ("logits", "logit_max", "tail_logsumexp", "target_logit"):
        if name in arrays:
            arrays[name][~served] = np.nan
    arrays["indices"][~served] = 0
    if "target" in arrays:
        arrays["target"][~served] = -1
