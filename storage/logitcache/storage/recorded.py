"""What a recording holds: its terms, the ids of its examples, and which row of its log is that of which example.

The log may hold several rows of one view of an example. The one of the latest step counts, and of several of that step
the one whose bytes are the largest: whatever order they arrived in, it is the same one. Changes no file.
"""

import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from logitcache.labels.errors import InvalidIds, LabelSetNotFound, NewerFormat, NotALabelSet, ShardDamaged
from logitcache.labels.identity import FORMAT_VERSION, canonical_json, sha256_hex
from logitcache.labels.ids import Ids, as_ids, check_kind
from logitcache.labels.label_set import row_spec
from logitcache.labels.recorded import RecordingTerms
from logitcache.storage.files import explained
from logitcache.storage.id_index import IdIndex
from logitcache.storage.log import Frame, Kind, Log, slot_dtype
from logitcache.storage.manifest import MAX_METADATA_BYTES
from logitcache.storage.places import Places


def terms_content(terms: RecordingTerms, ids: bytes | None) -> bytes:
    """Content of ``recording.json``."""
    told = None if ids is None else {"bytes": len(ids), "sha256": sha256_hex(ids)}
    return canonical_json({"format_version": FORMAT_VERSION, "terms": terms.to_json(), "ids": told})


def ids_content(ids: Ids | None) -> bytes | None:
    """Content of the file of ids: int64, or of texts a JSON list; None where they are ordinals."""
    if ids is None:
        return None
    if ids.texts is not None:
        return canonical_json(list(ids.texts))
    return ids.keys.astype("<i8").tobytes()


def read_terms(places: Places) -> tuple[RecordingTerms, dict[str, Any] | None]:
    """The terms of the recording in a folder, and what its ids hash to.

    Raises:
        LabelSetNotFound: nothing is recorded there.
        NewerFormat, NotALabelSet: what is there cannot be read.
    """
    path = places.recording
    if not path.exists():
        raise LabelSetNotFound(f"nothing is being recorded in {places.root}")
    try:
        with explained(path):
            if path.stat().st_size > MAX_METADATA_BYTES:
                raise NotALabelSet(f"{path} is too long to be a recording's")
            content = json.loads(path.read_bytes())
        version = content["format_version"]
        if type(version) is int and version > FORMAT_VERSION:
            raise NewerFormat(
                f"{path} has format version {version}, this logitcache reads up to {FORMAT_VERSION}: upgrade logitcache"
            )
        terms = RecordingTerms.from_json(content["terms"])
        ids = content["ids"]
        if (ids is None) != (terms.identity.ids == "ordinal") or not isinstance(ids, dict | None):
            raise ValueError("its ids are not told")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotALabelSet(f"{path} is damaged: {error}; restore it") from None
    return terms, ids


def _read_ids(places: Places, told: dict[str, Any], terms: RecordingTerms) -> Ids:
    path = places.recording_ids
    with explained(path):
        data = path.read_bytes() if path.stat().st_size == told.get("bytes") else b""
    if sha256_hex(data) != told.get("sha256"):
        raise ShardDamaged(f"{path} does not hash to what {places.recording} says: restore it")
    try:
        ids = as_ids(json.loads(data) if terms.identity.ids == "text" else np.frombuffer(data, "<i8").astype(np.int64))
        check_kind(ids, terms.identity.ids, places.root.name)
    except (ValueError, RecursionError, InvalidIds) as error:
        raise ShardDamaged(f"{path} does not hold ids: {error}; restore it") from None
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
        self.terms, told = read_terms(places)
        self.spec = row_spec(self.terms.identity)
        self.ids = None if told is None else _read_ids(places, told, self.terms)
        self._index = IdIndex() if self.ids is None else IdIndex().with_shard(0, "", self.ids.keys, 0)
        self.log = Log(places.recording_log, slot_dtype(self.spec))
        self._views = self.terms.identity.views
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._first = np.full(self.terms.examples * self._views, -1, np.int64)
        self._counts = np.zeros(self.terms.examples, np.int64) if self.spec.ragged else None
        self._sittings: dict[int, int] = {}
        self._finished: set[int] = set()
        self.sealing: Kind | None = None

    def follow(self) -> None:
        """Take in what was appended to the log since."""
        with self._lock:
            if self.log.is_cut:
                self.log.rewind()
                self._clear()
            for frame, rows in self.log.follow():
                self._take(frame, rows)

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
        for which in _rounds(places):
            self._settle_round(places[which], steps[which], frame.first + begins[which], counts[which])

    def _settle_round(self, places: np.ndarray, steps: np.ndarray, slots: np.ndarray, counts: np.ndarray) -> None:
        """As `_settle`, of places that are all different."""
        held = self._first[places]
        wins = held < 0
        if not wins.all():
            again = np.flatnonzero(~wins)
            held_steps = self.log.rows(held[again])["step"]
            wins[again] = steps[again] > held_steps
            same = again[steps[again] == held_steps]
            if len(same):
                wins[same] = self._are_larger(slots[same], counts[same], held[same], places[same])
        self._first[places[wins]] = slots[wins]
        if self._counts is not None:
            self._counts[places[wins]] = counts[wins]

    def _are_larger(
        self, slots: np.ndarray, counts: np.ndarray, held: np.ndarray, places: np.ndarray
    ) -> Bool[np.ndarray, " rows"]:
        """Whose bytes are larger than those of the rows that are held."""
        if self._counts is None:
            mine, theirs = (self.log.rows(which).view(np.uint8).reshape(len(which), -1) for which in (slots, held))
            return _larger(mine, theirs)
        larger = [
            self.log.rows(np.arange(slot, slot + count)).tobytes()
            > self.log.rows(np.arange(other, other + known)).tobytes()
            for slot, count, other, known in zip(
                slots.tolist(), counts.tolist(), held.tolist(), self._counts[places].tolist(), strict=True
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
            counts[first < 0] = 0
            return first, counts

    def places(self, ordinals: Int64[np.ndarray, " ids"], views: Any) -> Int64[np.ndarray, " ids"]:
        """Places of these views of examples; a place is what has one row, or of a causal label set one row a token."""
        places: np.ndarray = ordinals * self._views + views
        return places

    def complete(self) -> Bool[np.ndarray, " examples"]:
        """Which examples have all their views recorded."""
        complete: np.ndarray = np.all(self._first.reshape(-1, self._views) >= 0, axis=1)
        return complete

    def progress(self) -> Progress:
        """How far it is."""
        with self._lock:
            rows = int((self._first >= 0).sum()) if self._counts is None else int(self._counts.sum())
            examples = int(self.complete().sum())
            return Progress(examples, rows, frozenset(self._finished), self.sealing is not None)

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


def _rounds(places: Int64[np.ndarray, " rows"]) -> list[np.ndarray]:
    """Positions in groups, none of which has a place twice; nearly always one group."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    if len(begins) == len(places):
        return [np.arange(len(places))]
    nth = np.arange(len(places)) - np.repeat(begins, np.diff(begins, append=len(places)))
    return [order[nth == each] for each in range(int(nth.max()) + 1)]


def _larger(
    mine: UInt8[np.ndarray, "rows bytes"], theirs: UInt8[np.ndarray, "rows bytes"]
) -> Bool[np.ndarray, " rows"]:
    """Whose bytes are larger, compared from the first on."""
    at = (mine != theirs).argmax(axis=1)
    rows = np.arange(len(mine))
    larger: np.ndarray = mine[rows, at] > theirs[rows, at]
    return larger
