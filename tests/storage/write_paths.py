"""Everything that changes files of a store, each as a path that can be cut off at any operation and gone on with.

A path says what it was told is durable, so that what stands on the disk afterwards can be held against that.
"""

import shutil
from abc import ABC, abstractmethod
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from tests.building import Reference, build, grown, reference, statistics_of
from tests.runs import Run, small_run

from logitcache.labels.bill import Served
from logitcache.labels.errors import RowsMissing
from logitcache.labels.recorded import Who
from logitcache.labels.soft_labels import SoftLabels
from logitcache.server.jobs import folder as job_folder
from logitcache.server.jobs import recording as job_recording
from logitcache.server.jobs.folder import JobFolder
from logitcache.server.jobs.job import Job, JobRequest, Outcome, ProcessId
from logitcache.storage import LocalLabelSet, Recording, open_label_set
from logitcache.storage.admission import quarantine
from logitcache.storage.files import Files
from logitcache.storage.lock import WriterLock
from logitcache.storage.manifest import read_layout
from logitcache.storage.places import Places
from logitcache.storage.recorded import Recorded as RecordedRows
from logitcache.storage.served import ServedTally
from logitcache.storage.writer import LabelSetWriter

TINY: dict[str, Any] = {"k": 1, "classes": 3, "temperatures": (1.0,), "short_by": 4000}


@dataclass
class Told:
    """What a write path was told: shards, batches or states that are ``durable``, rows ``counted``, the digest."""

    durable: set[Any] = field(default_factory=set)
    counted: int = 0
    digest: str | None = None

    def copy(self) -> "Told":
        return deepcopy(self)


@dataclass
class WritePath(ABC):
    """One of them; ``path`` is always that of the label set, or of the folder of jobs.

    Attributes:
        template: the folder that holds the store as the path finds it.
    """

    name: str
    template: Path

    def path(self, root: Path) -> Path:
        return root / "store" / "set"

    def prepare(self) -> None:
        """Make the template."""
        self.template.mkdir(parents=True)

    def whole(self) -> Path:
        """Where an undisturbed one is made, for comparing."""
        root = self.template.with_name(f"{self.template.name}-whole")
        root.mkdir(parents=True)
        return self.path(root)

    def begun(self, root: Path) -> Path:
        """A copy of what the path finds."""
        shutil.copytree(self.template, root)
        return self.path(root)

    @abstractmethod
    def run(self, path: Path, files: Files, told: Told) -> None:
        """Do it all, or what is still to do."""

    @abstractmethod
    def check(self, path: Path, told: Told) -> None:
        """What a reader finds is right, and all that was told durable is there."""

    @abstractmethod
    def end(self, path: Path) -> Any:
        """What the path comes to: the same each time."""


def bits(soft: SoftLabels) -> dict[str, np.ndarray]:
    """Each field's rows as bytes, (rows, bytes)."""
    rows = len(soft.indices)
    return {
        name: np.ascontiguousarray(array).view(np.uint8).reshape(rows, -1)
        for name, array in soft.arrays().items()
        if name not in ("present", "row_splits")
    }


