"""Labelling: batches through the teacher and the selection, into the arrays of a shard.

A shard's arrays are made once, whole, and filled in place, in whatever order its examples are labelled. It writes no
files.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from logitcache.labels.errors import DatasetChanged, TeacherFault, shown
from logitcache.labels.selection.top_k import Rows, Selection, faulty_rows, select_top_k
from logitcache.labels.selection.transfer import Stopwatch
from logitcache.labels.soft_labels import SoftLabels, splits_of
from logitcache.server.labelling.batches import Batch
from logitcache.server.labelling.survey import Facts, beyond_fault
from logitcache.server.labelling.teachers import Teacher
from logitcache.storage.layout import Layout


@dataclass(frozen=True)
class Labelled:
    """A batch whose rows the teacher's device may still be computing."""

    batch: Batch
    selection: Selection
    watch: Stopwatch

    def rows(self) -> Rows:
        """Wait for them: those of the batch's examples in its order, padding left out.

        Raises:
            TeacherFault: a row of NaN, +inf or only -inf, which is named.
        """
        rows = self.selection.rows()
        _refuse_faulty(rows, self.batch)
        return rows

    @property
    def seconds(self) -> float:
        """What the teacher's forward and the selection took on their device; waits for them."""
        return self.watch.seconds


def label(teacher: Teacher, batch: Batch, layout: Layout) -> Labelled:
    """Give a batch to the teacher, and select from what it returns.

    Raises:
        DatasetFault: a target is none of the teacher's classes.
        TeacherFault: the teacher raised, or returned what cannot be stored.
    """
    classes = layout.identity.classes
    if batch.targets is not None and bool((batch.targets >= classes).any()):
        row = int((batch.targets >= classes).argmax())
        ordinal, place = batch.place(row)
        raise beyond_fault("target", int(batch.targets[row]), place, ordinal, classes)
    watch = Stopwatch(teacher.device)
    logits = teacher.logits(batch, classes)
    with torch.inference_mode():
        selection = select_top_k(logits, layout.row_spec, lengths=batch.lengths, targets=batch.targets)
    watch.stop(logits.device)
    return Labelled(batch, selection, watch)


def _refuse_faulty(rows: Rows, batch: Batch) -> None:
    faulty = faulty_rows(rows)
    if faulty:
        first, reason = next(iter(faulty.items()))
        _, position = batch.place(first)
        where = "" if position is None else f" at position {position:,}"
        at = np.unique(np.searchsorted(batch.splits, list(faulty), side="right") - 1)
        raise TeacherFault(
            f"the teacher gave {reason} for {batch.named(int(at[0]))}{where}; {len(at)} of the {len(batch.ordinals)} "
            f"examples of this batch cannot be stored ({shown(batch.ordinals[at].tolist())})",
            ids=batch.ids.at(at),
        )


def soft_labels(
    rows: Rows, fingerprints: np.ndarray, layout: Layout, row_counts: np.ndarray | None = None
) -> SoftLabels:
    """Freshly selected rows as soft labels, as far as statistics need them; ``row_counts`` where examples have many."""
    tails = len(layout.identity.temperatures)
    return SoftLabels(
        indices=rows.indices,
        logits=rows.logits,
        logit_max=rows.scalars[:, 0],
        tail_logsumexp=rows.scalars[:, 1 : 1 + tails],
        fingerprint=fingerprints,
        temperatures=layout.identity.temperatures,
        row_splits=None if row_counts is None else splits_of(row_counts),
    )


class ShardArrays:
    """The arrays of one shard, filled batch by batch.

    Attributes:
        arrays: by name, as `LabelSetWriter.commit` takes them.
        texts: ids of the examples, where they are texts.
    """

    def __init__(self, layout: Layout, shard: int, facts: Facts | None) -> None:
        """``facts`` are those of the shard's examples, where examples have many rows."""
        self._layout, self._span, self._facts = layout, layout.span(shard), facts
        self.arrays = {
            array.name: np.zeros((layout.used(array, shard), *array.row_shape), array.dtype)
            for array in layout.arrays.values()
        }
        examples = len(self._span)
        views = np.full(examples, layout.identity.views, np.int64)
        self._row_counts = views if facts is None else facts["length"].astype(np.int64)
        self._row_starts = splits_of(self._row_counts)
        self.texts: list[str] | None = [""] * examples if layout.identity.ids == "text" else None
        if layout.ragged:
            self.arrays["row_count"][:] = self._row_counts
            self.arrays["row_start"][:] = self._row_starts[:-1]

    def check(self, batch: Batch) -> None:
        """Refuse a batch whose examples are not those whose lengths were read before.

        Raises:
            DatasetChanged: one is another now.
        """
        if self._facts is None:
            return
        others = self._facts["fingerprint"][batch.ordinals - self._span.start] != batch.fingerprints
        if others.any():
            ordinals = batch.ordinals[others].tolist()
            raise DatasetChanged(
                f"the dataset gives other tokens for {len(ordinals)} examples ({shown(ordinals)}) than when their "
                "lengths were read: it must give the same each time it is read; shards committed before are kept",
                ids=batch.ids.at(others),
                ordinals=ordinals,
            )

    def put(self, labelled: Labelled) -> None:
        """Fill in a batch of the shard's examples, of which `check` had nothing to say.

        Raises:
            TeacherFault: see `Labelled.rows`.
        """
        batch, rows = labelled.batch, labelled.rows()
        slots = batch.ordinals - self._span.start
        first = self._row_starts[slots] + batch.views
        places = np.repeat(first - batch.splits[:-1], np.diff(batch.splits)) + np.arange(batch.rows)
        arrays = self.arrays
        arrays["ids"][slots], arrays["fingerprint"][slots, batch.views] = batch.ids.keys, batch.fingerprints
        for name in ("indices", "logits", "scalars"):
            arrays[name][places] = getattr(rows, name)
        if self._layout.ragged:
            arrays["tokens"][places] = batch.tokens
        if batch.targets is not None:
            arrays["target"][places] = batch.targets
        if self.texts is not None and batch.ids.texts is not None:
            for slot, text in zip(slots.tolist(), batch.ids.texts, strict=True):
                self.texts[slot] = text

    def soft_labels(self) -> SoftLabels:
        """All rows, for statistics."""
        arrays = self.arrays
        rows = Rows(arrays["indices"], arrays["logits"], arrays["scalars"])
        counts = self._row_counts if self._layout.ragged else None
        return soft_labels(rows, arrays["fingerprint"].reshape(-1), self._layout, counts)


def bucketed(ordinals: range, facts: Facts | None, batch_size: int) -> Sequence[Sequence[int]]:
    """Ordinals of each batch of a shard: in order, or with ``facts`` of its examples by rising length, so that little
    of a batch is padding. Formed anew at each shard, so that a resumed run repeats them.
    """
    starts = range(0, len(ordinals), batch_size)
    if facts is None:
        return [ordinals[start : start + batch_size] for start in starts]
    order = np.argsort(facts["length"], kind="stable") + ordinals.start
    return [order[start : start + batch_size].tolist() for start in starts]
