"""What a recorder does while the place that it records into is slow, full or away."""

import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.recordings import (
    CLASSES,
    EXAMPLES,
    LOGITS,
    MASK,
    OF_TOKENS,
    TOKENS,
    K,
    add,
    causal,
    recording,
    rows_of,
)
from tests.client.rows import inputs_of

from logitcache.client import Recorder
from logitcache.client import recorder as recorder_module
from logitcache.client.record import begun
from logitcache.client.recording_sinks import LocalSink
from logitcache.labels.errors import (
    DeadlineExceeded,
    DiskFull,
    IdentityChanged,
    InvalidRequest,
    KeyRefused,
    LabelSetNotFound,
    LogitcacheError,
    MalformedMessage,
    RequestRefused,
    RowsMissing,
    ServerFault,
    TeacherFault,
    UntrustedServer,
)
from logitcache.labels.identity import Identity
from logitcache.labels.ids import Ids
from logitcache.labels.recorded import RecordedRows, RecordingTerms, Stand, Who, recorder_id

DIGEST = "sha256:" + "2" * 64


class Slow:
    """In the place of a folder or a server: it takes rows while ``gate`` is open, and raises what stands in
    ``errors``."""

    def __init__(self) -> None:
        self.gate, self.asked = threading.Event(), threading.Semaphore(0)
        self.errors: deque[Exception] = deque()
        self.refused: set[int] = set()
        self.sent: list[RecordedRows] = []
        self.gate.set()

    def begin(self, terms: RecordingTerms, who: Who, ids: Ids | None) -> Stand:
        return Stand(terms.examples, 0, 0)

    def append(self, rows: RecordedRows, who: Who) -> None:
        self.asked.release()
        assert self.gate.wait(60)
        if self.errors:
            raise self.errors.popleft()
        unknown = sorted(self.refused & set(rows.ids.keys.tolist()))
        if unknown:
            raise RowsMissing(f"unknown: {unknown}", unknown=unknown, unlabelled=[])
        self.sent.append(rows)

    def finish(self, who: Who, *, part: bool) -> Stand:
        return Stand(EXAMPLES, EXAMPLES, EXAMPLES, (who.rank,), digest=DIGEST)

    def close(self) -> None:
        self.gate.set()

    @property
    def ids(self) -> list[list[int]]:
        """Ids of each request that was taken."""
        return [rows.ids.keys.tolist() for rows in self.sent]

    @property
    def all_ids(self) -> list[int]:
        return [id for ids in self.ids for id in ids]


@pytest.fixture
def slow() -> Slow:
    return Slow()


def into(sink: Slow, **options: Any) -> Recorder:
    teacher = recorder_id("run-1", range(100), "train", "moving", "")
    identity = Identity(teacher, K, CLASSES, (1.0, 2.0), "float16")
    return begun(
        sink, "run-1", RecordingTerms(identity, range(100), EXAMPLES), 0, None, **{"buffer_bytes": 1} | options
    )


def in_thread(work: Callable[[], Any]) -> threading.Event:
    """Set when the work is done."""
    done = threading.Event()

    def run() -> None:
        work()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done


def test_adding_waits_for_a_slow_server_only_when_the_buffer_is_full(slow: Slow) -> None:
    slow.gate.clear()
    with into(slow, buffer_bytes=50) as recorder:
        add(recorder, 0)
        assert slow.asked.acquire(timeout=30)  # it is being sent, and does not come back
        add(recorder, 1)
        add(recorder, 2)  # two rows are more than the buffer
        third = in_thread(lambda: add(recorder, 3))
        assert not third.wait(0.2)
        slow.gate.set()
        assert third.wait(30)
    assert sorted(slow.all_ids) == [0, 1, 2, 3]


def test_what_has_come_together_meanwhile_is_sent_as_one(slow: Slow) -> None:
    slow.gate.clear()
    with into(slow, buffer_bytes=1 << 20) as recorder:
        add(recorder, 0)
        assert slow.asked.acquire(timeout=30)
        for id in range(1, 20):
            add(recorder, id)
        slow.gate.set()
        recorder.flush()
    assert slow.ids == [[0], list(range(1, 20))]
    assert slow.sent[1].steps.tolist() == list(range(1, 20))


