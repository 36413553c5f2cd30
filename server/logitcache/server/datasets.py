"""Datasets: from a SPEC to batches of inputs with their ids and fingerprints, in whatever order is asked for.

A dataset is map-style: a length, and items by index that are an input, an ``(input, target)`` pair, or a mapping with
``input``. The id of an example is its index. What user code raises or returns wrongly becomes a `DatasetFault` that
names the example.
"""

import operator
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from logitcache.labels.errors import DatasetChanged, DatasetFault, shown
from logitcache.labels.fingerprints import fingerprint
from logitcache.server import specs

PROBES = 64
"""Examples that are read twice before any work, to find datasets that give other inputs each time."""


@dataclass(frozen=True)
class Batch:
    """Inputs of some examples: ``ids`` (batch,) int64, ``inputs`` (batch, ...), ``fingerprints`` (batch,) uint64."""

    ids: np.ndarray
    inputs: torch.Tensor
    fingerprints: np.ndarray


class Examples(Dataset[tuple[int, Any]]):
    """A user's dataset with each item reduced to its ordinal and its input."""

    def __init__(self, dataset: Any, spec: str) -> None:
        self._dataset, self._spec = dataset, spec
        self._length = len(dataset)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, ordinal: int) -> tuple[int, Any]:
        """Ordinal and input of an example; a `DatasetFault` in the input's place where there is none to be had.

        A fault is returned and not raised, because a loader's worker would wrap what is raised in a traceback's text.
        """
        try:
            return ordinal, _input(self._dataset[ordinal], ordinal)
        except DatasetFault as fault:
            return ordinal, fault
        except Exception as error:  # noqa: BLE001  # user code: whatever it raises is told
            told = f"the dataset raised {type(error).__name__} for example {ordinal:,}: {error}"
            return ordinal, DatasetFault(told, example=ordinal)

    def batches(self, index_lists: Sequence[Sequence[int]], workers: int = 0) -> Generator[Batch, None, None]:
        """Read these batches in this order, ``workers`` processes ahead of the caller.

        Raises:
            DatasetFault: an item cannot be read or stacked; the example is named.
        """
        # Ranges stay ranges: a list of every ordinal would take 40 bytes each.
        lists: Any = index_lists
        batches = iter(DataLoader(self, batch_sampler=lists, num_workers=workers, collate_fn=_collate))
        while True:
            batch = next(batches, None)
            if batch is None:
                return
            if isinstance(batch, DatasetFault):
                raise batch
            yield batch

    def fingerprints(self, ordinals: Sequence[int], workers: int = 0) -> np.ndarray:
        """Fingerprints of these examples, (examples,) uint64, without stacking more than a few of them."""
        lists = [ordinals[start : start + PROBES] for start in range(0, len(ordinals), PROBES)]
        found = [batch.fingerprints for batch in self.batches(lists, workers)]
        return np.concatenate(found) if found else np.empty(0, np.uint64)

    def check_stable(self) -> None:
        """Read up to `PROBES` examples twice, the second time backwards, and refuse a dataset that gives other inputs.

        Raises:
            DatasetChanged: it does; random augmentation without a fixed seed is the usual cause.
        """
        count = min(PROBES, len(self))
        probes = np.unique(np.linspace(0, len(self) - 1, count).astype(int)).tolist()
        first = self.fingerprints(probes)
        second = self.fingerprints(probes[::-1])[::-1]
        changed = [probe for probe, same in zip(probes, first == second, strict=True) if not same]
        if changed:
            raise DatasetChanged(
                f"the dataset {self._spec!r} gives other inputs each time it is read ({len(changed)} of {len(probes)} "
                f"examples tried: {shown(changed)}): turn random augmentation off, or seed it by the example's index; "
                "nothing was labelled",
                ids=changed,
            )


def _input(item: Any, ordinal: int) -> Any:
    if isinstance(item, Mapping):
        if "input_ids" in item:
            raise DatasetFault(
                f"example {ordinal:,} has 'input_ids': token sequences are not supported yet, only one row an example",
                example=ordinal,
            )
        if "input" not in item:
            raise DatasetFault(
                f"example {ordinal:,} is a mapping without 'input'; it has {shown(map(str, item))}", example=ordinal
            )
        if "id" in item and not _is_ordinal(item["id"], ordinal):
            raise DatasetFault(
                f"example {ordinal:,} has the id {item['id']!r}: ids other than the index are not supported yet",
                example=ordinal,
            )
        item = item["input"]
    elif isinstance(item, tuple | list):
        if len(item) != 2:
            raise DatasetFault(
                f"example {ordinal:,} has {len(item)} parts: give an input, an (input, target) pair, "
                "or a mapping with 'input'",
                example=ordinal,
            )
        item = item[0]
    if not hasattr(item, "dtype") and not isinstance(item, int | float):
        raise DatasetFault(
            f"the input of example {ordinal:,} is {type(item).__name__}, not a tensor, an array or a number",
            example=ordinal,
        )
    return item


def _is_ordinal(id: Any, ordinal: int) -> bool:
    try:
        return operator.index(id) == ordinal
    except TypeError:
        return False


def _collate(items: list[tuple[int, Any]]) -> Batch | DatasetFault:
    faults = [input for _, input in items if isinstance(input, DatasetFault)]
    if faults:
        return faults[0]
    ids = np.array([ordinal for ordinal, _ in items], np.int64)
    try:
        hashes = np.array([fingerprint(input) for _, input in items], np.uint64)
        tensors = [torch.as_tensor(input).detach() for _, input in items]
    except (TypeError, RuntimeError, ValueError) as error:
        return DatasetFault(f"an input of examples {ids[0]:,} to {ids[-1]:,} is no tensor of numbers: {error}")
    first = tensors[0]
    for ordinal, tensor in zip(ids.tolist(), tensors, strict=True):
        if tensor.shape != first.shape or tensor.dtype != first.dtype:
            return DatasetFault(
                f"the input of example {ordinal:,} is {tensor.dtype} of shape {tuple(tensor.shape)}, that of example "
                f"{ids[0]:,} is {first.dtype} of shape {tuple(first.shape)}: they must be equal to be stacked",
                example=ordinal,
            )
    return Batch(ids, torch.stack(tensors), hashes)


def worker_death(error: BaseException) -> DatasetFault | None:
    """What to say when a process that reads the dataset ended, if that is what this error tells.

    torch notices by a signal and raises wherever the main thread happens to be: in the teacher's forward, say.
    """
    told = str(error.__cause__ or error)
    if not told.startswith("DataLoader worker"):
        return None
    return DatasetFault(
        f"a process that reads the dataset ended: {told.partition('.')[0]}; it may have run out of memory or of shared "
        "memory: --loader-workers 0 reads in this process"
    )


def load_dataset(spec: str) -> Examples:
    """The dataset that a SPEC names.

    Raises:
        SpecNotFound: the SPEC names nothing.
        DatasetFault: making it raised, it is not map-style, or it is empty.
    """
    made = specs.load(spec, "dataset", DatasetFault)
    if not hasattr(made, "__getitem__") or not hasattr(made, "__len__"):
        raise DatasetFault(
            f"the dataset {spec!r} returned {type(made).__name__}, which has no length or no items by index: "
            "return a map-style dataset"
        )
    try:
        examples = Examples(made, spec)
    except Exception as error:
        raise DatasetFault(f"the length of the dataset {spec!r} raised {type(error).__name__}: {error}") from error
    if not len(examples):
        raise DatasetFault(f"the dataset {spec!r} is empty")
    return examples
