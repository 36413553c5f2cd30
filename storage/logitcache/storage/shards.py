"""Which shards of a label set can be served now: committed, checked, mapped; and how that changes while it is open.

Other processes commit, seal and repair at any time. What is known is one immutable `State`; every change makes a new
one, so a reader compares two references to learn whether anything was withdrawn while it gathered.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from logitcache.labels.errors import LabelSetLocked, ShardDamaged, StorageFault
from logitcache.storage.admission import Stamps, check_hashes, opened, quarantine
from logitcache.storage.files import Files
from logitcache.storage.layout import Layout, Places
from logitcache.storage.lock import WriterLock
from logitcache.storage.mapping import MappedArray
from logitcache.storage.records import Commit, Generation, newest_generation, numbered

Verify = Literal["strict", "background"]

REFRESH_S = 0.5
"""Seconds for which what is known of the folder is believed without looking again."""

_SETTLED_NS = 2_000_000_000
"""A folder changed more recently than this may change again within one tick of its clock: look inside even so."""

log = logging.getLogger("logitcache.storage")

_FileKey = tuple[int, int]


@dataclass(frozen=True)
class State:
    """What can be served. Arrays are by shard and never changed in place.

    Attributes:
        generation: the newest complete one, or None while building.
        commits: trusted commits, damaged ones excluded.
        version: 0 where a shard is not mapped, else a number that is new each time it is.
        all_served: every shard of the label set is mapped: there is nothing to look up.
    """

    generation: Generation | None
    commits: dict[int, Commit]
    version: np.ndarray
    all_served: bool = False


@dataclass(frozen=True)
class ShardReport:
    """Outcome of hashing one shard; ``problem`` is None when it is sound."""

    shard: int
    problem: str | None

    @property
    def ok(self) -> bool:
        """The bytes are those of the commit."""
        return self.problem is None


class Shards:
    """The served shards of one label set, with their mappings. Safe to use from several threads."""

    def __init__(self, places: Places, layout: Layout, verify: Verify) -> None:
        self.layout = layout
        self.state = State(None, {}, np.zeros(layout.shards, np.int64))
        self._places, self._verify, self._files = places, verify, Files()
        self._arrays = {
            array.name: MappedArray(np.dtype(array.dtype), array.row_shape, layout.shards, layout.chunk_bytes(array))
            for array in layout.arrays.values()
        }
        self.rows = {name: array.rows for name, array in self._arrays.items()}
        self._verified = np.zeros(layout.shards, bool)
        self._problems: dict[int, str] = {}
        self._condemned: dict[int, _FileKey] = {}
        self._commit_keys: dict[int, _FileKey] = {}
        self._stamps = Stamps(places.stamps)
        self._serial = 0
        self._lock = threading.RLock()
        self._looked_at = 0.0
        self._signature: tuple[int, int, bool] | None = None
        self._closing = threading.Event()
        self._verifier: threading.Thread | None = None
        self.refresh()

    def current(self) -> State:
        """The state, after a look at the folder if the last one is older than `REFRESH_S`."""
        if time.monotonic() - self._looked_at > REFRESH_S:
            self.refresh()
        return self.state

    def refresh(self) -> None:
        """Look for commits and generations that others made or withdrew."""
        with self._lock:
            self._looked_at = time.monotonic()
            signature = self._folder_signature()
            if signature == self._signature and signature[2]:
                return
            self._signature = signature
            generation = newest_generation(self._places.generations, self.layout)
            self._set_state(generation, self._read_commits(generation))
            self._start_verifier()

    def _folder_signature(self) -> tuple[int, int, bool]:
        times = []
        for folder in (self._places.commits, self._places.generations):
            try:
                times.append(folder.stat().st_mtime_ns)
            except FileNotFoundError:
                times.append(0)
        return times[0], times[1], time.time_ns() - max(times) > _SETTLED_NS

    def _read_commits(self, generation: Generation | None) -> dict[int, Commit]:
        commits: dict[int, Commit] = {}
        keys: dict[int, _FileKey] = {}
        for shard in numbered(self._places.commits):
            if shard >= self.layout.shards:
                continue
            path = self._places.commit(shard)
            try:
                status = path.stat()
                keys[shard] = (status.st_ino, status.st_ctime_ns)
                if self._condemned.get(shard) == keys[shard]:
                    continue
                known = self.state.commits.get(shard) if self._commit_keys.get(shard) == keys[shard] else None
                commit = known or Commit.read(path, self.layout, shard)
            except FileNotFoundError:
                continue
            except ShardDamaged as error:
                self._condemn(shard, error.message, keys[shard])
                continue
            # A repair that could not reproduce the bytes waits for the generation that will list it.
            if generation is None or generation.commits[shard] == commit.sha256:
                commits[shard] = commit
        self._replaced = {shard for shard, key in keys.items() if self._commit_keys.get(shard) not in (None, key)}
        self._commit_keys = keys
        return commits

    def _set_state(self, generation: Generation | None, commits: dict[int, Commit]) -> None:
        version = self.state.version.copy()
        for shard in range(self.layout.shards):
            if version[shard] and (shard not in commits or shard in self._replaced):
                version[shard] = 0
                self._verified[shard] = False
        for shard in commits.keys() & self._problems.keys():
            del self._problems[shard]
            self._condemned.pop(shard, None)
        self.state = State(generation, commits, version, bool(version.all()))

    def admit(self, shards: Iterable[int]) -> None:
        """Check and map these shards now, so that they can be served; a damaged one is withdrawn instead."""
        for shard in shards:
            with self._lock:
                if shard in self.state.commits and not self.state.version[shard]:
                    self._examine(shard, trust_stamps=True, hash_now=self._verify == "strict")

    def _examine(self, shard: int, *, trust_stamps: bool, hash_now: bool) -> str | None:
        """Open, check and (re)map one committed shard under the lock; what is wrong with it, if anything."""
        commit = self.state.commits[shard]
        try:
            with opened(self._places, self.layout, commit) as files:
                sound = trust_stamps and self._stamps.match(files, commit)
                if not sound and hash_now:
                    check_hashes(files, commit)
                    self._stamps.remember(files, commit)
                    sound = True
                if not self.state.version[shard]:
                    for name, handle in files.handles.items():
                        self._arrays[name].place(shard, handle)
                    self._serial += 1
                    version = self.state.version.copy()
                    version[shard] = self._serial
                    self.state = replace(self.state, version=version, all_served=bool(version.all()))
                self._verified[shard] = sound
        except ShardDamaged as error:
            if self._still_committed(shard):
                self._withdraw(shard, error.message)
                return error.message
            # Another process withdrew it between our look at the folder and this one.
            self.refresh()
            return None
        return None

    def _still_committed(self, shard: int) -> bool:
        try:
            status = self._places.commit(shard).stat()
        except FileNotFoundError:
            return False
        return self._commit_keys.get(shard) == (status.st_ino, status.st_ctime_ns)

    def _withdraw(self, shard: int, problem: str) -> None:
        commits = {number: commit for number, commit in self.state.commits.items() if number != shard}
        version = self.state.version.copy()
        version[shard] = 0
        self._verified[shard] = False
        self.state = State(self.state.generation, commits, version)
        self._condemn(shard, problem, self._commit_keys[shard])

    def _condemn(self, shard: int, problem: str, key: _FileKey) -> None:
        """Remember and report a damaged shard, and move its files aside if no other process is writing."""
        self._problems[shard] = problem
        self._condemned[shard] = key
        place = (
            "its files stay where they are, since another process is writing the label set, or the store is read-only"
        )
        with contextlib.suppress(LabelSetLocked, StorageFault), WriterLock(self._places.lock):
            place = f"moved to {quarantine(self._places, self.layout, shard, problem, self._files)}"
        log.error("label set %s: %s; withdrawn, %s; run precompute again", self._places.root.name, problem, place)

    def damaged(self) -> dict[int, str]:
        """Shards that were committed and are withdrawn, with what was wrong."""
        with self._lock:
            sealed = range(self.layout.shards) if self.state.generation else ()
            gone = {shard: "withdrawn earlier" for shard in sealed if shard not in self.state.commits}
            return gone | self._problems

    def verified(self) -> int:
        """How many served shards were hashed, now or as their stamps say."""
        return int(self._verified.sum())

    def verify_all(self, progress: Callable[[int, int], None] | None = None) -> list[ShardReport]:
        """Hash every committed shard now, stamps or not, and withdraw what is damaged; reports by shard."""
        self.refresh()
        shards = sorted(self.state.commits)
        reports = {shard: ShardReport(shard, problem) for shard, problem in self.damaged().items()}
        for done, shard in enumerate(shards, 1):
            with self._lock:
                if shard in self.state.commits:
                    problem = self._examine(shard, trust_stamps=False, hash_now=True)
                    reports[shard] = ShardReport(shard, problem)
            if progress is not None:
                progress(done, len(shards))
        self._save_stamps()
        return [reports[shard] for shard in sorted(reports)]

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
            with self._lock:
                shard = next((shard for shard in self._unverified() if shard not in tried), None)
                if shard is None:
                    break
                tried.add(shard)
                try:
                    self._examine(shard, trust_stamps=True, hash_now=True)
                except StorageFault as error:
                    log.error("label set %s: shard %d was not verified: %s", self._places.root.name, shard, error)
        self._save_stamps()

    def _save_stamps(self) -> None:
        with self._lock:
            self._stamps.save(self._files)

    def close(self) -> None:
        """Stop verifying and write the stamps down; mappings go when nothing refers to them."""
        self._closing.set()
        if self._verifier is not None:
            self._verifier.join()
        self._save_stamps()
