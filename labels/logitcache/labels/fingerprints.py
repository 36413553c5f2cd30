"""Fingerprints: 64-bit hashes of what the teacher was shown, so that a client can prove it holds the same.

The hash is XXH3-64 over ``"<dtype>:<shape>:"`` and the C-contiguous little-endian bytes of one input. It proves
identity against accidents (re-ordered, re-normalised or re-encoded data), not against someone who forges inputs.
Two inputs of equal value and another dtype have other fingerprints: the teacher might see them differently.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash
from jaxtyping import UInt32, UInt64


def fingerprint(input: Any) -> int:
    """Fingerprint of one input: a tensor on any device, a NumPy array, or a number.

    Raises:
        TypeError: the input is not an array of numbers.
    """
    dtype, array = _read(input)
    state = _begun(dtype, array.shape)
    state.update(np.ascontiguousarray(array).data)
    return int(state.intdigest())


def _read(input: Any) -> tuple[str, np.ndarray]:
    """The name of the dtype that an input has, and its values as a little-endian array."""
    if hasattr(input, "detach"):
        input = input.detach().cpu()
    dtype = str(getattr(input, "dtype", "")).removeprefix("torch.")
    try:
        array = np.asarray(input)
    except TypeError:
        # bfloat16 and the 8-bit floats have no NumPy dtype; float32 holds each of them exactly.
        array = np.asarray(input.float())
    if array.dtype.kind not in "biufc":
        raise TypeError(f"an input must be an array of numbers, not {type(input).__name__} of {array.dtype}")
    return dtype or array.dtype.name, np.asarray(array, array.dtype.newbyteorder("<"))


def _begun(dtype: str, shape: tuple[int, ...]) -> xxhash.xxh3_64:
    return xxhash.xxh3_64(f"{dtype}:{'x'.join(map(str, shape))}:".encode())


def token_fingerprint(tokens: UInt32[np.ndarray, " length"]) -> int:
    """Fingerprint of a token sequence, padding cut off: that of its ids as uint32, in whatever dtype they were held."""
    return fingerprint(np.ascontiguousarray(tokens, np.uint32))


def fingerprints(inputs: Iterable[Any]) -> UInt64[np.ndarray, " examples"]:
    """Fingerprint of each input of a batch: a stacked tensor or array, or a list of them."""
    if not hasattr(inputs, "dtype"):
        return np.fromiter((fingerprint(input) for input in inputs), np.uint64)
    dtype, array = _read(inputs)
    begun, found = _begun(dtype, array.shape[1:]), np.empty(len(array), np.uint64)
    for at, row in enumerate(np.ascontiguousarray(array)):
        state = begun.copy()
        state.update(row)
        found[at] = state.intdigest()
    return found
