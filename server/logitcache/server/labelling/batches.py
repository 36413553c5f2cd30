"""Batches: examples stacked for a teacher's forward, with everything about them that is stored.

Token sequences are padded at the right to the longest of their batch; a row is a token that is no padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from logitcache.labels.errors import DatasetFault, shown
from logitcache.labels.fingerprints import fingerprints
from logitcache.labels.ids import Ids
from logitcache.labels.soft_labels import splits_of
from logitcache.server.labelling.items import Example, Kind, told_id
from logitcache.server.labelling.survey import keys_of

PADDING = 0
"""Token in the place of padding: every vocabulary has it, and no row depends on it."""


@dataclass(frozen=True)
class Batch:
    """Some examples, in any order.

    Attributes:
        ordinals: (batch,) int64.
        views: (batch,) int64 view of each.
        ids: of the examples; the ordinals where the dataset gives none.
        inputs: (batch, ...) as the dataset gave them, or (batch, longest) int64 tokens.
        fingerprints: (batch,) uint64.
        lengths: (batch,) int64 rows of each example; None where each has one row.
        targets: (rows,) int32 of the examples' rows, one after the other; None where targets are not kept.
    """

    ordinals: np.ndarray
    ids: Ids
    inputs: torch.Tensor
    fingerprints: np.ndarray
    lengths: np.ndarray | None
    targets: np.ndarray | None
    views: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example], kind: Kind) -> "Batch":
        """A batch of these examples.

        Raises:
            DatasetFault: their inputs cannot be stacked.
        """
        ordinals = np.array([example.ordinal for example in examples], np.int64)
        ids = Ids(ordinals)
        if kind.ids != "ordinal":
            texts = [str(example.id) for example in examples] if kind.ids == "text" else None
            ids = Ids(keys_of(examples, kind), texts)
        inputs = _padded(examples) if kind.causal else _stacked(examples)
        targets = [example.targets for example in examples if example.targets is not None]
        return cls(
            ordinals=ordinals,
            ids=ids,
            inputs=inputs,
            fingerprints=_fingerprints(examples, inputs, kind),
            lengths=np.array([len(example.input) for example in examples], np.int64) if kind.causal else None,
            targets=np.concatenate(targets) if kind.targets else None,
            views=np.array([example.view for example in examples], np.int64),
        )

    @property
    def rows(self) -> int:
        """Rows of all examples together."""
        return int(self.splits[-1])

    @cached_property
    def splits(self) -> np.ndarray:
        """(batch + 1,) int64: which rows are whose."""
        counts = np.ones(len(self.ordinals), np.int64) if self.lengths is None else self.lengths
        return splits_of(counts)

    @cached_property
    def mask(self) -> torch.Tensor:
        """(batch, longest) int64: 1 where there is a token, 0 where there is padding."""
        lengths = torch.from_numpy(np.diff(self.splits))
        return (torch.arange(self.inputs.shape[1]) < lengths[:, None]).long()

    @property
    def tokens(self) -> np.ndarray:
        """(rows,) uint32 token of each row."""
        tokens: np.ndarray = self.inputs[self.mask.bool()].numpy().astype(np.uint32)
        return tokens

    def place(self, row: int) -> tuple[int, int | None]:
        """The ordinal of a row's example, and the row's position in it; None where an example has one row."""
        at = int(np.searchsorted(self.splits, row, side="right")) - 1
        return int(self.ordinals[at]), None if self.lengths is None else row - int(self.splits[at])

    def alone(self, at: int) -> "Batch":
        """The batch of one of its examples, cut to its own length."""
        one = slice(at, at + 1)
        rows = slice(int(self.splits[at]), int(self.splits[at + 1]))
        return Batch(
            ordinals=self.ordinals[one],
            ids=self.ids[one],
            inputs=self.inputs[one] if self.lengths is None else self.inputs[one, : rows.stop - rows.start],
            fingerprints=self.fingerprints[one],
            lengths=None if self.lengths is None else self.lengths[one],
            targets=None if self.targets is None else self.targets[rows],
            views=self.views[one],
        )

    def named(self, at: int) -> str:
        """One of its examples in words: its ordinal, its id where that is another, its view where it has several."""
        ordinal = int(self.ordinals[at])
        view = f", view {self.views[at]}" if self.views.any() else ""
        return f"example {ordinal:,}{told_id(ordinal, self.ids.at([at])[0])}{view}"

    def ids_told(self) -> str:
        """From which id to which, as `` (ids 'a' to 'b')``; empty where ids are the ordinals."""
        first, last = self.ids.at([0])[0], self.ids.at([len(self.ordinals) - 1])[0]
        if first == int(self.ordinals[0]) and last == int(self.ordinals[-1]):
            return ""
        return f" (ids {first!r:.80} to {last!r:.80})" if len(self.ordinals) > 1 else f" (id {first!r:.80})"

    def __str__(self) -> str:
        return told_ordinals(self.ordinals)


def told_ordinals(ordinals: Sequence[int] | np.ndarray) -> str:
    """Examples in words: from which to which where they follow each other, else the first few."""
    given = np.asarray(ordinals)
    first, last = int(given[0]), int(given[-1])
    if len(given) > 1 and np.array_equal(given, np.arange(first, last + 1)):
        return f"examples {first:,} to {last:,}"
    return f"example{'s' if len(given) > 1 else ''} {shown(given.tolist())}"


def _fingerprints(examples: Sequence[Example], inputs: torch.Tensor, kind: Kind) -> np.ndarray:
    # Those of a stack are those of what was stacked, and cost less. A plain number is another one in a stack: it has no
    # dtype of its own.
    if kind.causal or not all(hasattr(example.input, "dtype") for example in examples):
        return np.array([example.fingerprint for example in examples], np.uint64)
    return fingerprints(inputs)


def _padded(examples: Sequence[Example]) -> torch.Tensor:
    longest = max(len(example.input) for example in examples)
    tokens = torch.full((len(examples), longest), PADDING, dtype=torch.int64)
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example.input)] = torch.from_numpy(example.input.astype(np.int64))
    return tokens


def _stacked(examples: Sequence[Example]) -> torch.Tensor:
    tensors = []
    for example in examples:
        try:
            tensors.append(torch.as_tensor(example.input))
        except (TypeError, RuntimeError, ValueError) as error:
            raise DatasetFault(
                f"the input of {example} is no tensor of numbers: {error}", example=example.ordinal
            ) from None
    shape, dtype = tensors[0].shape, tensors[0].dtype
    for example, tensor in zip(examples, tensors, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise DatasetFault(
                f"the input of {example} is {tensor.dtype} of shape {tuple(tensor.shape)}, that of "
                f"{examples[0]} is {dtype} of shape {tuple(shape)}: they must be equal "
                "to be stacked (token sequences of any length are given as 'input_ids')",
                example=example.ordinal,
            )
    # Inputs may carry a graph, which ends here.
    return torch.stack(tensors).detach()
