"""Which shards of a label set can be served now: committed, checked, mapped; and how that changes while it is open.

Other processes commit, seal and repair at any time. What is known is one immutable `State`; every change makes a new
one, so a reader compares two references to learn whether anything was withdrawn while it gathered.
"""

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from logitcache.labels.errors import LabelSetLocked, ShardDamaged, StorageFault
from logitcache.storage.admission import OpenShard, Stamps, check_hashes, opened, quarantine
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

SCRUB_PAUSE_S = 0.05
"""Seconds between two shards of a scrub, so that it leaves the disk to those who wait for rows."""

log = logging.getLogger("logitcache.storage")

FileKey = tuple[int, int]
"""Inode and time of a file: another commit of the same shard, or another label set of the same name, has another."""


@dataclass(frozen=True)
class State:
    """What can be served. Arrays are by shard and never changed in place.

    Attributes:
        generation: the newest complete one, or None while building.
        commits: trusted commits, damaged ones excluded.
        version: 0 where a shard is not mapped, else a number that is new each time it is.
        all_served: every shard of the label set is mapped: there is nothing to look up.
        replaced: another label set stands in the folder now: nothing of it is served here.
    """

    generation: Generation | None
    commits: dict[int, Commit]
    version: np.ndarray
    all_served: bool = False
    replaced: bool = False


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

    def __init__(self, places: Places, layout: Layout, verify: Verify, scrub_s: float | None = None) -> None:
        self.layout = layout
        self.state = State(None, {}, np.zeros(layout.shards, np.int64))
        self._places, self._verify, self._files = places, verify, Files()
        self._arrays = {
            array.name: MappedArray(np.dtype(array.dtype), array.row_shape, layout.shards, layout.chunk_bytes(array))
            for array in layout.arrays.values()
        }
        self.rows = {name: array.rows for name, array in self._arrays.items()}
        self._lock = threading.Lock()
        self._checking: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._quarantining = threading.Lock()
        self._verified = np.zeros(layout.shards, bool)
        self._mapped: dict[int, tuple[int, ...]] = {}
        self._problems: dict[int, str] = {}
        self._condemned: dict[int, FileKey] = {}
        self._keys: dict[int, FileKey] = {}
        self._stamps = Stamps(places.stamps)
        self._serial = 0
        self._looked_at = 0.0
        self._signature: tuple[FileKey, int, int, bool] | None = None
        self._group = self._group_key()
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

    def refresh(self) -> None:
        """Look for commits and generations that others made or withdrew."""
        with self._lock:
            self._looked_at = time.monotonic()
            signature = self._folder_signature()
            if signature == self._signature and signature[-1]:
                return
            self._signature = signature
            if signature[0] != self._group:
                # Its commits would read well and belong to another teacher.
                self.state = State(None, {}, np.zeros_like(self.state.version), replaced=True)
                return
            generation = newest_generation(self._places.generations, self.layout)
            keys, commits, unreadable = self._read_commits(generation)
            self._set_state(generation, keys, commits)
            for shard, problem in unreadable.items():
                self._problems[shard], self._condemned[shard] = problem, keys[shard]
            self._start_verifier()
        for shard, problem in unreadable.items():
            self._quarantine(shard, keys[shard], problem)

    def _group_key(self) -> FileKey:
        try:
            status = self._places.group.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_mtime_ns

    def _folder_signature(self) -> tuple[FileKey, int, int, bool]:
        times = []
        for folder in (self._places.commits, self._places.generations):
            try:
                times.append(folder.stat().st_mtime_ns)
            except FileNotFoundError:
                times.append(0)
        return self._group_key(), times[0], times[1], time.time_ns() - max(times) > _SETTLED_NS

    def _read_commits(
        self, generation: Generation | None
    ) -> tuple[dict[int, FileKey], dict[int, Commit], dict[int, str]]:
        """What stands in the folder: the key of each commit, those that are trusted, and what is wrong with others."""
        keys: dict[int, FileKey] = {}
        commits: dict[int, Commit] = {}
        unreadable: dict[int, str] = {}
        for shard in numbered(self._places.commits):
            key = self._key(shard) if shard < self.layout.shards else None
            if key is None:
                continue
            keys[shard] = key
            if self._condemned.get(shard) == key:
                continue
            try:
                known = self.state.commits.get(shard) if self._keys.get(shard) == key else None
                commit = known or Commit.read(self._places.commit(shard), self.layout, shard)
            except FileNotFoundError:
                continue
            except ShardDamaged as error:
                unreadable[shard] = error.message
                continue
            # A repair that could not reproduce the bytes waits for the generation that will list it.
            if generation is None or generation.commits[shard] == commit.sha256:
                commits[shard] = commit
        return keys, commits, unreadable

    def _key(self, shard: int) -> FileKey | None:
        try:
            status = self._places.commit(shard).stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_ctime_ns

    def _set_state(self, generation: Generation | None, keys: dict[int, FileKey], commits: dict[int, Commit]) -> None:
        version = self.state.version.copy()
        for shard in np.flatnonzero(version).tolist():
            # The same commit in another file was withdrawn and made again: its chunk files are others, too.
            if shard not in commits or self._keys.get(shard) != keys[shard]:
                version[shard] = 0
                self._verified[shard] = False
        for shard in commits.keys() & self._problems.keys():
            del self._problems[shard]
            self._condemned.pop(shard, None)
        self._keys = keys
        self.state = State(generation, commits, version, bool(version.all()))

    def admit(self, shards: Iterable[int]) -> None:
        """Check and map these shards now, so that they can be served; a damaged one is withdrawn instead."""
        for shard in shards:
            with self._checking[shard]:
                if not self.state.version[shard]:
                    self._examine(shard, trust_stamps=True, hash_now=self._verify == "strict")

    def _examine(self, shard: int, *, trust_stamps: bool, hash_now: bool) -> None:
        """Open, check and (re)map one committed shard; the caller holds the shard's lock in ``_checking``."""
        with self._lock:
            commit, key = self.state.commits.get(shard), self._keys.get(shard)
        if commit is None or key is None:
            return
        try:
            with opened(self._places, self.layout, commit) as files:
                stamped = trust_stamps and self._stamps.match(files, commit)
                if hash_now and not stamped:
                    check_hashes(files, commit)
                self._admitted(files, commit, sound=stamped or hash_now)
        except ShardDamaged as error:
            self._withdraw(shard, commit, key, error.message)

    def _admitted(self, files: OpenShard, commit: Commit, *, sound: bool) -> None:
        shard = files.shard
        with self._lock:
            if self.state.commits.get(shard) is not commit:
                return
            if sound:
                self._stamps.remember(files, commit)
            inodes = tuple(stamp[0] for stamp in files.stamps)
            if not self.state.version[shard] or self._mapped.get(shard) != inodes:
                for name, handle in files.handles.items():
                    self._arrays[name].place(shard, handle)
                self._mapped[shard] = inodes
                self._serial += 1
                version = self.state.version.copy()
                version[shard] = self._serial
                self.state = replace(self.state, version=version, all_served=bool(version.all()))
            self._verified[shard] = sound

    def _withdraw(self, shard: int, commit: Commit, key: FileKey, problem: str) -> None:
        with self._lock:
            if self.state.commits.get(shard) is not commit:
                return
            commits = {number: other for number, other in self.state.commits.items() if number != shard}
            version = self.state.version.copy()
            version[shard] = 0
            self._verified[shard] = False
            self.state = State(self.state.generation, commits, version)
            ours = self._key(shard) == key
            if ours:
                self._problems[shard], self._condemned[shard] = problem, key
            else:
                self._signature = None
        if ours:
            self._quarantine(shard, key, problem)
        else:
            # Another process withdrew or repaired it between our look at the folder and this one.
            self.refresh()

    def _quarantine(self, shard: int, key: FileKey, problem: str) -> None:
        """Report a damaged shard, and move its files aside if no other process is writing or has done it already."""
        place = (
            "its files stay where they are, since another process is writing the label set, or the store is read-only"
        )
        # Threads of this process take turns; only another process makes us leave the files where they are.
        with self._quarantining, contextlib.suppress(LabelSetLocked, StorageFault), WriterLock(self._places.lock):
            if self._key(shard) == key:
                place = f"moved to {quarantine(self._places, self.layout, shard, problem, self._files)}"
            else:
                place = "which another process has dealt with meanwhile"
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
        with self._lock:
            # What was condemned before and could not be moved aside may have been restored.
            self._condemned.clear()
            self._signature = None
        self.refresh()
        shards = sorted(self.state.commits)
        unread: dict[int, str] = {}
        for done, shard in enumerate(shards, 1):
            if self._closing.is_set():
                break
            try:
                with self._checking[shard]:
                    self._examine(shard, trust_stamps=False, hash_now=True)
            except StorageFault as error:
                unread[shard] = error.message
            if progress is not None:
                progress(done, len(shards))
        self._save_stamps()
        damaged = self.damaged()
        gone = {shard: "withdrawn by another process meanwhile" for shard in shards if shard not in self.state.commits}
        problems = gone | damaged | unread
        return [ShardReport(shard, problems.get(shard)) for shard in sorted({*shards, *problems})]

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
                log.error("label set %s: shard %d was not verified: %s", self._places.root.name, shard, error)
        self._save_stamps()

    def _scrub(self, every_s: float) -> None:
        """Hash everything again every so often, with a pause after each shard: disks rot without changing a time."""
        while not self._closing.wait(every_s):
            self.verify_all(lambda _done, _total: self._pause())

    def _pause(self) -> None:
        self._closing.wait(SCRUB_PAUSE_S)

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
