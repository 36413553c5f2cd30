"""Proof, on batches of a run, that cached labels are the live teacher's rows, each in its place.

With k classes of many stored, the divergence from cached labels is a lower bound of the live one: all that is not
stored counts as one class. So it is compared twice, row by row: with the live teacher's divergence over the same k
classes and one for the rest, which it must equal up to the rounding of float16, and with the live divergence over all
classes, which it must not exceed. Labels come over HTTP, for batches padded on the right and on the left in turn, and
the live teacher reads those very batches; a row in another's place would be far off.
"""

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitcache.client import SoftLabelTensors, kl_divergence
from logitcache.server.demo.language_task import LanguageTask
from logitcache.server.demo.training import take_step

ROUNDING = 2.0**-11
"""Largest relative error of a number rounded to float16."""

FORWARD = 2.0**-14
"""More than a logit of this teacher moves when its example is in another batch; measured: 2^-19."""

FLOAT32_ROUNDINGS = 8
"""Roundings to float32 by which two computations of a divergence may differ, each of the largest logit's size."""


@dataclass(frozen=True)
class Agreement:
    """How far cached and live divergence of a row were apart, beside what was allowed there, and what was left out.

    ``left_out`` is the part of the live divergence that cached labels do not see; ``same_first`` the part of the rows
    whose likeliest class is the live teacher's; ``probability_difference`` the largest of any stored class.
    """

    steps: int
    rows: int
    largest_difference: float
    allowed_there: float
    closest_to_allowed: float
    left_out: float
    same_first: float
    probability_difference: float

    @property
    def holds(self) -> bool:
        """Both bounds were kept at every row."""
        return self.closest_to_allowed <= 1.0

    def __str__(self) -> str:
        return (
            f"Cached and live divergence over the stored classes, same weights, {self.rows:,} rows of {self.steps} "
            f"batches padded left or right: apart by at most {self.largest_difference:.1e}, where float16 allows "
            f"{self.allowed_there:.1e}; closest to the bound: {self.closest_to_allowed:.0%} of it.\n"
            f"Of the live divergence over all classes, of which the cached one is a lower bound, {self.left_out:.1%} "
            f"is left out. The likeliest class is the live teacher's in {self.same_first:.2%} of the rows, and no "
            f"stored probability is off by more than {self.probability_difference:.1e}."
        )


@dataclass(frozen=True)
class Rows:
    """Of each row of a batch: divergences, what they may be apart, and how the stored distribution compares."""

    cached: Tensor
    live: Tensor
    live_over_all: Tensor
    allowed: Tensor
    same_first: Tensor
    probability_difference: Tensor

    @property
    def difference(self) -> Tensor:
        """The larger of how far cached and live are apart, and how far the cached one is beyond the bound."""
        return torch.maximum((self.cached - self.live).abs(), self.cached - self.live_over_all)


def compare_batches(labels: Any, teacher: nn.Module, task: LanguageTask, temperature: float, steps: int) -> Agreement:
    """Train a student for some steps on cached labels, and compare each row before each step."""
    model, optimizer, loader = task.beginning(0)
    found = []
    for number, batch in enumerate(islice(loader, steps)):
        batch = padded_left(batch) if number % 2 else batch
        soft = labels.fetch(batch["id"], inputs=batch["input_ids"], attention_mask=batch["attention_mask"]).to("cpu")
        with torch.no_grad():
            student_logits, teacher_logits = (task.forward(one, batch) for one in (model, teacher))
        found.append(compare_rows(student_logits, teacher_logits, batch["attention_mask"], soft, temperature))
        take_step(task, model, optimizer, batch, partial(task.cached_loss, batch=batch, soft=soft))
    return _summary(found)


