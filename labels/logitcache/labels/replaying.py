"""Replaying: running an augmentation as it ran before, from a seed, and leaving the process's generators as they were.

Random augmentations draw from the generators of Python, NumPy and PyTorch, whichever is at hand; `replay` seeds all of
them. What keeps generators of its own is told by `seeded`. torch is not imported: where nobody has, nobody draws.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitcache.labels.derived import derived
from logitcache.labels.errors import InvalidRequest

_PYTHON, _NUMPY, _TORCH, _OWN = range(4)
"""Each generator has a seed of its own: Python's and NumPy's would draw the same numbers from one."""


@dataclass
class _Replayed:
    """The seed of one `replay`, and how many transforms of `seeded` were called in it so far."""

    seed: int
    calls: int = 0


_REPLAYED: ContextVar[_Replayed | None] = ContextVar("logitcache_replayed", default=None)


@contextmanager
def replay(seed: int) -> Iterator[None]:
    """Draw from this seed within the context: in ``random``, ``numpy.random`` and ``torch`` (the CPU's generator).

    Afterwards the generators go on as if nothing had been drawn, after an error, too. These generators are the
    process's: threads that draw meanwhile disturb each other, DataLoader workers do not.

    Args:
        seed: 64 unsigned bits, such as `views.seed_for` gives.

    Raises:
        InvalidRequest: it is not.
    """
    if not 0 <= seed < 2**64:
        raise InvalidRequest(f"seed={seed} is not a number of 64 unsigned bits")
    torch = sys.modules.get("torch")
    python, numpy = random.getstate(), np.random.get_state()
    of_torch = None if torch is None else torch.get_rng_state()
    token = _REPLAYED.set(_Replayed(seed))
    try:
        random.seed(derived(seed, _PYTHON))
        of_numpy = derived(seed, _NUMPY)
        np.random.seed([of_numpy & 0xFFFFFFFF, of_numpy >> 32])
        if torch is not None:
            torch.default_generator.manual_seed(derived(seed, _TORCH))
        yield
    finally:
        _REPLAYED.reset(token)
        random.setstate(python)
        np.random.set_state(numpy)
        if torch is not None:
            torch.set_rng_state(of_torch)


def replayed_seed() -> int | None:
    """The seed of the innermost `replay` around, or None outside of any."""
    replayed = _REPLAYED.get()
    return None if replayed is None else replayed.seed


def seeded(transform: Any) -> Callable[..., Any]:
    """A transform with generators of its own, told a seed at each call: that of the view that is being made, and the
    number of calls before it in this view. So two crops of an item differ, and are the same when it is made again.

    It must have a method ``set_random_seed(seed)``, as the ``Compose`` of albumentations has. Outside of `replay` it is
    called as it is.

    Raises:
        InvalidRequest: it has none.
    """
    if not callable(getattr(transform, "set_random_seed", None)):
        raise InvalidRequest(
            f"{type(transform).__name__} has no set_random_seed(seed): transforms that draw from random, numpy.random "
            "or torch need no `seeded`"
        )
    return _Seeded(transform)


class _Seeded:
    """What `seeded` returns; a class, so that datasets that hold one can be pickled."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        replayed = _REPLAYED.get()
        if replayed is not None:
            words = (_OWN, replayed.calls) if replayed.calls else (_OWN,)
            self.transform.set_random_seed(derived(replayed.seed, *words) & 0x7FFFFFFF)
            replayed.calls += 1
        return self.transform(*arguments, **options)
