"""`Labels`: what `connect` returns. A reader plus what a training loop needs around it.

It opens its reader where it is used: in the process that connected, and anew in each forked or spawned DataLoader
worker, which inherits neither socket nor lock. It follows a label set that grows or is repaired, and refuses another
one in its place. It knows nothing of HTTP, files or torch.
"""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from logitcache.client.attach import Attachable, ToAttach
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
from logitcache.client.part_errors import of_pinned
from logitcache.client.record import begun, checked, sink_of
from logitcache.client.recorder import BUFFER_BYTES as RECORDED_BYTES
from logitcache.client.recorder import Recorder
from logitcache.client.stats import Stats
from logitcache.client.target import (
    HttpTarget,
    beside,
    check_expected,
    check_successor,
    example_ids,
    has_generation,
    open_label_set,
    parse_target,
)
from logitcache.client.waiting import once_labelled
from logitcache.labels.errors import Id, InvalidRequest, LogitcacheError, RangeOutside, RowsMissing
from logitcache.labels.identity import Dtype, TeacherId, declared
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import LABELLED, Description, LabelSet, OnMissing
from logitcache.labels.ranges import as_ranges
from logitcache.labels.recorded import Mode, RecordingTerms, recorder_id
from logitcache.labels.soft_labels import SoftLabels

SEEN_BY_ALL_S = 2.0
"""Seconds after which every process of a server describes a generation that one of them has given rows of: each looks
at the store twice a second."""


class Labels(Attachable):
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
        key: str | None = None,
    ) -> None:
        self._target = parse_target(target)
        self._digest, self._teacher = digest, teacher
        self._timeout_s, self._retries, self._key = timeout_s, retries, key
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
        except RowsMissing as error:
            if self._digest is None or here.described is None or not error.unknown:
                raise
            raise of_pinned(error, here.described, self._digest) from error
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
        here.tally.count(rows=soft.rows_present, bytes=size, fetch_ms=1000 * (time.perf_counter() - began))
        return fetched

    def look(self, ids: Any) -> SoftLabels:
        """What these examples are known by: their labels, of a causal label set none of their rows, with a mask.

        They are not counted, because nobody trains on them. Errors are those of `fetch`.
        """
        here, reader = self._opened()
        rows = (0, 0) if self._is_causal else None
        soft = reader.fetch(as_ids(on_cpu(ids)), rows=rows, digest=self._digest, on_missing="mask")
        self._follow(here, soft.digest)
        return soft

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

    def record(
        self,
        name: str,
        *,
        run: str,
        steps: range,
        mode: Mode = "train",
        weights: str = "moving",
        preprocessing: str | None = None,
        top_k: int | None = None,
        temperatures: Iterable[float] | None = None,
        dtype: Dtype | None = None,
        targets: bool | None = None,
        views: int | None = None,
        rank: int = 0,
        recorders: int = 1,
        buffer_bytes: int = RECORDED_BYTES,
    ) -> Recorder:
        """Begin to record a new label set of the same examples, beside this one; or go on with it.

        Its ids, classes and alignment are this label set's, and so is the rest unless it is given; `record` tells the
        arguments. Of V views the first ``views`` are recorded.

        Args:
            name: of the new label set, in the same store or on the same server.
            run: see `record`, as for all others.
            steps: at which it records: ``range(first, last + 1)``.
            mode: how the model runs.
            weights: ``"moving"``, or what names them.
            preprocessing: what was done to inputs.
            top_k: classes stored of each row.
            temperatures: to declare besides 1.
            dtype: of the stored logits.
            targets: store targets.
            views: of each example.
            rank: which of the recorders this is.
            recorders: how many record together.
            buffer_bytes: of rows that may wait to be sent.

        Raises:
            InvalidRequest: this label set is not finished, or an argument cannot be right.
            LogitcacheError: as `record`.
        """
        _, reader = self._opened()
        described = reader.describe()
        of_this, target = described.identity, beside(self._target, name)
        told = {"k": top_k, "dtype": dtype, "targets": targets, "views": views}
        given: dict[str, Any] = {field: value for field, value in told.items() if value is not None}
        preprocessing = of_this.teacher.preprocessing if preprocessing is None else preprocessing
        identity = replace(
            of_this,
            teacher=recorder_id(run, steps, mode, weights, preprocessing),
            temperatures=of_this.temperatures if temperatures is None else declared(temperatures),
            **given,
        )
        if identity.views > of_this.views:
            raise InvalidRequest(f"views={views}: {self!r} has {of_this.views:,}")
        terms = RecordingTerms(checked(identity), steps, described.examples, recorders)
        like = described.name if isinstance(target, HttpTarget) else None
        ids = None if like is not None else example_ids(reader)
        sink = sink_of(target, like, timeout_s=self._timeout_s, retries=self._retries, key=self._key)
        return begun(sink, str(target), terms, rank, ids, buffer_bytes)

    @property
    def stats(self) -> Stats:
        """What fetching has cost in this process so far; while shards are still labelled, their teacher's time is asked
        for at each call.
        """
        here = self._here()
        if here.described is not None and here.described.digest is None:
            with suppress(LogitcacheError):  # then what was known last is told: a call of `fetch` says what is wrong
                self._describe_again(*self._opened(), None)
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
        return _rebuild, (str(self._target), self._digest, self._teacher, self._timeout_s, self._retries, self._key)

    def _to_attach(self) -> ToAttach:
        self._opened()
        described = self._here().described
        is_augmented = described is not None and described.identity.seed != 0
        return ToAttach(self.fetch, lambda: self._here().tally, self._is_causal, is_augmented)

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
                    self._target, timeout_s=self._timeout_s, retries=self._retries, key=self._key, tally=here.tally
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
        self._describe_again(here, here.reader, digest)

    def _describe_again(self, here: InProcess, reader: LabelSet, digest: str | None) -> None:
        assert here.described is not None
        now, until_s = reader.describe(), time.monotonic() + SEEN_BY_ALL_S
        while digest is not None and not has_generation(now, digest) and time.monotonic() < until_s:
            time.sleep(SEEN_BY_ALL_S / 10)
            now = reader.describe()
        check_expected(now, digest=self._digest, teacher=self._teacher)
        check_successor(here.described, now, repr(self), digest)
        here.described = now


def _rebuild(
    target: str,
    digest: str | None,
    teacher: str | TeacherId | None,
    timeout_s: float,
    retries: int | None,
    key: str | None,
) -> Labels:
    return Labels(target, digest=digest, teacher=teacher, timeout_s=timeout_s, retries=retries, key=key)
