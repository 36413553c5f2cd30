"""Pairwise mixing, as in mixup and cutmix: partner, weight and box of an example, from the seed of the view being made.

Counted and not drawn from a generator: whole numbers, and beyond them only what IEEE 754 and `decimal` round correctly.
So the bits are the same in every process and on every platform, whatever mathematical library that has.
"""

import math
import random
from dataclasses import dataclass
from decimal import Context, Decimal

from logitcache.labels.derived import derived
from logitcache.labels.errors import InvalidRequest
from logitcache.labels.replaying import replayed_seed

MAX_ALPHA = 1000
"""Beyond it all weights are one half, as good as, and take long to find."""

_MIXING = 4
"""After the generators that `replaying` counts."""

_PARTNER, _SEED, _WEIGHT, _OTHER, _TOP, _LEFT = range(6)

_EXACT = Context(prec=40, traps=[])


@dataclass(frozen=True)
class Mixing:
    """How an example is mixed.

    Attributes:
        partner: ordinal of the example it is mixed with; it may be itself.
        weight: the example's own share, 0 to 1; the partner's is the rest.
        seed: make the partner within ``replay(seed)``, so that its augmentation is its own, and replayed, too.
    """

    partner: int
    weight: float
    seed: int

    def box(self, height: int, width: int) -> tuple[slice, slice]:
        """For cutmix, rows and columns that are the partner's: 1 - weight of the area, up to whole pixels.

        It lies within the image; the area that it has in fact, after rounding, is the partner's share.
        """
        side = math.sqrt(1 - self.weight)
        rows, columns = (int(length * side + 0.5) for length in (height, width))
        top, left = _below(height - rows + 1, self.seed, _TOP), _below(width - columns + 1, self.seed, _LEFT)
        return slice(top, top + rows), slice(left, left + columns)


def mixing(examples: int, alpha: float = 1.0, *, seed: int | None = None) -> Mixing:
    """With which of so many examples the one that is being made is mixed, and how much; for use in ``__getitem__``.

    Args:
        examples: how many there are; each is the partner as often as any other.
        alpha: the weight is of the distribution Beta(alpha, alpha); 1 is uniform, below most examples stay as they are.
        seed: 64 bits that the result is a function of; None takes the one of the `replay` around, which teacher and
            student make each view in. Where there is none, one is drawn from ``random``.

    Raises:
        InvalidRequest: there are no examples, or ``alpha`` is not above 0, or above `MAX_ALPHA`.
    """
    if examples < 1:
        raise InvalidRequest(f"examples={examples}: there is none to mix with")
    if not 0 < alpha <= MAX_ALPHA:
        raise InvalidRequest(f"alpha={alpha} is not above 0 and at most {MAX_ALPHA:,}")
    if seed is None:
        seed = replayed_seed()
    if seed is None:
        seed = random.getrandbits(64)
    return Mixing(_below(examples, seed, _PARTNER), _beta(seed, alpha), derived(seed, _MIXING, _SEED))


def _below(count: int, seed: int, which: int) -> int:
    """A number from 0 to count - 1; none is more likely than another by more than 2^-64."""
    return derived(seed, _MIXING, which) * count >> 64


def _open_uniform(seed: int, which: int, attempt: int) -> float:
    """A number between 0 and 1 that is neither: an odd multiple of 2^-53."""
    return ((derived(seed, _MIXING, which, attempt) >> 11) | 1) * 2.0**-53


def _beta(seed: int, alpha: float) -> float:
    """A number of Beta(alpha, alpha), by rejection: at least half of the attempts succeed up to alpha 3."""
    shape = Decimal(alpha)
    attempt = 0
    while True:
        one, other = (_open_uniform(seed, which, attempt) for which in (_WEIGHT, _OTHER))
        attempt += 1
        first, second = _EXACT.ln(Decimal(one)), _EXACT.ln(Decimal(other))
        if alpha >= 1:
            # The density over its largest value is (4x(1 - x))^(alpha - 1).
            height = _EXACT.ln(_EXACT.multiply(4, _EXACT.multiply(Decimal(one), Decimal(1 - one))))
            if second <= _EXACT.multiply(_EXACT.subtract(shape, 1), height):
                return one
            continue
        # Jöhnk: of u^(1/alpha) and v^(1/alpha) that sum to at most 1, the share of the first.
        first, second = _EXACT.divide(first, shape), _EXACT.divide(second, shape)
        if _EXACT.add(_EXACT.exp(first), _EXACT.exp(second)) <= 1:
            smaller = _EXACT.exp(_EXACT.minus(_EXACT.abs(_EXACT.subtract(first, second))))
            share = _EXACT.divide(smaller if first < second else 1, _EXACT.add(1, smaller))
            return float(share)
