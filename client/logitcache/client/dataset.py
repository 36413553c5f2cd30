"""`with_ids`: a map-style dataset whose items tell their ordinal, for datasets that have no ids of their own.

It knows datasets by their two methods, and no torch.
"""

import operator
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from logitcache.labels.errors import InvalidRequest


@runtime_checkable
class MapStyleDataset(Protocol):
    """What `with_ids` wraps: items by ordinal, and how many there are."""

    def __len__(self) -> int:
        """Number of items."""

    def __getitem__(self, index: int, /) -> Any:
        """The item at an ordinal."""


class DatasetWithIds:
    """The dataset that `with_ids` returns."""

    def __init__(self, dataset: MapStyleDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The item with its ordinal: counted from the start also when ``index`` is negative."""
        ordinal = operator.index(index)
        ordinal = ordinal + len(self) if ordinal < 0 else ordinal
        item = self.dataset[index]
        if isinstance(item, Mapping):
            if "id" in item:
                raise InvalidRequest(
                    f'item {ordinal} has an "id" already: use the dataset as it is, with attach(ids="id")'
                )
            return {**item, "id": ordinal}
        if isinstance(item, tuple):
            return (*item, ordinal)
        return [*item, ordinal] if isinstance(item, list) else (item, ordinal)


def with_ids(dataset: MapStyleDataset) -> Any:
    """The dataset with each item's ordinal as its id: for label sets whose ids are the ordinals.

    A dataset that has ids of its own, numbers or texts, needs none of this: its label set has the same ids, and
    `Labels.attach` is told where a batch has them.

    A mapping gets an ``"id"``; a tuple or list gets one more element, the last; anything else becomes ``(item, id)``.
    It is typed as Any, since a DataLoader's annotations ask for torch's own class, which this module does not know.
    Wrap the dataset that was labelled, and take subsets or splits of the result: a subset counts from 0 again.

    Raises:
        InvalidRequest: the dataset has no length or no items by ordinal.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InvalidRequest(
            f"{type(dataset).__name__} has no length or no items by ordinal: with_ids wraps map-style datasets; "
            "let an iterable one yield its ids itself"
        )
    return DatasetWithIds(dataset)