@dataclass
class Labelled(WritePath):
    """A label set of one row an example, created and labelled: ``source`` is what it comes to."""

    source: Reference

    def __post_init__(self) -> None:
        self.arrays = {shard: self.source.arrays(self.source.layout.span(shard)) for shard in self.shards}
        self.statistics = {shard: statistics_of(self.arrays[shard], self.source.identity) for shard in self.shards}
        self.ids = self.source.at(np.arange(self.source.layout.examples))
        whole = build(self.whole(), self.source)
        with closing(LocalLabelSet(whole)) as reader:
            soft = reader.fetch(self.ids)
        self.expected, self.digest = bits(soft), soft.digest

    @property
    def shards(self) -> range:
        return range(self.source.layout.shards)

    def run(self, path: Path, files: Files, told: Told) -> None:
        with self.writer(path, files, told) as writer:
            self.label(writer, told)
            told.digest = writer.seal().digest

    def writer(self, path: Path, files: Files, told: Told, damaged: int = -1) -> LabelSetWriter:
        """A writer that takes up what is committed: of that nothing is to be labelled again."""
        committed = {int(file.stem) for file in (path / "commits").glob("*.json")} - {damaged}
        assert told.durable <= committed | {damaged}, "a shard that was committed is gone"
        writer = LabelSetWriter(path, self.source.layout, files=files)
        assert not committed & set(writer.missing), "a committed shard is to be labelled again"
        return writer

    def label(self, writer: LabelSetWriter, told: Told) -> None:
        for shard in writer.missing:
            span = self.source.layout.span(shard)
            writer.commit(shard, self.arrays[shard], self.statistics[shard], self.source.texts(span))
            told.durable.add(shard)

    def check(self, path: Path, told: Told) -> None:
        if not Places(path).group.exists():
            assert not told.durable, "a label set that was begun is gone"
            return
        with closing(LocalLabelSet(path, verify="background")) as reader:
            self.check_rows(reader, told)
            assert [report for report in reader.verify_all() if not report.ok] == []
            assert reader.damaged() == {}
            digests = [generation.digest for generation in reader.describe().generations]
            assert told.digest is None or told.digest in digests

    def served(self, told: Told) -> set[int]:
        """Shards that must be served."""
        return told.durable

    def check_rows(self, reader: LocalLabelSet, told: Told) -> None:
        """Those of committed shards are there, and whatever is there is right to the bit."""
        # Of the layout that stands; while it has not grown, later examples are unknown and masked.
        soft = reader.fetch(self.ids, on_missing="mask")
        present = soft.present
        assert present is not None
        for shard in self.served(told):
            span = self.source.layout.span(shard)
            assert present[span.start : span.stop].all(), f"shard {shard} was committed and is not served"
        for name, rows in bits(soft).items():
            assert np.array_equal(rows[present], self.expected[name][present]), f"wrong {name}"

    def end(self, path: Path) -> Any:
        with closing(LocalLabelSet(path)) as reader:
            assert all(report.ok for report in reader.verify_all())
            assert reader.describe().digest == self.digest
        content = {file for part in self.source.layout.parts for file in (path / part).glob("*")}
        assert not list((path / "staging").iterdir())
        return {str(file.relative_to(path)) for file in content}


@dataclass
class Grown(Labelled):
    """A sealed label set takes up more examples, and is sealed as its second generation."""

    begun_with: int

    def __post_init__(self) -> None:
        self.older = self.source.first(self.begun_with)
        # Built by growing: its last shard of old stays as it was.
        super().__post_init__()

    def prepare(self) -> None:
        super().prepare()
        build(self.path(self.template), self.older)

    def run(self, path: Path, files: Files, told: Told) -> None:
        told.durable |= set(range(self.begun_with))
        with self.writer(path, files, told) as writer:
            if writer.layout != self.source.layout:
                assert writer.missing == []
                writer.seal()
                writer.grow(self.source.layout)
            self.label(writer, told)
            told.digest = writer.seal().digest

    def served(self, told: Told) -> set[int]:
        # New shards wait for the generation that lists them.
        return told.durable if told.digest else told.durable & set(range(self.begun_with))

    def check(self, path: Path, told: Told) -> None:
        super().check(path, told)
        with closing(LocalLabelSet(path)) as reader:
            assert len(reader.describe().generations) >= 1
            old = reader.fetch(self.ids[: self.older.layout.examples], digest=reader.describe().generations[0].digest)
        for name, rows in bits(old).items():
            assert np.array_equal(rows, self.expected[name][: len(rows)])


@dataclass
class Repaired(Labelled):
    """One shard of a sealed label set has rotted: the next run moves it aside, labels it again and seals.

    Attributes:
        damaged: that shard.
        otherwise: the teacher gives other bits this time, so that it becomes a second generation.
    """

    damaged: int
    otherwise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.otherwise:
            logits = self.arrays[self.damaged]["logits"]
            logits[:, -1] -= np.asarray(0.25, logits.dtype)
            rows = self.source.layout.span(self.damaged)
            self.expected["logits"][rows.start : rows.stop] = (
                np.ascontiguousarray(logits).view(np.uint8).reshape(len(logits), -1)
            )
            self.digest = None

    def prepare(self) -> None:
        super().prepare()
        path = build(self.path(self.template), self.source)
        chunk = path / "logits" / f"c.{self.damaged}.0"
        content = bytearray(chunk.read_bytes())
        content[1] ^= 4
        chunk.write_bytes(content)
        self.rotten = bytes(content)

    def served(self, told: Told) -> set[int]:
        # Other rows wait for the generation that lists them.
        return told.durable if told.digest or not self.otherwise else told.durable & self.sound

    def is_damaged(self, path: Path) -> bool:
        """It is not repaired yet."""
        chunk = path / "logits" / f"c.{self.damaged}.0"
        return chunk.read_bytes() == self.rotten

    @property
    def sound(self) -> set[int]:
        return set(self.shards) - {self.damaged}

    def run(self, path: Path, files: Files, told: Told) -> None:
        told.durable |= self.sound
        with self.writer(path, files, told, self.damaged) as writer:
            assert set(writer.missing) <= {self.damaged}
            self.label(writer, told)
            told.digest = writer.seal().digest

    def check(self, path: Path, told: Told) -> None:
        # On a copy: who reads a damaged shard moves it aside, which is the path's to do.
        copy = path.parents[1].with_name("looked-at") / "store" / "set"
        shutil.copytree(path, copy)
        with closing(LocalLabelSet(copy)) as reader:
            self.check_rows(reader, told)
            reader.verify_all()
            assert set(reader.damaged()) <= {self.damaged}
            assert reader.describe().generations
        shutil.rmtree(copy.parents[1])
        withdrawn = list((path / "quarantine").glob("*/commit.json"))
        assert withdrawn or (path / "commits" / f"{self.damaged}.json").exists(), "a withdrawn commit was lost"

    def end(self, path: Path) -> Any:
        with closing(LocalLabelSet(path)) as reader:
            self.digest = self.digest or reader.describe().digest
        return super().end(path)


