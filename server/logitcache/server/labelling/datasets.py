"""Datasets: from a SPEC to batches of examples, in whatever order is asked for, read by as many processes as asked for.

A dataset is map-style: a length, and items by index; `items` tells what those may be. What user code raises or returns
wrongly becomes a `DatasetFault` that names the example.
"""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from logitcache.labels.errors import DatasetChanged, DatasetFault, InvalidRequest, shown
from logitcache.labels.viewed_items import ViewedItems
from logitcache.server.labelling import specs
from logitcache.server.labelling.batches import Batch
from logitcache.server.labelling.items import Example, Kind, read_item, settle
from logitcache.server.labelling.survey import Facts, alike, differing, facts_dtype, facts_of

PROBES = 64
"""Examples that are read twice before any work, to find datasets that give other inputs each time."""

SURVEYED = 64
"""Examples that a process reads at a time where only their facts are asked for."""


class Examples(Dataset[Any]):
    """A user's dataset with each item read as an `Example`.

    A *place* is an ordinal and a view in one number, ``ordinal * views + view``; with one view it is the ordinal.

    Attributes:
        kind: what its items are.
        views: how many there are of each example.
    """

    def __init__(self, dataset: Any, length: int, kind: Kind, spec: str, views: int = 1, seed: int = 0) -> None:
        """With ``seed`` 0 items are taken as they are."""
        self._dataset, self._length, self.kind, self._spec = dataset, length, kind, spec
        self.views, self._viewed = views, ViewedItems(dataset, seed) if seed else None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> Example | DatasetFault:
        """The example at a place; a `DatasetFault` instead where there is none to be had.

        A fault is returned and not raised, because a loader's worker would wrap what is raised in a traceback's text.
        """
        try:
            ordinal, view = divmod(int(place), self.views)
            return read_item(self._item(ordinal, view), ordinal, self.kind, view)
        except DatasetFault as fault:
            return fault

    def example(self, ordinal: int) -> Example | DatasetFault:
        """An example in its first view, or the `DatasetFault` instead."""
        return self[ordinal * self.views]

    def _item(self, ordinal: int, view: int) -> Any:
        viewed = self._viewed
        return _item(self._dataset.__getitem__ if viewed is None else partial(_view, viewed, view), ordinal)

    def batches(self, places: Iterable[Sequence[int]], workers: int = 0) -> Generator[Batch, None, None]:
        """Read batches of these places in this order, ``workers`` processes ahead of the caller.

        Raises:
            DatasetFault: an item cannot be read or stacked; the example is named.
        """
        return self._loaded(places, workers, partial(Batch.of, kind=self.kind))

    def facts(
        self,
        ordinals: Sequence[int],
        workers: int = 0,
        advance: Callable[[int], None] = lambda examples: None,
        view: int = 0,
    ) -> Facts:
        """What these examples are known by, as they are in a view; inputs are read and let go. ``advance`` is told how
        many more were read.

        Raises:
            DatasetFault: an item cannot be read; the example is named.
        """
        facts = np.empty(len(ordinals), facts_dtype(self.kind))
        lists = (
            [ordinal * self.views + view for ordinal in ordinals[start : start + SURVEYED]]
            for start in range(0, len(ordinals), SURVEYED)
        )
        done = 0
        with worker_deaths_told():
            for part in self._loaded(lists, workers, partial(facts_of, kind=self.kind)):
                facts[done : done + len(part)] = part
                done += len(part)
                advance(len(part))
        return facts

    def _loaded(
        self, index_lists: Iterable[Sequence[int]], workers: int, make: Callable[[list[Example]], Any]
    ) -> Generator[Any, None, None]:
        # The lists are not gathered first: ordinals of a whole dataset as numbers would take 40 bytes each.
        lists: Any = index_lists
        found = iter(DataLoader(self, batch_sampler=lists, num_workers=workers, collate_fn=partial(_made, make)))
        try:
            while True:
                try:
                    one = next(found, None)
                except (OSError, EOFError) as error:
                    # What a process had given back is fetched from it, and it ended before.
                    raise _worker_ended(error) from error
                if one is None:
                    return
                if isinstance(one, DatasetFault):
                    raise one
                yield one
        finally:
            # A fault has this frame in its traceback, and is in the frame: the loader would be left to the garbage
            # collector, which cuts the workers' queues before it tells them to end, and waits 5 s for each in vain.
            del found

    def check_stable(self) -> tuple[list[int], Facts]:
        """Read up to `PROBES` examples twice, the second time backwards, and refuse a dataset that gives others then.

        Gives the ordinals of these examples and their facts.

        Raises:
            DatasetChanged: it does; random augmentation without a fixed seed is the usual cause.
            DatasetFault: all views of each of these are the same.
        """
        count = min(PROBES, len(self))
        probes: list[int] = np.unique(np.linspace(0, len(self) - 1, count).astype(int)).tolist()
        first, second = self.facts(probes), self.facts(probes[::-1])[::-1]
        changed = [probe for probe, same in zip(probes, alike(first, second), strict=True) if not same]
        if changed:
            raise DatasetChanged(
                f"the dataset {self._spec!r} gives other {' and '.join(differing(first, second))} each time it is read "
                f"({len(changed)} of {len(probes)} examples tried: {shown(changed)}): {self._advice}; "
                "nothing was labelled",
                ids=changed,
            )
        # The fewer the examples, the likelier are two views the same by chance: as many more views are looked at.
        others = range(1, min(self.views, 1 + -(-PROBES // len(probes))))
        if others and all(bool(alike(first, self.facts(probes, view=view)).all()) for view in others):
            raise DatasetFault(
                f"the dataset {self._spec!r} gives the same for every view ({len(probes)} examples tried in "
                f"{1 + len(others)} views): {_IGNORED}; "
                "without random augmentation leave --views out; nothing was labelled"
            )
        return probes, first

    @property
    def _advice(self) -> str:
        if self._viewed is not None:
            return f"even from the same seed: {_IGNORED}"
        return "turn random augmentation off, or label it with --views, or seed it by the example's index"


_IGNORED = (
    "its transform does not draw from random, numpy.random or torch; wrap one with generators of its own in "
    "logitcache.client.seeded"
)


def _view(viewed: ViewedItems, view: int, ordinal: int) -> Any:
    return viewed.item(ordinal, view)


def _item(read: Callable[[int], Any], ordinal: int) -> Any:
    try:
        return read(ordinal)
    except DatasetFault:
        raise
    except Exception as error:
        raise DatasetFault(
            f"the dataset raised {type(error).__name__} for example {ordinal:,}: {error}", example=ordinal
        ) from error


def _made(make: Callable[[list[Example]], Any], examples: list[Example | DatasetFault]) -> Any:
    """What a loader's process gives back for one list of examples, or the first fault among them."""
    read = []
    for example in examples:
        if isinstance(example, DatasetFault):
            return example
        read.append(example)
    try:
        return make(read)
    except DatasetFault as fault:
        return fault


@contextlib.contextmanager
def worker_deaths_told() -> Iterator[None]:
    """Say what to do when a process that reads the dataset ended.

    torch notices by a signal and raises wherever the main thread happens to be: in the teacher's forward, say.

    Raises:
        DatasetFault: one ended.
    """
    try:
        yield
    except BaseException as error:
        told = str(error.__cause__ or error)
        if not told.startswith("DataLoader worker"):
            raise
        raise _worker_ended(told.partition(".")[0]) from error


def _worker_ended(told: object) -> DatasetFault:
    return DatasetFault(
        f"a process that reads the dataset ended: {told}; it may have run out of memory or of shared memory: "
        "--loader-workers 0 reads in this process"
    )


def load_dataset(spec: str, targets: bool | None = None, views: int = 1, seed: int = 0) -> Examples:
    """The dataset that a SPEC names; ``targets`` says whether targets are kept, None that they are where it gives some.

    Each item is made for so many views from this seed; with seed 0 it is taken as it is.

    Raises:
        InvalidRequest: token sequences have one view.
        SpecNotFound: the SPEC names nothing.
        DatasetFault: making it raised, it is not map-style, it is empty, or its first item cannot be labelled.
    """
    made = specs.load(spec, "dataset", DatasetFault)
    if not hasattr(made, "__getitem__") or not hasattr(made, "__len__"):
        raise DatasetFault(
            f"the dataset {spec!r} returned {type(made).__name__}, which has no length or no items by index: "
            "return a map-style dataset"
        )
    try:
        length = len(made)
    except Exception as error:
        raise DatasetFault(f"the length of the dataset {spec!r} raised {type(error).__name__}: {error}") from error
    if not length:
        raise DatasetFault(f"the dataset {spec!r} is empty")
    kind = settle(_item(made.__getitem__, 0), targets)
    if kind.causal and seed:
        raise InvalidRequest("token sequences have one view, as they are: leave --views out")
    return Examples(made, length, kind, spec, views, seed)
