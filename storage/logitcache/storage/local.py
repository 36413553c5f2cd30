"""The reader of a label set in a local folder.

Fetching is: ids to rows, are those rows served, one ``np.take`` an array straight into where they are wanted, and a
look whether a shard was withdrawn meanwhile. It imports neither the Zarr library nor torch.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from logitcache.labels import wire
from logitcache.labels.bill import TeacherTime
from logitcache.labels.errors import (
    DigestChanged,
    InvalidRequest,
    LabelSetNotFound,
    LogitcacheError,
    NotALabelSet,
    RowsMissing,
    ShardDamaged,
    StoreNotFound,
    shown,
)
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.label_set import LABELLED, UNKNOWN, UNLABELLED, Description, Limits, OnMissing, Sealed
from logitcache.labels.label_set import Shards as ShardCounts
from logitcache.labels.missing import AGAIN, NOT_YET, rows_missing
from logitcache.labels.ranges import check_ranges
from logitcache.labels.soft_labels import SoftLabels, splits_of
from logitcache.storage.admission import stored_rows, stored_texts
from logitcache.storage.asked import Asked, asked_for
from logitcache.storage.gather import gather_rows, gather_runs, mark_missing
from logitcache.storage.layout import TEXTS, Layout
from logitcache.storage.paging import Paging
from logitcache.storage.places import Places
from logitcache.storage.reading import status
from logitcache.storage.records import Commit, Generation
from logitcache.storage.served import ServedTally
from logitcache.storage.shards import ShardReport, Shards, Verify
from logitcache.storage.state import State
from logitcache.storage.statistics import RetainedMass, read_statistics, retained_in, summed, teacher_time_in
from logitcache.storage.store import is_folder, names_in

ADMISSIONS = 3
"""Tries to have shards admitted that another process withdraws and repairs at the same moment."""

FEW_EXAMPLES = 8192
"""Examples that are looked up, and their rows found wherever they are, in about a millisecond."""

FEW_BYTES = 8 << 20
"""Rows that are copied in about a millisecond, less than sending them takes."""

Allocate = Callable[[int, str | None], dict[str, np.ndarray]]
"""Arrays to gather into, by field, for so many rows of a digest."""


class LocalLabelSet:
    """A label set in a folder of this machine, read through memory mappings. Implements `labels.label_set.LabelSet`.

    Commits and generations that another process makes are noticed within half a second. With ``verify="strict"`` no
    row of a shard is given out before its files hash to what its commit says; ``"background"`` gives rows out at once
    and withdraws a damaged shard when it is found. With ``scrub_s`` everything is hashed again whenever so many seconds
    have gone by. Safe to use from several threads; after a fork, open it anew.

    When the folder is removed or replaced by another label set, every call raises DigestChanged.

    Raises:
        StoreNotFound, LabelSetNotFound: no such folder, or nothing in it yet.
        NotALabelSet, NewerFormat: the folder holds something that this version cannot read.
        StorageFault: the folder is a symbolic link or holds one, or cannot be read.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        verify: Verify = "strict",
        scrub_s: float | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.path = Path(path).absolute()
        self.name = self.path.name
        if not is_folder(self.path.parent):
            raise StoreNotFound(f"there is no store {self.path.parent}: no such folder")
        if not is_folder(self.path):
            raise LabelSetNotFound(
                f"there is no label set {self.name!r} in {self.path.parent}", available=names_in(self.path.parent)
            )
        if status(self.path / "zarr.json") is None and (inside := names_in(self.path)):
            raise NotALabelSet(f"{self.path} is a store and not a label set: name one in it ({shown(inside)})")
        self._limits = limits or Limits()
        self._shards = Shards(Places(self.path), verify, scrub_s)
        self.identity, self.row_spec = self.layout.identity, self.layout.row_spec
        self._made: dict[int, _Made] = {}
        self.tally = ServedTally(Places(self.path).served, self.identity)
        self._paging = Paging()

    @property
    def layout(self) -> Layout:
        """The label set's shape as it was when the folder was last looked at; it grows."""
        return self._shards.state.layout

    @property
    def is_replaced(self) -> bool:
        """Another label set stands in the folder now, or none: this one must be opened anew."""
        self._shards.refresh()
        return self._shards.state.replaced

    def describe(self) -> Description:
        """What the label set is and how far it is, as of now."""
        state = self._current()
        layout = state.layout
        labelled = sum(layout.shard_examples[shard] for shard in state.commits)
        rows = sum(layout.shard_rows[shard] for shard in state.commits)
        texts = sum(commit.parts[TEXTS].bytes for commit in state.commits.values() if TEXTS in commit.parts)
        made = self._how_made(state)
        return Description(
            name=self.name,
            identity=self.identity,
            examples=layout.examples,
            labelled=labelled,
            rows=rows,
            generations=tuple(Sealed(each.number, each.examples, each.digest) for each in state.generations),
            shards=ShardCounts(
                total=layout.shards,
                committed=len(state.commits),
                verified=self._shards.verified(),
                damaged=len(self._shards.damaged()),
            ),
            label_bytes=layout.used_bytes(labelled, rows) + texts,
            limits=self._limits,
            retained_mass=summed([each.retained for each in made]),
            teacher_time=TeacherTime.summed(each.teacher_time for each in made),
            served=self.tally.so_far(),
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
        """Soft labels of these examples; see `labels.label_set.LabelSet.fetch`.

        ``limits`` hold for this fetch beside the label set's own, for who can take less than those allow.
        """
        asked = self._asked(ids, rows, view, digest, on_missing, limits)
        arrays, found = self._fetch(asked, None)
        return SoftLabels(**arrays, temperatures=self.row_spec.temperatures, digest=found)

    def fetch_body(
        self, ids: Any, *, rows: Any = None, view: Any = 0, digest: str | None = None, on_missing: OnMissing = "error"
    ) -> tuple[UInt8[np.ndarray, " bytes"], str | None]:
        """The same as one safetensors body, gathered straight into it, and the digest; `wire.decode_rows` reads it."""
        asked = self._asked(ids, rows, view, digest, on_missing)
        body: list[np.ndarray] = []

        def allocate(rows: int, found: str | None) -> dict[str, np.ndarray]:
            buffer, views = wire.rows_plan(self.row_spec, rows, len(asked.ids), asked.masked, found).allocate()
            body[:] = [buffer]
            return views

        _, served = self._fetch(asked, allocate)
        return body[0], served

    def states(self, ids: Any, *, digest: str | None = None) -> UInt8[np.ndarray, " ids"]:
        """For each id `LABELLED`, `UNLABELLED` or `UNKNOWN`; see `labels.label_set.LabelSet.states`."""
        asked = self._asked(ids, None, 0, digest, "mask")
        place, looked = self._place(asked, self._current())
        committed = np.zeros(place.state.layout.shards, bool)
        committed[[*place.state.commits]] = True
        labelled = looked.inside & committed[place.shards]
        states: np.ndarray = np.where(labelled, LABELLED, np.where(looked.known, UNLABELLED, UNKNOWN)).astype(np.uint8)
        return states

    def example_ids(self) -> Ids | None:
        """Ids of all its examples in their order; None where they are their ordinals.

        Raises:
            InvalidRequest: it is not sealed, so not all are known.
            ShardDamaged: some cannot be read.
        """
        state = self._current()
        if state.newest is None or len(state.newest.commits) != state.layout.shards:
            raise InvalidRequest(f"{self.name!r} is not finished, so its examples are not all known: finish it first")
        if self.identity.ids == "ordinal":
            return None
        places, layout = Places(self.path), state.layout
        commits = [state.commits[shard] for shard in range(layout.shards) if shard in state.commits]
        if len(commits) < layout.shards:
            raise ShardDamaged(f"{self.name!r} has damaged shards: {AGAIN}")
        keys = np.concatenate([stored_rows(places, layout, commit, "ids") for commit in commits])
        if self.identity.ids == "integer":
            return Ids(keys)
        return as_ids([text for commit in commits for text in stored_texts(places, layout, commit)])

    def is_at_hand(self, examples: int) -> bool:
        """A fetch of so many examples is quick and touches no disk, as far as can be told: `FEW_EXAMPLES`, and
        `FEW_BYTES` of rows if they have as many as others, all served and in memory.
        """
        layout = self.layout
        rows = examples * layout.rows // max(1, layout.examples) if self.row_spec.ragged else examples
        few = examples <= FEW_EXAMPLES and self.row_spec.nbytes(rows, examples) <= FEW_BYTES
        return few and not self._paging.cold and self._shards.is_settled and self._shards.is_in_memory()

    def _asked(
        self, ids: Any, rows: Any, view: Any, digest: str | None, on_missing: str, limits: Limits | None = None
    ) -> Asked:
        allowed = (self._limits,) if limits is None else (self._limits, limits)
        return asked_for(self.name, self.identity, self.row_spec, allowed, ids, rows, view, digest, on_missing)

    def _fetch(self, asked: Asked, allocate: Allocate | None) -> tuple[dict[str, np.ndarray], str | None]:
        while True:
            place = self._at_once(asked, self._current()) or self._place(asked, self._admitted(asked))[0]
            served = slice(None) if place.looked is None else place.looked.served
            if place.looked is not None and not asked.masked and not place.looked.served.all():
                raise self._missing(asked.ids, place, place.looked)
            arrays = self._gather(asked, place, allocate)
            # Whatever was withdrawn or replaced while rows were copied is asked for again.
            now, state = self._shards.state, place.state
            if now is state or np.array_equal(*(each.version[place.shards[served]] for each in (now, state))):
                return arrays, place.digest

    def _at_once(self, asked: Asked, state: State) -> "_Place | None":
        """Where these examples are if all are served, as nearly always; None where there is more to find out or to
        tell, which is `_place`'s to do.
        """
        newest = state.newest
        if not state.all_served or asked.masked or asked.digest not in (None, newest and newest.digest):
            return None
        ordinals, _ = self._shards.ordinals(asked.ids)
        # Read as unsigned, -1 is above any number of examples.
        if int(ordinals.view(np.uint64).max()) >= (newest or state.layout).examples:
            return None
        return _Place(state, newest, state.layout.example_slots(ordinals))

    def _place(self, asked: Asked, state: State) -> "tuple[_Place, _Looked]":
        """Where the examples asked for are, and which of them can be served, in this state."""
        generation = self._generation(state, asked.digest)
        layout = state.layout
        ordinals, known_for_sure = self._shards.ordinals(asked.ids)
        beyond = layout.examples if asked.digest is None or generation is None else generation.examples
        known = (ordinals >= 0) & (ordinals < beyond)
        inside = known if generation is None else known & (ordinals < generation.examples)
        slots = layout.example_slots(np.where(inside, ordinals, 0))
        shards = slots // layout.examples_per_shard
        served = inside if state.all_served else inside & (state.version[shards] > 0)
        if generation is not None and generation is not state.newest:
            self._refuse_changed(generation, state, np.unique(shards[inside]))
        if not known_for_sure:
            known = known | (ordinals < 0)
        looked = _Looked(known, inside, served)
        return _Place(state, generation, slots, looked), looked

    def _generation(self, state: State, digest: str | None) -> Generation | None:
        """The generation that is asked for, or the newest; None while building for the first time."""
        if digest is None:
            return state.newest
        for generation in reversed(state.generations):
            if generation.digest == digest:
                return generation
        served = state.newest.digest if state.newest else None
        raise DigestChanged(
            f"{self.name!r} is at {served or 'no digest yet: it is being built'}, and {digest} is none of its "
            f"{len(state.generations):,} generations: labels from both would be mixed; pin the digest that is there",
            expected=digest,
            served=served,
        )

    def _refuse_changed(self, generation: Generation, state: State, shards: np.ndarray) -> None:
        for shard in shards.tolist():
            commit = state.commits.get(shard)
            if commit is not None and commit.sha256 != generation.commits[shard]:
                raise DigestChanged(
                    f"shard {shard} of {self.name!r} was damaged and labelled again with other bytes since "
                    f"{generation.digest}: pin the digest of a newer generation",
                    expected=generation.digest,
                    served=state.newest.digest if state.newest else None,
                )

    def _admitted(self, asked: Asked) -> State:
        """The state after every shard of these examples that can be admitted is."""
        state = self._current()
        for _ in range(ADMISSIONS):
            if state.all_served:
                break
            place, looked = self._place(asked, state)
            waiting = np.unique(place.shards[looked.inside & ~looked.served]).tolist()
            waiting = [shard for shard in waiting if shard in state.commits]
            if not waiting:
                break
            self._shards.admit(waiting)
            state = self._ours(self._shards.state)
        return state

    def _current(self) -> State:
        return self._ours(self._shards.current())

    def _ours(self, state: State) -> State:
        if state.replaced:
            raise DigestChanged(f"the label set {self.name!r} was removed or replaced while it was open: open it again")
        return state

    def _gather(self, asked: Asked, place: "_Place", allocate: Allocate | None) -> dict[str, np.ndarray]:
        """The fields of an answer: new arrays, or what ``allocate`` gives for so many rows of a digest."""
        stored, slots, cold = self._shards.rows, place.slots, self._paging.cold
        if cold:
            self._shards.will_need("example", slots)
        if self.row_spec.ragged:
            first, splits = self._row_runs(asked, place)
        else:
            first, splits = place.state.layout.row_slots(slots, asked.view), None
        rows = len(slots) if splits is None else int(splits[-1])
        for limits in asked.limits:
            limits.check(self.row_spec, len(slots), rows)
        into = {} if allocate is None else allocate(rows, place.digest)
        if cold:
            self._shards.will_need("row", first, 1 if splits is None else np.diff(splits))
        began = time.perf_counter()
        if splits is None:
            arrays = gather_rows(stored, self.row_spec, first, into)
        else:
            arrays = gather_runs(stored, self.row_spec, first, splits, into)
        self._paging.note(time.perf_counter() - began, rows * self.row_spec.row_bytes)
        inputs = slots if splits is not None else first
        arrays["fingerprint"] = stored["fingerprint"].reshape(-1).take(inputs, 0, into.get("fingerprint"), "clip")
        if splits is not None:
            arrays["row_splits"] = _put(splits, into.get("row_splits"))
        if asked.masked and place.looked is not None:
            mark_missing(arrays, place.looked.served)
            arrays["present"] = _put(place.looked.served, into.get("present"))
        return arrays

    def _row_runs(self, asked: Asked, place: "_Place") -> tuple[np.ndarray, np.ndarray]:
        """Of a causal label set: where the rows of each example begin, and ``row_splits``."""
        stored, slots_per_shard = self._shards.rows, place.state.layout.rows_per_shard
        starts = stored["row_start"].take(place.slots, mode="clip").astype(np.int64)
        counts = stored["row_count"].take(place.slots, mode="clip").astype(np.int64)
        served = np.ones(len(counts), np.bool_) if place.looked is None else place.looked.served
        if served.any() and int((starts + counts)[served].max()) > slots_per_shard:
            raise ShardDamaged(
                f"rows of {self.name!r} lie outside their shard, and were committed so: precompute it anew under "
                "another name, and do not use these labels"
            )
        counts[~served] = 0
        if asked.ranges is not None:
            here = np.flatnonzero(served)
            check_ranges(asked.ranges[here], counts[here], asked.ids, self.name, here)
            begins, ends = np.where(served, asked.ranges.T, 0)
            starts, counts = starts + begins, ends - begins
        return place.shards * slots_per_shard + starts, splits_of(counts)

    def _missing(self, ids: Ids, place: "_Place", looked: "_Looked") -> RowsMissing:
        unlabelled = looked.known & ~looked.served
        damaged = sorted(set(place.shards[unlabelled & looked.inside].tolist()) & self._shards.damaged().keys())
        examples = place.state.layout.examples if place.generation is None else place.generation.examples
        return rows_missing(
            self.name,
            self.identity.ids,
            examples,
            asked=len(ids.at(slice(None))),
            unknown=ids.at(~looked.known),
            unlabelled=ids.at(unlabelled),
            reason=f"shards withdrawn as damaged: {shown(damaged)}; {AGAIN}" if damaged else NOT_YET,
        )

    def _how_made(self, state: State) -> "list[_Made]":
        """Statistics of the committed shards, read once a commit: a repair may give the same bytes in another time."""
        places, made = Places(self.path), []
        for shard, commit in state.commits.items():
            known = self._made.get(shard)
            if known is None or known.commit is not commit:
                statistics = read_statistics(places, shard)
                known = _Made(commit, retained_in(statistics), teacher_time_in(statistics))
                self._made[shard] = known
            made.append(known)
        return made

    def damaged(self) -> dict[int, str]:
        """Shards that were committed and are withdrawn, with what was wrong."""
        return self._shards.damaged()

    def verify_all(
        self, progress: Callable[[int, int], None] | None = None, threads: int | None = None
    ) -> list[ShardReport]:
        """Hash every committed shard now, in so many threads; ``progress`` gets bytes done and bytes in all."""
        return self._shards.verify_all(progress, threads)

    def save_tally(self) -> None:
        """Write down what a server counted in ``tally``, unless another label set stands in the folder by now."""
        with suppress(LogitcacheError):  # the folder cannot be looked at
            if self.tally.is_unsaved and not self.is_replaced:
                self.tally.save()

    def close(self) -> None:
        """Stop verifying; arrays that were fetched are copies and stay valid."""
        self.save_tally()
        self._shards.close()


class _Made(NamedTuple):
    """How the shard of a commit was made."""

    commit: Commit
    retained: RetainedMass
    teacher_time: TeacherTime | None


@dataclass(frozen=True)
class _Looked:
    """What was found out about examples that are not all served at once. Arrays have an entry an id asked for.

    ``known`` examples belong to the label set, or may; those ``inside`` belong to the generation asked for; those
    ``served`` have their shard mapped.
    """

    known: np.ndarray
    inside: np.ndarray
    served: np.ndarray


class _Place(NamedTuple):
    """Where examples are, in one state: their slots, which hold for those inside. Without ``looked`` all are served."""

    state: State
    generation: Generation | None
    slots: np.ndarray
    looked: _Looked | None = None

    @property
    def shards(self) -> np.ndarray:
        """Which shard each example is in."""
        shards: np.ndarray = self.slots // self.state.layout.examples_per_shard
        return shards

    @property
    def digest(self) -> str | None:
        """Digest of the generation, or None while building for the first time."""
        return self.generation.digest if self.generation else None


def _put(values: np.ndarray, into: np.ndarray | None) -> np.ndarray:
    if into is None:
        return values
    into[...] = values
    return into
