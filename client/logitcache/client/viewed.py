"""`with_views`: the student's dataset, each item made as the teacher was shown it.

It knows datasets by their two methods, and nothing of how labels are fetched.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

from logitcache.client.dataset import MapStyleDataset
from logitcache.client.extras import import_with_torch
from logitcache.client.held_inputs import on_cpu
from logitcache.labels.errors import InvalidRequest, LabelMismatch, UnknownView, shown
from logitcache.labels.fingerprints import fingerprint
from logitcache.labels.identity import Identity
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.soft_labels import SoftLabels
from logitcache.labels.viewed_items import ViewedItems
from logitcache.labels.views import view_of

SEEN = "seen"
"""Key under which a mapping gets what `ViewedDataset` adds."""


class ViewedDataset:
    """The dataset that `with_views` returns.

    An index is an ordinal, whose view is that of the epoch, or a pair of an ordinal and a view, as a sampler of several
    views an example may give. Items are the dataset's own and one more part, ``{"id", "view", "fingerprint"}``: under
    ``"seen"`` in a mapping, else the last one. `Labels.attach` takes it as ``ids``.
    """

    def __init__(self, dataset: MapStyleDataset, identity: Identity) -> None:
        if not identity.seed:
            raise InvalidRequest(
                "this label set's inputs were taken as they were: label it with --views to replay augmentations"
            )
        self.dataset, self.views = dataset, identity.views
        self._items = ViewedItems(dataset, identity.seed)
        # In memory that is shared, so that workers which outlive an epoch see the next one.
        torch: Any = import_with_torch("torch")
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """The items of this epoch are made in the view `view_of` it, also by workers that are running."""
        view_of(epoch, self.views)
        self._epoch[0] = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """The item and what was seen of it.

        Raises:
            UnknownView: the label set has no such view.
        """
        at, view = index if isinstance(index, tuple) else (index, view_of(int(self._epoch[0]), self.views))
        ordinal = operator.index(at)
        ordinal = ordinal + len(self) if ordinal < 0 else ordinal
        if not 0 <= view < self.views:
            raise UnknownView(f"view {view} does not exist: there are {self.views:,} views, 0 to {self.views - 1:,}")
        item = self._items.item(ordinal, view)
        seen = {"id": self._items.id(ordinal), "view": view, "fingerprint": _signed(fingerprint(_input(item)))}
        if isinstance(item, Mapping):
            return {**item, SEEN: seen}
        if isinstance(item, tuple):
            return (*item, seen)
        return [*item, seen] if isinstance(item, list) else (item, seen)


def with_views(dataset: MapStyleDataset, identity: Identity) -> Any:
    """The dataset with each item made as the teacher of a label set was shown it: ``labels.describe().identity``.

    Call ``set_epoch`` before each epoch; view `view_of` it is what its items are. Every item tells the hash of its
    input, so that `Labels.attach` finds a transform that changed, at the first batch.

    Raises:
        InvalidRequest: the label set was not labelled with ``--views``.
    """
    return ViewedDataset(dataset, identity)


def as_seen(fetch: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of ids, and of what `with_views` adds in their place: then labels come for the views that were
    seen, and are compared with the hashes. It may give a tuple, of several teachers.
    """

    def fetched(ids: Any, **others: Any) -> Any:
        if not isinstance(ids, Mapping):
            return fetch(ids, **others)
        wanted = as_ids(on_cpu(ids["id"]))
        soft = fetch(wanted, **others | {"view": ids["view"]})
        for each in soft if isinstance(soft, tuple) else (soft,):
            check_seen(ids, each, wanted)
        return soft

    return fetched


def check_seen(seen: Mapping[str, Any], soft: SoftLabels, ids: Ids) -> None:
    """Refuse labels of other inputs than those that a batch holds; examples without labels are passed over.

    Raises:
        LabelMismatch: some differ; examples and views are named.
    """
    views, given = ([int(value) for value in seen[name]] for name in ("view", "fingerprint"))
    present = [True] * len(ids) if soft.present is None else soft.present.tolist()
    labelled = soft.fingerprint.tolist()
    wrong = [at for at, here in enumerate(present) if here and given[at] != _signed(labelled[at])]
    if wrong:
        named = [ids.at([at])[0] for at in wrong]
        pairs = [f"{id} (view {views[at]})" for id, at in zip(named, wrong, strict=True)]
        raise LabelMismatch(
            f"{len(wrong):,} of {len(ids):,} inputs are not what the teacher was shown: {shown(pairs)}; the transform, "
            "its library or the data changed: label them anew under another name, or restore what it was",
            ids=named,
            views=[views[at] for at in wrong],
        )


def _input(item: Any) -> Any:
    if isinstance(item, Mapping):
        return item["input"]
    return item[0] if isinstance(item, tuple | list) else item


def _signed(bits: int) -> int:
    """64 bits as a number that tensors can hold."""
    return bits - 2**64 if bits >= 2**63 else bits
