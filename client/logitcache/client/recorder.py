"""`Recorder`: a run's own logits, on their way to a label set while the run goes on.

`add` selects and returns; one thread sends what was added, as many rows at once as have come together meanwhile, and
what it has sent is durable. It knows nothing of HTTP or files.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int64

from logitcache.client.extras import import_with_torch
from logitcache.client.held_inputs import HeldTokens, check_one_an_id, held_tokens, on_cpu
from logitcache.client.recording_sinks import Sink
from logitcache.labels.errors import (
    Id,
    InvalidIds,
    InvalidRequest,
    LogitcacheError,
    RecorderReplaced,
    RowsMissing,
    ShapeMismatch,
    TeacherFault,
    TooManyRows,
    UnknownView,
    shown,
)
from logitcache.labels.fingerprints import fingerprints, token_fingerprint
from logitcache.labels.identity import Identity
from logitcache.labels.ids import Ids, as_ids, check_kind
from logitcache.labels.label_set import row_spec
from logitcache.labels.recorded import RecordedRows, RecordingTerms, Who, check_recorded, together
from logitcache.labels.soft_labels import RowSpec, SoftLabels, splits_of
from logitcache.labels.views import as_views

MOST_BYTES_AT_ONCE = 4 << 20
"""Rows that are sent in one request, in bytes, unless one example has more."""

BUFFER_BYTES = 64 << 20
"""Rows that may wait to be sent, in bytes; then `Recorder.add` waits, too."""

SEALED_PAUSE_S = 0.1
"""Seconds between two questions whether a label set is sealed."""

NOT_SENT_AGAIN = (InvalidIds, UnknownView, RowsMissing, ShapeMismatch, TooManyRows, TeacherFault, RecorderReplaced)
"""What the place that rows are sent to says of the rows themselves, or of this recorder for good: they are dropped. Any
other error (of the server, its store, its key, a proxy in its place, or nobody's) says nothing of them: they are
kept."""

_LOG = logging.getLogger("logitcache.client")


@dataclass(frozen=True)
class _Added:
    """A batch whose rows may still be on their way from the device."""

    rows: Callable[[], RecordedRows]
    nbytes: int


class Recorder:
    """Records rows of one run; made by `record` and `Labels.record`. A context manager: left without an error it
    `finish`\\ es, left with one it sends what was added, and the recording can be gone on with.

    One thread at a time may add. Errors of what was added earlier are raised by the next call, which adds nothing
    then. What was sent before is kept; what could not be sent for a reason that is not in the rows, such as a server
    that is away or a full disk, is sent again after that.

    Attributes:
        terms: what is recorded.
        digest: of the label set, when it is sealed.
    """

    def __init__(
        self,
        name: str,
        sink: Sink,
        terms: RecordingTerms,
        *,
        rank: int = 0,
        ids: Ids | None = None,
        buffer_bytes: int = BUFFER_BYTES,
    ) -> None:
        self.name, self.terms = name, terms
        self.digest: str | None = None
        self._spec = row_spec(terms.identity)
        self._sink, self._who = sink, Who(rank, time.time_ns())
        self._buffer_bytes = buffer_bytes
        self._step = terms.steps.start
        try:
            self._stand = sink.begin(terms, self._who, ids)
        except RecorderReplaced as error:
            # The clock of whoever sat here before is ahead of ours; to begin is to take the place all the same.
            self._who = Who(rank, int(error.details["sitting"]) + 1)
            self._stand = sink.begin(terms, self._who, ids)
        self._pid = os.getpid()
        self._change = threading.Condition()
        self._waiting: deque[_Added] = deque()
        self._waiting_bytes, self._under_way, self._closed = 0, False, False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._send, name="logitcache-record", daemon=True)
        self._thread.start()

    def add(
        self,
        ids: Any,
        logits: Any,
        *,
        step: int | None = None,
        view: Any = 0,
        inputs: Any = None,
        attention_mask: Any = None,
        targets: Any = None,
    ) -> None:
        """Record what the model gave for a batch. Selects on the logits' device, and does not wait for it.

        The same view of an example may be recorded several times: the one of the latest step counts, and of several of
        the same step the one whose bytes are the largest, in whatever order they arrive.

        Args:
            ids: (batch,) whose logits these are.
            logits: (batch, classes), of a causal label set (batch, length, classes): a tensor on any device, or an
                array. They are detached.
            step: of the optimizer, at which the weights were as they are; counted up from the first that is recorded
                with each call, unless given.
            view: which augmentation: one for all, or one for each.
            inputs: (batch, …) what the model was shown, so that others can be held to it. Of a causal label set the
                token ids, (batch, length), which are always needed.
            attention_mask: (batch, length) of padded tokens: 1 for a token, 0 for padding, which is right of them.
            targets: (batch,) classes, where the label set stores them; of a causal one (batch, length), of which that
                of token i + 1 belongs to row i. Below 0 is none.

        Raises:
            ShapeMismatch: other classes than the label set's, or not one of each an id.
            InvalidIds, UnknownView, InvalidRequest: an argument cannot be right.
            TeacherFault: logits that were added before hold NaN or +inf; their ids are named.
            LogitcacheError: what was added before could not be sent.
            MissingExtra: torch is not installed; `add_rows` does without.
        """
        wanted, views, at = self._checked(ids, view, step)
        identity, examples = self.terms.identity, len(wanted)
        tokens: HeldTokens | None = None
        of_tokens: dict[str, Any] = {}
        if identity.alignment == "causal":
            tokens = _right_padded(inputs, attention_mask, wanted)
            read = tokens.tokens.astype(np.uint32)
            splits = splits_of(tokens.counts)
            prints = np.fromiter(map(token_fingerprint, np.split(read, splits[1:-1])), np.uint64)
            of_tokens = {"row_splits": splits, "tokens": read}
        elif attention_mask is not None:
            raise InvalidRequest("attention_mask says which of the inputs are tokens, and this label set has none")
        else:
            prints = _fingerprints(inputs, examples)
        classes = _targets(targets, identity, tokens, wanted)
        selected = import_with_torch("logitcache.client.selecting").selected(
            logits, self._spec, identity.classes, examples, None if tokens is None else tokens.counts, classes
        )

        def rows() -> RecordedRows:
            found = selected()
            scalars = {name: found.scalars[:, column] for name, column in self._spec.scalars.items()}
            soft = SoftLabels(
                indices=found.indices,
                logits=found.logits,
                fingerprint=prints,
                temperatures=self._spec.temperatures,
                target=classes,
                **scalars,
                **of_tokens,
            )
            return RecordedRows(wanted, views, np.full(examples, at, np.int64), soft)

        count = examples if tokens is None else len(tokens.tokens)
        self._put(_Added(rows, self._spec.nbytes(count, examples)))
        self._step = at + 1

    def add_rows(self, ids: Any, soft: SoftLabels, *, step: int | None = None, view: Any = 0) -> None:
        """Record rows whose top k are chosen already: by a teacher that runs elsewhere, or without torch.

        Args:
            ids: (examples,) whose rows these are.
            soft: rows of the label set's k, dtypes and temperatures. Logits are centred, sorted by falling logit.
            step: see `add`.
            view: see `add`.

        Raises:
            ShapeMismatch, TeacherFault, InvalidIds, UnknownView, InvalidRequest: they are no such rows.
            LogitcacheError: what was added before could not be sent.
        """
        wanted, views, at = self._checked(ids, view, step)
        copies: dict[str, Any] = {name: array.copy() for name, array in soft.arrays().items()}
        soft = replace(soft, **copies)
        rows = RecordedRows(wanted, views, np.full(len(wanted), at, np.int64), soft)
        check_recorded(rows, self.terms, self.name)
        self._put(_Added(lambda: rows, self._spec.nbytes(len(soft), len(wanted))))
        self._step = at + 1

    def flush(self) -> None:
        """Return when all that was added is durable.

        Raises:
            LogitcacheError: some of it could not be sent.
        """
        with self._change:
            self._change.notify_all()  # what failed before is tried again, if that was told
            self._change.wait_for(lambda: self._error is not None or not (self._waiting or self._under_way))
            self._raise()

    def finish(self, *, part: bool = False) -> str | None:
        """All is added: wait until it is durable, and seal the label set; gives its digest.

        It is sealed when every recorder has finished and every example is recorded. Before, this gives None and says
        what is missing; what was recorded is kept and can be read, and another recorder of the same run can go on.

        Args:
            part: seal it though examples are missing; it has those that were recorded then, and where ids were their
                ordinals they are whole numbers of their own.

        Raises:
            LogitcacheError: something could not be sent or sealed; finish again to go on.
        """
        if self.digest is not None:
            return self.digest
        self.flush()
        self._stand = self._sink.finish(self._who, part=part)
        while self._stand.sealing and self._stand.digest is None:
            time.sleep(SEALED_PAUSE_S)
            self._stand = self._sink.finish(self._who, part=part)
        self.digest = self._stand.digest
        if self.digest is None:
            _LOG.warning("%s", self._unfinished())
        return self.digest

    def _unfinished(self) -> str:
        stand, others = self._stand, self.terms.recorders - len(self._stand.finished)
        if others:
            return f"{self.name!r} is not sealed yet: {others} of {self.terms.recorders} recorders have not finished"
        return (
            f"{self.name!r} is not sealed: {stand.examples - stand.recorded:,} of {stand.examples:,} examples were not "
            f"recorded ({shown(stand.missing, stand.examples - stand.recorded)}). What was recorded is kept and can be "
            "read: record the others (does the loader drop its last batch?), or finish(part=True)"
        )

    def missing(self) -> list[Id]:
        """Ids of examples that were not recorded when this recorder finished, a thousand of them at most."""
        return list(self._stand.missing)

    def close(self) -> None:
        """Send what was added, and end; the recording can be gone on with. A second call does nothing.

        Raises:
            LogitcacheError: some of it could not be sent.
        """
        if self._closed:
            return
        try:
            self.flush()
        finally:
            with self._change:
                self._closed = True
                self._waiting.clear()  # what could not be sent: that was raised
                self._change.notify_all()
            self._thread.join()
            self._sink.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            try:
                self.close()
            except Exception as unsent:
                if error is None:
                    raise
                # What ended the block is what its caller wants to know.
                _LOG.warning("%r ended with some rows unsent: %s", self.name, unsent)

    def _checked(self, ids: Any, view: Any, step: int | None) -> tuple[Ids, Int64[np.ndarray, " ids"], int]:
        if self._closed or os.getpid() != self._pid:
            raise InvalidRequest("this recorder is closed, or belongs to another process: begin to record anew")
        wanted, identity = as_ids(on_cpu(ids)), self.terms.identity
        check_kind(wanted, identity.ids, self.name)
        views = as_views(on_cpu(view), wanted, identity.views, self.name)
        at = self._step if step is None else step
        if isinstance(at, bool) or not isinstance(at, int | np.integer) or int(at) not in self.terms.steps:
            raise InvalidRequest(
                f"step {at!r:.40} is none of those that {self.name!r} records ({self.terms.steps.start:,} to "
                f"{self.terms.steps.stop - 1:,}): it was begun for these"
            )
        # Copies: the loop may use its arrays anew before they are sent.
        views = np.broadcast_to(np.asarray(views, np.int64), (len(wanted),)).copy()
        return Ids(wanted.keys.copy(), wanted.texts), views, int(at)

    def _put(self, added: _Added) -> None:
        with self._change:
            self._raise()
            self._change.notify_all()  # what failed before is tried again
            self._change.wait_for(
                lambda: self._error is not None or not self._waiting or self._waiting_bytes < self._buffer_bytes
            )
            self._raise()
            self._waiting.append(added)
            self._waiting_bytes += added.nbytes
            self._change.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _send(self) -> None:
        """The thread: take what has come together, send it, and go on; after an error, when it was told."""
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closed or (self._waiting and self._error is None))
                if not self._waiting or self._error is not None:
                    return
                taken = [self._waiting.popleft()]
                while self._waiting and sum(each.nbytes for each in (*taken, self._waiting[0])) <= MOST_BYTES_AT_ONCE:
                    taken.append(self._waiting.popleft())
                self._waiting_bytes -= sum(each.nbytes for each in taken)
                self._under_way = True
            error: Exception | None
            try:
                error, kept = self._send_together(taken), list[_Added]()
            except Exception as caught:  # noqa: BLE001 - raised where the next call is made
                # It can be sent yet: when the server is back, lets us in again, or has room on its disk.
                error, kept = caught, taken
            with self._change:
                self._under_way, self._error = False, error
                self._waiting.extendleft(reversed(kept))
                self._waiting_bytes += sum(each.nbytes for each in kept)
                self._change.notify_all()

    def _send_together(self, taken: list[_Added]) -> Exception | None:
        """Send batches; gives the first error of rows that were left out, being no rows.

        Raises:
            Exception: all of them are to be sent again.
        """
        parts: list[RecordedRows] = []
        faulty: Exception | None = None
        for each in taken:
            try:
                rows = each.rows()
                check_recorded(rows, self.terms, self.name)
                parts += _split(rows, self._spec)
            except Exception as error:  # noqa: BLE001 - of this batch; the others are sent all the same
                faulty = faulty or error
        while parts:
            count = _fitting(parts, self._spec)
            sent, parts = parts[:count], parts[count:]
            try:
                self._sink.append(together(sent), self._who)
            except NOT_SENT_AGAIN as error:
                refused = self._send_each(sent) if count > 1 else error
                faulty = faulty or refused
        return faulty

    def _send_each(self, parts: list[RecordedRows]) -> LogitcacheError | None:
        """Send batches one by one that were refused together, so that only the batch at fault is lost.

        Where that ends in another error all are sent again: what is there already is the same row.
        """
        refused: LogitcacheError | None = None
        for part in parts:
            try:
                self._sink.append(part, self._who)
            except NOT_SENT_AGAIN as error:
                refused = refused or error
        return refused


def _split(rows: RecordedRows, spec: RowSpec) -> list[RecordedRows]:
    """A batch in parts that can be sent, none of them longer than it may be by more than an example."""
    soft = rows.soft
    splits = np.arange(len(rows) + 1) if soft.row_splits is None else soft.row_splits
    part_of = splits[:-1] * spec.row_bytes // MOST_BYTES_AT_ONCE
    parts = []
    for begin, end in pairwise([0, *(np.flatnonzero(np.diff(part_of)) + 1).tolist(), len(rows)]):
        of_rows = slice(int(splits[begin]), int(splits[end]))
        arrays: dict[str, Any] = {name: array[of_rows] for name, array in soft.arrays().items()}
        arrays["fingerprint"] = soft.fingerprint[begin:end]
        if soft.row_splits is not None:
            arrays["row_splits"] = splits[begin : end + 1] - splits[begin]
        ids = rows.ids[begin:end]
        parts.append(RecordedRows(ids, rows.views[begin:end], rows.steps[begin:end], replace(soft, **arrays)))
    return parts


def _fitting(parts: list[RecordedRows], spec: RowSpec) -> int:
    """How many of the parts, one at least, are sent in one request."""
    nbytes = np.cumsum([spec.nbytes(len(part.soft), len(part)) for part in parts])
    return max(1, int(np.searchsorted(nbytes, MOST_BYTES_AT_ONCE, side="right")))


def _right_padded(inputs: Any, attention_mask: Any, ids: Ids) -> HeldTokens:
    if inputs is None:
        raise InvalidRequest("rows of a causal label set are of tokens: give inputs, the token ids")
    tokens = held_tokens(on_cpu(inputs), on_cpu(attention_mask), ids)
    if attention_mask is not None and not isinstance(attention_mask, list | tuple):
        mask = np.asarray(on_cpu(attention_mask)) == 1
        if not np.array_equal(mask, np.arange(mask.shape[1]) < tokens.counts[:, None]):
            raise InvalidRequest("padding is left of the tokens: to record, pad on the right")
    if (tokens.counts < 1).any() or bool((tokens.tokens < 0).any()) or bool((tokens.tokens >= 2**32).any()):
        raise InvalidRequest("each example needs a token at least, and tokens are 0 to 2^32 - 1")
    return tokens


def _fingerprints(inputs: Any, examples: int) -> np.ndarray:
    if inputs is None:
        return np.zeros(examples, np.uint64)
    check_one_an_id(inputs, examples)
    try:
        return fingerprints(on_cpu(inputs))
    except TypeError as error:
        raise InvalidRequest(f"inputs have no fingerprint: {error}") from None


def _targets(targets: Any, identity: Identity, tokens: HeldTokens | None, ids: Ids) -> np.ndarray | None:
    """(rows,) int32 class of each row, -1 for none; None where the label set stores none."""
    if (targets is None) == identity.targets:
        raise InvalidRequest(
            "this label set stores targets: give them"
            if identity.targets
            else "this label set stores no targets: begin it so"
        )
    if targets is None:
        return None
    given, examples = np.asarray(on_cpu(targets)), len(ids)
    if given.dtype.kind not in "iu":
        raise InvalidRequest(f"targets are {given.dtype}: classes are whole numbers")
    if tokens is None:
        if given.shape != (examples,):
            raise ShapeMismatch(f"targets of shape {given.shape} for {examples:,} ids: one an id is needed")
        rows = given
    else:
        if given.ndim != 2 or len(given) != examples or given.shape[1] < int(tokens.counts.max()):
            raise ShapeMismatch(f"targets of shape {given.shape}: one a token is needed")
        following = np.full((examples, given.shape[1]), -1, np.int64)
        following[:, :-1] = given[:, 1:]
        following[np.arange(examples), tokens.counts - 1] = -1
        rows = following[np.arange(given.shape[1]) < tokens.counts[:, None]]
    if (beyond := rows >= identity.classes).any():
        of_rows = np.arange(examples) if tokens is None else np.repeat(np.arange(examples), tokens.counts)
        raise InvalidRequest(
            f"targets are none of the classes, 0 to {identity.classes - 1:,} (ids: {shown(ids.at(of_rows[beyond]))})"
        )
    return np.where(rows < 0, -1, rows).astype(np.int32)
