"""Seeds of views, and replaying: the same draws wherever and whenever, and generators that go on undisturbed."""

import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from logitcache.labels.derived import derived
from logitcache.labels.errors import InvalidRequest
from logitcache.labels.ids import Ids
from logitcache.labels.replaying import replay, seeded
from logitcache.labels.views import as_views, seed_for, view_of


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def test_the_seed_of_a_view_is_pinned() -> None:
    """A student with a later version must make the inputs that the teacher was shown."""
    assert seed_for(1, 0, 0) == 2319651275181844610
    assert seed_for(1, -5, 3) == 7854644550303431423
    assert seed_for(7, "train/n01/é.jpg", 2) == 9324072595272665798


def test_seeds_differ_by_label_set_id_and_view() -> None:
    seeds = {seed_for(seed, id, view) for seed in (1, 2) for id in (0, 1, 256, "0", "1") for view in (0, 1, 2)}
    assert len(seeds) == 30
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_epochs_take_the_views_in_turn() -> None:
    assert [view_of(epoch, 3) for epoch in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert view_of(10**9, 1) == 0
    with pytest.raises(InvalidRequest, match="epoch=-1"):
        view_of(-1, 3)


def test_a_seed_gives_the_same_draws_and_another_one_others() -> None:
    seeds = [seed_for(1, 5, view) for view in range(3)]
    first: list[tuple[float, ...]] = []
    again: list[tuple[float, ...]] = []
    for found in (first, again):
        for seed in seeds:
            with replay(seed):
                found.append(drawn())
            drawn()
    assert first == again
    assert len({number for draws in first for number in draws}) == 9
    with replay(1):
        low = drawn()
    with replay(1 + 2**32):  # the high bits count
        assert all(one != other for one, other in zip(low, drawn(), strict=True))


def test_generators_go_on_as_if_nothing_had_been_drawn() -> None:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = [drawn() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    found = [drawn()]
    with replay(9):
        torch.randn(7)  # leaves half of a pair of normal numbers
        np.random.normal()
        random.gauss(0, 1)
    found.append(drawn())
    with pytest.raises(ZeroDivisionError), replay(9), replay(10):
        drawn()
        raise ZeroDivisionError
    found.append(drawn())
    assert found == expected


def test_another_process_draws_the_same_with_and_without_torch() -> None:
    code = (
        "import random, numpy\n{}\nfrom logitcache.labels.replaying import replay\nfrom logitcache.labels.views import "
        "seed_for\nwith replay(seed_for(3, 'a', 1)): print(random.random(), float(numpy.random.random()){})"
    )
    with replay(seed_for(3, "a", 1)):
        expected = drawn()
    for imports, last, count in (("import torch", ", float(torch.rand(()))", 3), ("", "", 2)):
        done = subprocess.run([sys.executable, "-c", code.format(imports, last)], capture_output=True, check=True)
        assert [float(word) for word in done.stdout.split()] == pytest.approx(expected[:count], abs=0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_what_is_no_seed_is_refused(seed: int) -> None:
    with pytest.raises(InvalidRequest, match="64 unsigned bits"), replay(seed):
        pass


class OwnGenerator:
    """Draws from a generator of its own, as newer versions of albumentations do."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng()

    def set_random_seed(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *, image: np.ndarray) -> np.ndarray:
        noisy: np.ndarray = image + self.generator.random(image.shape)
        return noisy


def test_a_transform_with_generators_of_its_own_is_told_the_seed() -> None:
    transform, image = pickle.loads(pickle.dumps(seeded(OwnGenerator()))), np.zeros(4)
    made = []
    for seed in (5, 6, 5):
        with replay(seed):
            made.append(transform(image=image).tolist())
        transform(image=image)
    assert made[0] == made[2] != made[1]
    free = transform(image=image).tolist()
    assert free != transform(image=image).tolist()  # outside it draws as ever
    with pytest.raises(InvalidRequest, match=r"OrdinaryTransform has no set_random_seed"):
        seeded(OrdinaryTransform())


def test_each_call_within_an_item_draws_on_its_own_and_the_same_when_it_is_made_again() -> None:
    transform, other, image = seeded(OwnGenerator()), seeded(OwnGenerator()), np.zeros(4)
    made = []
    for _ in range(2):
        with replay(5):
            crops = [transform(image=image).tolist()]
            with replay(6):
                crops.append(transform(image=image).tolist())
            made.append([*crops, transform(image=image).tolist(), other(image=image).tolist()])
    assert made[0] == made[1]
    assert len({tuple(crop) for crop in made[0]}) == 4
    # Pinned: label sets that were made with one call an item keep their bytes.
    assert made[0][0] == np.random.default_rng(derived(5, 3) & 0x7FFFFFFF).random(4).tolist()


class OrdinaryTransform:
    def __call__(self, image: np.ndarray) -> np.ndarray:
        return image


def test_numbers_of_numpy_are_views_too() -> None:
    ids = Ids(np.arange(2))
    assert as_views(np.int64(1), ids, 2, "set") == 1
    assert as_views(np.array([1, 0], np.uint64), ids, 2, "set") is not None
