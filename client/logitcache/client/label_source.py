"""`Labels`: what `connect` returns. A reader plus what a training loop needs around it.

It opens its reader where it is used: in the process that connected, and anew in each forked or spawned DataLoader
worker, which inherits neither socket nor lock. It knows nothing of HTTP, files or torch.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from logitcache.client.attach import AttachedLoader, Part
from logitcache.client.fetched import FetchedLabels
from logitcache.client.stats import Stats, Tally
from logitcache.client.target import check_expected, open_label_set, parse_target
from logitcache.labels.errors import DigestChanged, InvalidRequest, LabelMismatch, ShapeMismatch, shown
from logitcache.labels.fingerprints import fingerprints
from logitcache.labels.identity import TeacherId
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import Description, LabelSet, OnMissing
from logitcache.labels.soft_labels import SoftLabels

Batch = TypeVar("Batch")

_ARRAYS = ("indices", "logits", "logit_max", "tail_logsumexp", "fingerprint", "present")


class _InProcess:
    """What belongs to one process and must not be used by a fork of it."""

    def __init__(self, inherited: "_InProcess | None" = None) -> None:
        self.pid = os.getpid()
        self.lock = threading.Lock()  # a lock that a thread of the parent held would never be released here
        self.reader: LabelSet | None = None
        self.described: Description | None = None  # as it was when this process last checked it
        self.tally = Tally()
        self.inherited = inherited  # kept alive: collecting it would close sockets and mappings of the parent's reader


class Labels:
    """The soft labels of one label set. Thread-safe, fork-safe and picklable; made by `connect`, whose arguments it
    has.
    """

    def __init__(
        self,
        target: str | Path,
        *,
        digest: str | None = None,
        teacher: str | TeacherId | None = None,
        timeout_s: float = 60.0,
        retries: int | None = None,
    ) -> None:
        self._target = parse_target(target)
        self._digest, self._teacher = digest, teacher
        self._timeout_s, self._retries = timeout_s, retries
        self._closed = False
        self._process = _InProcess()

    def open(self) -> "Labels":
        """Read and check the description now, and not at the first use; returns itself."""
        self._reader()
        return self

    def describe(self) -> Description:
        """The label set as of now: identity, progress, digest, limits."""
        return self._reader().describe()

    def fetch(self, ids: Any, *, view: int = 0, inputs: Any = None, on_missing: OnMissing = "error") -> FetchedLabels:
        """Soft labels of these examples, in the order asked for; duplicates are allowed.

        Args:
            ids: whole numbers: a list, an integer array or a tensor.
            view: which augmentation; this version has one, 0.
            inputs: the inputs that you hold for these ids (a stacked tensor or array, or a list), to be checked against
                what the teacher was shown, bit by bit: same dtype, shape and values.
            on_missing: ``"error"``, or ``"mask"`` for a ``present`` mask and NaN where there is no label.

        Raises:
            RowsMissing: some ids have no labels; ``error.ids`` names them.
            LabelMismatch: inputs differ from what the teacher was shown; ``error.ids`` names their examples.
            ShapeMismatch: there are more or fewer inputs than ids.
            InvalidIds, UnknownView, InvalidRequest: an argument cannot be right.
            DigestChanged: the label set is no longer at the digest that was pinned.
            DeadlineExceeded, Unavailable: no answer within the time allowed.
        """
        wanted = as_ids(_on_cpu(ids))
        if inputs is not None and len(inputs) != len(wanted):
            raise ShapeMismatch(f"{len(inputs):,} inputs were given for {len(wanted):,} ids: one an id is needed")
        reader = self._reader()
        soft = reader.fetch(wanted, view=view, digest=self._digest, on_missing=on_missing)
        self._check_content(reader, soft)
        arrays = [getattr(soft, name) for name in _ARRAYS]
        self._here().tally.count(rows=len(soft), bytes=sum(array.nbytes for array in arrays if array is not None))
        if inputs is not None:
            self._check_inputs(wanted, inputs, soft)
        return FetchedLabels.of(soft)

    def attach(
        self,
        loader: Iterable[Batch],
        *,
        ids: Part,
        view: int = 0,
        inputs: Part | None = None,
        on_missing: OnMissing = "error",
        depth: int = 2,
        device: Any = None,
    ) -> AttachedLoader[Batch]:
        """The loader, with the labels of each batch beside it: iterating gives ``(batch, soft)``.

        Labels of the next ``depth`` batches are under way while a step computes. Otherwise it is the loader: its
        length, its ``set_epoch``, its state (at the batch that was delivered), its other attributes. Batches are held
        until their step: a loader that refills one buffer must be copied from, or attached with ``depth=0``.

        Args:
            loader: a DataLoader, or any iterable of batches.
            ids: where a batch has its ids: a key, a position, or a function of the batch. See `with_ids`.
            view: as in `fetch`.
            inputs: where a batch has the inputs, to check every one of them as `fetch` does; None checks nothing.
            on_missing: as in `fetch`; `distillation_loss` takes the CE alone for rows that are masked.
            depth: batches whose labels are fetched ahead; each is held in memory.
            device: yield `SoftLabelTensors` there in place of NumPy arrays.

        Raises:
            InvalidRequest: ``depth`` is below 0.
        """

        def fetch(ids: Any, inputs: Any) -> FetchedLabels:
            return self.fetch(ids, view=view, inputs=inputs, on_missing=on_missing)

        return AttachedLoader(
            loader, fetch, lambda: self._here().tally, ids=ids, inputs=inputs, depth=depth, device=device
        )

    @property
    def stats(self) -> Stats:
        """What fetching has cost in this process so far."""
        return self._here().tally.snapshot()

    def close(self) -> None:
        """Give back connections or mappings; arrays that were fetched stay valid."""
        here = self._here()
        with here.lock:
            self._closed = True
            if here.reader is not None:
                here.reader.close()

    def __enter__(self) -> "Labels":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Labels({str(self._target)!r})"

    def __reduce__(self) -> Any:
        return _rebuild, (str(self._target), self._digest, self._teacher, self._timeout_s, self._retries)

    def _here(self) -> _InProcess:
        if self._process.pid != os.getpid():
            self._process = _InProcess(inherited=self._process)
        return self._process

    def _reader(self) -> LabelSet:
        """This process's reader; opened, and checked to be the label set expected, when it is first needed."""
        here = self._here()
        with here.lock:
            if self._closed:
                raise InvalidRequest(f"{self!r} is closed: connect again")
            if here.reader is None:
                reader = open_label_set(
                    self._target, timeout_s=self._timeout_s, retries=self._retries, tally=here.tally
                )
                try:
                    here.described = reader.describe()
                    check_expected(here.described, digest=self._digest, teacher=self._teacher)
                except BaseException:
                    reader.close()
                    raise
                here.reader = reader
            return here.reader

    def _check_content(self, reader: LabelSet, soft: SoftLabels) -> None:
        """Follow a label set that is finished or repaired, and refuse another one that was put in its place."""
        here = self._here()
        if here.described is None or soft.digest == here.described.digest:
            return
        now = reader.describe()
        check_expected(now, digest=self._digest, teacher=self._teacher)
        if changed := here.described.identity.differences(now.identity):
            raise DigestChanged(
                f"{self!r} was replaced by another label set ({', '.join(changed)} changed): these rows are not of the "
                "one that you connected to; connect again to take it",
                expected=here.described.digest,
                served=soft.digest,
            )
        before = here.described
        if before.generation is not None and (now.generation or 0) <= before.generation:
            raise DigestChanged(
                f"{self!r} was made anew: it was at {before.digest} (generation {before.generation}) and is at "
                f"{now.digest} (generation {now.generation}), so its examples may be others; connect again to take it",
                expected=before.digest,
                served=soft.digest,
            )
        here.described = now

    def _check_inputs(self, ids: np.ndarray, inputs: Any, soft: SoftLabels) -> None:
        try:
            held = fingerprints(_on_cpu(inputs))
        except TypeError as error:
            raise InvalidRequest(f"inputs cannot be compared with what the teacher was shown: {error}") from None
        differs = held != soft.fingerprint
        if soft.present is not None:
            differs &= soft.present
        if differs.any():
            wrong = list(dict.fromkeys(ids[differs].tolist()))
            raise LabelMismatch(
                f"the inputs of {len(wrong):,} examples are not what the teacher was shown (ids: {shown(wrong)}): "
                "the ids are not those of these inputs (was with_ids forgotten, or wrapped around a subset?), or the "
                "dataset was re-ordered or is preprocessed in another way",
                ids=wrong,
            )


def _on_cpu(values: Any) -> Any:
    """A tensor in one transfer in place of one a row; anything else as it is."""
    return values.detach().cpu() if hasattr(values, "detach") else values


def _rebuild(
    target: str, digest: str | None, teacher: str | TeacherId | None, timeout_s: float, retries: int | None
) -> Labels:
    return Labels(target, digest=digest, teacher=teacher, timeout_s=timeout_s, retries=retries)
