"""Items of a dataset made for one view each: the same code for the teacher's side and for the student's."""

from collections.abc import Mapping
from typing import Any

from logitcache.labels.derived import derived
from logitcache.labels.errors import DatasetFault
from logitcache.labels.replaying import replay
from logitcache.labels.views import seed_for

LOOKING = 0
"""View under which an item is made only to learn its id; ids must not depend on what is drawn."""


class ViewedItems:
    """Reads a map-style dataset, each item under the seed of its example and view.

    The id that a seed depends on must be known before the item is made. Where items have ids of their own, an item is
    made once more to learn it, and its id is kept; a method ``id_of(ordinal)`` of the dataset spares that.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self._ids: dict[int, int | str] = {}
        self._has_ids = True  # until the first item shows that it has none

    def item(self, ordinal: int, view: int) -> Any:
        """The item at an ordinal as it is in this view.

        Raises:
            DatasetFault: its id is not the one that its seed was derived from.
        """
        id = self.id(ordinal)
        with replay(seed_for(self._seed, id, view)):
            item = self._dataset[ordinal]
        own = _own_id(item)
        own = ordinal if own is None else own
        if own != id:
            raise DatasetFault(
                f"example {ordinal:,} has in view {view:,} the id {own!r:.80}, and its seed was derived from {id!r:.80}"
                ": ids must not depend on what is drawn, and a method id_of must tell those that the items have",
                example=ordinal,
            )
        return item

    def id(self, ordinal: int) -> int | str:
        """The id of the example at an ordinal: its own, or the ordinal where it has none."""
        if not self._has_ids:
            return ordinal
        known = self._ids.get(ordinal)
        if known is not None:
            return known
        if hasattr(self._dataset, "id_of"):
            return _plain(self._dataset.id_of(ordinal))
        with replay(derived(self._seed, ordinal, LOOKING)):
            item = self._dataset[ordinal]
        found = _own_id(item)
        if found is None:
            self._has_ids = bool(self._ids)  # a dataset of both kinds is refused where it is labelled
            return ordinal
        return self._ids.setdefault(ordinal, found)


def _own_id(item: Any) -> int | str | None:
    """The id that an item has; None where its ordinal is its id."""
    found = item.get("id") if isinstance(item, Mapping) else None
    return None if found is None else _plain(found)


def _plain(id: Any) -> int | str:
    """A text as it is, a number out of a tensor or array of no dimensions."""
    return id if isinstance(id, str) else int(id)
