"""A shard is committed while the next one is labelled: how far they may be apart, and what failures on either side do.

Shards are of 4,096 examples, the dataset has 9,000. Both sides are told to wait for each other where a test is about
their order; were they not at work together, the waiting would end in `Late`.
"""

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.server import specimens
from tests.server.test_precompute import Notes
from tests.storage.faults import Counting

from logitcache.labels.errors import DiskFull, TeacherFault
from logitcache.server.labelling.precompute import precompute
from logitcache.server.labelling.preparation import Request
from logitcache.storage import LocalLabelSet

SHARD = 4096
BATCH = 512
STOPPED = "stopped: {} of 3 shards are committed and kept; the same command goes on from there"


OnBatch = Callable[[Callable[[int], None]], None]


class Late(Exception):
    """What a test waited for did not come."""


class Signal:
    """Something that happens once, and can be waited for."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        self._event.set()

    def wait(self) -> None:
        if not self._event.wait(60):
            raise Late


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    here = "tests.server.specimens"
    return Request(
        "set", f"{here}:Watched", f"{here}:data", tmp_path / "store", 3, (), BATCH, "cpu", rows_per_shard=SHARD
    )


@pytest.fixture
def on_batch(monkeypatch: pytest.MonkeyPatch) -> OnBatch:
    """Have something done before each batch, whose first ordinal it is given; not for the trial of one batch before."""

    def install(tell: Callable[[int], None]) -> None:
        trial = iter([True])

        def without_the_trial(first: int) -> None:
            if not next(trial, False):
                tell(first)

        monkeypatch.setattr(specimens.Watched, "tell", without_the_trial, raising=False)

    return install


def committing(at: Callable[[int, str], None]) -> Counting:
    """Files that call ``at(shard, what)`` at the first write of a shard, "begins", and before its commit, "ends"."""

    def counted(number: int, operation: str, path: Path) -> None:
        part = path.name.split(".")
        if operation == "write" and part[0] == "ids" and part[1].isdigit():
            at(int(part[1]), "begins")
        if operation == "link" and path.parent.name == "commits":
            at(int(path.stem), "ends")

    return Counting(counted)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def committed(request: Request) -> list[int]:
    return sorted(int(path.stem) for path in (request.path / "commits").iterdir())


def test_a_shard_is_committed_while_the_next_one_is_labelled_and_no_other(request_: Request, on_batch: OnBatch) -> None:
    events: list[tuple[str, int]] = []
    begun, labelled, third = Signal(), Signal(), threading.Event()

    def tell(first: int) -> None:
        events.append(("batch", first))
        if first == SHARD:
            begun.wait()
        if first == 2 * SHARD - BATCH:
            labelled.set()
        if first == 2 * SHARD:
            third.set()

    def at(shard: int, what: str) -> None:
        if (what, shard) == ("begins", 0):
            begun.set()
        if (what, shard) == ("ends", 0):
            labelled.wait()
            # The third shard would come now, were it not to wait for this commit.
            third.wait(0.3)
        events.append((what, shard))

    on_batch(tell)
    precompute(request_, files=committing(at))
    assert events.index(("begins", 0)) < events.index(("batch", 2 * SHARD - BATCH)) < events.index(("ends", 0))
    assert events.index(("ends", 0)) < events.index(("batch", 2 * SHARD))
    assert [event for event in events if event[0] != "batch"] == [
        (what, shard) for shard in range(3) for what in ("begins", "ends")
    ]


def test_a_commit_that_fails_is_told_as_it_is_and_nothing_later_is_committed(
    request_: Request, on_batch: OnBatch
) -> None:
    failed = Signal()

    def at(shard: int, what: str) -> None:
        if (shard, what) == (1, "begins"):
            failed.set()
            raise full()

    on_batch(lambda first: failed.wait() if first == 2 * SHARD else None)
    notes = Notes()
    with pytest.raises(DiskFull, match="what is committed is kept"):
        precompute(request_, notes, files=committing(at))
    assert (committed(request_), notes.notes) == ([0], [STOPPED.format(1)])
    assert list((request_.path / "staging").iterdir()) == []
    on_batch(lambda first: None)
    assert precompute(request_).labelled == 9000 - SHARD


@pytest.mark.parametrize("also_the_commit_fails", [False, True])
def test_a_fault_of_the_teacher_waits_for_the_commit_before_it(
    request_: Request, on_batch: OnBatch, also_the_commit_fails: bool
) -> None:
    raised = Signal()

    def tell(first: int) -> None:
        if first == SHARD + BATCH:
            raised.set()
            raise RuntimeError("the teacher's own trouble")

    def at(shard: int, what: str) -> None:
        if what == "ends":
            raised.wait()
            if also_the_commit_fails:
                raise full()

    on_batch(tell)
    notes = Notes()
    # What goes wrong with the earlier shard is what there is to mend first.
    with pytest.raises(DiskFull if also_the_commit_fails else TeacherFault):
        precompute(request_, notes, files=committing(at))
    kept = [] if also_the_commit_fails else [0]
    assert (committed(request_), notes.notes) == (kept, [STOPPED.format(len(kept))])
    on_batch(lambda first: None)
    assert precompute(request_).labelled == 9000 - SHARD * len(kept)


def test_interrupted_twice_it_still_finishes_the_commit_under_way(request_: Request, on_batch: OnBatch) -> None:
    interrupted = Signal()

    class Interrupting(Notes):
        def advance(self, rows: int) -> None:
            super().advance(rows)
            if self.rows > SHARD:
                interrupted.set()
                raise KeyboardInterrupt

    def at(shard: int, what: str) -> None:
        if what == "ends":
            interrupted.wait()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    on_batch(lambda first: None)
    notes = Interrupting()
    with pytest.raises(KeyboardInterrupt):
        precompute(request_, notes, files=committing(at))
    assert (committed(request_), notes.notes) == ([0], [STOPPED.format(1)])
    reader = LocalLabelSet(request_.path)
    assert len(reader.fetch(np.arange(SHARD))) == SHARD
    reader.close()
