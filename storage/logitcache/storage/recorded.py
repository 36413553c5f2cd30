"""What a recording holds: its terms, the ids of its examples, and which row of its log is that of which example.

The log may hold several rows of one view of an example. The one of the latest step counts, and of several of that step
the one whose bytes are the largest: whatever order they arrived in, it is the same one. Changes no file.
"""

import os
import re
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from logitcache.labels.errors import (
    InvalidIds,
    InvalidRequest,
    LabelSetNotFound,
    NewerFormat,
    NotALabelSet,
    ShardDamaged,
    StorageFault,
    Unavailable,
)
from logitcache.labels.identity import FORMAT_VERSION, canonical_json, sha256_hex
from logitcache.labels.ids import Ids, as_ids, check_kind
from logitcache.labels.label_set import row_spec
from logitcache.labels.recorded import RecordingTerms
from logitcache.storage.id_index import IdIndex
from logitcache.storage.log import MAGIC, Frame, Kind, Log, check_width, slot_dtype
from logitcache.storage.manifest import MAX_METADATA_BYTES
from logitcache.storage.mapping import zeros
from logitcache.storage.places import Places
from logitcache.storage.reading import blocks, open_file, parsed, read_file, refuse_holes, refuse_links, status
from logitcache.storage.records import MAX_TEXT_JSON_BYTES

_SCANNED = 1 << 20
"""Examples that are looked through at once: what is recorded of them costs memory, what is not costs none."""


def terms_content(terms: RecordingTerms, ids: bytes | None) -> bytes:
    """Content of ``recording.json``, with a number for its log that is drawn anew each time."""
    told = None if ids is None else {"bytes": len(ids), "sha256": sha256_hex(ids)}
    log = secrets.token_hex(8)
    return canonical_json({"format_version": FORMAT_VERSION, "terms": terms.to_json(), "ids": told, "log": log})


def refuse_lost_recording(places: Places) -> None:
    """Refuse to begin anew in a folder that holds recorded rows, but not what they were begun with.

    Raises:
        StorageFault: a log of rows is there, without the file that a recording begins with, and nothing was sealed.
    """
    if not all(status(file) is None for file in (places.recording, places.group)):
        return
    try:
        handle = open_file(places.root, places.recording_log)
    except FileNotFoundError:
        return
    begins = b"".join(blocks(handle, len(MAGIC), places.recording_log))
    os.close(handle)
    if begins != MAGIC:
        return  # as a recording that was never begun may leave it
    raise StorageFault(
        f"{places.recording} is missing, and rows that were recorded stand beside it: restore it; or remove "
        f"{places.root}, and the rows with it",
        path=str(places.recording),
    )


def ids_content(ids: Ids | None) -> bytes | None:
    """Content of the file of ids: int64, or of texts a JSON list; None where they are ordinals."""
    if ids is None:
        return None
    if ids.texts is not None:
        return canonical_json(list(ids.texts))
    return ids.keys.astype("<i8").tobytes()


def read_terms(places: Places) -> tuple[RecordingTerms, dict[str, Any] | None, int]:
    """The terms of the recording in a folder, what its ids hash to, and its log's number.

    Raises:
        LabelSetNotFound: nothing is recorded there.
        NewerFormat, NotALabelSet: what is there cannot be read.
        StorageFault: the folder is a symbolic link or holds one, or cannot be read.
    """
    path = places.recording
    try:
        refuse_links(places.root)
        data = read_file(places.root, path, MAX_METADATA_BYTES, NotALabelSet)
    except FileNotFoundError:
        raise LabelSetNotFound(f"nothing is being recorded in {places.root}") from None
    try:
        content = parsed(data)
        version = content["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise NewerFormat(
                f"{path} has format version {version!s:.40}, this logitcache reads up to {FORMAT_VERSION}: "
                "upgrade logitcache"
            )
        terms = RecordingTerms.from_json(content["terms"])
        check_width(row_spec(terms.identity))
        ids = content["ids"]
        if (ids is None) != (terms.identity.ids == "ordinal") or not isinstance(ids, dict | None):
            raise ValueError("its ids are not told")
        if not re.fullmatch(r"[0-9a-f]{16}", content["log"]):
            raise ValueError("its log's number is not told")
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        raise NotALabelSet(f"{path} is damaged: {error!s:.200}; restore it") from None
    return terms, ids, int(content["log"], 16)


