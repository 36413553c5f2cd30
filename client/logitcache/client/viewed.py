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
from logitcache.labels.fingerprints import fingerprint, fingerprints
from logitcache.labels.identity import Identity
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.soft_labels import SoftLabels
from logitcache.labels.viewed_items import ViewedItems
from logitcache.labels.views import view_of

SEEN = "seen"
"""Key under which a mapping gets what `ViewedDataset` adds."""

COMPARED = 4
"""Examples of each batch whose inputs are compared with what the dataset gave, as the batch arrives."""


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
        self._epoch = torch.zeros(1, dtype=torch.int64, device="cpu").share_memory_()

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
            DatasetFault: the item has another id than the one that its seed was derived from.
        """
        pair = index if isinstance(index, tuple) else (index, view_of(int(self._epoch[0]), self.views))
        ordinal, view = (int(operator.index(number)) for number in pair)  # also those of NumPy and torch
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


def as_seen(fetch: Callable[..., Any], *, needs_views: bool = False) -> Callable[..., Any]:
    """The same function of ids, and of what `with_views` adds in their place: then labels come for the views that were
    seen, and are compared with the hashes. It may give a tuple, of several teachers.

    A few of the batch's inputs, ``inputs`` or else ``given``, are compared with the hashes, too. ``needs_views`` says
    that ids alone do not tell which view a batch holds: then ids come with a view, or with what `with_views` adds.
    """

    def fetched(ids: Any, *, given: Any = None, view: Any = None, **others: Any) -> Any:
        if not isinstance(ids, Mapping):
            if needs_views and view is None:
                raise InvalidRequest(
                    "these labels are of augmented inputs, and ids alone do not say which view a batch holds: wrap the "
                    'dataset in with_views and attach what it adds (ids="seen", or ids=-1 where they are tuples), '
                    "or say which view (view=...), or have every input compared (inputs=...)"
                )
            return fetch(ids, view=0 if view is None else view, **others)
        if view is not None:
            raise InvalidRequest("what with_views adds says which view each input is: leave view=... out")
        wanted = as_ids(on_cpu(ids["id"]))
        check_given(ids, others.get("inputs", given), wanted)
        soft = fetch(wanted, **others | {"view": ids["view"]})
        for each in soft if isinstance(soft, tuple) else (soft,):
            check_seen(ids, each, wanted)
        return soft

    return fetched


def given_inputs(batch: Any) -> Any:
    """The inputs of a batch of items of `with_views` where they usually are: under ``"input"``, or first; else None."""
    if isinstance(batch, Mapping):
        return batch.get("input")
    return batch[0] if isinstance(batch, tuple | list) and batch else None


def check_given(seen: Mapping[str, Any], inputs: Any, ids: Ids) -> None:
    """Refuse a batch whose inputs were changed after the dataset gave them; `COMPARED` of them are looked at, others
    from batch to batch. What is no array of numbers and no list of such, one an example, is passed over.

    Raises:
        LabelMismatch: some differ; examples and views are named.
    """
    hashes = _numbers(seen["fingerprint"])
    count = len(hashes)
    if not count or _length(inputs) != count:
        return
    at = sorted({(hashes[0] + step * count // COMPARED) % count for step in range(COMPARED)})
    try:
        held = fingerprints([inputs[one] for one in at]).tolist()
    except TypeError:
        return
    wrong = [one for one, bits in zip(at, held, strict=True) if _signed(bits) != hashes[one]]
    if wrong:
        raise _mismatch(
            f"{len(wrong):,} of {len(at):,} inputs looked at are not what the dataset gave",
            "the batch was changed afterwards (mixed as a whole, normalised or converted, in the collate function or "
            "on the device), and its labels are of what the dataset gave: change inputs in the dataset instead; or "
            "tell attach where a batch has what the dataset gave (inputs=...), or that it has it nowhere (inputs=None)",
            seen,
            ids,
            wrong,
        )


def check_seen(seen: Mapping[str, Any], soft: SoftLabels, ids: Ids) -> None:
    """Refuse labels of other inputs than those that a batch holds; examples without labels are passed over.

    Raises:
        LabelMismatch: some differ; examples and views are named.
    """
    hashes, labelled = _numbers(seen["fingerprint"]), soft.fingerprint.tolist()
    present = [True] * len(ids) if soft.present is None else soft.present.tolist()
    wrong = [at for at, here in enumerate(present) if here and hashes[at] != _signed(labelled[at])]
    if wrong:
        raise _mismatch(
            f"{len(wrong):,} of {len(ids):,} inputs are not what the teacher was shown",
            "the transform, its library or the data changed: label them anew under another name, or restore what it "
            "was",
            seen,
            ids,
            wrong,
        )


def _mismatch(what: str, advice: str, seen: Mapping[str, Any], ids: Ids, wrong: list[int]) -> LabelMismatch:
    """``wrong`` are positions in the batch."""
    numbers, named = _numbers(seen["view"]), ids.at(wrong)
    views = [numbers[at] for at in wrong]
    pairs = [f"{id} (view {view})" for id, view in zip(named, views, strict=True)]
    return LabelMismatch(f"{what}: {shown(pairs)}; {advice}", ids=named, views=views)


def _length(inputs: Any) -> int:
    """How many examples these inputs are of; 0 where they are no array and no list of arrays."""
    if isinstance(inputs, tuple | list):
        return len(inputs) if all(hasattr(one, "dtype") for one in inputs) else 0
    shape: Any = inputs.shape if hasattr(inputs, "dtype") else ()
    return int(shape[0]) if len(shape) else 0


def _numbers(values: Any) -> list[int]:
    """Whole numbers, of a tensor on any device or a list."""
    return [int(value) for value in on_cpu(values)]


def _input(item: Any) -> Any:
    if isinstance(item, Mapping):
        return item["input"]
    return item[0] if isinstance(item, tuple | list) else item


def _signed(bits: int) -> int:
    """64 bits as a number that tensors can hold."""
    return bits - 2**64 if bits >= 2**63 else bits
