"""Label sets and recordings under arbitrary sequences of writing, growing, failing, being killed, damaged, found,
repaired, sealed and read, against a plain model of them, while other threads read all along.

The model of a label set is which rows each shard was committed with, which shards are sound, and what the generations
list. At every moment every reader serves exactly the rows of sound shards that the newest generation lists (before the
first one: that are committed); what a reader in another thread was given at any moment is right to the bit.
"""

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.building import Reference, grown, reference, statistics_of
from tests.runs import STEPS, small_run
from tests.storage.faults import FAULTS, Faulty, Killed

from logitcache.labels.errors import (
    DatasetChanged,
    DigestChanged,
    InvalidRequest,
    LabelSetLocked,
    RecorderReplaced,
    RowsMissing,
    StorageFault,
)
from logitcache.labels.recorded import Who
from logitcache.labels.soft_labels import SoftLabels
from logitcache.storage import LocalLabelSet, Recording, open_label_set
from logitcache.storage.files import Files
from logitcache.storage.manifest import read_layout
from logitcache.storage.places import Places
from logitcache.storage.records import numbered
from logitcache.storage.writer import LabelSetWriter

DONE = Counter[str]()
"""What the machines did, told at the end."""

FAST = settings(max_examples=25, stateful_step_count=15, deadline=None)
LONG = settings(FAST, max_examples=1500, stateful_step_count=40, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    """The kernel is not killed here, so nothing is lost; what was done is told."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("fsync", "fdatasync"):
            patched.setattr(os, name, lambda handle: None)
        yield
    print("\n", ", ".join(f"{count:,} {what}" for what, count in sorted(DONE.items())))


class Reading:
    """A thread that reads all along; `check` raises what it came upon since."""

    def __init__(self, read: Callable[[], None]) -> None:
        self._read, self._stop = read, threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="reads all along")
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            try:
                self._read()
            except BaseException as error:
                self._error = error
                return
            DONE["reads in another thread"] += 1

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def retried(act: Callable[[], Any]) -> Any:
    """Its result; a reader may hold the lock for a moment, while it moves damaged files aside."""
    until = time.monotonic() + 30
    while True:
        try:
            return act()
        except LabelSetLocked:
            if time.monotonic() > until:
                raise
            time.sleep(0.001)


def faults(most: int) -> st.SearchStrategy[tuple[str, int] | None]:
    """None, or what befalls the operation of a number: less often, so that things come to an end, too."""
    fault = st.tuples(st.sampled_from(FAULTS), st.integers(0, most))
    return st.none() | st.none() | st.none() | fault


Versions = tuple[int, ...]

GROWTH: list[Reference] = [reference(2, k=2, classes=5, temperatures=(1.0,), ids="integer", short_by=4000)]
for more in (50, 5000):
    GROWTH.append(grown(GROWTH[-1], more))
"""A label set and what it grows to: two shards, three, five."""

WHOLE = GROWTH[-1]
SHARDS = WHOLE.layout.shards
PARTS = sorted(WHOLE.layout.parts)


def arrays_of(shard: int, version: int) -> dict[str, np.ndarray]:
    """A shard's rows; of version 1 the teacher gave other bits."""
    arrays = WHOLE.arrays(WHOLE.layout.span(shard))
    if version:
        arrays["logits"] = arrays["logits"].copy()
        arrays["logits"][:, -1] -= np.float16(0.25)
    return arrays


STORED = {(shard, version): arrays_of(shard, version) for shard in range(SHARDS) for version in (0, 1)}
"""By shard and version."""

CHOSEN = {shard: np.unique(np.linspace(0, len(WHOLE.layout.span(shard)) - 1, 7).astype(int)) for shard in range(SHARDS)}
"""Positions in each shard of the examples that are asked for."""


def asked_of(shard: int) -> np.ndarray:
    """Ordinals of the examples of a shard that are asked for."""
    return WHOLE.layout.span(shard).start + CHOSEN[shard]


class Store(RuleBasedStateMachine):
    """One label set and what should be true of it.

    Attributes:
        sound: version of each shard that is committed and sound.
        hurt: of those that were damaged since, and may have been found or not.
        sealed: versions of each generation's shards.
        digests: of those versions.
        ever: all versions that each shard was ever committed with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / "store" / "set"
        self.sound: dict[int, int] = {}
        self.hurt: dict[int, int] = {}
        self.sealed: list[Versions] = []
        self.digests: dict[Versions, str] = {}
        self.ever: set[tuple[int, int]] = set()
        self.size = 0
        self.seen: list[tuple[str | None, dict[int, int]]] = []
        self.reader: LocalLabelSet | None = None
        self.readings: list[Reading] = []

    # What is read.

    def versions_in(self, reader: LocalLabelSet) -> tuple[str | None, dict[int, int]]:
        """Digest of what a reader serves, and the version of each shard that it serves rows of: right to the bit."""
        soft = reader.fetch(WHOLE.at(np.concatenate([asked_of(shard) for shard in range(SHARDS)])), on_missing="mask")
        assert soft.present is not None
        found, first = {}, 0
        for shard in range(SHARDS):
            rows = slice(first, first + len(CHOSEN[shard]))
            first = rows.stop
            if soft.present[rows].any():
                found[shard] = self.version_of(shard, soft, rows)
        return soft.digest, found

    @staticmethod
    def version_of(shard: int, soft: SoftLabels, rows: slice) -> int:
        """Whose rows these are, all of one version and of these examples."""
        assert soft.present is not None
        assert soft.present[rows].all(), f"part of shard {shard} is served"
        for version in (0, 1):
            stored = {name: array[CHOSEN[shard]] for name, array in STORED[shard, version].items()}
            same = {
                "indices": np.array_equal(soft.indices[rows], stored["indices"]),
                "logits": np.array_equal(soft.logits[rows], stored["logits"]),
                "logit_max": np.array_equal(soft.logit_max[rows], stored["scalars"][:, 0]),
                "tail_logsumexp": np.array_equal(soft.tail_logsumexp[rows], stored["scalars"][:, 1:2]),
                "fingerprint": np.array_equal(soft.fingerprint[rows], stored["fingerprint"][:, 0]),
            }
            if all(same.values()):
                return version
        raise AssertionError(f"wrong rows of shard {shard}: {same}")

    def look(self, reader: LocalLabelSet) -> None:
        """What another thread reads is held against the model when the model knows what came of the rule."""
        self.seen.append(self.versions_in(reader))

    def refreshed(self) -> LocalLabelSet:
        assert self.reader is not None
        self.reader._shards.refresh()
        return self.reader

    def visible(self, versions: dict[int, int]) -> dict[int, int]:
        """Those that the newest generation lists, or all of them before the first one."""
        if not self.sealed:
            return versions
        listed = self.sealed[-1]
        return {shard: version for shard, version in versions.items() if listed[shard : shard + 1] == (version,)}

    # What is written.

    @property
    def layout_of(self) -> Reference:
        return GROWTH[self.size]

    def writer(self, files: Files | None = None) -> LabelSetWriter:
        """A writer that takes up what is there: of sound shards nothing is to be labelled again, of hurt ones all."""
        writer = retried(lambda: LabelSetWriter(self.path, self.layout_of.layout, files=files))
        assert isinstance(writer, LabelSetWriter)
        assert writer.committed == sorted(self.sound)
        self.hurt.clear()
        return writer

    def under(self, fault: tuple[str, int] | None, act: Callable[[Files], None]) -> bool:
        """Do something, under a fault of one operation or none; what stands afterwards tells how far it came. True if
        it was done.
        """
        if fault is None:
            act(Files())
            return True
        files = Faulty(fault[1], fault[0])
        try:
            act(files)
        except Killed:
            assert fault[0].startswith("killed")
        except StorageFault:
            assert not fault[0].startswith("killed")
        else:
            return True
        DONE[f"faults: {fault[0]}"] += 1
        return False

    def committed_now(self, shard: int, version: int) -> None:
        """After a fault: the commit decides."""
        if shard not in self.sound and shard not in self.hurt and Places(self.path).commit(shard).exists():
            self.sound[shard] = version

    FAULTY = faults(60)

    @initialize(fault=FAULTY)
    def create(self, fault: tuple[str, int] | None) -> None:
        self.under(fault, lambda files: self.writer(files).close())
        self.writer().close()
        self.reader = LocalLabelSet(self.path)
        other = LocalLabelSet(self.path)
        self.readings = [Reading(partial(self.look, reader)) for reader in (self.reader, other)]
        self.closing = other

    @rule(shard=st.integers(0, SHARDS - 1), version=st.sampled_from([0, 0, 1]), fault=FAULTY)
    def commit(self, shard: int, version: int, fault: tuple[str, int] | None) -> None:
        if shard < self.layout_of.layout.shards:
            self.label(shard, version, fault)

    def label(self, shard: int, version: int, fault: tuple[str, int] | None) -> None:
        """Commit one shard, if it is missing."""
        self.ever.add((shard, version))
        arrays = STORED[shard, version]

        def act(files: Files) -> None:
            with self.writer(files) as writer:
                if shard in writer.missing:
                    writer.commit(shard, arrays, statistics_of(arrays, WHOLE.identity))

        was = shard in self.sound
        if self.under(fault, act):
            self.sound.setdefault(shard, version)
            DONE["commits"] += not was
        else:
            self.committed_now(shard, version)

    @rule(version=st.sampled_from([0, 0, 1]))
    def commit_all(self, version: int) -> None:
        """As precompute does: whatever is missing."""
        for shard in range(self.layout_of.layout.shards):
            if shard not in self.sound:
                self.label(shard, version, None)

    @precondition(lambda self: self.sealed and len(self.sound) < len(self.sealed[-1]))
    @rule(shard=st.integers(0, SHARDS - 1))
    def commit_other_examples(self, shard: int) -> None:
        """A shard of a generation is never labelled again with other examples."""
        if shard in self.sound or shard in self.hurt or shard >= len(self.sealed[-1]):
            return
        if not list((self.path / "quarantine").glob(f"*-shard-{shard}/commit.json")):
            return
        arrays = STORED[shard, 0] | {"fingerprint": STORED[shard, 0]["fingerprint"] ^ np.uint64(1)}
        with self.writer() as writer, pytest.raises(DatasetChanged):
            writer.commit(shard, arrays, statistics_of(arrays, WHOLE.identity))
        DONE["other examples refused"] += 1

    @precondition(lambda self: len(self.sound) + len(self.hurt) == self.layout_of.layout.shards)
    @rule(fault=FAULTY)
    def seal(self, fault: tuple[str, int] | None) -> None:
        def act(files: Files) -> None:
            with self.writer(files) as writer:
                if writer.missing:
                    with pytest.raises(InvalidRequest):
                        writer.seal()
                else:
                    writer.seal()

        self.under(fault, act)
        versions = tuple(version for _, version in sorted(self.sound.items()))
        if len(numbered(Places(self.path).generations)) > len(self.sealed):
            assert len(versions) == self.layout_of.layout.shards
            self.sealed.append(versions)
            DONE["generations"] += 1

    @precondition(lambda self: self.size + 1 < len(GROWTH) and self.is_complete)
    @rule(fault=FAULTY)
    def grow(self, fault: tuple[str, int] | None) -> None:
        def act(files: Files) -> None:
            with self.writer(files) as writer:
                writer.grow(GROWTH[self.size + 1].layout)

        self.under(fault, act)
        if read_layout(self.path).examples > self.layout_of.layout.examples:
            self.size += 1
            DONE["growths"] += 1

    @property
    def is_complete(self) -> bool:
        """Sealed, with all that is sealed there."""
        versions = tuple(version for _, version in sorted(self.sound.items()))
        return bool(self.sealed) and versions == self.sealed[-1] and len(versions) == self.layout_of.layout.shards

    # What goes wrong.

    @precondition(lambda self: self.sound)
    @rule(
        data=st.data(),
        how=st.sampled_from(["flip", "truncate", "append", "empty", "delete", "foreign"]),
        what=st.sampled_from([*PARTS, "commits"]),
    )
    def damage(self, data: st.DataObject, how: str, what: str) -> None:
        """A file of a committed shard is exchanged for another: never changed in place, where a mapping may be."""
        shard = data.draw(st.sampled_from(sorted(self.sound)))
        places = Places(self.path)
        file = places.commit(shard) if what == "commits" else places.part(WHOLE.layout, what, shard)
        if what == "commits" and how == "delete":
            return  # as if it had never been committed; nothing is left to tell
        content = bytearray(file.read_bytes())
        if how == "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "truncate":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        elif how == "append":
            content += b"\0"
        elif how == "empty":
            content.clear()
        elif how == "foreign":
            others = [path for path in file.parent.iterdir() if path != file and path.name != "zarr.json"]
            if not others:
                return
            content = bytearray(data.draw(st.sampled_from(sorted(others))).read_bytes())
        if content == file.read_bytes() and how != "delete":
            return
        if how == "delete":
            file.unlink()
        else:
            aside = self.root / "aside"
            aside.write_bytes(content)
            aside.rename(file)
        self.hurt[shard] = self.sound.pop(shard)
        DONE[f"damages: {how}"] += 1

    # Who finds it.

    @rule()
    def verify(self) -> None:
        reports = {report.shard: report for report in self.refreshed().verify_all()}
        for shard in self.hurt:
            gone = not Places(self.path).commit(shard).exists()
            assert gone or not reports[shard].ok, f"damage of shard {shard} was not found"
        for shard in self.visible(self.sound):
            assert reports[shard].ok
        DONE["verifications"] += 1
        self.hurt.clear()

    @rule()
    def open_anew(self) -> None:
        """A reader that never saw a file of it hashes all that it serves."""
        with closing(LocalLabelSet(self.path)) as fresh:
            digest, found = self.versions_in(fresh)
            assert found == self.visible(self.sound)
            assert digest == (self.digests.get(self.sealed[-1]) if self.sealed else None)

    @rule()
    def write_nothing(self) -> None:
        """A writer looks at everything and sets damaged shards aside."""
        self.writer().close()

    @precondition(lambda self: self.sealed)
    @rule(data=st.data())
    def ask_for_an_older_generation(self, data: st.DataObject) -> None:
        """Of a digest only rows of that digest are served."""
        versions = data.draw(st.sampled_from(sorted(self.digests)))
        sound = self.visible(self.sound)
        wanted = {shard for shard, version in sound.items() if versions[shard : shard + 1] == (version,)}
        reader = self.refreshed()
        for shard in wanted:
            ids = WHOLE.at(asked_of(shard))
            soft = reader.fetch(ids, digest=self.digests[versions], on_missing="mask")
            assert soft.digest == self.digests[versions]
            assert self.version_of(shard, soft, slice(None)) == versions[shard]
        for shard in sound.keys() - wanted:
            if shard < len(versions):
                ids = WHOLE.at(asked_of(shard))
                with pytest.raises(DigestChanged):
                    reader.fetch(ids, digest=self.digests[versions], on_missing="mask")
        DONE["fetches of a generation"] += len(sound)

    @invariant()
    def what_is_sound_is_served_and_nothing_else(self) -> None:
        if self.reader is None:
            return
        reader = self.refreshed()
        digest, found = self.versions_in(reader)
        if self.sealed:
            known = self.digests.setdefault(self.sealed[-1], str(digest))
            assert known == digest, "the same content has another digest"
            assert len(set(self.digests.values())) == len(self.digests)
        else:
            assert digest is None
        sound, hurt = self.visible(self.sound), self.visible(self.hurt)
        assert sound.items() <= found.items() <= (sound | hurt).items()
        for reading in self.readings:
            reading.check()
        seen, self.seen = self.seen, []
        of_digest = {digest: versions for versions, digest in self.digests.items()}
        for then, versions in seen:
            for shard, version in versions.items():
                assert (shard, version) in self.ever
                # It may know a generation that a rule in between made: that has been listed by now.
                assert then is None or of_digest[then][shard] == version

    def teardown(self) -> None:
        for reading in self.readings:
            reading.close()
        if self.reader is not None:
            self.reader.close()
            self.closing.close()
        shutil.rmtree(self.root)


RUN = small_run(9, recorders=2, ids="text")
"""What is recorded: nine examples by two recorders."""

GIVEN = {step: RUN.batch(RUN.places, step=STEPS.start + step, other=step).soft.arrays() for step in range(10)}
"""By step, the rows of all places that are given at it: others at each."""


class Recorded(RuleBasedStateMachine):
    """One recording and what should be true of it, until it is sealed and after.

    Attributes:
        rows: by place, the step of the row that counts: that of the latest step.
        sittings: of each recorder that has begun.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / "store" / "run"
        self.rows: dict[int, int] = {}
        self.sittings: dict[int, int] = {}
        self.recording: Recording | None = None
        self.readings: list[Reading] = []
        self.seen: list[dict[int, int]] = []
        self.given: set[tuple[int, int]] = set()
        self.part: bool | None = None
        self.digest: str | None = None

    @initialize()
    def begin(self) -> None:
        self.open()
        for rank in (0, 1):
            self.sit_down(rank)
        self.reader = open_label_set(self.path)
        self.readings = [Reading(lambda: self.seen.append(self.read(self.reader)))]

    def open(self, files: Files | None = None) -> Recording:
        if self.recording is not None:
            self.recording.close()
        self.recording = None
        self.recording = Recording(self.path, RUN.terms, RUN.ids, files=files)
        return self.recording

    def read(self, reader: Any) -> dict[int, int]:
        """By place, the step whose rows are served: right to the bit."""
        soft = reader.fetch(RUN.ids_of(RUN.places), on_missing="mask")
        held = {place: soft.logit_max[place] for place in np.flatnonzero(soft.present).tolist()}
        steps = {place: round(float(most - RUN.source.logits[place].max())) for place, most in held.items()}
        for place, step in steps.items():
            for name, rows in GIVEN[step].items():
                found = soft.arrays()[name][place]
                assert np.array_equal(found, rows[place], equal_nan=rows.dtype.kind == "f"), f"wrong {name} of {place}"
        return steps

    @precondition(lambda self: self.digest is None)
    @rule(rank=st.integers(0, 1))
    def sit_down(self, rank: int) -> None:
        """A recorder begins anew, as after a restart."""
        if self.part is not None:
            return
        assert self.recording is not None
        self.sittings[rank] = self.sittings.get(rank, 0) + 1
        self.recording.begin(Who(rank, self.sittings[rank]))

    @precondition(lambda self: self.digest is None and self.sittings and self.part is None)
    @rule(
        data=st.data(),
        places=st.lists(st.sampled_from(RUN.places.tolist()), min_size=1, max_size=5),
        step=st.integers(0, 9),
        fault=faults(3),
    )
    def record(self, data: st.DataObject, places: list[int], step: int, fault: tuple[str, int] | None) -> None:
        """Rows of some places, perhaps twice, by a recorder that sits; killed on the way, all of them or none."""
        rank = data.draw(st.sampled_from(sorted(self.sittings)))
        who, batch = Who(rank, self.sittings[rank]), RUN.batch(places, step=STEPS.start + step, other=step)
        after = self.rows | {place: max(step, self.rows.get(place, -1)) for place in places}
        self.given |= {(place, step) for place in places}
        if fault is None:
            assert self.recording is not None
            self.recording.append(batch, who)
            self.rows = after
            DONE["batches recorded"] += 1
            return
        try:
            self.open(Faulty(fault[1], fault[0])).append(batch, who)
        except (Killed, StorageFault):
            DONE[f"faults: {fault[0]}"] += 1
        else:
            self.rows = after
        self.open()
        with closing(open_label_set(self.path)) as reader:
            found = self.read(reader)
        assert found in (self.rows, after), "part of a batch was recorded"
        self.rows = found

    @precondition(lambda self: self.digest is None and self.rows)
    @rule(torn=st.binary(max_size=300))
    def tear(self, torn: bytes) -> None:
        """The server is killed, and the log ends in the beginning of a frame."""
        assert self.recording is not None
        self.recording.close()
        log = Places(self.path).recording_log
        if log.exists():
            with log.open("ab") as file:
                file.write(b"LCLOG\0\1\n" + torn if torn else b"")
        self.open()
        DONE["torn logs"] += 1

    @precondition(lambda self: self.digest is None and self.rows)
    @rule(part=st.booleans(), fault=faults(90))
    def seal(self, part: bool, fault: tuple[str, int] | None) -> None:
        """All of it, or what there is; cut off anywhere, it goes on."""
        whole = len(self.rows) == len(RUN.places)
        if self.part is None and not whole and not part:
            assert self.recording is not None
            with pytest.raises(RowsMissing):
                self.recording.seal()
            return
        recording = self.open(None if fault is None else Faulty(fault[1], fault[0]))
        try:
            self.digest = recording.seal(part=part).digest
        except (Killed, StorageFault):
            DONE[f"faults: {fault and fault[0]}"] += 1
            recording.close()
            self.recording = None
            if Places(self.path).recording.exists():
                self.part = True if self.open().stand().sealing else self.part
            else:
                with closing(open_label_set(self.path)) as reader:
                    self.digest = reader.describe().digest
                assert self.digest, "it is no recording any more, and not sealed"
        if self.digest:
            DONE["recordings sealed"] += 1

    @precondition(lambda self: self.digest)
    @rule()
    def compare(self) -> None:
        """What it came to is what is written of the same rows directly, whatever order they came in."""
        with closing(LocalLabelSet(self.path)) as reader:
            assert [report for report in reader.verify_all() if not report.ok] == []
            assert reader.describe().digest == self.digest
            assert self.read(reader) == self.rows

    @invariant()
    def what_was_acknowledged_is_served_and_nothing_else(self) -> None:
        for reading in self.readings:
            reading.check()
        if self.readings:
            assert self.read(self.reader) == self.rows
            with closing(open_label_set(self.path)) as fresh:
                assert self.read(fresh) == self.rows
        seen, self.seen = self.seen, []
        assert {pair for each in seen for pair in each.items()} <= self.given

    def teardown(self) -> None:
        for reading in self.readings:
            reading.close()
        if self.readings:
            self.reader.close()
        if self.recording is not None:
            self.recording.close()
        shutil.rmtree(self.root)

    @precondition(lambda self: self.digest is None and self.part is None and max(self.sittings.values(), default=0) > 1)
    @rule(data=st.data())
    def record_as_one_that_was_replaced(self, data: st.DataObject) -> None:
        """An earlier sitting of a recorder is heard no more."""
        rank = data.draw(st.sampled_from([rank for rank, sitting in self.sittings.items() if sitting > 1]))
        assert self.recording is not None
        with pytest.raises(RecorderReplaced):
            self.recording.append(RUN.batch([0], step=STEPS.start + 9, other=9), Who(rank, self.sittings[rank] - 1))


class LongStore(Store):
    """The same, for longer."""


class LongRecorded(Recorded):
    """The same, for longer."""


TestStore, TestRecorded = Store.TestCase, Recorded.TestCase
TestStore.settings = TestRecorded.settings = FAST
TestStoreForLonger = pytest.mark.proof(pytest.mark.timeout(7200)(LongStore.TestCase))
TestRecordedForLonger = pytest.mark.proof(pytest.mark.timeout(7200)(LongRecorded.TestCase))
TestStoreForLonger.settings = TestRecordedForLonger.settings = LONG