def _read_ids(places: Places, told: dict[str, Any], terms: RecordingTerms) -> Ids:
    path, texts = places.recording_ids, terms.identity.ids == "text"
    most = 2 + terms.examples * (MAX_TEXT_JSON_BYTES if texts else 8)
    try:
        handle = open_file(places.root, path, ShardDamaged)
    except FileNotFoundError:
        raise ShardDamaged(f"{path} is missing: restore it") from None
    try:
        size = os.fstat(handle).st_size
        whole = size == told.get("bytes") and size <= most
        refuse_holes(handle, size, path, ShardDamaged)
        data = b"".join(blocks(handle, size, path)) if whole else b""
    finally:
        os.close(handle)
    if sha256_hex(data) != told.get("sha256"):
        raise ShardDamaged(f"{path} does not hash to what {places.recording} says: restore it")
    try:
        ids = as_ids(parsed(data) if texts else np.frombuffer(data, "<i8").astype(np.int64))
        check_kind(ids, terms.identity.ids, places.root.name)
    except (ValueError, InvalidIds) as error:
        raise ShardDamaged(f"{path} does not hold ids: {error!s:.200}; restore it") from None
    if len(ids) != terms.examples:
        raise ShardDamaged(f"{path} has {len(ids):,} ids of {terms.examples:,} examples; restore it")
    return ids


@dataclass(frozen=True)
class Progress:
    """How far a recording is: ``rows`` recorded; ``examples`` of which every view is; the ranks that have finished."""

    examples: int
    rows: int
    finished: frozenset[int]
    sealing: bool


