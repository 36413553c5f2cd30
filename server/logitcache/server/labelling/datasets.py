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

from logitcache.labels.errors import DatasetChanged, DatasetFault, shown
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

    Attributes:
        kind: what its items are.
    """

    def __init__(self, dataset: Any, length: int, kind: Kind, spec: str) -> None:
        self._dataset, self._length, self.kind, self._spec = dataset, length, kind, spec

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, ordinal: int) -> Example | DatasetFault:
        """An example; a `DatasetFault` in its place where there is none to be had.

        A fault is returned and not raised, because a loader's worker would wrap what is raised in a traceback's text.
        """
        try:
            ordinal = int(ordinal)
            return read_item(_item(self._dataset, ordinal), ordinal, self.kind)
        except DatasetFault as fault:
            return fault

    def batches(self, index_lists: Iterable[Sequence[int]], workers: int = 0) -> Generator[Batch, None, None]:
        """Read these batches in this order, ``workers`` processes ahead of the caller.

        Raises:
            DatasetFault: an item cannot be read or stacked; the example is named.
        """
        return self._loaded(index_lists, workers, partial(Batch.of, kind=self.kind))

    def facts(
        self, ordinals: Sequence[int], workers: int = 0, advance: Callable[[int], None] = lambda examples: None
    ) -> Facts:
        """What these examples are known by; inputs are read and let go. ``advance`` is told how many more were read.

        Raises:
            DatasetFault: an item cannot be read; the example is named.
        """
        facts = np.empty(len(ordinals), facts_dtype(self.kind))
        lists = (ordinals[start : start + SURVEYED] for start in range(0, len(ordinals), SURVEYED))
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
        """
        count = min(PROBES, len(self))
        probes: list[int] = np.unique(np.linspace(0, len(self) - 1, count).astype(int)).tolist()
        first, second = self.facts(probes), self.facts(probes[::-1])[::-1]
        changed = [probe for probe, same in zip(probes, alike(first, second), strict=True) if not same]
        if changed:
            raise DatasetChanged(
                f"the dataset {self._spec!r} gives other {' and '.join(differing(first, second))} each time it is read "
                f"({len(changed)} of {len(probes)} examples tried: {shown(changed)}): turn "
                "random augmentation off, or seed it by the example's index; nothing was labelled",
                ids=changed,
            )
        return probes, first


def _item(dataset: Any, ordinal: int) -> Any:
    try:
        return dataset[ordinal]
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


def load_dataset(spec: str, targets: bool | None = None) -> Examples:
    """The dataset that a SPEC names; ``targets`` says whether targets are kept, None that they are where it gives some.

    Raises:
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
    return Examples(made, length, settle(_item(made, 0), targets), spec)
