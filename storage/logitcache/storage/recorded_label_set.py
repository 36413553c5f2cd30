"""The reader of a label set while it is recorded: rows come from its log, and from its shards once it is sealed."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8

from logitcache.labels import wire
from logitcache.labels.errors import DigestChanged, LabelSetNotFound, StorageFault
from logitcache.labels.ids import Ids
from logitcache.labels.label_set import LABELLED, UNKNOWN, UNLABELLED, Description, Limits, OnMissing
from logitcache.labels.label_set import Shards as ShardCounts
from logitcache.labels.missing import rows_missing
from logitcache.labels.ranges import check_ranges
from logitcache.labels.soft_labels import SoftLabels, splits_of
from logitcache.storage.asked import Asked, asked_for
from logitcache.storage.gather import mark_missing, runs
from logitcache.storage.local import LocalLabelSet
from logitcache.storage.places import Places
from logitcache.storage.reading import status
from logitcache.storage.recorded import Recorded
from logitcache.storage.served import ServedTally
from logitcache.storage.shards import ShardReport, Verify


class RecordedLabelSet:
    """A label set in a folder of this machine that is being recorded. Implements `labels.label_set.LabelSet`.

    Rows are given out as soon as they are durable; a later step's take the place of an earlier one's. There is no
    digest before it is sealed; then this reader goes on as a `LocalLabelSet`. Safe to use from several threads.

    Raises:
        LabelSetNotFound: nothing is recorded in this folder.
        NotALabelSet, NewerFormat, ShardDamaged, StorageFault: what is there cannot be read.
    """

    def __init__(
        self, path: Path | str, *, verify: Verify = "strict", scrub_s: float | None = None, limits: Limits | None = None
    ) -> None:
        self.path = Path(path).absolute()
        self.name = self.path.name
        self._verify: Verify = verify
        self._scrub_s, self._limits = scrub_s, limits or Limits()
        self._recorded = Recorded(self.path)
        self.identity, self.row_spec = self._recorded.terms.identity, self._recorded.spec
        self.tally = ServedTally(None, self.identity)  # kept nowhere: no teacher's time was saved
        self._sealed: LocalLabelSet | None = None
        self._sealing = threading.Lock()

    @property
    def is_replaced(self) -> bool:
        """It was sealed, or another label set stands in the folder now: open it anew."""
        return status(Places(self.path).recording) is None or self._recorded.log.is_removed

    def is_at_hand(self, examples: int) -> bool:
        """Never: its log is looked at each time."""
        return False

    def describe(self) -> Description:
        """What is recorded, as of now."""
        if (sealed := self._current()) is not None:
            return sealed.describe()
        progress, terms = self._recorded.progress(), self._recorded.terms
        return Description(
            name=self.name,
            identity=self.identity,
            examples=terms.examples,
            labelled=progress.examples,
            rows=progress.rows,
            generations=(),
            shards=ShardCounts(total=0, committed=0, verified=0, damaged=0),
            label_bytes=self._recorded.log.end * self._recorded.log.dtype.itemsize,
            limits=self._limits,
        )

    def fetch(
        self,
        ids: Any,
        *,
        rows: Any = None,
        view: Any = 0,
        digest: str | None = None,
        on_missing: OnMissing = "error",
        limits: Limits | None = None,
    ) -> SoftLabels:
        """Soft labels of these examples; see `LocalLabelSet.fetch`."""
        if (sealed := self._current()) is not None:
            return sealed.fetch(ids, rows=rows, view=view, digest=digest, on_missing=on_missing, limits=limits)
        asked = self._asked(ids, rows, view, digest, on_missing, limits)
        return SoftLabels(temperatures=self.row_spec.temperatures, digest=None, **self._gather(asked))

    def fetch_body(
        self, ids: Any, *, rows: Any = None, view: Any = 0, digest: str | None = None, on_missing: OnMissing = "error"
    ) -> tuple[UInt8[np.ndarray, " bytes"], str | None]:
        """The same as one safetensors body; see `LocalLabelSet.fetch_body`."""
        if (sealed := self._current()) is not None:
            return sealed.fetch_body(ids, rows=rows, view=view, digest=digest, on_missing=on_missing)
        asked = self._asked(ids, rows, view, digest, on_missing)
        arrays = self._gather(asked)
        plan = wire.rows_plan(self.row_spec, len(arrays["indices"]), len(asked.ids), asked.masked, None)
        body, views = plan.allocate()
        for name, array in arrays.items():
            views[name][...] = array
        return body, None

    def states(self, ids: Any, *, digest: str | None = None) -> UInt8[np.ndarray, " ids"]:
        """For each id `LABELLED`, `UNLABELLED` or `UNKNOWN`; a label of every view is one."""
        if (sealed := self._current()) is not None:
            return sealed.states(ids, digest=digest)
        asked = self._asked(ids, None, 0, digest, "mask")
        ordinals = self._recorded.ordinals(asked.ids)
        labelled = self._recorded.are_complete(np.maximum(ordinals, 0)) & (ordinals >= 0)
        states: np.ndarray = np.where(labelled, LABELLED, np.where(ordinals >= 0, UNLABELLED, UNKNOWN))
        return states.astype(np.uint8)

    def example_ids(self) -> Ids | None:
        """Ids of all its examples in their order; None where they are their ordinals."""
        return self._recorded.ids if (sealed := self._current()) is None else sealed.example_ids()

    def verify_all(
        self, progress: Callable[[int, int], None] | None = None, threads: int | None = None
    ) -> list[ShardReport]:
        """There is no shard yet: each frame of the log is checked when it is read."""
        return [] if (sealed := self._current()) is None else sealed.verify_all(progress, threads)

    def damaged(self) -> dict[int, str]:
        """Shards that are damaged: it has none before it is sealed."""
        return {} if self._sealed is None else self._sealed.damaged()

    def save_tally(self) -> None:
        """There is no bill of a recording."""

    def close(self) -> None:
        """Close the log; arrays that were fetched stay valid."""
        self._recorded.close()
        if self._sealed is not None:
            self._sealed.close()

    def _current(self) -> LocalLabelSet | None:
        """The label set as it was sealed; before, None, and what was appended to the log is taken in."""
        if self._sealed is None and not self.is_replaced:
            self._recorded.follow()
            return None
        with self._sealing:
            if self._sealed is None:
                if status(Places(self.path).recording) is not None:
                    raise self._replaced()
                sealed = LocalLabelSet(self.path, verify=self._verify, scrub_s=self._scrub_s, limits=self._limits)
                if sealed.layout.identity.differences(self.identity):
                    sealed.close()
                    raise self._replaced()
                self._sealed = sealed
        return self._sealed

    def _replaced(self) -> DigestChanged:
        return DigestChanged(f"the label set {self.name!r} was replaced while it was open: open it again")

    def _asked(
        self, ids: Any, rows: Any, view: Any, digest: str | None, on_missing: str, limits: Limits | None = None
    ) -> Asked:
        allowed = (self._limits,) if limits is None else (self._limits, limits)
        asked = asked_for(self.name, self.identity, self.row_spec, allowed, ids, rows, view, digest, on_missing)
        if digest is not None:
            raise DigestChanged(
                f"{self.name!r} is at no digest yet: it is being recorded; pin one when it is sealed", expected=digest
            )
        return asked

    def _gather(self, asked: Asked) -> dict[str, np.ndarray]:
        recorded, spec = self._recorded, self.row_spec
        ordinals = recorded.ordinals(asked.ids)
        known = ordinals >= 0
        first, counts = recorded.located(np.where(known, ordinals, 0), asked.view)
        served = known & (first >= 0)
        counts = np.where(served, counts, 0)
        if not asked.masked and not served.all():
            raise rows_missing(
                self.name,
                self.identity.ids,
                recorded.terms.examples,
                asked=len(asked.ids.at(slice(None))),
                unknown=asked.ids.at(~known),
                unlabelled=asked.ids.at(known & ~served),
                reason="not recorded yet: wait for the run that records them, or record them",
            )
        starts = first
        if asked.ranges is not None:
            here = np.flatnonzero(served)
            check_ranges(asked.ranges[here], counts[here], asked.ids, self.name, here)
            begins, ends = np.where(served, asked.ranges.T, 0)
            starts, counts = first + begins, ends - begins
        for limits in asked.limits:
            limits.check(spec, len(first), int(counts.sum()) if spec.ragged else len(first))
        places = recorded.places(np.where(known, ordinals, 0), asked.view)
        return self._arrays(places, first, starts, counts, served, asked.masked)

    def _arrays(
        self,
        places: np.ndarray,
        first: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
        served: np.ndarray,
        masked: bool,
    ) -> dict[str, np.ndarray]:
        """Fields of an answer: of each place its rows from a slot on; the fingerprint stands in its first slot."""
        recorded, spec = self._recorded, self.row_spec
        rows = np.zeros(int(counts.sum()) if spec.ragged else len(first), recorded.log.dtype)
        if spec.ragged:
            splits = splits_of(counts)
            rows[:] = recorded.rows(runs(starts, splits), np.repeat(places, counts))
        else:
            rows[served] = recorded.rows(starts[served], places[served])
        arrays = {name: np.ascontiguousarray(rows[name]) for name in spec.arrays}
        arrays |= {name: np.ascontiguousarray(rows["scalars"][:, column]) for name, column in spec.scalars.items()}
        arrays["fingerprint"] = np.zeros(len(first), np.uint64)
        arrays["fingerprint"][served] = recorded.rows(first[served], places[served])["fingerprint"]
        if spec.ragged:
            arrays["row_splits"] = splits
        if masked:
            mark_missing(arrays, served)
            arrays["present"] = served
        return arrays


Readable: TypeAlias = LocalLabelSet | RecordedLabelSet
"""A label set of this machine, whatever it is made of."""


def open_label_set(
    path: Path, *, verify: Verify = "strict", scrub_s: float | None = None, limits: Limits | None = None
) -> Readable:
    """The reader of the label set in a folder: sealed, being labelled, or being recorded.

    Raises:
        LogitcacheError: as `LocalLabelSet` and `RecordedLabelSet` do.
    """
    being_recorded = Places(path).recording
    if status(being_recorded) is not None:
        try:
            return RecordedLabelSet(path, verify=verify, scrub_s=scrub_s, limits=limits)
        except (LabelSetNotFound, StorageFault):
            # Unless it was sealed right now.
            if status(being_recorded) is not None:
                raise
    return LocalLabelSet(path, verify=verify, scrub_s=scrub_s, limits=limits)
