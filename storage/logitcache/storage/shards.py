"""Which shards of a label set can be served now: committed, checked, mapped; and how that changes while it is open.

Other processes commit, seal and repair at any time. What is known is one immutable `State`; every change makes a new
one, so a reader compares two references to learn whether anything was withdrawn while it gathered.
"""

import contextlib
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Int64

from logitcache.labels.errors import LabelSetLocked, LogitcacheError, ShardDamaged, StorageFault
from logitcache.labels.ids import Ids
from logitcache.storage.admission import OpenShard, Stamps, check_hashes, is_lost, opened, quarantine
from logitcache.storage.files import Files
from logitcache.storage.id_index import IdIndex
from logitcache.storage.layout import Layout
from logitcache.storage.lock import WriterLock
from logitcache.storage.looking import Found, Signature, commit_key, group_key, grown_layout, look
from logitcache.storage.looking import signature as look_at
from logitcache.storage.manifest import read_layout
from logitcache.storage.mapping import MappedArray, will_need
from logitcache.storage.packing import MOST_SHARDS
from logitcache.storage.places import Places
from logitcache.storage.records import Commit
from logitcache.storage.state import FileKey, State

Verify = Literal["strict", "background"]

RESERVED_BYTES = 1 << 42
"""Addresses reserved an array, so that a label set can grow while it is open; beyond them it must be opened anew."""

REFRESH_S = 0.5
"""Seconds for which what is known of the folder is believed without looking again."""

SETTLED_S = REFRESH_S - 0.005
"""Seconds for which nothing is to be looked at, nor will be before a batch that begins now is answered."""

SCRUB_PAUSE_S = 0.05
"""Seconds between two shards of a scrub, so that it leaves the disk to those who wait for rows."""

MOST_HASHING = 8
"""Threads that hash at once: enough for what the fastest disk gives, and a slow one is not sent here and there."""

SAMPLED = 3
"""Rows that are looked at to tell whether a label set is in memory: enough if most of it is not."""

SAMPLED_S = 0.01
"""Seconds for which they are believed: it takes longer than a batch to leave memory, and a slow gather tells, too."""

WEYL = 0x9E3779B97F4A7C15
"""Step of a sequence whose values fill their range evenly, at less cost than a generator of random numbers."""

log = logging.getLogger("logitcache.storage")


@dataclass(frozen=True)
class ShardReport:
    """Outcome of hashing one shard; ``problem`` is None when it is sound."""

    shard: int
    problem: str | None

    @property
    def ok(self) -> bool:
        """The bytes are those of the commit."""
        return self.problem is None


