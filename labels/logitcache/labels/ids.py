"""Ids of examples as callers give them, made into one array.

In this version an id is the example's ordinal, 0 to N - 1. Whether an id exists is the label set's to say.
"""

from typing import Any

import numpy as np
from jaxtyping import Int64

from logitcache.labels.errors import InvalidIds


def as_ids(ids: Any) -> Int64[np.ndarray, " examples"]:
    """Ids as an int64 array; order and duplicates are kept.

    ``ids`` is a sequence of whole numbers, a NumPy array of any integer dtype, or a CPU tensor.

    Raises:
        InvalidIds: empty, not one-dimensional, not whole numbers (floats and booleans included), or beyond 64 bits.
    """
    if isinstance(ids, str | bytes | dict | set):
        raise InvalidIds(f"ids must be a sequence of whole numbers, not {type(ids).__name__}")
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError, TypeError) as error:
        raise InvalidIds(f"ids must be a sequence of whole numbers: {error}") from None
    if array.ndim != 1:
        raise InvalidIds(f"ids must be one-dimensional, not of shape {array.shape}; for one example pass [id]")
    if array.size == 0:
        raise InvalidIds("ids is empty: ask for at least one example")
    # NumPy would read True as 1.
    if array.dtype.kind not in "iu" or (isinstance(ids, list | tuple) and bool in set(map(type, ids))):
        _refuse(ids, array)
    if array.dtype == np.uint64 and bool((array > np.iinfo(np.int64).max).any()):
        raise InvalidIds(f"id {int(array.max())} is beyond 64 signed bits")
    return np.ascontiguousarray(array, np.int64)


def _refuse(ids: Any, array: np.ndarray) -> None:
    """Name the first id that is wrong; NumPy has turned a mixed list into floats, texts or objects by now."""
    for value in ids if isinstance(ids, list | tuple) else array:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise InvalidIds(f"id {repr(value)[:60]} is not a whole number, but {type(value).__name__}")
        if not -(2**63) <= int(value) < 2**63:
            raise InvalidIds(f"id {str(value)[:60]} is beyond 64 signed bits")
    raise InvalidIds(f"ids must be whole numbers, not {array.dtype}")
