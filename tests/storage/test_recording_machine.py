"""Recordings under arbitrary sequences of recording, being replaced, torn, failing and sealing, against a plain model
of them, while another thread reads all along.
"""

import shutil
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.runs import STEPS, small_run
from tests.storage.faults import Faulty, Killed
from tests.storage.machines import DONE, FAST, LONG, Reading, faults

from logitcache.labels.errors import RecorderReplaced, RowsMissing, StorageFault
from logitcache.labels.recorded import Who
from logitcache.storage import LocalLabelSet, Recording, open_label_set
from logitcache.storage.files import Files
from logitcache.storage.places import Places

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")

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
        try:
            recording = self.open(None if fault is None else Faulty(fault[1], fault[0]))
            self.digest = recording.seal(part=part).digest
        except (Killed, StorageFault):
            DONE[f"faults: {fault and fault[0]}"] += 1
            if self.recording is not None:
                self.recording.close()
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


class LongRecorded(Recorded):
    """The same, for longer."""


TestRecorded = Recorded.TestCase
TestRecorded.settings = FAST
TestRecordedForLonger = pytest.mark.proof(pytest.mark.timeout(7200)(LongRecorded.TestCase))
TestRecordedForLonger.settings = LONG
