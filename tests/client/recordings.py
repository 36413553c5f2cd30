"""A recording that tests begin: what its examples and logits are."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.client.rows import dense_logits, truncated

from logitcache.client import Recorder, record
from logitcache.labels.soft_labels import SoftLabels

EXAMPLES, CLASSES, K = 20, 10, 4

LOGITS = torch.from_numpy(dense_logits(EXAMPLES, CLASSES, seed=3).astype(np.float32))
TOKENS = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
OF_TOKENS = torch.from_numpy(dense_logits(12, CLASSES, seed=9).astype(np.float32)).reshape(3, 4, CLASSES)


def recording(target: Path, **options: Any) -> Recorder:
    """Begin to record 20 examples of 10 classes at step 0 to 99, with what a test changes."""
    told: dict[str, Any] = {"run": "run-1", "steps": range(100), "classes": CLASSES, "top_k": K, "temperatures": [2.0]}
    told |= {"examples": None if "ids" in options else EXAMPLES} | options
    return record(target, **told)


def rows_of(ids: Any) -> SoftLabels:
    """Rows that another library chose."""
    return replace(truncated(LOGITS[list(ids)], K, temperatures=(1.0, 2.0), dtype="float16"), digest=None)


def causal(target: Path, **options: Any) -> Recorder:
    return recording(target, alignment="causal", examples=3, **options)


def add(recorder: Recorder, *ids: int) -> None:
    recorder.add(np.array(ids), LOGITS[list(ids)])
