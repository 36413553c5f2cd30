"""Numbers derived from a seed and counters: the same in every process and on every machine, whatever was drawn before.

XXH3-64 (seed 0) over the words as 64-bit little-endian integers. Not for secrets.
"""

import operator
import struct
from typing import SupportsIndex

import xxhash


def derived(seed: SupportsIndex, *words: SupportsIndex) -> int:
    """A number of 64 unsigned bits that depends on the seed and the words alone, each taken modulo 2^64."""
    counted = [operator.index(word) % 2**64 for word in (seed, *words)]  # also those of NumPy and torch
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(counted)}Q", *counted))


def uniform(seed: SupportsIndex, *words: SupportsIndex) -> float:
    """The same as a number from 0 to 1, 1 excluded: its 53 high bits, as many as a float holds."""
    return (derived(seed, *words) >> 11) * 2.0**-53
