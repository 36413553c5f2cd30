"""The mathematics of distilling from truncated rows: pure functions of tensors.

A teacher's row is k stored log-probabilities and one for everything else, the residual bucket. The student's row is cut
the same way. Knows nothing of label sets, targets or reductions. All functions keep the dtype they are given.
"""

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def teacher_log_probs(
    logits: Float[Tensor, "rows k"], tail: Float[Tensor, " rows"], temperature: float
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, " rows"]]:
    """The teacher's log-probabilities of the stored classes, and of all others together (-inf where k = classes).

    Normalised by ``logaddexp(logsumexp(logits / T), tail)``, where ``tail`` is the log-sum-exp of logits / T over the
    classes that are not stored: with the rounded head the probabilities still sum to 1.
    """
    scaled = logits / temperature
    log_normalizer = torch.logaddexp(scaled.logsumexp(1), tail)
    return scaled - log_normalizer[:, None], tail - log_normalizer


def student_log_probs(
    logits: Float[Tensor, "rows classes"],
    indices: Int64[Tensor, "rows k"],
    has_bucket: Bool[Tensor, " rows"],
    temperature: float,
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, " rows"]]:
    """The student's log-probabilities of the teacher's stored classes, and of all others together.

    The latter is a log-sum-exp with the stored classes masked to -inf: ``log(-expm1(logsumexp(stored)))`` would lose
    value and gradient to rounding where little is left over. Rows without a bucket are not masked, so that no
    log-sum-exp is empty and its gradient NaN; their second value means nothing.
    """
    scaled = logits / temperature
    log_normalizer = scaled.logsumexp(1)
    stored = scaled.gather(1, indices)
    others = scaled.scatter(1, indices, stored.masked_fill(has_bucket[:, None], -math.inf))
    return stored - log_normalizer[:, None], others.logsumexp(1) - log_normalizer


def weighted_log_ratio(log_t: Float[Tensor, "*shape"], log_p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``t · log(t / p)``, and 0 where t is 0 whatever p is: the limit, and not the NaN of 0 · (-inf)."""
    t = log_t.exp()
    return torch.where(t > 0, t * (log_t - log_p), 0.0)


def bucket_divergence(
    student: Float[Tensor, "rows classes"],
    indices: Int64[Tensor, "rows k"],
    logits: Float[Tensor, "rows k"],
    tail: Float[Tensor, " rows"],
    temperature: float,
) -> Float[Tensor, " rows"]:
    """KL(teacher || student) over the stored classes and one bucket for the rest: ``Σ t·log(t/p) + r·log(r/r_p)``.

    By the log-sum inequality a lower bound of the KL over all classes, and equal to it where nothing is left out.
    """
    log_t, log_r = teacher_log_probs(logits, tail, temperature)
    log_p, log_r_p = student_log_probs(student, indices, torch.isfinite(log_r), temperature)
    return weighted_log_ratio(log_t, log_p).sum(1) + weighted_log_ratio(log_r, log_r_p)


def target_divergence(
    student: Float[Tensor, "rows classes"],
    indices: Int64[Tensor, "rows k"],
    logits: Float[Tensor, "rows k"],
    tail: Float[Tensor, " rows"],
    target: Int64[Tensor, " rows"],
    target_logit: Float[Tensor, " rows"],
    temperature: float,
) -> Float[Tensor, " rows"]:
    """`bucket_divergence` with the target as one more stored class, where it is not among the k.

    A finer cut of the same distributions: no smaller than the bucket's, and still a lower bound of the full KL.
    """
    return bucket_divergence(
        student, *with_target(indices, logits, tail, target, target_logit, temperature), temperature
    )


def with_target(
    indices: Int64[Tensor, "rows k"],
    logits: Float[Tensor, "rows k"],
    tail: Float[Tensor, " rows"],
    target: Int64[Tensor, " rows"],
    target_logit: Float[Tensor, " rows"],
    temperature: float,
) -> tuple[Int64[Tensor, "rows k+1"], Float[Tensor, "rows k+1"], Float[Tensor, " rows"]]:
    """Stored classes, their logits and the tail, when the target is stored too: ``log(exp(tail) - exp(target / T))``.

    A row without a target (-1), or with one among the k, gets its first class once more with a logit of -inf: a
    probability of 0, and no class that leaves the bucket. Where the target is all of the tail but for float32 rounding
    of the two, nothing remains: a remainder made of rounding could face a student that has no other class.
    """
    apart = (target >= 0) & (indices != target[:, None]).all(1)
    part = target_logit / temperature - tail
    rounding = 8 * torch.finfo(torch.float32).eps * (1 + tail.abs())
    rest = torch.where(part < -rounding, tail + torch.log1p(-part.exp()), -math.inf)
    return (
        torch.cat([indices, torch.where(apart, target, indices[:, 0])[:, None]], 1),
        torch.cat([logits, torch.where(apart, target_logit, -math.inf)[:, None]], 1),
        torch.where(apart, rest, tail),
    )


def head_divergence(
    student: Float[Tensor, "rows classes"],
    indices: Int64[Tensor, "rows k"],
    logits: Float[Tensor, "rows k"],
    temperature: float,
) -> Float[Tensor, " rows"]:
    """KL(teacher || student) with both renormalised over the stored classes: what truncation without a tail does.

    Biased: it is 0 for every student that splits its mass among the stored classes as the teacher does, however much it
    puts outside them.
    """
    log_t = torch.log_softmax(logits / temperature, 1)
    log_p = torch.log_softmax(student.gather(1, indices) / temperature, 1)
    return weighted_log_ratio(log_t, log_p).sum(1)