class Recorded:
    """What is recorded, as of the last `follow`. Safe to use from several threads.

    Attributes:
        terms: what it was begun with.
        ids: of its examples in their order; None where they are their ordinals.

    Raises:
        LabelSetNotFound: nothing is recorded in this folder.
        NewerFormat, NotALabelSet, ShardDamaged, StorageFault: what is there cannot be read.
    """

    def __init__(self, root: Path) -> None:
        places = Places(root)
        self.terms, told, number = read_terms(places)
        self.spec = row_spec(self.terms.identity)
        self.ids = None if told is None else _read_ids(places, told, self.terms)
        self._index = IdIndex() if self.ids is None else IdIndex().with_shard(0, "", self.ids.keys, 0)
        self.log = Log(places.recording_log, slot_dtype(self.spec), number)
        self._views = self.terms.identity.views
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        # Slots of the first row of each place. That of a frame's header, 0, is none: nothing was recorded there.
        self._first = zeros(self.terms.examples * self._views)
        self._counts = zeros(self.terms.examples) if self.spec.ragged else None
        self._held_views = zeros(self.terms.examples) if self._views > 1 else None
        self._rows = self._complete = 0
        self._sittings: dict[int, int] = {}
        self._finished: set[int] = set()
        self.sealing: Kind | None = None

    def follow(self) -> None:
        """Take in what was appended to the log since."""
        with self._lock:
            if self.log.is_cut:
                self.log.rewind()
                self._clear()
            try:
                for frame, rows in self.log.follow():
                    self._take(frame, rows)
            except BaseException:
                # Half of a frame may be taken in: all of it is read again.
                self.log.rewind()
                self._clear()
                raise

    def _take(self, frame: Frame, rows: np.ndarray) -> None:
        if frame.kind in (Kind.SEALING, Kind.SEALING_PART):
            self.sealing = frame.kind
        elif frame.kind == Kind.FINISHED:
            self._finished.add(frame.rank)
        else:
            self._finished.discard(frame.rank)
            self._sittings[frame.rank] = max(frame.sitting, self._sittings.get(frame.rank, 0))
        if frame.rows:
            self._settle(frame, rows)

    def _settle(self, frame: Frame, rows: np.ndarray) -> None:
        """Of each place that a frame has rows of, keep the row that counts."""
        begins = np.flatnonzero(rows["position"] == 0)
        counts = np.diff(begins, append=len(rows))
        places, steps = rows["place"][begins], rows["step"][begins]
        if rows["position"][0] or ((places < 0) | (places >= len(self._first))).any():
            raise ShardDamaged(
                f"{self.log.path} holds rows of examples that {self.log.path.parent} has not: it is another "
                "recording's; restore it"
            )
        which, slots = _latest(places, steps), frame.first + begins
        while len(later := _repeated(places[which])):
            # Of those that are left of a place, every second one is held against the one before it.
            mine, theirs = which[later], which[later - 1]
            larger = self._are_larger(slots[mine], counts[mine], slots[theirs], counts[theirs])
            which[later - 1] = np.where(larger, mine, theirs)
            which = np.delete(which, later)
        self._settle_one_each(places[which], steps[which], slots[which], counts[which])

    def _settle_one_each(self, places: np.ndarray, steps: np.ndarray, slots: np.ndarray, counts: np.ndarray) -> None:
        """As `_settle`, of places that are all different."""
        held = self._first[places]
        wins = held == 0
        self._count(places[wins])
        if not wins.all():
            again = np.flatnonzero(~wins)
            held_steps = self.log.rows(held[again])["step"]
            wins[again] = steps[again] > held_steps
            same = again[steps[again] == held_steps]
            if len(same):
                known = np.ones(len(same), np.int64) if self._counts is None else self._counts[places[same]]
                wins[same] = self._are_larger(slots[same], counts[same], held[same], known)
        self._first[places[wins]] = slots[wins]
        if self._counts is not None:
            self._rows += int((counts[wins] - self._counts[places[wins]]).sum())
            self._counts[places[wins]] = counts[wins]

    def _count(self, places: np.ndarray) -> None:
        """Count places of which nothing was recorded before."""
        if self._counts is None:
            self._rows += len(places)
        if self._held_views is None:
            self._complete += len(places)
            return
        examples, added = np.unique(places // self._views, return_counts=True)
        self._held_views[examples] += added
        self._complete += int((self._held_views[examples] == self._views).sum())

    def _are_larger(
        self, slots: np.ndarray, counts: np.ndarray, others: np.ndarray, other_counts: np.ndarray
    ) -> Bool[np.ndarray, " rows"]:
        """Whether the rows in these slots have larger bytes than those in the other ones."""
        if self._counts is None:
            mine, theirs = (self.log.rows(which).view(np.uint8).reshape(len(which), -1) for which in (slots, others))
            return _larger(mine, theirs)
        larger = [
            self.log.rows(np.arange(slot, slot + count)).tobytes()
            > self.log.rows(np.arange(other, other + known)).tobytes()
            for slot, count, other, known in zip(
                slots.tolist(), counts.tolist(), others.tolist(), other_counts.tolist(), strict=True
            )
        ]
        return np.array(larger, bool)

    def ordinals(self, ids: Ids) -> Int64[np.ndarray, " ids"]:
        """Ordinals of these ids, -1 where none is known; ids are of the label set's kind."""
        if self.ids is None:
            known = (ids.keys >= 0) & (ids.keys < self.terms.examples)
            ordinals: np.ndarray = np.where(known, ids.keys, -1)
            return ordinals
        return self._index.ordinals(ids.keys)

    def located(
        self, ordinals: Int64[np.ndarray, " ids"], views: Any = 0
    ) -> tuple[Int64[np.ndarray, " ids"], Int64[np.ndarray, " ids"]]:
        """Where these views of examples stand in the log: the slot of their first row, -1 where none was recorded, and
        how many rows they have.
        """
        with self._lock:
            first: np.ndarray = self._first.take(self.places(ordinals, views))
            counts = np.ones(len(first), np.int64) if self._counts is None else self._counts.take(ordinals)
            counts[first == 0] = 0
            first[first == 0] = -1
            return first, counts

    def rows(self, slots: Int64[np.ndarray, " rows"], places: Int64[np.ndarray, " rows"]) -> np.ndarray:
        """Rows in these slots, which `located` told to be those of these places, (rows,) of the slots' dtype.

        Raises:
            Unavailable: they are not, or not any more: the log was taken back or closed meanwhile.
        """
        rows = self.log.rows(slots)
        if not np.array_equal(rows["place"], places):
            raise Unavailable(f"{self.log.path} was changed while rows were read from it: ask again")
        return rows

    def places(self, ordinals: Int64[np.ndarray, " ids"], views: Any) -> Int64[np.ndarray, " ids"]:
        """Places of these views of examples; a place is what has one row, or of a causal label set one row a token."""
        places: np.ndarray = ordinals * self._views + views
        return places

    def are_complete(self, ordinals: Int64[np.ndarray, " ids"] | slice) -> Bool[np.ndarray, " ids"]:
        """Which of these examples have all their views recorded."""
        complete: np.ndarray = (
            self._first[ordinals] > 0 if self._held_views is None else self._held_views[ordinals] == self._views
        )
        return complete

    def complete(self) -> Int64[np.ndarray, " examples"]:
        """Ordinals of the examples that have all their views recorded."""
        return np.concatenate(list(self._ordinals(complete=True)))

    def incomplete(self, most: int) -> Int64[np.ndarray, " examples"]:
        """Ordinals of the first so many examples that have not."""
        found = np.zeros(0, np.int64)
        for more in self._ordinals(complete=False):
            found = np.concatenate([found, more])[:most]
            if len(found) == most:
                break
        return found

    def _ordinals(self, *, complete: bool) -> Iterator[Int64[np.ndarray, " some"]]:
        for begin in range(0, self.terms.examples, _SCANNED):
            yield np.flatnonzero(self.are_complete(slice(begin, begin + _SCANNED)) == complete) + begin

    def progress(self) -> Progress:
        """How far it is."""
        with self._lock:
            return Progress(self._complete, self._rows, frozenset(self._finished), self.sealing is not None)

    def sitting(self, rank: int) -> int:
        """The last sitting of one of the recorders, 0 if it never began."""
        return self._sittings.get(rank, 0)

    def example_ids(self, ordinals: Int64[np.ndarray, " examples"]) -> Ids:
        """Ids of these examples."""
        if self.ids is None:
            return Ids(ordinals)
        texts = None if self.ids.texts is None else [self.ids.texts[ordinal] for ordinal in ordinals.tolist()]
        return Ids(self.ids.keys[ordinals], texts)

    def close(self) -> None:
        """Close the log."""
        self.log.close()


def _latest(places: Int64[np.ndarray, " rows"], steps: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " some"]:
    """Positions of those that are of the latest step of their place, in the order of places."""
    order = np.lexsort((steps, places))
    ordered, of_steps = places[order], steps[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    latest = np.repeat(of_steps[last], np.diff(last, prepend=-1))
    found: np.ndarray = order[of_steps == latest]
    return found


def _repeated(places: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " some"]:
    """Of each run of one place, positions of the second, the fourth and so on."""
    begins = np.flatnonzero(np.append(True, places[1:] != places[:-1]))
    nth = np.arange(len(places)) - np.repeat(begins, np.diff(begins, append=len(places)))
    return np.flatnonzero(nth % 2)


def _larger(
    mine: UInt8[np.ndarray, "rows bytes"], theirs: UInt8[np.ndarray, "rows bytes"]
) -> Bool[np.ndarray, " rows"]:
    """Whose bytes are larger, compared from the first on."""
    at = (mine != theirs).argmax(axis=1)
    rows = np.arange(len(mine))
    larger: np.ndarray = mine[rows, at] > theirs[rows, at]
    return larger
