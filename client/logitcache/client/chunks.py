"""A value for each of many rows of a student's logits, in the memory of a few rows.

At 128 k classes one copy of a batch's logits in float32 is gigabytes, and plain autograd keeps several. Here a chunk of
rows is computed at a time, and once more for the gradient: besides the logits themselves only their gradient is as
large. Knows nothing of what is computed.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits in a chunk: 64 MiB in float32, of which a divergence and its gradient need some ten at a time.

1,024 rows of 128 k classes in bfloat16 (0.26 GB) peak 0.9 GB above the logits, their gradient included, and 3.1 GB when
they are computed all at once.
"""

ValuesOf: TypeAlias = Callable[[Tensor, slice], Tensor]
"""From logits (chunk, classes) and which places these are to a value each (chunk,), each of its own row alone."""


def values_in_chunks(
    student: Float[Tensor, "all classes"],
    positions: Int64[Tensor, " places"],
    values_of: ValuesOf,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Float[Tensor, " places"]:
    """``values_of`` of the student's rows at ``positions``, which are all different, and its exact gradient.

    Rows elsewhere are never read, so whatever they hold they have no part in values and gradients. A gradient that is
    to be differentiated in its turn (``create_graph``) is made without chunks.
    """
    rows = max(1, chunk_elements // max(1, student.shape[1]))
    if len(positions) <= rows:
        # Nothing is saved where all rows are one chunk, and computing them twice would cost half as much again.
        return values_of(student.index_select(0, positions), slice(0, len(positions)))
    values: Tensor = _Chunked.apply(student, positions, values_of, rows)  # type: ignore[no-untyped-call]
    return values


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, positions: Tensor, values_of: ValuesOf, rows: int) -> Tensor:
        ctx.save_for_backward(student, positions)
        ctx.values_of, ctx.rows = values_of, rows
        chunks = [
            values_of(student.index_select(0, positions[chunk]), chunk) for chunk in _chunks(len(positions), rows)
        ]
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor, None, None, None]:
        student, positions = ctx.saved_tensors
        if torch.is_grad_enabled():
            values = ctx.values_of(student.index_select(0, positions), slice(None))
            return torch.autograd.grad(values, student, grad_values, create_graph=True)[0], None, None, None
        grad = torch.zeros_like(student)
        for chunk in _chunks(len(positions), ctx.rows):
            with torch.enable_grad():
                logits = student.detach().index_select(0, positions[chunk]).requires_grad_()
                values = ctx.values_of(logits, chunk)
            grad.index_copy_(0, positions[chunk], torch.autograd.grad(values, logits, grad_values[chunk])[0])
        return grad, None, None, None


def _chunks(places: int, rows: int) -> Iterator[slice]:
    """Slices of so many rows; one empty slice if there are no places, so that there is a chunk to give the dtype."""
    return (slice(start, min(start + rows, places)) for start in range(0, max(places, 1), rows))
