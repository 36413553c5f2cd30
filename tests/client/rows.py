"""Label sets made by hand for the client's tests: rows of a teacher's dense logits, and their description."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from logitcache.labels.fingerprints import fingerprints, token_fingerprint
from logitcache.labels.identity import Identity, TeacherId
from logitcache.labels.label_set import Description, Limits, Sealed, Shards
from logitcache.labels.soft_labels import SoftLabels, logsumexp, splits_of

TEACHER = TeacherId("resnet-tiny", "sha256:aa", "none")
DIGEST = "sha256:" + "1" * 64


def truncated(
    dense: Any,
    k: int,
    *,
    temperatures: tuple[float, ...] = (1.0,),
    dtype: str = "float32",
    digest: str | None = DIGEST,
    target: Any = None,
) -> SoftLabels:
    """Soft labels of dense (rows, classes) logits, as precompute would store them; ``target`` holds -1 for none."""
    values = np.asarray(dense, np.float64)
    order = np.argsort(-values, axis=1, kind="stable")
    centred = values - values.max(axis=1, keepdims=True)
    rest = np.take_along_axis(centred, order[:, k:], 1)
    tails = [logsumexp(rest / t) if rest.shape[1] else np.full(len(values), -np.inf) for t in temperatures]
    return SoftLabels(
        indices=order[:, :k].astype(np.uint16 if values.shape[1] <= 65_536 else np.uint32),
        logits=np.take_along_axis(centred, order[:, :k], 1).astype(dtype),
        logit_max=values.max(axis=1).astype(np.float32),
        tail_logsumexp=np.stack(tails, 1).astype(np.float32),
        fingerprint=fingerprints(inputs_of(range(len(values)))),
        temperatures=temperatures,
        digest=digest,
        target=None if target is None else np.asarray(target, np.int32),
        target_logit=None if target is None else _target_logits(centred, np.asarray(target, np.int64)),
    )


def _target_logits(centred: np.ndarray, target: np.ndarray) -> np.ndarray:
    logits = np.take_along_axis(centred, np.maximum(target, 0)[:, None], 1)[:, 0]
    return np.where(target < 0, np.nan, logits).astype(np.float32)


def causal(
    dense: list[np.ndarray], tokens: list[np.ndarray], k: int, *, present: Any = None, **options: Any
) -> SoftLabels:
    """Soft labels of one example for each array of dense (length, classes) logits and of tokens, targets included.

    Examples that are not ``present`` have no rows; all are, if it is None.
    """
    held = [index for index in range(len(dense)) if present is None or present[index]]
    target = [np.append(tokens[index][1:].astype(np.int64), -1) for index in held]
    empty = [np.zeros((0, dense[0].shape[1]))]
    soft = truncated(
        np.concatenate(empty + [dense[i] for i in held]), k, target=np.concatenate([[], *target]), **options
    )
    counts = [len(tokens[index]) if index in held else 0 for index in range(len(dense))]
    return replace(
        soft,
        fingerprint=np.array([token_fingerprint(read.astype(np.uint32)) for read in tokens], np.uint64),
        present=None if present is None else np.asarray(present, np.bool_),
        row_splits=splits_of(np.array(counts, np.int64)),
        tokens=np.concatenate([np.zeros(0), *(tokens[index] for index in held)]).astype(np.uint32),
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
        rows=len(soft),
        generations=() if soft.digest is None else (Sealed(1, len(soft), soft.digest),),
        shards=Shards(1, 1, 1, 0),
        label_bytes=0,
        limits=limits or Limits(),
    )
