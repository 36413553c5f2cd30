"""Recording: rows of a run are made durable in a log as they come, and sealed as a label set when all are there.

    recording/recording.json    what it was begun with; while it exists the label set is being recorded
    recording/ids               ids of the examples, where they are not their ordinals
    recording/log               what was recorded, see `log`

One process records into a folder, for any number of recorders (the ranks of a run). Killed at any moment, what `append`
returned for is kept. Sealing writes the shards as every label set's are written, and removes the log last: killed in
between, it is taken up where it was.
"""

import contextlib
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np

from logitcache.labels.errors import (
    IdentityChanged,
    InvalidIds,
    InvalidRequest,
    NotALabelSet,
    RecorderReplaced,
    RowsMissing,
    StorageFault,
    StoreNotFound,
    Unavailable,
    shown,
)
from logitcache.labels.identity import check_name
from logitcache.labels.ids import Ids, check_kind
from logitcache.labels.label_set import row_spec
from logitcache.labels.recorded import RecordedRows, RecordingTerms, Stand, Who, check_recorded
from logitcache.labels.soft_labels import SoftLabels, splits_of
from logitcache.storage.files import Files
from logitcache.storage.gather import runs
from logitcache.storage.id_index import repeated
from logitcache.storage.layout import Layout
from logitcache.storage.lock import WriterLock
from logitcache.storage.log import Kind, LogWriter, check_width, slot_dtype
from logitcache.storage.packing import default_rows_per_shard
from logitcache.storage.places import Places
from logitcache.storage.reading import status
from logitcache.storage.recorded import Recorded, ids_content, refuse_lost_recording, terms_content
from logitcache.storage.records import Generation
from logitcache.storage.statistics import retained_mass
from logitcache.storage.writer import LabelSetWriter

MAX_SITTING = 2**63 - 1

MOST_SHOWN = 1000
"""Ids of examples without rows that are named at once."""