def _reserved(layout: Layout) -> tuple[dict[str, MappedArray], int]:
    """Addresses for every array, and for how many shards: with room to grow, unless this process may not have it."""
    widest = max(layout.chunk_bytes(array) for array in layout.arrays.values())
    most_shards = max(layout.shards, min(MOST_SHARDS, RESERVED_BYTES // widest))
    try:
        return _mapped_arrays(layout, most_shards), most_shards
    except StorageFault:
        return _mapped_arrays(layout, layout.shards), layout.shards


def _mapped_arrays(layout: Layout, shards: int) -> dict[str, MappedArray]:
    return {
        array.name: MappedArray(np.dtype(array.dtype), array.row_shape, shards, layout.chunk_bytes(array))
        for array in layout.arrays.values()
    }


class Shards:
    """The served shards of one label set, with their mappings. Safe to use from several threads.

    Raises:
        LabelSetNotFound, NotALabelSet, NewerFormat: as `manifest.read_layout` does.
        StorageFault: there are no addresses for its arrays.
    """

    def __init__(self, places: Places, verify: Verify, scrub_s: float | None = None) -> None:
        # The key first: a manifest that is replaced in between is noticed by the next look.
        self._group = group_key(places)
        layout = read_layout(places.root)
        self._arrays, self._most_shards = _reserved(layout)
        self.state = State(layout, (), {}, np.zeros(self._most_shards, np.int64))
        self._places, self._verify, self._files = places, verify, Files()
        self.rows = {name: array.rows for name, array in self._arrays.items()}
        self._lock = threading.Lock()
        self._checking: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._quarantining = threading.Lock()
        self._verified = np.zeros(self._most_shards, bool)
        self._index = IdIndex()
        self._indexed_commits: dict[int, Commit] = {}
        self._indexing = threading.Lock()
        self._mapped: dict[int, tuple[int, ...]] = {}
        self._problems: dict[int, str] = {}
        self._condemned: dict[int, FileKey] = {}
        self._keys: dict[int, FileKey] = {}
        self._stamps = Stamps(places.stamps)
        self._serial = self._drawn = 0
        self._looked_at = self._sampled_at = 0.0
        self._signature: Signature | None = None
        self._closing = threading.Event()
        self._verifier: threading.Thread | None = None
        self._scrubber: threading.Thread | None = None
        self.refresh()
        if scrub_s is not None:
            self._scrubber = threading.Thread(target=self._scrub, args=(scrub_s,), name="logitcache-scrub", daemon=True)
            self._scrubber.start()

    def current(self) -> State:
        """The state, after a look at the folder if the last one is older than `REFRESH_S`."""
        if time.monotonic() - self._looked_at > REFRESH_S:
            self.refresh()
        return self.state

    @property
    def is_settled(self) -> bool:
        """All shards are served, and the folder was looked at a moment ago: there is nothing to do but to read."""
        state = self.state
        indexed = state.layout.identity.ids == "ordinal" or state.commits is self._indexed_commits
        return state.all_served and indexed and time.monotonic() - self._looked_at <= SETTLED_S

    def is_in_memory(self) -> bool:
        """A few rows all over are in memory, or were a moment ago. All shards must be served."""
        state, logits, now = self.state, self._arrays["logits"], time.monotonic()
        if now - self._sampled_at < SAMPLED_S:
            return True
        for _ in range(SAMPLED):
            self._drawn = (self._drawn + WEYL) % 2**64
            shard = self._drawn * state.served_shards >> 64
            row = (self._drawn % 2**32) * state.layout.shard_rows[shard] >> 32
            if not logits.in_memory(shard * state.layout.rows_per_shard + row):
                return False
        self._sampled_at = now
        return True

    def refresh(self) -> None:
        """Look for commits and generations that others made or withdrew."""
        with self._lock:
            if self.state.replaced:
                return  # For good: while nothing of it is served, any label set could pass for it grown.
            self._looked_at = time.monotonic()
            signature = look_at(self._places)
            if signature == self._signature and signature.settled:
                return
            layout = self.state.layout
            if signature.group != self._group:
                grown = grown_layout(self._places, self.state, self._keys)
                if grown is None or grown.shards > self._most_shards:
                    # Its commits would read well and belong to other examples.
                    nothing = np.zeros_like(self.state.version)
                    self.state = replace(self.state, commits={}, version=nothing, replaced=True).settled()
                    return
                layout = grown
            found = look(self._places, layout, self.state, self._keys, self._condemned)
            self._set_state(layout, found)
            # Not before: what could not be looked at is looked at again.
            self._signature, self._group = signature, signature.group
            for shard, problem in found.unreadable.items():
                self._problems[shard], self._condemned[shard] = problem, found.keys[shard]
            self._start_verifier()
        for shard, problem in found.unreadable.items():
            self._quarantine(shard, found.keys[shard], problem)

    def _set_state(self, layout: Layout, found: Found) -> None:
        version = self.state.version.copy()
        # The same commit in another file was withdrawn and made again: its chunk files are others, too.
        gone = [
            shard
            for shard in np.flatnonzero(version).tolist()
            if shard not in found.commits or self._keys.get(shard) != found.keys[shard]
        ]
        version[gone] = 0
        self._verified[gone] = False
        for shard in found.commits.keys() & self._problems.keys():
            del self._problems[shard]
            self._condemned.pop(shard, None)
        self._keys = found.keys
        self.state = State(layout, found.generations, found.commits, version).settled()
        self._unmap(gone)

    def _unmap(self, shards: list[int]) -> None:
        """Let go of files that are not served any more; after the state, which tells readers to gather again."""
        for shard in shards:
            if self._mapped.pop(shard, None) is not None:
                for array in self._arrays.values():
                    array.clear(shard)

    def will_need(self, per: Literal["example", "row"], first: np.ndarray, counts: np.ndarray | int = 1) -> None:
        """Have pages read from the disk: of all arrays with one entry an example, or a row, those that hold ``counts``
        entries from each of the ``first`` ones.
        """
        wanted = [name for name, array in self.state.layout.arrays.items() if array.per == per and name != "ids"]
        will_need(self._arrays[name].pages(first, counts) for name in wanted)

    def ordinals(self, ids: Ids) -> tuple[Int64[np.ndarray, " ids"], bool]:
        """Ordinals of these ids, -1 where none is known; and whether what is not known is surely not in the label set.

        While shards are missing, their ids are not known either, unless ids are ordinals.
        """
        if self.state.layout.identity.ids == "ordinal":
            return ids.keys, True
        index = self._indexed()
        return index.ordinals(ids.keys), len(index.commits) == self.state.layout.shards

    def _indexed(self) -> IdIndex:
        """The index of the ids of all committed shards, brought up to date."""
        state = self.state
        if state.commits is self._indexed_commits:
            return self._index
        with self._indexing:
            index, damaged = self._index.following(self._places, state.layout, state.commits)
            self._index, self._indexed_commits = index, state.commits
        for commit, error in damaged:
            self._withdraw(commit, self._keys.get(commit.shard, (0, 0)), error)
        return index

    def admit(self, shards: Iterable[int]) -> None:
        """Check and map these shards now, so that they can be served; a damaged one is withdrawn instead."""
        for shard in shards:
            with self._checking[shard]:
                if not self.state.version[shard]:
                    self._examine(shard, trust_stamps=True, hash_now=self._verify == "strict")

    def _examine(self, shard: int, *, trust_stamps: bool, hash_now: bool) -> None:
        """Open, check and (re)map one committed shard; the caller holds the shard's lock in ``_checking``."""
        with self._lock:
            commit, key, layout = self.state.commits.get(shard), self._keys.get(shard), self.state.layout
        if commit is None or key is None:
            return
        try:
            with opened(self._places, layout, commit) as files:
                stamped = trust_stamps and self._stamps.match(files, commit)
                if hash_now and not stamped:
                    check_hashes(files, commit, self._closing)
                self._admitted(files, commit, sound=stamped or hash_now)
        except ShardDamaged as error:
            self._withdraw(commit, key, error)

    def _admitted(self, files: OpenShard, commit: Commit, *, sound: bool) -> None:
        shard = files.shard
        with self._lock:
            if self.state.commits.get(shard) is not commit:
                return
            if sound:
                self._stamps.remember(files, commit)
            inodes = tuple(stamp[0] for stamp in files.stamps)
            if not self.state.version[shard] or self._mapped.get(shard) != inodes:
                for name, array in self._arrays.items():
                    array.place(shard, files.handles[name])
                self._mapped[shard] = inodes
                self._serial += 1
                self.state = self.state.with_shard(shard, self._serial)
            self._verified[shard] = sound

    def _withdraw(self, commit: Commit, key: FileKey, error: ShardDamaged) -> None:
        shard, problem = commit.shard, error.message
        with self._lock:
            if self.state.commits.get(shard) is not commit:
                return
            self.state = self.state.without_shard(shard)
            self._unmap([shard])
            self._stamps.forget(shard)
            self._verified[shard] = False
            stands = commit_key(self._places, shard)
            ours = stands == key
            if ours or stands is None:
                self._problems[shard] = problem
            if ours:
                self._condemned[shard] = key
            else:
                self._signature = None
        if ours and is_lost(error):
            place = "its files stay where they are, since the disk may give them back: verify it again, or"
            log.error("label set %s: %s; withdrawn, %s run precompute again", self._places.root.name, problem, place)
        elif ours:
            self._quarantine(shard, key, problem)
        else:
            # Another process withdrew or repaired it between our look at the folder and this one.
            self.refresh()

    def _quarantine(self, shard: int, key: FileKey, problem: str) -> None:
        """Report a damaged shard, and move its files aside if no other process is writing or has done it already."""
        place = (
            "its files stay where they are, since another process is writing the label set, the store is read-only, "
            "or the label set has symbolic links"
        )
        # Threads of this process take turns; only another process makes us leave the files where they are.
        with self._quarantining, contextlib.suppress(LabelSetLocked, StorageFault), WriterLock(self._places.lock):
            if commit_key(self._places, shard) == key:
                place = f"moved to {quarantine(self._places, self.state.layout, shard, problem, self._files)}"
            else:
                place = "which another process has dealt with meanwhile"
        log.error("label set %s: %s; withdrawn, %s; run precompute again", self._places.root.name, problem, place)

    def damaged(self) -> dict[int, str]:
        """Shards that were committed and are withdrawn, with what was wrong."""
        with self._lock:
            sealed = range(self.state.served_shards) if self.state.newest else ()
            gone = {shard: "withdrawn earlier" for shard in sealed if shard not in self.state.commits}
            return gone | self._problems

    def verified(self) -> int:
        """How many served shards were hashed, now or as their stamps say."""
        return int(self._verified.sum())

    def verify_all(
        self,
        progress: Callable[[int, int], None] | None = None,
        threads: int | None = None,
        pause_s: float = 0.0,
    ) -> list[ShardReport]:
        """Hash every committed shard now, stamps or not, and withdraw what is damaged; reports by shard.

        ``progress`` gets bytes done and bytes in all. So many ``threads`` hash at once, by default one a processor up
        to `MOST_HASHING`, each with a pause after each shard.
        """
        for shard in [*self._condemned]:
            # It could not be moved aside and may have been restored; or it is being moved, which is waited for.
            with self._checking[shard], self._lock:
                self._condemned.pop(shard, None)
                self._signature = None
        self.refresh()
        with self._lock:
            # The background thread may be moving one aside just now: its turn is waited for, too.
            shards = sorted({*self.state.commits, *self._condemned})
            sizes = {
                shard: sum(part.bytes for part in commit.parts.values()) for shard, commit in self.state.commits.items()
            }
        total, done, unread = sum(sizes.values()), 0, dict[int, str]()
        pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, MOST_HASHING), "logitcache-verify")
        try:
            for shard, problem in pool.map(partial(self._verified_now, pause_s), shards):
                done += sizes.get(shard, 0)
                if problem is not None:
                    unread[shard] = problem
                if progress is not None:
                    progress(done, total)
        finally:
            pool.shutdown(cancel_futures=True)
        self._save_stamps()
        damaged = self.damaged()
        gone = {shard: "withdrawn by another process meanwhile" for shard in shards if shard not in self.state.commits}
        problems = gone | damaged | unread
        return [ShardReport(shard, problems.get(shard)) for shard in sorted({*shards, *problems})]

    def _verified_now(self, pause_s: float, shard: int) -> tuple[int, str | None]:
        """Hash one shard; what kept it from being hashed."""
        if self._closing.is_set():
            return shard, f"shard {shard} was not verified: its label set was closed meanwhile"
        try:
            with self._checking[shard]:
                self._examine(shard, trust_stamps=False, hash_now=True)
        except StorageFault as error:
            return shard, error.message
        self._closing.wait(pause_s)
        return shard, None

    def _unverified(self) -> list[int]:
        return [shard for shard in sorted(self.state.commits) if not self._verified[shard]]

    def _start_verifier(self) -> None:
        if self._unverified() and not self._closing.is_set() and not (self._verifier and self._verifier.is_alive()):
            self._verifier = threading.Thread(target=self._verify_in_background, name="logitcache-verify", daemon=True)
            self._verifier.start()

    def _verify_in_background(self) -> None:
        """Admit and hash what is not verified yet, shard by shard, so that requests seldom have to wait for it."""
        tried: set[int] = set()
        while not self._closing.is_set():
            shard = next((shard for shard in self._unverified() if shard not in tried), None)
            if shard is None:
                break
            tried.add(shard)
            try:
                with self._checking[shard]:
                    if not self._verified[shard]:
                        self._examine(shard, trust_stamps=True, hash_now=True)
            except StorageFault as error:
                if not self._closing.is_set():
                    log.error("label set %s: shard %d was not verified: %s", self._places.root.name, shard, error)
        self._save_stamps()

    def _scrub(self, every_s: float) -> None:
        """Hash everything again every so often, with a pause after each shard: disks rot without changing a time."""
        while not self._closing.wait(every_s):
            try:
                reports = self.verify_all(threads=1, pause_s=SCRUB_PAUSE_S)
            except LogitcacheError as error:
                log.error("label set %s was not scrubbed: %s", self._places.root.name, error)
                continue
            for report in reports:
                if not report.ok and not self._closing.is_set():
                    log.error("label set %s: the scrub found: %s", self._places.root.name, report.problem)

    def _save_stamps(self) -> None:
        with self._lock:
            self._stamps.save(self._files)

    def close(self) -> None:
        """Stop verifying and write the stamps down; mappings go when nothing refers to them."""
        self._closing.set()
        for thread in (self._verifier, self._scrubber):
            if thread is not None:
                thread.join()
        self._save_stamps()