@pytest.mark.parametrize(
    "error",
    [
        DeadlineExceeded("away"),
        DiskFull("full"),
        KeyRefused("the key was revoked"),
        UntrustedServer("a new certificate"),
        RequestRefused("a proxy's page"),
        MalformedMessage("a proxy's page"),
        ServerFault("a mistake of the server"),
        InvalidRequest("'run-1' is not being recorded: there is nothing to continue"),  # its volume is not mounted yet
        LabelSetNotFound("likewise"),
        IdentityChanged("another recording is there"),
        RuntimeError("a mistake of ours"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_could_not_be_sent_is_kept_and_sent_when_it_is_flushed_again(slow: Slow, error: Exception) -> None:
    with into(slow) as recorder:
        slow.errors.append(error)
        add(recorder, 4, 5)
        with pytest.raises(type(error)):
            recorder.flush()
        recorder.flush()
        assert slow.ids == [[4, 5]]
        slow.errors.append(error)
        add(recorder, 6)
        with pytest.raises(type(error)):
            recorder.flush()
        add(recorder, 7)  # this too has it sent
        recorder.flush()
    assert slow.all_ids == [4, 5, 6, 7]


def test_a_call_that_raises_what_happened_before_adds_nothing_and_counts_no_step(slow: Slow) -> None:
    with into(slow) as recorder:
        slow.errors.append(DiskFull("full"))
        add(recorder, 0)
        with pytest.raises(DiskFull):
            recorder.flush()
        slow.errors.append(DiskFull("full"))
        while True:  # until what is tried again behind this has failed again
            try:
                add(recorder, 1)
            except DiskFull:
                break
        recorder.flush()
        recorder.add([2], LOGITS[[2]])
        recorder.flush()
    steps = np.concatenate([rows.steps for rows in slow.sent])
    assert steps.tolist() == list(range(len(steps)))


def test_leaving_while_the_server_is_away_says_so_once_more_and_ends(slow: Slow) -> None:
    slow.errors.extend([DeadlineExceeded("away")] * 2)
    recorder = into(slow)
    add(recorder, 0)
    with pytest.raises(DeadlineExceeded):
        recorder.flush()
    with pytest.raises(DeadlineExceeded):
        recorder.close()
    recorder.close()
    assert (slow.ids, len(slow.errors)) == ([], 0)
    with pytest.raises(InvalidRequest, match="closed"):
        add(recorder, 0)


def test_only_the_batch_at_fault_is_lost_of_those_that_were_sent_together(slow: Slow) -> None:
    slow.gate.clear()
    slow.refused = {99}
    recorder = into(slow, buffer_bytes=1 << 20)
    add(recorder, 0)
    assert slow.asked.acquire(timeout=30)
    add(recorder, 1)
    recorder.add([99, 2], LOGITS[:2])
    broken = LOGITS[[3, 4]].clone()
    broken[1, 0] = torch.nan
    recorder.add([3, 4], broken)
    add(recorder, 5)
    slow.gate.set()
    with pytest.raises(LogitcacheError) as caught:
        recorder.flush()
    assert isinstance(caught.value, TeacherFault | RowsMissing)
    recorder.close()
    assert slow.ids == [[0], [1], [5]]


def test_rows_that_do_not_come_off_the_device_take_no_others_with_them(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> Any:
        raise RuntimeError("the device is lost")

    slow.gate.clear()
    with into(slow, buffer_bytes=1 << 20) as recorder:
        add(recorder, 0)
        assert slow.asked.acquire(timeout=30)
        add(recorder, 1)
        with monkeypatch.context() as patched:
            patched.setattr("logitcache.client.selecting.selected", lambda *_: lost)
            add(recorder, 2)
        add(recorder, 3)
        slow.gate.set()
        with pytest.raises(RuntimeError, match="device is lost"):
            recorder.flush()
        recorder.flush()
    assert slow.ids == [[0], [1, 3]]


@pytest.mark.parametrize("alignment", ["pointwise", "causal"])
def test_a_batch_too_long_for_one_request_is_sent_in_parts(
    tmp_path: Path, alignment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = []
    for name, most in (("run-1", 1 << 20), ("run-2", 100)):
        monkeypatch.setattr(recorder_module, "MOST_BYTES_AT_ONCE", most)
        taken: list[int] = []
        append = LocalSink.append

        def counted(self: LocalSink, rows: RecordedRows, who: Who, append: Any = append, taken: Any = taken) -> None:
            taken.append(len(rows))
            append(self, rows, who)

        with monkeypatch.context() as patched:
            patched.setattr(LocalSink, "append", counted)
            if alignment == "causal":
                with causal(tmp_path / name) as recorder:
                    recorder.add([0, 1, 2], OF_TOKENS, inputs=TOKENS, attention_mask=MASK)
            else:
                with recording(tmp_path / name) as recorder:
                    recorder.add(range(EXAMPLES), LOGITS)
        assert (len(taken) == 1) == (most > 100)
        digests.append(recorder.digest)
    assert digests[0] == digests[1] is not None


def test_a_loop_may_use_its_arrays_anew_at_once(slow: Slow) -> None:
    slow.gate.clear()
    ids, logits, soft = np.array([1, 2]), LOGITS[[1, 2]].clone(), rows_of([3, 4])
    with into(slow, buffer_bytes=1 << 20) as recorder:
        recorder.add(ids, logits, inputs=inputs_of(ids))
        recorder.add_rows(others := np.array([3, 4]), soft)
        expected = soft.indices.copy()
        for array in (ids, others, soft.indices):
            array[:] = 0
        logits.zero_()
        slow.gate.set()
    assert slow.all_ids == [1, 2, 3, 4]
    found = np.concatenate([rows.soft.indices for rows in slow.sent])
    assert np.array_equal(found[:2], LOGITS[[1, 2]].topk(K).indices)
    assert np.array_equal(found[2:], expected)
