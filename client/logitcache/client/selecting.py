"""From a batch's logits to rows that can be recorded. The only part of recording that needs torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from logitcache.labels.errors import InvalidRequest, ShapeMismatch
from logitcache.labels.selection.top_k import Rows, select_top_k
from logitcache.labels.soft_labels import RowSpec


def selected(
    logits: Any, spec: RowSpec, classes: int, examples: int, lengths: np.ndarray | None, targets: np.ndarray | None
) -> Callable[[], Rows]:
    """The k largest logits of each row, on the logits' device; the function that is returned waits for them.

    Args:
        logits: (batch, classes), or with ``lengths`` (batch, length, classes); a tensor or an array of floats.
        spec: what a row consists of.
        classes: of the label set.
        examples: of the batch.
        lengths: (batch,) rows of each example, from its first.
        targets: (rows,) class of each row, -1 for none.

    Raises:
        ShapeMismatch: another shape, or another number of classes.
        InvalidRequest: they are no floats.
    """
    given = logits.detach() if isinstance(logits, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(logits))
    if not given.is_floating_point():
        raise InvalidRequest(f"logits are {given.dtype}: what a model gives before its softmax is needed, in floats")
    wanted = f"({examples:,}, {'' if lengths is None else 'length, '}{classes:,})"
    shape = tuple(given.shape)
    if given.dim() != (2 if lengths is None else 3) or shape[0] != examples:
        raise ShapeMismatch(f"logits of shape {shape} for {examples:,} ids: {wanted} is needed")
    if shape[-1] != classes:
        raise ShapeMismatch(f"logits of {shape[-1]:,} classes: this label set has {classes:,}, so {wanted} is needed")
    if lengths is not None and int(lengths.max()) > shape[1]:
        raise ShapeMismatch(f"logits of shape {shape} for an example of {int(lengths.max()):,} tokens")
    with torch.no_grad():
        return select_top_k(given, spec, lengths=lengths, targets=targets).rows
