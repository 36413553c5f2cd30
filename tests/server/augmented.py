"""Datasets with random augmentation of every style, good and bad, that tests name by SPEC."""

import random
from typing import Any

import numpy as np
import torch

from logitcache.client import mixing, replay, seeded

EXAMPLES, CLASSES = 300, 7


def one() -> torch.nn.Module:
    return teacher(2)


def other() -> torch.nn.Module:
    return teacher(3)


def teacher(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    linear = torch.nn.Linear(3 * 4 * 4, CLASSES)
    with torch.no_grad():
        linear.weight *= 10
    return torch.nn.Sequential(torch.nn.Flatten(), linear)


def plain(image: torch.Tensor) -> torch.Tensor:
    """Draws from Python and NumPy."""
    if random.random() < 0.5:
        image = image.flip(-1)
    return image + float(np.random.normal()) + random.gauss(0, 1)


class OfTorch(torch.nn.Module):
    """As torchvision's v2 transforms do: a module that draws from torch."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        shift = int(torch.randint(0, 4, ()))
        return torch.roll(image, shift, -1) + torch.randn(image.shape)


class OwnGenerators:
    """As albumentations does: a generator of its own, images by keyword as arrays, and a method to seed it."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng()

    def set_random_seed(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": image + self.generator.normal(size=image.shape).astype(np.float32)}


class Images:
    """Small images; items are pairs, or mappings with ids of their own."""

    def __init__(self, transform: Any, ids: str = "") -> None:
        self.images = torch.randn(EXAMPLES, 3, 4, 4, generator=torch.Generator().manual_seed(8))
        self.transform, self.ids = transform, ids

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image = self.transform(self.images[index])
        if not self.ids:
            return image, index % CLASSES
        own = f"images/{index}.png" if self.ids == "text" else torch.tensor(10**6 - index)
        return {"input": image, "labels": index % CLASSES, "id": own}


class Told(Images):
    """Tells ids without making items."""

    reads = 0

    def id_of(self, ordinal: int) -> int:
        return 10**6 - ordinal

    def __getitem__(self, index: int) -> Any:
        type(self).reads += 1
        return super().__getitem__(index)


class Keyword:
    """Calls a transform as albumentations is called."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.transform(image=image.numpy())["image"])


class Mixing(Images):
    """mixup: partner and weight are of the view's seed, and the partner is augmented on its own."""

    def __getitem__(self, index: int) -> Any:
        mixed = mixing(len(self), 0.4)
        with replay(mixed.seed):
            partner = self.transform(self.images[mixed.partner])
        return mixed.weight * self.transform(self.images[index]) + (1 - mixed.weight) * partner


def of_plain() -> Images:
    return Images(plain)


def of_torch() -> Images:
    return Images(OfTorch(), "number")


def of_own_generators() -> Images:
    return Images(Keyword(seeded(OwnGenerators())), "text")


def of_mixing() -> Images:
    return Mixing(Keyword(seeded(OwnGenerators())))


def of_told() -> Images:
    return Told(plain, "number")


STYLES = {
    "plain": of_plain,
    "torch": of_torch,
    "own_generators": of_own_generators,
    "mixing": of_mixing,
    "told": of_told,
}


def unseeded() -> Images:
    return Images(Keyword(OwnGenerators()))


def constant() -> Images:
    return Images(lambda image: image)


def brighter(image: torch.Tensor) -> torch.Tensor:
    return plain(image) + 1e-3


def changed() -> Images:
    return Images(brighter)


def raising() -> Images:
    def fails(image: torch.Tensor) -> torch.Tensor:
        if random.random() < 0.01:
            raise ValueError("a corrupt crop")
        return plain(image)

    return Images(fails)


class Beyond(Images):
    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0], 9 if index == 250 else 1


def beyond() -> Images:
    return Beyond(plain)


class Repeated(Images):
    def __getitem__(self, index: int) -> Any:
        return {"input": self.transform(self.images[index]), "id": 7 if index == 250 else index}


def repeated() -> Images:
    return Repeated(plain)


class Drawn(Images):
    """Ids that depend on what is drawn."""

    def __getitem__(self, index: int) -> Any:
        return {"input": self.transform(self.images[index]), "id": f"{index}-{random.random()}"}


def drawn_ids() -> Images:
    return Drawn(plain)


class ToldOthers(Images):
    """Tells ids that its items, which have none, are not labelled under."""

    def id_of(self, ordinal: int) -> int:
        return (ordinal + 5) % EXAMPLES


def told_others() -> Images:
    return ToldOthers(plain)


class Coins(Images):
    """So few examples, and so little augmentation, that two views are often the same."""

    def __len__(self) -> int:
        return 2


def coins() -> Images:
    return Coins(lambda image: image.flip(-1) if random.random() < 0.5 else image)


def tokens() -> list[Any]:
    return [{"input_ids": torch.arange(4)}]