class Recording:
    """The one writer of a recording, from construction to `close`. Safe to use from several threads.

    Args:
        path: folder of the label set; its parent is the store.
        terms: what it is begun with; None continues what is there.
        ids: of the examples in their order, where they are not their ordinals.

    Raises:
        InvalidName: of the folder.
        StoreNotFound: neither the store nor its parent folder exists.
        IdentityChanged: a label set is there already, or it was begun with other terms or ids; each is named.
        LabelSetLocked: another process records into it.
        InvalidRequest, InvalidIds: there is nothing to continue; or terms are out of bounds, ids not as many as
            examples or not all different.
        ShardDamaged, StorageFault: what is there cannot be read or written.
    """

    def __init__(
        self, path: Path, terms: RecordingTerms | None = None, ids: Ids | None = None, *, files: Files | None = None
    ) -> None:
        check_name(path.name)
        self.path, self.name, self._places, self._files = path, path.name, Places(path), files or Files()
        if terms is not None:
            _check_ids(terms, ids, self.name)
            self._claim_folder()
        elif not self._places.recording.exists():
            raise InvalidRequest(f"{self.name!r} is not being recorded: there is nothing to continue")
        self._lock, self._appending = WriterLock(self._places.lock), threading.Lock()
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock.release)
            if terms is not None and status(self._places.recording) is None:
                refuse_lost_recording(self._places)
                self._begin(terms, ids)
            self._files.sync_names(self.path, self._places.recording.parent)
            self._recorded = Recorded(path)
            undo.callback(self._recorded.close)
            if terms is not None:
                self.check_terms(terms, ids)
            self._recorded.follow()
            self._log, self._closed = LogWriter(self._recorded.log, self._files), False
            undo.pop_all()

    @property
    def terms(self) -> RecordingTerms:
        """What it was begun with."""
        return self._recorded.terms

    def _claim_folder(self) -> None:
        store = self.path.parent
        if not store.is_dir():
            if not store.parent.is_dir():
                raise StoreNotFound(f"the store {store} cannot be made: {store.parent} does not exist")
            self._files.make_folder(store)
        if self._places.group.exists() and not self._places.recording.exists():
            raise IdentityChanged(f"there is a label set {self.name!r} already: record under another name")
        known = self._places.lock.exists() or self._places.recording.exists()
        if (found := status(self.path)) is not None and not stat.S_ISDIR(found.st_mode):
            raise NotALabelSet(f"{self.path} is no folder: use another name")
        if self.path.is_dir() and not known and any(self.path.iterdir()):
            raise NotALabelSet(f"{self.path} holds files that logitcache did not write: use another name")
        self._files.make_folder(self.path)

    def _begin(self, terms: RecordingTerms, ids: Ids | None) -> None:
        if self._places.group.exists():
            raise IdentityChanged(f"there is a label set {self.name!r} already: record under another name")
        files, places = self._files, self._places
        folder = places.recording.parent
        # The name of the lock file: without it a power cut could leave what passes for a foreign folder.
        files.fsync(self.path)
        files.make_folder(folder)
        for left in folder.iterdir():
            files.remove(left)
        content = ids_content(ids)
        if content is not None:
            files.write(places.recording_ids, content)
            files.fsync(places.recording_ids)
        files.write(places.recording_log, b"")
        files.fsync(places.recording_log)
        # Their names before the one that promises them.
        files.fsync(folder)
        files.create(folder / "recording.json.staged", places.recording, terms_content(terms, content))

    @property
    def is_broken(self) -> bool:
        """Rows that could not be made durable could not be taken back either: close it, and begin anew."""
        return self._log.is_broken

    @property
    def is_removed(self) -> bool:
        """Its folder was removed, or sealed: there is nothing to record into."""
        return self._recorded.log.is_removed

    def check_terms(self, terms: RecordingTerms, ids: Ids | None) -> None:
        """Refuse to continue with other terms or ids than it was begun with.

        Raises:
            IdentityChanged: they are; each is named with both values.
        """
        found, fields = self._recorded, self._recorded.terms.differences(terms)
        if not fields and (found.ids is None) != (ids is None):
            fields["ids"] = ("ordinals", "their own") if found.ids is None else ("their own", "ordinals")
        if fields or ids is None or found.ids is None:
            pass
        elif ids.keys.shape != found.ids.keys.shape:
            fields["ids"] = (_told(found.ids), _told(ids))
        elif not np.array_equal(ids.keys, found.ids.keys):
            first = [int((ids.keys != found.ids.keys).reshape(len(ids), -1).any(axis=1).argmax())]
            fields["ids"] = (f"…{shown(found.ids.at(first))}…", f"…{shown(ids.at(first))}…")
        if fields:
            told = "; ".join(f"{field} was {old!r} and is now {new!r}" for field, (old, new) in fields.items())
            raise IdentityChanged(
                f"recording {self.name!r} was begun with something else: {told}. Nothing was changed: record with the "
                "old values to continue it, or under another name",
                fields={field: [str(value) for value in values] for field, values in fields.items()},
            )

    def begin(self, who: Who) -> None:
        """One of the recorders begins, or begins anew; an earlier sitting of it is heard no more.

        Raises:
            InvalidRequest: the recording has fewer recorders, or the sitting can be none.
            RecorderReplaced: a later sitting of it began before.
            IdentityChanged: the recording is being sealed.
        """
        if not 1 <= who.sitting <= MAX_SITTING:
            raise InvalidRequest(f"sitting {who.sitting} of recorder {who.rank}: 1 to {MAX_SITTING:,} are known")
        if not 0 <= who.rank < self.terms.recorders:
            raise InvalidRequest(
                f"rank {who.rank} of {self.name!r} does not exist: it was begun with {self.terms.recorders} recorders"
            )
        with self._appending:
            self._refuse_sealing()
            if who.sitting > self._recorded.sitting(who.rank):
                self._append(Kind.BEGAN, who)
            self._check_sitting(who)

    def append(self, rows: RecordedRows, who: Who) -> None:
        """Make rows durable: all of them when this returns, or none.

        Raises:
            RowsMissing: ids are unknown to the label set; they are named, and nothing was recorded.
            RecorderReplaced: this recorder began anew elsewhere.
            ShapeMismatch, TeacherFault, InvalidRequest, InvalidIds, UnknownView: as `check_recorded`.
            IdentityChanged: the recording is being sealed.
            TooManyRows: more than a frame of the log may have; nothing of it was recorded.
            DiskFull, StoreNotWritable, StorageFault: nothing of it was recorded.
            Unavailable: the recording was closed meanwhile.
        """
        check_kind(rows.ids, self.terms.identity.ids, self.name)
        check_recorded(rows, self.terms, self.name)
        ordinals = self._recorded.ordinals(rows.ids)
        if (ordinals < 0).any():
            unknown = rows.ids.at(ordinals < 0)
            raise RowsMissing(
                f"{len(unknown):,} of the ids that were to be recorded are none of {self.name!r}: {shown(unknown)}; "
                f"it was begun with {self.terms.examples:,} examples. Nothing of this batch was recorded",
                unknown=unknown,
                unlabelled=[],
            )
        slots = self._slots(rows, ordinals)
        with self._appending:
            self._refuse_sealing()
            self._check_sitting(who)
            self._append(Kind.ROWS, who, slots)

    def finish(self, who: Who) -> None:
        """One of the recorders has recorded all that it has. Errors as of `append`."""
        with self._appending:
            progress = self._recorded.progress()
            if not progress.sealing:
                self._check_sitting(who)
                if who.rank not in progress.finished:
                    self._append(Kind.FINISHED, who)

    def stand(self) -> Stand:
        """How the recording stands."""
        recorded, terms = self._recorded.progress(), self.terms
        missing: tuple[int | str, ...] = ()
        if recorded.finished and recorded.examples < terms.examples:
            missing = tuple(self.missing())
        finished = tuple(sorted(recorded.finished))
        return Stand(terms.examples, recorded.examples, recorded.rows, finished, recorded.sealing, missing)

    def missing(self, most: int = MOST_SHOWN) -> list[int | str]:
        """Ids of the first so many examples that have not all their views recorded."""
        return self._recorded.example_ids(self._recorded.incomplete(most)).at(slice(None))

    def seal(self, *, part: bool = False, progress: Callable[[int, int], None] | None = None) -> Generation:
        """Write what was recorded as shards, seal them, and remove the log; nothing is recorded from now on.

        Args:
            part: seal the examples that were recorded, though others were not. Where ids were ordinals they are whole
                numbers of their own then.
            progress: gets examples done and examples in all.

        Raises:
            RowsMissing: some examples were not recorded, and ``part`` is not said, or none was.
            DiskFull, StoreNotWritable, StorageFault: what is done is kept; seal again.
            Unavailable: the recording was closed.
        """
        recorded = self._recorded
        with self._appending:
            self._refuse_closed()
            done, examples = recorded.progress().examples, self.terms.examples
            part = recorded.sealing == Kind.SEALING_PART or (part and done < examples)
            if not done or not (done == examples or part):
                raise self._incomplete(examples - done)
            if recorded.sealing is None:
                self._append(Kind.SEALING_PART if part else Kind.SEALING, Who(0, 0))
        generation = compacted(self.path, recorded, recorded.complete(), self._lock, self._files, progress)
        # The file that makes it a recording goes first; what else is left over belongs to nobody then.
        self._files.remove(self._places.recording)
        folder = self._places.recording.parent
        with contextlib.suppress(OSError, StorageFault):
            self._files.fsync(folder)
            for left in folder.iterdir():
                self._files.remove(left)
            folder.rmdir()
        return generation

    def _incomplete(self, count: int) -> RowsMissing:
        missing = self.missing()
        return RowsMissing(
            f"{count:,} of {self.terms.examples:,} examples of {self.name!r} were not recorded "
            f"({shown(missing, count)}), so it is not sealed; what was recorded is kept and can be "
            "read: record the others (does the loader drop its last batch?), or seal those that there are",
            unknown=[],
            unlabelled=missing,
        )

    def _append(self, kind: Kind, who: Who, rows: np.ndarray | None = None) -> None:
        self._refuse_closed()
        self._log.append(kind, who.rank, who.sitting, rows)
        self._recorded.follow()

    def _refuse_closed(self) -> None:
        if self._closed:  # so its lock may be another's by now
            raise Unavailable(f"recording {self.name!r} was closed at this moment: try again")

    def _refuse_sealing(self) -> None:
        if self._recorded.sealing is not None:
            raise IdentityChanged(f"{self.name!r} is being sealed: record under another name")

    def _check_sitting(self, who: Who) -> None:
        known = self._recorded.sitting(who.rank)
        if not known or who.sitting != known:
            raise RecorderReplaced(
                f"recorder {who.rank} of {self.name!r} began anew since: two record as the same one. Give each its own "
                "rank and tell how many recorders there are, or stop the other one"
                if known
                else f"recorder {who.rank} of {self.name!r} has not begun",
                sitting=known,
            )

    def _slots(self, rows: RecordedRows, ordinals: np.ndarray) -> np.ndarray:
        """The rows as they stand in the log."""
        soft, spec = rows.soft, self._recorded.spec
        slots = np.zeros(len(soft), slot_dtype(spec))
        splits = np.arange(len(soft) + 1) if soft.row_splits is None else soft.row_splits
        of_rows = np.repeat(np.arange(len(rows)), np.diff(splits))
        slots["place"] = self._recorded.places(ordinals, rows.views)[of_rows]
        slots["step"], slots["fingerprint"] = rows.steps[of_rows], soft.fingerprint[of_rows]
        slots["position"] = np.arange(len(soft)) - splits[:-1][of_rows]
        for name in spec.arrays:
            slots[name] = getattr(soft, name)
        for name, column in spec.scalars.items():
            slots["scalars"][:, column] = getattr(soft, name)
        return slots

    def close(self) -> None:
        """Let another process record, when what is being appended is; a second call does nothing."""
        with self._appending:
            self._closed = True
            self._log.close()
            self._recorded.close()
            self._lock.release()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _told(ids: Ids) -> str:
    return f"{len(ids):,} {'texts' if ids.are_texts else 'whole numbers'}"


