"""A small student of the digits and its losses; a batch is images, targets and ids. Knows nothing of servers."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from logitcache.client import distillation_loss, with_ids
from logitcache.server.demo.digits import BATCH, CLASSES, test_set, train_set
from logitcache.server.demo.training import ALPHA, Beginning

TEMPERATURE = 2.0
LEARNING_RATE = 0.01


class DigitsTask:
    """See `training.Task`."""

    ids = -1

    def beginning(self, seed: int) -> Beginning:
        """See `training.Task`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = student()
        order = torch.Generator().manual_seed(seed)
        numbered = cast("Dataset[Any]", with_ids(train_set()))
        loader = DataLoader(numbered, batch_size=BATCH, shuffle=True, generator=order)
        return model, torch.optim.Adam(model.parameters(), lr=LEARNING_RATE), loader

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """(batch, 10) logits."""
        logits: Tensor = model(batch[0])
        return logits

    def hard_loss(self, logits: Tensor, batch: Any) -> Tensor:
        """See `training.Task`."""
        return F.cross_entropy(logits, batch[1])

    def live_loss(self, logits: Tensor, batch: Any, teacher_logits: Tensor) -> Tensor:
        """See `training.Task`."""
        return dense_distillation_loss(logits, teacher_logits=teacher_logits, targets=batch[1])

    def cached_loss(self, logits: Tensor, batch: Any, soft: Any) -> Tensor:
        """See `training.Task`."""
        return distillation_loss(logits, soft, targets=batch[1], temperature=TEMPERATURE, alpha=ALPHA)

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """Accuracy and cross-entropy on the test digits."""
        held_out = test_set()
        with torch.inference_mode():
            logits = model(held_out.images)
            right = (logits.argmax(dim=1) == held_out.targets).float().mean()
            return float(right), float(F.cross_entropy(logits, held_out.targets))


def student() -> nn.Module:
    """A convolutional network of 6,090 parameters: (batch, 1, 8, 8) images to (batch, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, CLASSES),
    )


def dense_distillation_loss(student_logits: Tensor, *, teacher_logits: Tensor, targets: Tensor) -> Tensor:
    """``alpha T² KL(teacher || student) + (1 - alpha) CE``, all classes, mean of the batch (Hinton et al. 2015)."""
    divergence = F.kl_div(
        F.log_softmax(student_logits / TEMPERATURE, dim=1),
        F.log_softmax(teacher_logits / TEMPERATURE, dim=1),
        log_target=True,
        reduction="batchmean",
    )
    return ALPHA * TEMPERATURE**2 * divergence + (1 - ALPHA) * F.cross_entropy(student_logits, targets)
