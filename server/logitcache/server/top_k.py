"""The selection: a teacher's logits to the rows that are stored, on the teacher's device.

Knows tensors only, no teacher, no files. Pointwise alignment: ``(batch, classes)`` in.
"""

from dataclasses import dataclass

import numpy as np
import torch

from logitcache.labels.soft_labels import RowSpec

_TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Rows:
    """Stored rows of one batch, as NumPy arrays on the CPU; see `labels.soft_labels.SoftLabels` for the fields."""

    indices: np.ndarray
    logits: np.ndarray
    scalars: np.ndarray


def select_top_k(logits: torch.Tensor, spec: RowSpec) -> Rows:
    """The k largest logits of each row, centred and rounded, and what is left out as log-sum-exps.

    The tail is summed over the classes that are not stored, not taken as a difference, so the residual mass is accurate
    however small; the sums are float32 (float64 for a float64 teacher). Rows must have a finite maximum: see
    `faulty_rows`.

    Args:
        logits: (batch, classes), of any float dtype; -inf marks classes that the teacher never predicts.
        spec: k, dtypes and temperatures.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    maximum = wide.amax(1, keepdim=True)
    centred = wide - maximum
    values, indices = centred.topk(spec.k, dim=1, sorted=True)
    rest = centred.scatter(1, indices, -torch.inf)
    tails = [torch.logsumexp(rest / temperature, 1) for temperature in spec.temperatures]
    scalars = torch.stack([maximum[:, 0], *tails], 1).float()
    return Rows(
        indices=indices.cpu().numpy().astype(spec.index_dtype),
        logits=_rounded(values, _TORCH_DTYPES[spec.dtype]).cpu().numpy(),
        scalars=scalars.cpu().numpy(),
    )


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the stored dtype; what is finite stays finite (float16 ends at 65,504), -inf stays -inf."""
    lowest = torch.finfo(dtype).min
    return torch.where(values.isneginf(), values, values.clamp(min=lowest)).to(dtype)


def faulty_rows(logits: torch.Tensor) -> dict[int, str]:
    """Rows that cannot be a distribution, by position in the batch, with the reason: NaN, +inf, or nothing but -inf.

    A row's maximum is finite exactly when it has none of these, so one reduction decides.
    """
    # A float64 maximum that float32 cannot hold is refused as well: logit_max is float32.
    maximum = logits.amax(1).float()
    bad = (~maximum.isfinite()).nonzero()[:, 0].tolist()
    return {row: _reason(float(maximum[row])) for row in bad}


def _reason(maximum: float) -> str:
    if maximum != maximum:
        return "NaN"
    return "+inf" if maximum > 0 else "-inf for every class"
