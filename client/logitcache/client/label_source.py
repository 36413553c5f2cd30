"""`Labels`: what `connect` returns. A reader plus what a training loop needs around it.

It opens its reader where it is used: in the process that connected, and anew in each forked or spawned DataLoader
worker, which inherits neither socket nor lock. It follows a label set that grows or is repaired, and refuses another
one in its place. It knows nothing of HTTP, files or torch.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from logitcache.client.attach import AUTO, AttachedLoader, Auto, Part, given_parts, token_parts
from logitcache.client.fetched import FetchedLabels
from logitcache.client.held_inputs import (
    HeldTokens,
    check_counts,
    check_fingerprints,
    check_one_an_id,
    check_tokens,
    held_tokens,
    on_cpu,
    too_many,
)
from logitcache.client.in_process import InProcess
from logitcache.client.lookahead import BUFFER_BYTES
from logitcache.client.schedule import Schedule
from logitcache.client.stats import Stats
from logitcache.client.target import check_expected, check_successor, open_label_set, parse_target
from logitcache.client.viewed import as_seen
from logitcache.client.waiting import once_labelled
from logitcache.labels.errors import Id, InvalidRequest, RangeOutside
from logitcache.labels.identity import TeacherId
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import LABELLED, Description, LabelSet, OnMissing
from logitcache.labels.ranges import as_ranges
from logitcache.labels.soft_labels import SoftLabels

Batch = TypeVar("Batch")


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
        self._process = InProcess()

    def open(self) -> "Labels":
        """Read and check the description now, and not at the first use; returns itself."""
        self._opened()
        return self

    def describe(self) -> Description:
        """The label set as of now: identity, progress, digest, limits."""
        return self._opened()[1].describe()

    def fetch(
        self,
        ids: Any,
        *,
        rows: Any = None,
        view: Any = 0,
        inputs: Any = None,
        attention_mask: Any = None,
        on_missing: OnMissing | Literal["wait"] = "error",
    ) -> FetchedLabels:
        """Soft labels of these examples, in the order asked for; duplicates are allowed.

        Args:
            ids: whole numbers (a list, an integer array or a tensor) or texts, whichever the label set's are.
            rows: of a causal label set, which rows of each example: ``(start, stop)`` for all, or an array (examples,
                2). None means all, or as many as ``inputs`` have tokens.
            view: which augmentation: one for all ids, or a list, array or tensor with one for each. An id may stand
                there several times, with another view each time.
            inputs: the inputs that you hold for these ids, to be checked against what the teacher was shown. Of a
                pointwise label set, a stacked tensor or array, or a list: compared bit by bit, dtype and shape too. Of
                a causal one, token ids in any integer dtype: padded to (batch, length), or a list with one sequence for
                each example. They may be cut short: labels then come for the tokens that are there. Where ``rows`` is
                given, they are the tokens of those rows.
            attention_mask: of padded token ids, 1 for a token and 0 for padding, left or right of the tokens. Without
                it all of ``inputs`` are tokens.
            on_missing: ``"error"``, or ``"mask"`` for a ``present`` mask: where there is no label, a pointwise example
                has a row of NaN, a causal one no rows; or ``"wait"`` until a job or another run has labelled all of
                them, for ``timeout_s`` seconds. Ids that the label set does not contain are an error at once.

        Raises:
            RowsMissing: some ids have no labels; ``error.ids`` names them.
            LabelMismatch: inputs differ from what the teacher was shown, or are longer; ``error.ids`` names their
                examples.
            RangeOutside: some examples have fewer rows; ``error.ids`` names them.
            ShapeMismatch: there are more or fewer inputs than ids, or tokens than rows.
            InvalidIds, UnknownView, InvalidRequest: an argument cannot be right.
            DigestChanged: the label set no longer has the digest that was pinned.
            DeadlineExceeded, Unavailable: no answer, or with ``"wait"`` no labels, within the time allowed.
        """
        began = time.perf_counter()
        wanted = as_ids(on_cpu(ids))
        here, reader = self._opened()
        held: HeldTokens | None = None
        if inputs is not None and self._is_causal:
            held = held_tokens(inputs, attention_mask, wanted)
            if rows is not None:
                rows = as_ranges(on_cpu(rows), len(wanted))
                check_counts(held, rows, wanted)
        elif attention_mask is not None:
            raise InvalidRequest("attention_mask says which of the inputs are tokens: give it with token ids as inputs")
        elif inputs is not None:
            check_one_an_id(inputs, len(wanted))
        asked = held.ranges if held is not None and rows is None else on_cpu(rows)

        missing: OnMissing = "error" if on_missing == "wait" else on_missing

        def read() -> SoftLabels:
            nonlocal began
            if on_missing == "wait":
                began = time.perf_counter()  # the wait before is not what fetching takes
            return reader.fetch(wanted, rows=asked, view=on_cpu(view), digest=self._digest, on_missing=missing)

        try:
            soft = once_labelled(read, self._timeout_s) if on_missing == "wait" else read()
        except RangeOutside as error:
            if rows is not None:
                raise
            raise too_many(error.ids, masked=attention_mask is not None) from error
        self._follow(here, soft.digest)
        if held is not None:
            check_tokens(held, soft, wanted, repr(self), masked=attention_mask is not None)
        elif inputs is not None:
            check_fingerprints(inputs, soft, wanted)
        fetched = FetchedLabels.of(soft)
        size = 0 if here.described is None else here.described.row_spec.nbytes(len(soft), soft.examples)
        here.tally.count(rows=len(soft), bytes=size, fetch_ms=1000 * (time.perf_counter() - began))
        return fetched

    def missing(self, ids: Any) -> list[Id]:
        """Those of these ids that have no labels, once each, in the order given.

        They are unknown to the label set, not labelled yet, or withdrawn as damaged. Errors are those of `fetch`.
        """
        if hasattr(ids, "__len__") and len(ids) == 0:
            return []
        wanted = as_ids(on_cpu(ids))
        here, reader = self._opened()
        self._follow(here, self._digest or reader.describe().digest)
        return wanted.at(reader.states(wanted, digest=self._digest) != LABELLED)

    def attach(
        self,
        loader: Iterable[Batch],
        *,
        ids: Part,
        rows: Part | tuple[int, int] | None = None,
        view: Any = 0,
        inputs: Part | Auto | None = AUTO,
        attention_mask: Part | Auto | None = AUTO,
        on_missing: OnMissing | Literal["wait"] = "error",
        depth: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        device: Any = None,
        schedule: Schedule | None = None,
        first_step: int = 0,
        accumulate: int = 1,
    ) -> AttachedLoader[Batch]:
        """The loader, with the labels of each batch beside it: iterating gives ``(batch, soft)``.

        Labels of the next batches are fetched while a step computes, in the loader's order, by one thread. Otherwise it
        is the loader: its length, its ``set_epoch``, its state (at the batch that was delivered), its other attributes.
        Batches are held until their step: a loader that refills one buffer must be copied from, or attached with
        ``depth=0``.

        With a causal label set, the token ids of every batch that is a mapping with ``"input_ids"`` are checked, and
        the labels come cut to the tokens that the batch has.

        Args:
            loader: a DataLoader, or any iterable of batches.
            ids: where a batch has its ids: a key, a position, or a function of the batch. See `with_ids`. Where it has
                what `with_views` adds, ids, views and hashes of the inputs are taken from that, and compared.
            rows: which rows of each example, for batches that begin in the middle of their examples: ``(start, stop)``
                for all, or where a batch has an array or tensor (examples, 2) of them.
            view: one view for all, or where a batch has the view of each example: a key or a function.
            inputs: where a batch has the inputs, to check every one of them as `fetch` does; None checks nothing.
                Unless given, ``"input_ids"`` of batches that have it, with a causal label set; nothing otherwise.
            attention_mask: where a batch has the mask of these inputs; unless given, ``"attention_mask"`` of batches
                that have it, with a causal label set. None takes all inputs for tokens.
            on_missing: as in `fetch`; `distillation_loss` takes the CE alone for examples that are masked.
            depth: batches ahead that labels are fetched for, each held in memory; 0 fetches at the step itself. None
                begins with 2 and asks for one more, up to 16, where a step waited and asking earlier can help; `stats`
                tells how many. The depth changes neither order nor labels, but with it the step at which a batch is
                pulled; so where loader and step draw from one generator, in one process, a number makes runs
                repeatable.
            buffer_bytes: with depth None, bytes of labels that are held or under way: no more batches are asked for
                than fit if their labels are as large as the largest of the last 32 answers, but always one ahead.
            device: yield `SoftLabelTensors` there in place of NumPy arrays. The thread that fetches makes them; for a
                CUDA device it copies into pinned memory, and the step issues non-blocking copies on its own stream.
            schedule: at which of the optimizer's steps to distil. Batches of steps of weight 0 come as
                ``(batch, None)``, and nothing is fetched for them.
            first_step: the optimizer's step that the first batch belongs to, for a run that resumes. Later epochs go on
                from the last; ``step`` of what is returned tells the next one and can be set.
            accumulate: batches that make one step of the optimizer; the end of an epoch ends a step, too.

        Raises:
            InvalidRequest: ``depth`` or ``first_step`` is below 0, ``buffer_bytes`` or ``accumulate`` is below 1, or
                ``attention_mask`` is given without ``inputs``.
        """
        self._opened()
        parts = token_parts(inputs, attention_mask) if self._is_causal else given_parts(inputs, attention_mask)

        def fetch(ids: Any, **others: Any) -> FetchedLabels:
            return self.fetch(ids, on_missing=on_missing, **{"rows": rows, "view": view, **others})

        if rows is not None and not isinstance(rows, tuple):
            parts["rows"] = rows
        if isinstance(view, str) or callable(view):
            parts["view"] = view
        return AttachedLoader(
            loader,
            as_seen(fetch),
            lambda: self._here().tally,
            ids=ids,
            parts=parts,
            depth=depth,
            buffer_bytes=buffer_bytes,
            device=device,
            schedule=schedule,
            first_step=first_step,
            accumulate=accumulate,
        )

    @property
    def stats(self) -> Stats:
        """What fetching has cost in this process so far."""
        here = self._here()
        return here.tally.snapshot(None if here.described is None else here.described.teacher_time)

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

    def _here(self) -> InProcess:
        if self._process.pid != os.getpid():
            self._process = InProcess(inherited=self._process)
        return self._process

    def _opened(self) -> tuple[InProcess, LabelSet]:
        """This process's state and reader, which is opened, and checked to be the label set expected, when it is first
        needed.
        """
        here = self._here()
        if here.reader is not None and not self._closed:
            return here, here.reader
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
            return here, here.reader

    @property
    def _is_causal(self) -> bool:
        """Each token has a row. It cannot change: another alignment is another label set."""
        described = self._here().described
        return described is not None and described.identity.alignment == "causal"

    def _follow(self, here: InProcess, digest: str | None) -> None:
        """Take a label set that was finished, repaired or grew, and refuse another one that was put in its place.

        ``digest`` is that of what was just read. The reader holds it to the one that was pinned, if any.
        """
        if here.described is None or here.reader is None or digest == (self._digest or here.described.digest):
            return
        now = here.reader.describe()
        check_expected(now, digest=self._digest, teacher=self._teacher)
        check_successor(here.described, now, repr(self), digest)
        here.described = now


def _rebuild(
    target: str, digest: str | None, teacher: str | TeacherId | None, timeout_s: float, retries: int | None
) -> Labels:
    return Labels(target, digest=digest, teacher=teacher, timeout_s=timeout_s, retries=retries)
