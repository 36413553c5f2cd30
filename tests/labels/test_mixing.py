"""Pairwise mixing: the same partner, weight and box wherever asked for, of the distributions that are promised."""

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logitcache.labels.errors import InvalidRequest
from logitcache.labels.mixing import Mixing, mixing
from logitcache.labels.replaying import replay
from logitcache.labels.views import seed_for

SEEDS = st.integers(0, 2**64 - 1)
ALPHAS = st.floats(1e-9, 1000, exclude_min=True)


@given(seed=SEEDS, examples=st.integers(1, 2**63 - 1), alpha=ALPHAS)
def test_mixing_is_a_function_of_the_seed_alone(seed: int, examples: int, alpha: float) -> None:
    found = mixing(examples, alpha, seed=seed)
    assert 0 <= found.partner < examples
    assert 0 <= found.weight <= 1
    with replay(seed):
        random.random()
        assert mixing(examples, alpha) == found
    assert mixing(examples, 2.5, seed=seed).partner == found.partner


def test_mixing_is_pinned() -> None:
    """A student with a later version, on another platform, must make the inputs that the teacher was shown."""
    seed = seed_for(1, 0, 0)
    pinned = [(alpha, mixing(1000, alpha, seed=seed)) for alpha in (0.2, 1.0, 4.0)]
    assert {(found.partner, found.seed) for _, found in pinned} == {(159, 4613881337723487471)}
    assert [(alpha, found.weight.hex()) for alpha, found in pinned] == [
        (0.2, "0x1.808a4864ed45bp-1"),
        (1.0, "0x1.e1b7d1aee44d2p-2"),
        (4.0, "0x1.e1b7d1aee44d2p-2"),
    ]
    assert Mixing(0, 0.25, seed).box(32, 48) == (slice(2, 30), slice(0, 42))


def test_another_process_mixes_the_same() -> None:
    code = (
        "import sys; from logitcache.labels.mixing import mixing; from logitcache.labels.replaying import replay\n"
        "assert 'torch' not in sys.modules\n"
        "for seed in range(50):\n"
        "    with replay(seed): found = mixing(10**6, 0.2); print(found.partner, found.weight.hex(), found.seed)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    expected = [mixing(10**6, 0.2, seed=seed) for seed in range(50)]
    assert done.stdout.splitlines() == [f"{found.partner} {found.weight.hex()} {found.seed}" for found in expected]


def test_outside_of_a_replay_mixing_is_drawn_anew() -> None:
    random.seed(3)
    first = mixing(10**9)
    assert first != mixing(10**9)
    random.seed(3)
    assert first == mixing(10**9)


@pytest.mark.parametrize("examples", [2, 10, 97])
def test_every_example_is_the_partner_as_often_as_any_other(examples: int) -> None:
    """Chi-square of the counts, whose mean is examples - 1 and deviation sqrt(2 (examples - 1)): within 4 of these."""
    seeds = 60 * examples
    counts = np.bincount(
        [mixing(examples, seed=seed_for(1, id, id % 3)).partner for id in range(seeds)], minlength=examples
    )
    statistic = float(((counts - 60) ** 2 / 60).sum())
    assert abs(statistic - (examples - 1)) < 4 * (2 * (examples - 1)) ** 0.5


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4, 1.0, 1.5, 4.0, 30.0])
def test_weights_have_the_moments_of_the_beta_distribution(alpha: float) -> None:
    """Mean 1/2, and E|2w - 1|^2n as the product of (2i - 1) / (2 alpha + 2i - 1), each within 4 standard errors."""
    count = 2000
    spread = 2 * np.array([mixing(2, alpha, seed=seed_for(2, id, 0)).weight for id in range(count)]) - 1
    moments = np.cumprod([(2 * i - 1) / (2 * alpha + 2 * i - 1) for i in range(1, 5)])
    assert abs(spread.mean()) < 4 * (moments[0] / count) ** 0.5
    for power, (moment, of_square) in enumerate(zip(moments[:2], moments[[1, 3]], strict=True), 1):
        assert abs((spread ** (2 * power)).mean() - moment) < 4 * ((of_square - moment**2) / count) ** 0.5


@given(seed=SEEDS, weight=st.floats(0, 1), height=st.integers(1, 500), width=st.integers(1, 500))
def test_a_box_is_the_partners_share_of_the_image_and_lies_within_it(
    seed: int, weight: float, height: int, width: int
) -> None:
    rows, columns = Mixing(0, weight, seed).box(height, width)
    assert 0 <= rows.start <= rows.stop <= height
    assert 0 <= columns.start <= columns.stop <= width
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    assert abs(area - (1 - weight) * height * width) <= (height + width) / 2 + 0.25


def test_boxes_reach_every_place_that_is_within() -> None:
    boxes = [Mixing(0, 0.75, seed_for(1, id, 0)).box(4, 6) for id in range(400)]
    assert {(rows.start, columns.start) for rows, columns in boxes} == {(y, x) for y in range(3) for x in range(4)}
    assert {(rows.stop - rows.start, columns.stop - columns.start) for rows, columns in boxes} == {(2, 3)}


@pytest.mark.parametrize(
    ("examples", "alpha", "told"),
    [(0, 1.0, "examples=0"), (9, 0.0, "alpha=0.0"), (9, -1.0, "alpha=-1"), (9, 1001.0, "1,000"), (9, np.nan, "nan")],
)
def test_what_cannot_be_mixed_is_refused(examples: int, alpha: float, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        mixing(examples, alpha)