def _check_ids(terms: RecordingTerms, ids: Ids | None, name: str) -> None:
    if (ids is None) != (terms.identity.ids == "ordinal"):
        raise InvalidRequest("the ids of the examples are needed where they are not their ordinals, and only there")
    try:
        read = RecordingTerms.from_json(terms.to_json())
    except ValueError as error:
        raise InvalidRequest(f"nothing can be recorded so: {error}") from None
    check_width(row_spec(terms.identity))
    if read != terms:
        raise InvalidRequest(f"steps={terms.steps!r}: give range(first, last + 1)")
    if ids is None:
        return
    if ids.are_texts and ids.texts is None:
        raise InvalidIds("the ids of a new label set are needed as texts, and not as their hashes")
    check_kind(ids, terms.identity.ids, name)
    if len(ids) != terms.examples:
        raise InvalidRequest(f"{len(ids):,} ids were given for {terms.examples:,} examples")
    if pairs := repeated(ids.keys):
        raise InvalidIds(f"examples {pairs[0][0]:,} and {pairs[0][1]:,} have the same id, {ids.at([pairs[0][0]])[0]!r}")


def compacted(
    path: Path,
    recorded: Recorded,
    ordinals: np.ndarray,
    lock: WriterLock,
    files: Files,
    progress: Callable[[int, int], None] | None,
) -> Generation:
    """Write these examples of a recording as the shards of a label set, in their order, and seal it."""
    identity = recorded.terms.identity
    if len(ordinals) < recorded.terms.examples and identity.ids == "ordinal":
        identity = replace(identity, ids="integer")
    if recorded.spec.ragged:
        _, counts = recorded.located(ordinals)
        size = default_rows_per_shard(int(counts.sum()), int(counts.max()))
        layout = Layout.causal(identity, counts, size)
    else:
        size = default_rows_per_shard(len(ordinals) * identity.views, views=identity.views)
        layout = Layout.pointwise(identity, len(ordinals), size)
    with LabelSetWriter(path, layout, files=files, lock=lock) as writer:
        for shard in writer.missing:
            arrays, texts, soft = _shard(layout, shard, recorded, ordinals)
            writer.commit(shard, arrays, {"retained_mass": retained_mass(soft)}, texts)
            if progress is not None:
                progress(layout.span(shard).stop, layout.examples)
        return writer.seal()