@dataclass
class Quarantined(Repaired):
    """A reader finds the damage and moves the shard aside; the next run labels it again."""

    def run(self, path: Path, files: Files, told: Told) -> None:
        told.durable |= self.sound
        places = Places(path)
        if self.damaged not in told.durable and places.commit(self.damaged).exists() and self.is_damaged(path):
            with WriterLock(places.lock):
                quarantine(places, self.source.layout, self.damaged, "for a test", files)
        super().run(path, files, told)


@dataclass
class Recorded(WritePath):
    """A recording: begun, recorded in batches, finished and sealed.

    Attributes:
        part: some examples are never recorded.
        torn: it was begun before, and its log ends in a frame that was cut off.
    """

    source: Run
    part: bool = False
    torn: bool = False

    def __post_init__(self) -> None:
        views = self.source.identity.views
        places = self.source.places[: -views if self.part else None]
        self.batches = np.array_split(places, 3)
        self.ids = self.source.ids_of(range(self.source.terms.examples))
        whole, told = self.whole(), Told()
        self.run(whole, Files(), told)
        self.digest = told.digest
        with closing(LocalLabelSet(whole)) as reader:
            self.expected = {place: self.served(reader, place) for place in places.tolist()}

    def served(self, reader: Any, place: int) -> dict[str, bytes] | None:
        """One place's rows, None where there are none."""
        example, view = divmod(place, self.source.identity.views)
        try:
            soft = reader.fetch([self.ids[example]], view=view)
        except RowsMissing:
            return None
        return {name: array.tobytes() for name, array in soft.arrays().items()}

    def prepare(self) -> None:
        super().prepare()
        if self.torn:
            path = self.path(self.template)
            self.source.begun(path).close()
            log = Places(path).recording_log
            log.write_bytes(log.read_bytes() + b"LCLOG\0\1\nhalf of a frame")

    def run(self, path: Path, files: Files, told: Told) -> None:
        places = Places(path)
        if places.group.exists() and not places.recording.exists():
            with LabelSetWriter(path, read_layout(path), files=files) as writer:
                told.digest = writer.seal().digest
            return
        with Recording(path, self.source.terms, self.source.ids, files=files) as recording:
            if not recording.stand().sealing:
                who = Who(0, recording._recorded.sitting(0) + 1)
                recording.begin(who)
                for number, batch in enumerate(self.batches):
                    if number not in told.durable:
                        recording.append(self.source.batch(batch), who)
                        told.durable.add(number)
                recording.finish(who)
            told.digest = recording.seal(part=self.part).digest

    def check(self, path: Path, told: Told) -> None:
        if not Places(path).group.exists() and not Places(path).recording.exists():
            assert not told.durable, "a recording that was begun is gone"
            return
        if Places(path).recording.exists() and list(Places(path).commits.glob("*.json")):
            with closing(RecordedRows(path)) as recorded:
                recorded.follow()
                assert recorded.sealing is not None, "rows may be recorded that the shards there will not have"
        with closing(open_label_set(path, verify="background")) as reader:
            acknowledged = {place for number in told.durable for place in self.batches[number].tolist()}
            for place in self.source.places.tolist():
                served = self.served(reader, place)
                assert served is not None or place not in acknowledged, f"place {place} was acknowledged and is lost"
                assert served is None or served == self.expected[place], f"wrong rows of place {place}"
            assert reader.damaged() == {}
            assert told.digest is None or reader.describe().digest == told.digest

    def end(self, path: Path) -> Any:
        with closing(LocalLabelSet(path)) as reader:
            assert all(report.ok for report in reader.verify_all())
            assert reader.describe().digest == self.digest
        assert not Places(path).recording.exists()
        return None


