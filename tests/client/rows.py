"""Label sets made by hand for the client's tests: rows of a teacher's dense logits, and their description."""

from typing import Any

import numpy as np
import torch

from logitcache.labels.fingerprints import fingerprints
from logitcache.labels.identity import Identity, TeacherId
from logitcache.labels.label_set import Description, Limits, Shards
from logitcache.labels.soft_labels import SoftLabels, logsumexp

TEACHER = TeacherId("resnet-tiny", "sha256:aa", "none")
DIGEST = "sha256:" + "1" * 64


def truncated(
    dense: Any, k: int, *, temperatures: tuple[float, ...] = (1.0,), dtype: str = "float32", digest: str | None = DIGEST
) -> SoftLabels:
    """Soft labels of dense (rows, classes) logits, as precompute would store them."""
    values = np.asarray(dense, np.float64)
    order = np.argsort(-values, axis=1, kind="stable")
    centred = values - values.max(axis=1, keepdims=True)
    rest = np.take_along_axis(centred, order[:, k:], 1)
    tails = [logsumexp(rest / t) if rest.shape[1] else np.full(len(values), -np.inf) for t in temperatures]
    return SoftLabels(
        indices=order[:, :k].astype(np.uint16),
        logits=np.take_along_axis(centred, order[:, :k], 1).astype(dtype),
        logit_max=values.max(axis=1).astype(np.float32),
        tail_logsumexp=np.stack(tails, 1).astype(np.float32),
        fingerprint=fingerprints(inputs_of(range(len(values)))),
        temperatures=temperatures,
        digest=digest,
    )


def dense_logits(rows: int, classes: int, *, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, (rows, classes))


def inputs_of(ids: Any) -> torch.Tensor:
    """What the teacher was shown for these examples."""
    return torch.tensor([[float(index), 1.0] for index in ids])


def picked(soft: SoftLabels, ids: Any) -> dict[str, np.ndarray]:
    """Arrays of these rows, by name."""
    names = ("indices", "logits", "logit_max", "tail_logsumexp", "fingerprint")
    return {name: getattr(soft, name)[np.asarray(ids)] for name in names}


def description(soft: SoftLabels, *, name: str = "digits", limits: Limits | None = None) -> Description:
    dtype: Any = soft.logits.dtype.name
    return Description(
        name=name,
        identity=Identity(TEACHER, soft.indices.shape[1], 10, soft.temperatures, dtype),
        examples=len(soft),
        labelled=len(soft),
        digest=soft.digest,
        generation=1,
        shards=Shards(1, 1, 1, 0),
        label_bytes=0,
        limits=limits or Limits(),
    )
