"""A small language model as student, and its losses; a batch is what `language.loader` gives.

Knows nothing of servers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitcache.client import distillation_loss
from logitcache.server.demo import language
from logitcache.server.demo.corpus import LONGEST, VOCABULARY
from logitcache.server.demo.language import NO_LABEL, Size, next_labels, next_token_loss
from logitcache.server.demo.training import ALPHA, Beginning
from logitcache.server.demo.transformer import Transformer

TEMPERATURE = 1.0
LEARNING_RATE = 0.003


class LanguageTask:
    """See `training.Task`."""

    ids = "id"

    def __init__(self, size: Size) -> None:
        self.size = size

    def beginning(self, seed: int) -> Beginning:
        """See `training.Task`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = student()
        return (
            model,
            torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE),
            language.loader(language.train_set(self.size), seed),
        )

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """(batch, length, classes) logits, unshifted."""
        return language.forward(model, batch)

    def hard_loss(self, logits: Tensor, batch: Any) -> Tensor:
        """See `training.Task`."""
        return next_token_loss(logits, batch)

    def live_loss(self, logits: Tensor, batch: Any, teacher_logits: Tensor) -> Tensor:
        """See `training.Task`."""
        return dense_distillation_loss(logits, batch, teacher_logits)

    def cached_loss(self, logits: Tensor, batch: Any, soft: Any) -> Tensor:
        """See `training.Task`."""
        return distillation_loss(
            logits,
            soft,
            targets=batch["labels"],
            attention_mask=batch["attention_mask"],
            temperature=TEMPERATURE,
            alpha=ALPHA,
        )

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """How often the next token is the likeliest one, and the cross-entropy, on files that are held out."""
        right = counted = 0
        loss = 0.0
        with torch.inference_mode():
            for batch in language.loader(language.held_out_set(self.size), seed=0):
                labels = next_labels(batch)
                there = labels != NO_LABEL
                logits, wanted = language.forward(model, batch)[there], labels[there]
                loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
                right += int((logits.argmax(dim=1) == wanted).sum())
                counted += len(wanted)
        return right / counted, loss / counted


def student() -> nn.Module:
    """A transformer of 440,000 parameters, a seventh of the teacher's."""
    return Transformer(VOCABULARY, width=96, layers=2, heads=2, longest=LONGEST)


def dense_distillation_loss(student_logits: Tensor, batch: dict[str, Any], teacher_logits: Tensor) -> Tensor:
    """``alpha T² KL(teacher || student) + (1 - alpha) CE`` over all classes, mean of all tokens.

    An example's last token has no next one, so it has the divergence alone, whole.
    """
    labels, held = next_labels(batch).flatten(), batch["attention_mask"].flatten()
    student, teacher = student_logits.flatten(0, 1), teacher_logits.flatten(0, 1)
    log_p, log_t = (F.log_softmax(logits / TEMPERATURE, dim=1) for logits in (student, teacher))
    soft = TEMPERATURE**2 * F.kl_div(log_p, log_t, log_target=True, reduction="none").sum(dim=1)
    hard = F.cross_entropy(student, labels, ignore_index=NO_LABEL, reduction="none")
    values = torch.where(labels == NO_LABEL, soft, ALPHA * soft + (1 - ALPHA) * hard)
    # Weighted and not selected: the gradient of a selection by mask is slow.
    mean: Tensor = (values * held).sum() / held.sum()
    return mean
