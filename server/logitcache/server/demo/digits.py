"""The demo's teacher and data: scikit-learn's 1,797 handwritten digits and a convolutional network trained on them.

`teacher` and `train_set` are what ``logitcache precompute`` is given as SPECs. The split and the recipe are fixed, and
the trained weights are kept, so a second call gives the same teacher, and its labels the same identity.
Knows nothing of label sets or of students.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset

from logitcache.server.demo.weights import trained_once

CLASSES = 10
BATCH = 64
TEACHER_EPOCHS = 8
RECIPE = 1
"""Raised whenever the teacher's network or training changes: weights of an older recipe are then not found."""


class Digits(Dataset[tuple[Tensor, int]]):
    """Images of (1, 8, 8) float32 in [0, 1], each with the digit that it shows."""

    def __init__(self, images: Tensor, targets: Tensor) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


def train_set() -> Digits:
    """The 1,437 digits that teacher and students are trained on, always in the same order."""
    return _splits()[0]


def test_set() -> Digits:
    """The other 360 digits."""
    return _splits()[1]


@lru_cache(maxsize=1)
def _splits() -> tuple[Digits, Digits]:
    pixels, targets = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, targets.astype(np.int64), test_size=0.2, random_state=0, stratify=targets)
    train_images, test_images, train_targets, test_targets = map(torch.from_numpy, parts)
    return Digits(train_images, train_targets), Digits(test_images, test_targets)


class Teacher(nn.Sequential):
    """A convolutional network of 780,000 parameters: (batch, 1, 8, 8) images to (batch, 10) logits."""

    def __init__(self) -> None:
        super().__init__(
            *_convolution(1, 96),
            *_convolution(96, 96),
            nn.MaxPool2d(2),
            *_convolution(96, 192),
            *_convolution(192, 192),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(192 * 2 * 2, 256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, CLASSES),
        )


def _convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


def teacher() -> Teacher:
    """The trained teacher in eval mode. The first call trains it (some ten seconds), later ones read its file."""
    model = Teacher()
    model.load_state_dict(trained_once(f"digits-teacher-{RECIPE}", lambda: _trained()))
    return model.eval()


def _trained() -> Teacher:
    """A teacher trained with fixed seeds; the caller's random numbers are left as they were."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = Teacher().train()
        data = train_set()
        steps = TEACHER_EPOCHS * (-(-len(data) // BATCH))
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in range(TEACHER_EPOCHS):
            for chosen in torch.randperm(len(data)).split(BATCH):
                loss = F.cross_entropy(model(_shifted(data.images[chosen])), data.targets[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model


def _shifted(images: Tensor) -> Tensor:
    """The images moved by up to one pixel in each direction, all of a batch alike."""
    down, right = torch.randint(0, 3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