def _shard(
    layout: Layout, shard: int, recorded: Recorded, ordinals: np.ndarray
) -> tuple[dict[str, np.ndarray], list[str] | None, SoftLabels]:
    """Arrays of a shard as `LabelSetWriter.commit` takes them, its text ids, and its rows for statistics."""
    span, views, spec = layout.span(shard), layout.identity.views, recorded.spec
    of_shard = ordinals[span.start : span.stop]
    ids = recorded.example_ids(of_shard)
    counts: np.ndarray | None = None
    if spec.ragged:
        first, counts = recorded.located(of_shard)
        places = recorded.places(of_shard, 0)
        rows = recorded.rows(runs(first, splits_of(counts)), np.repeat(places, counts))
        prints = recorded.rows(first, places)["fingerprint"][:, None]
    else:
        examples, of_views = np.repeat(of_shard, views), np.tile(np.arange(views), len(of_shard))
        first, _ = recorded.located(examples, of_views)
        rows = recorded.rows(first, recorded.places(examples, of_views))
        prints = rows["fingerprint"].reshape(-1, views)
    arrays = {name: np.ascontiguousarray(rows[name]) for name in ("scalars", *spec.arrays)}
    arrays["ids"] = np.arange(span.start, span.stop) if layout.identity.ids == "ordinal" else ids.keys
    arrays["fingerprint"] = np.ascontiguousarray(prints)
    if counts is not None:
        arrays["row_count"] = counts.astype(np.uint32)
        arrays["row_start"] = splits_of(counts)[:-1].astype(np.uint32)
    tails = arrays["scalars"][:, spec.scalars["tail_logsumexp"]]
    soft = SoftLabels(
        indices=arrays["indices"],
        logits=arrays["logits"],
        logit_max=arrays["scalars"][:, 0],
        tail_logsumexp=tails,
        fingerprint=arrays["fingerprint"].reshape(-1),
        temperatures=spec.temperatures,
    )
    return arrays, None if ids.texts is None else list(ids.texts), soft
