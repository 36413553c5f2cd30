"""Children that make their first call of a function of floats in several threads, as a fresh process does, until a
number of seconds is over: how many there were, and how many gave other bits than most of them.

``python first_calls.py FUNCTION SECONDS settled|unsettled`` prints both. A child gives back the pages of torch's code,
since it is while they are read that one thread overtakes the other.
"""

import ctypes
import os
import sys
import time
from collections import Counter
from pathlib import Path

import torch

DONT_NEED = 4  # of madvise
ELEMENTS = 2816  # in two threads, by MKL's own choice


def code_of_torch() -> list[tuple[int, int]]:
    """Address and size of what is mapped to be run."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_ = line.split()
        if "libtorch_cpu" in line and "x" in rights:
            begin, end = (int(address, 16) for address in addresses.split("-"))
            found.append((begin, end - begin))
    return found


def child(function: str, given: torch.Tensor) -> bytes:
    """The bits that a child gives."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        for begin, size in CODE:
            LIBC.madvise(begin, size, DONT_NEED)
        os.write(theirs, getattr(torch, function)(given).numpy().tobytes())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        bits = pipe.read()
    os.wait()
    return bits


if __name__ == "__main__":
    function, seconds, settled = sys.argv[1:]
    if settled == "settled":
        import logitcache.labels.selection  # noqa: F401
    torch.set_num_threads(2)
    LIBC, CODE = ctypes.CDLL(None), code_of_torch()
    LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    given, until = torch.linspace(0.05, 0.95, ELEMENTS), time.monotonic() + float(seconds)
    seen = Counter[bytes]()
    while time.monotonic() < until:
        seen[child(function, given)] += 1
    print(seen.total(), seen.total() - seen.most_common(1)[0][1])
