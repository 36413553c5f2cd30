"""The selection: a teacher's logits to the rows that are stored, on the teacher's device, some rows at a time.

Logits of token data are the largest thing in memory by far, so they are never copied as a whole: rows that are no
padding are taken in chunks of some MiB, widened, reduced and forgotten. Each row is computed by itself: on a CPU,
chunks of any size give the same bits. What is selected is copied to the host behind the computation, and waited for
only when the rows are asked for. Knows tensors only, no teacher, no files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from logitcache.labels.selection.transfer import Landing, to_device
from logitcache.labels.soft_labels import RowSpec, splits_of

CHUNK_BYTES = 128 << 20
"""What a chunk may take in memory besides the logits: its rows widened, and a scratch of the same size.

Some percent of the logits of a batch of long sequences; a quarter of it is slower by half for a vocabulary of 128 k,
since every chunk starts the same dozen kernels.
"""

FEWEST_ROWS = 2
"""A sum over one row alone is split over threads by torch, and over two rows is not: its last bits would differ."""

_TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Rows:
    """Stored rows of one batch, as NumPy arrays on the CPU; see `labels.soft_labels.SoftLabels` for the fields.

    ``scalars`` has the columns that `RowSpec.columns` names.
    """

    indices: np.ndarray
    logits: np.ndarray
    scalars: np.ndarray


class Selection:
    """Rows on their way from the device to the host."""

    def __init__(self, rows: int, spec: RowSpec, device: torch.device) -> None:
        self._spec, self._landing = spec, Landing(device)
        self._indices = self._landing.empty(rows, spec.k, dtype=torch.int64)
        self._logits = self._landing.empty(rows, spec.k, dtype=_TORCH_DTYPES[spec.dtype])
        self._scalars = self._landing.empty(rows, len(spec.columns), dtype=torch.float32)

    def put(self, part: slice, indices: torch.Tensor, logits: torch.Tensor, scalars: torch.Tensor) -> None:
        """Begin to copy some of the rows; ``logits`` are rounded to the stored dtype."""
        for source, into in ((indices, self._indices), (logits, self._logits), (scalars, self._scalars)):
            self._landing.copy(source, into[part])

    def close(self) -> None:
        """All rows are put."""
        self._landing.close()

    def rows(self) -> Rows:
        """Wait for them."""
        self._landing.wait()
        indices = self._indices.numpy().astype(self._spec.index_dtype)
        return Rows(indices, self._logits.numpy(), self._scalars.numpy())


def select_top_k(
    logits: torch.Tensor,
    spec: RowSpec,
    *,
    lengths: Sequence[int] | np.ndarray | None = None,
    targets: np.ndarray | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Selection:
    """The k largest logits of each row, centred and rounded, and what is left out as log-sum-exps.

    The tail is summed over the classes that are not stored, not taken as a difference, so the residual mass is accurate
    however small; the sums are float32 (float64 for a float64 teacher). Rows should have a finite maximum: see
    `faulty_rows`.

    Args:
        logits: (batch, classes), or with ``lengths`` (batch, length, classes); of any float dtype and memory layout.
            -inf marks classes that the teacher never predicts.
        spec: k, dtypes and temperatures.
        lengths: (batch,) how many rows of each example are selected, from its first; the others are not even read.
        targets: (rows,) class of each selected row, -1 for none; needed where ``spec`` has targets.
        chunk_bytes: see `CHUNK_BYTES`; no result of a CPU depends on it.
    """
    stacked, splits = (logits[None], splits_of(np.array([len(logits)])))
    if lengths is not None:
        stacked, splits = logits, splits_of(np.asarray(lengths))
    rows, classes = int(splits[-1]), stacked.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    most = max(FEWEST_ROWS, chunk_bytes // (2 * classes * dtype.itemsize))
    buffers = torch.empty(2, min(max(rows, FEWEST_ROWS), most), classes, dtype=dtype, device=logits.device)
    selection = Selection(rows, spec, logits.device)
    wanted = None if targets is None else to_device(torch.from_numpy(targets), logits.device).long()
    for first in range(0, rows, most):
        count = min(most, rows - first)
        wide, scratch = buffers[:, : max(count, FEWEST_ROWS)]
        _gather(stacked, splits, first, wide[:count])
        wide[count:] = wide[0]
        part = slice(first, first + count)
        _select(wide, scratch, spec, None if wanted is None else _padded(wanted[part], len(wide)), selection, part)
    selection.close()
    return selection


def _padded(targets: torch.Tensor, rows: int) -> torch.Tensor:
    """Targets of a chunk, and none for the rows that fill it up."""
    return torch.nn.functional.pad(targets, (0, rows - len(targets)), value=-1)


def _gather(stacked: torch.Tensor, splits: np.ndarray, first: int, wide: torch.Tensor) -> None:
    """Copy rows from the given one on, widened: as many as ``wide`` holds."""
    done = 0
    while done < len(wide):
        example = int(np.searchsorted(splits, first + done, side="right")) - 1
        begin = first + done - int(splits[example])
        count = min(len(wide) - done, int(splits[example + 1]) - first - done)
        wide[done : done + count].copy_(stacked[example, begin : begin + count])
        done += count


def _select(
    wide: torch.Tensor,
    scratch: torch.Tensor,
    spec: RowSpec,
    targets: torch.Tensor | None,
    selection: Selection,
    part: slice,
) -> None:
    """Select from the rows in ``wide``, which is used up, into a part of ``selection``; rows beyond it are left out."""
    count = part.stop - part.start
    # One more than is stored: the largest of the rest. Each pass over the rows that can be spared counts.
    values, indices = wide.topk(min(spec.k + 1, wide.shape[1]), dim=1, sorted=True)
    maximum, top = values[:, :1], values[:, spec.k :]
    centred = values[:, : spec.k] - maximum
    columns = [maximum[:, 0].float()]
    of_targets = [_target_logits(wide, maximum, targets)] if spec.targets and targets is not None else []
    if top.shape[1]:
        wide.scatter_(1, indices[:, : spec.k], -torch.inf)
        columns += [_tail(wide, scratch, top, maximum, temperature) for temperature in spec.temperatures]
    else:
        columns += [torch.full_like(columns[0], -torch.inf)] * len(spec.temperatures)
    logits = _rounded(centred[:count], _TORCH_DTYPES[spec.dtype])
    selection.put(part, indices[:count, : spec.k], logits, torch.stack([*columns, *of_targets], 1)[:count])


def _tail(
    rest: torch.Tensor, scratch: torch.Tensor, top: torch.Tensor, maximum: torch.Tensor, temperature: float
) -> torch.Tensor:
    """log-sum-exp over each row of the centred logits of the rest, divided by a temperature: (rows,) float32.

    ``top`` (rows, 1) is the largest of the rest, ``maximum`` (rows, 1) that of the row; -inf where the rest is -inf.
    """
    safe = torch.where(top.isneginf(), maximum, top)
    torch.sub(rest, safe, out=scratch)
    if temperature != 1:
        scratch.div_(temperature)
    return (scratch.exp_().sum(1).log_() + ((safe - maximum) / temperature)[:, 0]).float()


def _target_logits(wide: torch.Tensor, maximum: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Centred logit of each row's target, (rows,) float32; NaN where there is none."""
    given = wide.gather(1, targets.clamp(min=0)[:, None]) - maximum
    return torch.where(targets < 0, torch.nan, _rounded(given[:, 0], torch.float32))


def _rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To the stored dtype; what is finite stays finite (float16 ends at 65,504), -inf stays -inf."""
    lowest = torch.finfo(dtype).min
    return torch.where(values.isneginf(), values, values.clamp(min=lowest)).to(dtype)


def faulty_rows(rows: Rows) -> dict[int, str]:
    """Rows that came of no distribution, by position, with the reason: NaN, +inf, or nothing but -inf.

    The maximum of a row's logits is finite exactly when it has none of these. A float64 maximum that float32 cannot
    hold is refused as well.
    """
    maximum = rows.scalars[:, 0]
    return {row: _reason(float(maximum[row])) for row in np.flatnonzero(~np.isfinite(maximum)).tolist()}


def _reason(maximum: float) -> str:
    if maximum != maximum:
        return "NaN"
    return "+inf" if maximum > 0 else "-inf for every class"
