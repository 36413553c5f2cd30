"""Views: which augmentation of an example a row is of, and the seed from which teacher and student both make it.

Nothing of a view is stored but its rows and its fingerprint: the seed is derived from the label set's, the example's id
and the view's number, so whoever knows these makes the same input again.
"""

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Int64

from logitcache.labels.derived import derived
from logitcache.labels.errors import InvalidRequest, ShapeMismatch, UnknownView
from logitcache.labels.ids import Ids, as_ids

Views: TypeAlias = int | Int64[np.ndarray, " ids"]
"""One view for all ids, or one for each."""


def as_views(view: Any, ids: Ids, views: int, name: str) -> Views:
    """The view, or the view of each id, of a label set that has so many: a number, or a sequence, array or CPU tensor.

    Raises:
        UnknownView: one does not exist.
        ShapeMismatch: there are more or fewer than ids.
        InvalidRequest: they are no whole numbers.
    """
    if isinstance(view, int) and not isinstance(view, bool):
        if not 0 <= view < views:
            raise _unknown(view, views, name)
        return view
    array = np.asarray(view)
    if array.dtype.kind not in "iu":
        raise InvalidRequest(f"view={view!r:.60}: give a whole number, or one for each id")
    if not array.ndim:
        return as_views(int(array), ids, views, name)
    if array.shape != (len(ids),):
        raise ShapeMismatch(
            f"views of shape {array.shape} for {len(ids):,} ids: give one view for all, or one for each"
        )
    outside = (array < 0) | (array >= views)
    if outside.any():
        raise _unknown(int(array[outside][0]), views, name, ids.at(outside))
    return np.ascontiguousarray(array, np.int64)


def _unknown(view: int, views: int, name: str, ids: list[int | str] | None = None) -> UnknownView:
    has = "it has one view, 0" if views == 1 else f"it has {views:,} views, 0 to {views - 1:,}"
    return UnknownView(f"view {view!r} of {name!r} does not exist: {has}", **({"ids": ids} if ids else {}))


def seed_for(seed: int, id: int | str, view: int) -> int:
    """The seed of one view of one example, 64 unsigned bits, in a label set with this seed.

    XXH3-64 of the seed, the kind of id (0 a whole number, 1 a text), the id's key and the view; see `derived`.
    """
    keys = as_ids([id]).keys[0]
    key = [int(half) for half in keys] if isinstance(id, str) else [int(keys)]
    return derived(seed, int(isinstance(id, str)), *key, view)


def view_of(epoch: int, views: int) -> int:
    """The view that an epoch trains on: one after the other, and from the first again.

    Raises:
        InvalidRequest: ``epoch`` is below 0.
    """
    if epoch < 0:
        raise InvalidRequest(f"epoch={epoch} is below 0: epochs are counted from 0")
    return epoch % views