def _summary(found: list[Rows]) -> Agreement:
    rows = Rows(*(torch.cat([getattr(one, name) for one in found]) for name in Rows.__dataclass_fields__))
    share = rows.difference / rows.allowed
    # A NaN is further off than anything.
    worst = rows.difference.nan_to_num(nan=torch.inf).argmax()
    return Agreement(
        steps=len(found),
        rows=len(share),
        largest_difference=float(rows.difference[worst]),
        allowed_there=float(rows.allowed[worst]),
        closest_to_allowed=float(share.nan_to_num(nan=torch.inf).max()),
        left_out=float(1 - rows.cached.sum() / rows.live_over_all.sum()),
        same_first=float(rows.same_first.double().mean()),
        probability_difference=float(rows.probability_difference.max()),
    )


def compare_rows(
    student_logits: Tensor, teacher_logits: Tensor, attention_mask: Tensor, soft: SoftLabelTensors, temperature: float
) -> Rows:
    """Compare the rows of a batch; logits are (batch, length, classes), the live ones are computed in float64."""
    held = attention_mask.bool()
    cached = kl_divergence(student_logits, soft, temperature=temperature, attention_mask=attention_mask)[held].double()
    teacher, student = teacher_logits[held].double(), student_logits[held].double()
    log_t, log_p = (F.log_softmax(logits / temperature, dim=1) for logits in (teacher, student))
    cut_t, cut_p = (_cut(log_probs, soft.indices) for log_probs in (log_t, log_p))
    live = (cut_t.exp() * (cut_t - cut_p)).sum(dim=1)
    tail = soft.tail_logsumexp[:, soft.temperatures.index(temperature)].double()
    stored = torch.cat([soft.logits.double() / temperature, tail[:, None]], dim=1).softmax(dim=1)
    return Rows(
        cached=cached,
        live=live,
        live_over_all=(log_t.exp() * (log_t - log_p)).sum(dim=1),
        allowed=_allowed(teacher, student, cut_t, cut_p, soft.indices, temperature),
        same_first=soft.indices[:, 0] == teacher.argmax(dim=1),
        probability_difference=(stored - cut_t.exp()).abs().amax(dim=1),
    )


def _cut(log_probs: Tensor, indices: Tensor) -> Tensor:
    """(rows, k + 1) log-probabilities of the stored classes, and of all others together."""
    others = log_probs.scatter(1, indices, -torch.inf).logsumexp(dim=1)
    return torch.cat([log_probs.gather(1, indices), others[:, None]], dim=1)


def _allowed(
    teacher: Tensor, student: Tensor, cut_t: Tensor, cut_p: Tensor, indices: Tensor, temperature: float
) -> Tensor:
    """The most that float16 labels may change the divergence of each row.

    A stored logit z is centred, so rounding moves it by at most ``2^-11 |z|``; another batch moves any logit by
    `FORWARD`. The derivative of ``KL(t || p)`` by one of the teacher's logits is ``t (log(t / p) - KL) / T``, for the
    class of all that is not stored too. The first order is taken twice, and the second is added, since row by row the
    first may be near 0. On top come the roundings of two computations in float32, where each log-probability is a
    difference of logits, as in `digits_agreement`.
    """
    centred = teacher.gather(1, indices) - teacher.amax(dim=1, keepdim=True)
    moved = (F.pad(ROUNDING * centred.abs(), (0, 1)) + FORWARD) / temperature
    t = cut_t.exp()
    divergence = (t * (cut_t - cut_p)).sum(dim=1, keepdim=True)
    slope = (cut_t - cut_p - divergence).abs()
    first_order, second_order = (t * slope * moved).sum(dim=1), (t * (1 + slope) * moved**2).sum(dim=1)
    largest = (student.abs().amax(dim=1) + teacher.abs().amax(dim=1)) / temperature
    return 2 * first_order + second_order + FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps * largest


def padded_left(batch: dict[str, Any]) -> dict[str, Any]:
    """The same batch with its padding moved to the left."""
    length = batch["attention_mask"].shape[1]
    padding = length - batch["attention_mask"].sum(dim=1)
    places = (torch.arange(length) - padding[:, None]) % length  # what stands at the end, padding, comes round first
    return {name: part.gather(1, places) if isinstance(part, Tensor) else part for name, part in batch.items()}