@dataclass
class Tallied(Labelled):
    """What servers answered is written down beside a sealed label set, time and again."""

    def prepare(self) -> None:
        super().prepare()
        build(self.path(self.template), self.source)

    def run(self, path: Path, files: Files, told: Told) -> None:
        told.durable |= set(self.shards)
        tally = ServedTally(Places(path).served, self.source.identity, files)
        while (tally.so_far() or Served()).rows < 30:
            tally.count(10, 0.5)
            tally.save()
            if not tally.is_unsaved:
                told.counted = (tally.so_far() or Served()).rows
        with self.writer(path, files, told) as writer:
            told.digest = writer.seal().digest

    def check(self, path: Path, told: Told) -> None:
        super().check(path, told)
        found = ServedTally(Places(path).served, self.source.identity).so_far() or Served()
        assert found.rows in (0, 10, 20, 30)
        assert found.rows >= told.counted
        assert found.seconds == found.rows / 20


REQUEST = JobRequest(label_set="set", teacher="one", dataset="points", top_k=3)


@dataclass
class JobStates(WritePath):
    """A server writes a job down at each step, its process how it ended."""

    def __post_init__(self) -> None:
        queued = Job.of(REQUEST)
        running = queued.running(ProcessId(pid=7, began="today"), "cpu")
        again = queued.model_copy(update={"attempt": 2})
        self.states = [queued, running, again, again.over("succeeded", digest="sha256:" + "1" * 64)]
        self.outcome = Outcome(digest="sha256:" + "1" * 64)

    def path(self, root: Path) -> Path:
        return root / "store" / job_folder.FOLDER

    def prepare(self) -> None:
        self.path(self.template).mkdir(parents=True)

    def run(self, path: Path, files: Files, told: Told) -> None:
        folder = JobFolder(path, REQUEST.job_id)
        with patch.object(job_folder, "Files", lambda: files), patch.object(job_recording, "Files", lambda: files):
            for number, job in enumerate(self.states):
                if number in told.durable:
                    continue
                if number == 3:
                    job_recording.write_json(folder.path / job_recording.OUTCOME, self.outcome.model_dump())
                    told.durable.add("outcome")
                folder.write(job)
                told.durable.add(number)
                if number == 2:
                    folder.clear(2)

    def check(self, path: Path, told: Told) -> None:
        folder = JobFolder(path, REQUEST.job_id)
        found = folder.read()
        last = max((number for number in told.durable if isinstance(number, int)), default=-1)
        assert found in [*([None] if last < 0 else [self.states[last]]), *self.states[last + 1 : last + 2]]
        if "outcome" in told.durable:
            assert folder.outcome() == self.outcome

    def end(self, path: Path) -> Any:
        assert JobFolder(path, REQUEST.job_id).read() == self.states[-1]
        return None


def write_paths(root: Path) -> dict[str, WritePath]:
    """All of them, with their templates made."""
    texts = reference(2, ids="text", targets=True, **TINY)
    plain = reference(2, **TINY)
    runs = {"texts": small_run(4, ids="text", views=2, **_run_options()), "causal": _causal()}
    made: list[WritePath] = [
        Labelled("create, commit, seal", root / "labelled", texts),
        Grown("grow", root / "grown", grown(reference(1, **TINY), 4200), 1),
        Repaired("quarantine and repair", root / "repaired", texts, 1),
        Repaired("repair with other rows", root / "otherwise", plain, 0, otherwise=True),
        Quarantined("quarantine by a reader", root / "quarantined", plain, 1),
        Recorded("record and seal", root / "recorded", runs["texts"]),
        Recorded("record tokens and seal a part", root / "part", runs["causal"], part=True),
        Recorded("record on after a torn frame", root / "torn", runs["texts"], torn=True),
        Tallied("count what was served", root / "tallied", plain),
        JobStates("states of a job", root / "jobs"),
    ]
    for each in made:
        each.prepare()
    return {each.name: each for each in made}


def _run_options() -> dict[str, Any]:
    return {name: value for name, value in TINY.items() if name != "short_by"}


def _causal() -> Run:
    return small_run(4, alignment="causal", ids="text", **_run_options())
