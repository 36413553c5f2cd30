"""Recording: what was acknowledged is read back bit for bit whatever happens, and sealed as if it were precomputed."""

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.building import SHAPES, Reference, build, reference
from tests.conformance import LabelSetConformance, ShapesConformance
from tests.runs import RANK_0, RUNS, STEPS, Run, run_of, small_run
from tests.storage.faults import Counting, failing, failing_once, full_disk, killed

from logitcache.labels import wire
from logitcache.labels.errors import (
    DigestChanged,
    DiskFull,
    IdentityChanged,
    InvalidIds,
    InvalidName,
    InvalidRequest,
    LabelSetLocked,
    LabelSetNotFound,
    LogitcacheError,
    NewerFormat,
    NotALabelSet,
    RecorderReplaced,
    RowsMissing,
    ShapeMismatch,
    ShardDamaged,
    StorageFault,
    StoreNotFound,
    TeacherFault,
    TooManyRows,
    Unavailable,
    UnknownView,
)
from logitcache.labels.identity import canonical_json, sha256_hex
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.label_set import LABELLED, UNKNOWN, UNLABELLED, LabelSet
from logitcache.labels.recorded import MAX_STEP, RecordedRows, Who
from logitcache.storage import LocalLabelSet, RecordedLabelSet, Recording, log, open_label_set
from logitcache.storage.files import Bytes, Files
from logitcache.storage.log import HEADER, Kind, Log, LogWriter, slot_dtype
from logitcache.storage.places import Places
from logitcache.storage.recorded import read_terms
from logitcache.storage.store import label_set_names

TINY: dict[str, Any] = {"k": 1, "classes": 3, "temperatures": (1.0,)}

OPENING = 5
"""Operations with which a recording is taken up: what a killed process may have left is synced, or cut off."""

Reader = LocalLabelSet | RecordedLabelSet

Attempt = Callable[[], None]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Run:
    return small_run(**RUNS[request.param])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "run"


def files_of(path: Path) -> dict[str, bytes]:
    """Every file of a label set, but for who wrote it last and what was verified on this machine."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: content for name, content in found.items() if name not in ("lock", "stamps.json")}


def digest_of(path: Path) -> str | None:
    reader = open_label_set(path)
    digest = reader.describe().digest
    reader.close()
    return digest


def log_of(path: Path) -> bytes:
    return Places(path).recording_log.read_bytes()


def assert_holds(reader: Reader, run: Run, places: Any, *, other: int = 0) -> None:
    """Exactly these places are given out, bit for bit as they were recorded."""
    views = run.identity.views
    held = set(np.asarray(places).tolist())
    for place in run.places.tolist():
        example, view = divmod(place, views)
        ids = run.ids_of([example])
        if place not in held:
            with pytest.raises(RowsMissing) as caught:
                reader.fetch(ids, view=view)
            assert (caught.value.unknown, caught.value.unlabelled) == ([], ids)
            continue
        given = run.batch([place], other=other).soft.arrays()
        found = reader.fetch(ids, view=view).arrays()
        assert found.keys() == given.keys()
        for name, array in given.items():
            assert (found[name].dtype, found[name].tobytes()) == (array.dtype, array.tobytes()), name
    complete = [held >= set(range(each * views, each * views + views)) for each in range(run.terms.examples)]
    states = reader.states(run.ids_of(range(run.terms.examples)))
    assert states.tolist() == [LABELLED if each else UNLABELLED for each in complete]


class TestAcknowledged:
    """What `append` returned for can be read."""

    def test_rows_are_read_back_bit_for_bit_by_readers_opened_before_and_after(self, run: Run, path: Path) -> None:
        with run.begun(path) as recording:
            before = open_label_set(path)
            assert isinstance(before, RecordedLabelSet)
            for done in (0, 4, len(run.places)):
                if done:
                    recording.append(run.batch(run.places[max(0, done - 4) : done]), RANK_0)
                    recording.append(run.batch(run.places[:done]), RANK_0)
                after = RecordedLabelSet(path)
                for reader in (before, after):
                    assert_holds(reader, run, run.places[:done])
                after.close()
            before.close()

    def test_another_process_reads_what_was_acknowledged(self, run: Run, path: Path) -> None:
        with run.begun(path) as recording:
            recording.append(run.batch(run.places[:4]), RANK_0)
            child = multiprocessing.get_context("fork").Process(target=read_elsewhere, args=(path, run))
            child.start()
            child.join()
            assert child.exitcode == 0

    def test_it_describes_how_far_it_is(self, run: Run, path: Path) -> None:
        places = run.places[: 3 * run.identity.views]
        with run.begun(path) as recording:
            recording.append(run.batch(places[:-1]), RANK_0)
            reader = RecordedLabelSet(path)
            assert reader.describe().labelled == recording.stand().recorded == 2
            recording.append(run.batch(places[-1:]), RANK_0)
            described, stand = reader.describe(), recording.stand()
            assert (described.labelled, described.examples, described.digest) == (3, run.terms.examples, None)
            assert described.rows == stand.rows == len(run.source.rows(places))
            assert (described.identity, described.shards.total, described.generation) == (run.identity, 0, None)
            assert described.label_bytes == len(log_of(path))
            assert label_set_names(path.parent) == [path.name]
            assert (stand.missing, stand.finished, stand.sealing) == ((), (), False)
            recording.finish(RANK_0)
            stand = recording.stand()
            assert (stand.missing, stand.finished) == (tuple(run.ids_of(range(3, run.terms.examples))), (0,))
            assert not reader.is_replaced
            assert not reader.is_at_hand(1)
            assert (reader.verify_all(), reader.damaged()) == ([], {})
            known = reader.example_ids()
            assert (None if known is None else known.at(slice(None))) == (
                None if run.ids is None else run.ids_of(range(run.terms.examples))
            )
            reader.close()

    def test_threads_that_share_a_reader_get_what_was_acknowledged_while_more_is_appended(self, path: Path) -> None:
        run = small_run(200)
        with run.begun(path) as recording, ThreadPoolExecutor(3) as threads:
            reader, done = RecordedLabelSet(path), 0

            def read() -> None:
                while (count := done) < len(run.places):
                    found = reader.fetch(run.places[:count]) if count else None
                    assert found is None or np.array_equal(found.indices, run.arrays["indices"][:count])

            reading = [threads.submit(read) for _ in range(3)]
            try:
                for place in run.places.tolist():
                    recording.append(run.batch([place]), RANK_0)
                    done = place + 1
            finally:
                done = len(run.places)
            for each in reading:
                each.result()
            reader.close()

    def test_the_body_for_the_wire_holds_what_fetch_gives(self, run: Run, path: Path) -> None:
        run.record(path)
        reader = RecordedLabelSet(path)
        ids = run.ids_of([4, 0, 4])
        soft, (body, digest) = reader.fetch(ids, on_missing="mask"), reader.fetch_body(ids, on_missing="mask")
        sent = wire.decode_rows(body)
        assert sent.digest is digest is soft.digest is None
        for name, array in soft.arrays().items():
            assert sent.arrays()[name].tobytes() == array.tobytes(), name
        reader.close()

    def test_a_digest_cannot_be_pinned_before_it_is_sealed(self, run: Run, path: Path) -> None:
        run.record(path)
        reader = RecordedLabelSet(path)
        with pytest.raises(DigestChanged, match="being recorded"):
            reader.fetch(run.ids_of([0]), digest="sha256:" + "0" * 64)
        reader.close()

    def test_rows_survive_that_the_system_writes_a_few_bytes_at_a_time(
        self, run: Run, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda handle, data, at: whole(handle, memoryview(data)[:7], at))
        run.record(path)
        reader = RecordedLabelSet(path)
        assert_holds(reader, run, run.places)
        reader.close()


def read_elsewhere(path: Path, run: Run) -> None:
    assert_holds(open_label_set(path), run, run.places[:4])


@pytest.fixture(scope="module")
def recorded(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_and_partial(tmp_path_factory.mktemp("store"), source)


@pytest.fixture(scope="module", params=["pointwise, integers, targets", "causal, texts, targets"])
def shape(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Reference, Path]:
    found = reference(3, **SHAPES[request.param])
    return found, recorded_and_partial(tmp_path_factory.mktemp("store"), found)


def recorded_and_partial(store: Path, source: Reference) -> Path:
    """Recordings ``complete``, of all rows, and ``partial``, of those of a first shard's examples."""
    run = run_of(source)
    for name, count in (("complete", run.terms.examples), ("partial", source.layout.span(1).start)):
        with run.begun(store / name) as recording:
            # Backwards and in parts: rows lie in another order than their examples.
            for part in reversed(np.array_split(np.arange(count), 5)):
                recording.append(run.batch(part), RANK_0)
    return store


def opened(path: Path) -> Iterator[RecordedLabelSet]:
    reader = RecordedLabelSet(path)
    yield reader
    reader.close()


class TestReader(LabelSetConformance):
    """A recording is read as every label set is, but that it has no digest yet."""

    @pytest.fixture
    def complete(self, recorded: Path) -> Iterator[LabelSet]:
        yield from opened(recorded / "complete")

    @pytest.fixture
    def partial(self, recorded: Path) -> Iterator[LabelSet]:
        yield from opened(recorded / "partial")

    def test_the_description_names_identity_digest_and_size(self, complete: LabelSet, source: Reference) -> None:
        described = complete.describe()
        assert (described.identity, described.digest) == (source.identity, None)
        assert (described.examples, described.labelled) == (source.layout.examples, source.layout.examples)

    def test_the_pinned_digest_is_served_and_another_is_refused(self, complete: LabelSet) -> None:
        with pytest.raises(DigestChanged):
            complete.fetch([0], digest="sha256:" + "0" * 64)


class TestReaderOfShapes(ShapesConformance):
    """So it is for every kind of rows and ids."""

    @pytest.fixture
    def source(self, shape: tuple[Reference, Path]) -> Reference:
        return shape[0]

    @pytest.fixture
    def complete(self, shape: tuple[Reference, Path]) -> Iterator[LabelSet]:
        yield from opened(shape[1] / "complete")

    @pytest.fixture
    def partial(self, shape: tuple[Reference, Path]) -> Iterator[LabelSet]:
        yield from opened(shape[1] / "partial")


class TestSealed:
    """What is sealed is what a precompute of the same rows would have written."""

    def test_every_file_and_the_digest_are_those_of_rows_written_directly(self, run: Run, path: Path) -> None:
        run.record(path)
        with Recording(path) as recording:
            generation = recording.seal()
        written = run.written(path.with_name("direct"))
        assert files_of(path) == files_of(written)
        assert generation.digest == digest_of(path) == digest_of(written)

    def test_so_it_is_with_several_shards(self, path: Path) -> None:
        run = run_of(reference(9, **TINY, ids="text"))
        run.record(path, size=10_000)
        told: list[tuple[int, int]] = []
        with Recording(path) as recording:
            recording.seal(progress=lambda *done: told.append(done))
        assert files_of(path) == files_of(run.written(path.with_name("direct")))
        assert told == [(32_768, 35_864), (35_864, 35_864)]
        reader = LocalLabelSet(path)
        known = reader.example_ids()
        assert known is not None
        assert tuple(known.at(slice(None))) == run.source.ids
        reader.close()

    def test_all_ids_are_known_only_of_a_label_set_that_is_sealed(self, path: Path) -> None:
        reader = LocalLabelSet(build(path, reference(2), [0]))
        with pytest.raises(InvalidRequest, match="not finished"):
            reader.example_ids()
        reader.close()

    def test_an_open_reader_goes_on_with_the_sealed_label_set(self, run: Run, path: Path) -> None:
        run.record(path)
        reader = open_label_set(path)
        assert_holds(reader, run, run.places)
        with Recording(path) as recording:
            digest = recording.seal().digest
            # Sealed once more, as by a caller who lost the answer, it is the same.
            assert recording.seal().digest == digest
        assert reader.is_replaced
        assert_holds(reader, run, run.places)
        assert reader.fetch(run.ids_of([0]), digest=digest).digest == reader.describe().digest == digest
        known = reader.example_ids()
        assert (known is None) == (run.ids is None)
        assert known is None or known.at(slice(None)) == run.ids_of(range(run.terms.examples))
        assert (reader.damaged(), [report.ok for report in reader.verify_all()]) == ({}, [True])
        reader.close()
        assert isinstance(open_label_set(path), LocalLabelSet)

    def test_no_file_of_the_recording_is_left(self, run: Run, path: Path) -> None:
        run.record(path)
        (Places(path).recording.parent / "recording.json.staged").write_bytes(b"left by a kill")
        with Recording(path) as recording:
            assert not recording.is_removed
            recording.seal()
            assert recording.is_removed
        assert not (path / "recording").exists()

    def test_nothing_is_recorded_once_it_is_being_sealed(self, run: Run, path: Path) -> None:
        run.record(path)
        with Recording(path, files=failing_once("link", 0, errno.EIO)) as recording:
            with pytest.raises(StorageFault):
                recording.seal()
            assert recording.stand().sealing
            attempts: list[Attempt] = [
                lambda: recording.append(run.batch([0]), RANK_0),
                lambda: recording.begin(Who(0, 2)),
            ]
            for refused in attempts:
                with pytest.raises(IdentityChanged, match="being sealed"):
                    refused()
            recording.finish(RANK_0)
            reader = RecordedLabelSet(path)
            assert_holds(reader, run, run.places)
            reader.close()
            digest = recording.seal().digest
        assert digest == digest_of(run.written(path.with_name("direct")))

    def test_one_that_was_closed_changes_nothing_since_another_may_have_its_lock(self, run: Run, path: Path) -> None:
        run.record(path)
        with Recording(path, files=failing_once("link", 0, errno.EIO)) as closed, pytest.raises(StorageFault):
            closed.seal()
        with Recording(path) as recording:
            with pytest.raises(Unavailable, match="closed"):
                closed.seal()
            assert not list((path / "commits").iterdir())
            assert recording.seal().digest == digest_of(run.written(path.with_name("direct")))

    def test_one_that_was_closed_records_nothing(self, run: Run, path: Path) -> None:
        with run.begun(path) as closed:
            pass
        before = log_of(path)
        attempts: list[Attempt] = [
            lambda: closed.append(run.batch([0]), RANK_0),
            lambda: closed.begin(Who(0, 2)),
            lambda: closed.finish(RANK_0),
        ]
        for refused in attempts:
            with pytest.raises(Unavailable, match="closed"):
                refused()
        assert log_of(path) == before


class TestPart:
    """Of a run that did not reach all examples."""

    def test_sealing_names_what_is_missing_and_keeps_what_is_there(self, run: Run, path: Path) -> None:
        views = run.identity.views
        with run.begun(path) as recording:
            with pytest.raises(RowsMissing, match="6 of 6 examples"):
                recording.seal(part=True)
            # Of the last example one view is there and the others are not.
            recording.append(run.batch(run.places[: 4 * views + (views > 1)]), RANK_0)
            with pytest.raises(RowsMissing, match="2 of 6 examples") as caught:
                recording.seal()
            assert (caught.value.unknown, caught.value.unlabelled) == ([], run.ids_of([4, 5]))
            recording.append(run.batch(run.places[4 * views :]), RANK_0)
            assert recording.seal().digest == digest_of(run.written(path.with_name("direct")))

    def test_a_part_is_the_label_set_of_the_examples_that_were_recorded(self, run: Run, path: Path) -> None:
        views = run.identity.views
        changes = {"ids": "integer"} if run.ids is None else {}
        with run.begun(path) as recording:
            recording.append(run.batch(run.places[: 4 * views + (views > 1)]), RANK_0)
            generation = recording.seal(part=True)
        assert generation.examples == 4
        assert files_of(path) == files_of(run.written(path.with_name("direct"), range(4), **changes))
        reader = LocalLabelSet(path)
        assert reader.states(run.ids_of([3, 4])).tolist() == [LABELLED, UNKNOWN]
        reader.close()

    def test_all_of_it_sealed_as_a_part_is_all_of_it(self, run: Run, path: Path) -> None:
        run.record(path)
        with Recording(path) as recording:
            assert recording.seal(part=True).digest == digest_of(run.written(path.with_name("direct")))

    def test_a_reader_of_ordinals_that_became_ids_of_their_own_is_told_to_open_again(self, path: Path) -> None:
        run = small_run()
        with run.begun(path) as recording:
            recording.append(run.batch([0, 3]), RANK_0)
            reader = open_label_set(path)
            recording.seal(part=True)
        assert reader.is_replaced
        with pytest.raises(DigestChanged, match="open it again"):
            reader.fetch([0])
        reader.close()
        again = open_label_set(path)
        assert np.array_equal(again.fetch([3, 0]).indices, run.batch([3, 0]).soft.indices)
        again.close()

    def test_a_part_that_was_being_sealed_stays_one(self, path: Path) -> None:
        run = small_run()
        with run.begun(path) as recording:
            recording.append(run.batch([0, 3]), RANK_0)
        files = failing_once("link", 0, errno.EIO)
        with Recording(path, files=files) as recording, pytest.raises(StorageFault):
            recording.seal(part=True)
        with Recording(path) as recording:
            assert recording.seal().examples == 2


EVENTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 5), min_size=1, max_size=7),  # places, some of them twice
        st.integers(5, 7),  # step
        st.integers(0, 2),  # which rows
        st.integers(0, 2),  # recorder
        st.integers(1, 2),  # how often it is sent
    ),
    min_size=1,
    max_size=6,
)


class TestOrder:
    """What is sealed does not depend on how rows came."""

    @pytest.mark.parametrize("kind", ["pointwise, integers, targets", "three views, texts", "causal"])
    @settings(max_examples=6)
    @given(events=EVENTS, data=st.data())
    def test_the_digest_is_the_same_for_all_orders_batches_recorders_and_repetitions(
        self, kind: str, events: list[Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        run = small_run(6 // RUNS[kind].get("views", 1), recorders=3, **RUNS[kind])
        store = tmp_path_factory.mktemp("store")
        complete = [(list(run.places), 5, 0, 0, 1), *events]
        single = [([place], step, other, 0, 1) for places, step, other, _, _ in complete for place in places]
        digests = set()
        for name, sent in (("a", complete), ("b", data.draw(st.permutations(single)))):
            with Recording(store / name, run.terms, run.ids) as recording:
                for rank in range(3):
                    recording.begin(Who(rank, 1))
                for places, step, other, rank, times in sent:
                    for _ in range(times):
                        recording.append(run.batch(places, step=step, other=other), Who(rank, 1))
                digests.add(recording.seal().digest)
        # And it is that of the label set that has of each place the largest of the latest rows.
        assert len(digests) == 1
        reader = LocalLabelSet(store / "a")
        for place in run.places.tolist():
            latest = max(step for places, step, *_ in complete if place in places)
            others = {other for places, step, other, *_ in complete if place in places and step == latest}
            example, view = divmod(place, run.identity.views)
            found = reader.fetch(run.ids_of([example]), view=view).logit_max.tobytes()
            assert found in {run.batch([place], other=other).soft.logit_max.tobytes() for other in others}
        reader.close()
        shutil.rmtree(store)

    def test_a_later_step_counts_whenever_it_arrives(self, run: Run, path: Path) -> None:
        with run.begun(path) as recording:
            recording.append(run.batch(run.places, step=7, other=1), RANK_0)
            recording.append(run.batch(run.places, step=6, other=2), RANK_0)
            recording.append(run.batch(run.places, step=5, other=3), RANK_0)
            reader = RecordedLabelSet(path)
            assert_holds(reader, run, run.places, other=1)
            recording.append(run.batch(run.places, step=8), RANK_0)
            assert_holds(reader, run, run.places)
            reader.close()
            digest = recording.seal().digest
        assert digest == digest_of(run.written(path.with_name("direct")))

    def test_one_place_many_times_in_a_batch_takes_time_in_proportion(self, path: Path) -> None:
        run = small_run(3, **TINY)
        rng = np.random.default_rng(3)
        places, steps = rng.integers(0, 3, 30_000), rng.integers(STEPS.start, STEPS.start + 4, 30_000)
        others = rng.integers(0, 50, 30_000)
        batch = run.batch(places)
        batch = dataclasses.replace(
            batch,
            steps=steps,
            soft=dataclasses.replace(batch.soft, logit_max=batch.soft.logit_max + others.astype(np.float32)),
        )
        with run.begun(path) as recording:
            recording.append(batch, RANK_0)  # of 30,000 squared comparisons it would not come back
        reader = RecordedLabelSet(path)
        found = reader.fetch([0, 1, 2])
        for place in range(3):
            last = (places == place) & (steps == STEPS.start + 3)
            # Of one step, the row with the largest bytes: little-endian, the lowest byte counts first.
            expected = max(value.tobytes() for value in batch.soft.logit_max[last])
            assert found.logit_max[place].tobytes() == expected
        reader.close()

    def test_causal_examples_may_have_another_number_of_rows_at_a_later_step(self, path: Path) -> None:
        run = small_run(alignment="causal")
        other = small_run(alignment="causal", seed=3)
        other = dataclasses.replace(other, terms=run.terms)
        assert run.source.row_counts.tolist() != other.source.row_counts.tolist()
        with other.begun(path) as recording:
            recording.append(other.batch(other.places, step=5), RANK_0)
            recording.append(run.batch(run.places, step=6), RANK_0)
            recording.append(other.batch(other.places, step=5), RANK_0)
            digest = recording.seal().digest
        assert digest == digest_of(run.written(path.with_name("direct")))


def frames_of(content: bytes, size: int) -> list[int]:
    """Where the frames of a log end, in bytes."""
    ends, at = [], 0
    while at < len(content):
        at += size * (1 + int(np.frombuffer(content[at : at + HEADER.itemsize], HEADER)[0]["rows"]))
        ends.append(at)
    return ends


class TestTorn:
    """A crash tears the last frame at most, and what changed later is found."""

    @pytest.mark.parametrize("options", [{"ids": "text", "views": 2}, {"alignment": "causal"}], ids=str)
    def test_a_log_cut_off_at_any_byte_keeps_its_whole_frames_and_goes_on(
        self, options: dict[str, Any], path: Path
    ) -> None:
        run = small_run(2, **TINY, **options)
        batches = [run.batch(part) for part in np.array_split(run.places, 2)]
        with run.begun(path) as recording:
            for batch in batches:
                recording.append(batch, RANK_0)
            recording.finish(RANK_0)
        whole = log_of(path)
        ends = frames_of(whole, slot_dtype(log_spec(run)).itemsize)
        assert (ends[-1], len(ends)) == (len(whole), 4)
        digest = digest_of(run.written(path.with_name("direct")))
        for length in range(len(whole)):
            Places(path).recording_log.write_bytes(whole[:length])
            kept = sum(end <= length for end in ends)
            with Recording(path, run.terms, run.ids) as recording:
                assert len(log_of(path)) == ([0, *ends])[kept]
                held = sum(len(batch.soft) for batch in batches[: max(0, kept - 1)])
                assert recording.stand().rows == held
                recording.begin(RANK_0)
                for batch in batches[max(0, kept - 1) :]:
                    recording.append(batch, RANK_0)
                recording.finish(RANK_0)
                # Byte for byte what it would have been.
                assert log_of(path) == whole
        with Recording(path) as recording:
            assert recording.seal().digest == digest

    def test_a_flipped_bit_tears_the_last_frame_and_damages_an_earlier_one(self, path: Path) -> None:
        run = small_run(3, **TINY)
        with run.begun(path) as recording:
            recording.append(run.batch([0]), RANK_0)
            recording.append(run.batch([1, 2]), RANK_0)
        whole = log_of(path)
        ends = [0, *frames_of(whole, slot_dtype(log_spec(run)).itemsize)]
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1 << place % 8
            Places(path).recording_log.write_bytes(changed)
            begins = max(end for end in ends if end <= place)
            if begins == ends[-2]:
                with Recording(path) as recording:
                    assert recording.stand().rows == 1
                    recording.append(run.batch([1, 2]), RANK_0)
                assert log_of(path) == whole
            else:
                with pytest.raises(ShardDamaged, match=f"at byte {begins:,}"):
                    Recording(path)
                assert log_of(path) == changed
        Places(path).recording_log.write_bytes(whole)
        reader = RecordedLabelSet(path)
        assert_holds(reader, run, run.places)
        reader.close()

    def test_what_a_torn_frame_leaves_is_cut_off_and_where_others_begin_in_it_nothing_is(self, path: Path) -> None:
        run = small_run(3)
        run.record(path)
        whole = log_of(path)
        for tail in (log.MAGIC * 100, whole[:-1]):
            Places(path).recording_log.write_bytes(whole + tail)
            with pytest.raises(ShardDamaged, match=f"at byte {len(whole):,}"):
                Recording(path)
            assert log_of(path) == whole + tail
        for tail in (b"\0", b"\0" * 4096, log.MAGIC, b"\xff" * 4096):
            Places(path).recording_log.write_bytes(whole + tail)
            reader = RecordedLabelSet(path)
            assert_holds(reader, run, run.places)
            reader.close()
            Recording(path).close()
            assert log_of(path) == whole


def log_spec(run: Run) -> Any:
    return run.source.layout.row_spec


class Unsynced(Files):
    """While it ``fails``, what is appended is written and looked at by a reader, and cannot be made durable."""

    def __init__(self, reader: RecordedLabelSet) -> None:
        self.reader, self.fails = reader, False

    def append(self, handle: int, path: Path, end: int, data: Bytes) -> None:
        super().append(handle, path, end, data)
        self.reader.describe()
        if self.fails:
            raise StorageFault(f"{path}: not synced")


class TestFaults:
    """The disk refuses."""

    @pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, DiskFull), (errno.EIO, StorageFault)])
    def test_a_batch_that_could_not_be_written_is_not_there_and_the_others_are(
        self, run: Run, path: Path, code: int, error: type[LogitcacheError]
    ) -> None:
        digest = digest_of(run.written(path.with_name("direct")))
        for number in range(3):
            run.begun(path).close()
            files = failing_once("append", number, code)
            recording, reader = Recording(path, files=files), RecordedLabelSet(path)
            held: list[int] = []
            for batch in np.array_split(run.places, 3):
                if [operation for operation, _ in files.log].count("append") == number:
                    with pytest.raises(error) as caught:
                        recording.append(run.batch(batch), RANK_0)
                    assert type(caught.value) is error
                    assert_holds(reader, run, held)
                recording.append(run.batch(batch), RANK_0)
                held += batch.tolist()
                assert_holds(reader, run, held)
            assert [operation for operation, _ in files.log].count("append") == 4
            assert recording.seal().digest == digest
            recording.close()
            reader.close()
            shutil.rmtree(path)

    def test_a_full_disk_loses_nothing_and_it_goes_on_when_there_is_room(self, run: Run, path: Path) -> None:
        room = False
        full = full_disk(OPENING + 1)

        def at(number: int, operation: str, where: Path) -> None:
            if not room:
                full.at(number, operation, where)

        run.begun(path).close()
        with Recording(path, files=Counting(at)) as recording:
            recording.append(run.batch(run.places[:2]), RANK_0)
            for _ in range(3):
                with pytest.raises(DiskFull, match="make room"):
                    recording.append(run.batch(run.places), RANK_0)
            with pytest.raises(DiskFull):
                recording.begin(Who(0, 2))
            assert len(log_of(path)) % slot_dtype(log_spec(run)).itemsize == 0
            reader = RecordedLabelSet(path)
            assert_holds(reader, run, run.places[:2])
            reader.close()
            room = True
            recording.append(run.batch(run.places), RANK_0)
            room = False
            with pytest.raises(DiskFull):
                recording.seal()
            room = True
            assert recording.seal().digest == digest_of(run.written(path.with_name("direct")))

    def test_what_cannot_be_cut_off_is_not_written_after_and_is_cut_off_by_the_next(self, path: Path) -> None:
        run = small_run()
        run.begun(path).close()

        with Recording(path, files=failing(OPENING + 1, errno.EIO)) as recording:
            recording.append(run.batch([0]), RANK_0)
            whole = log_of(path)
            with pytest.raises(StorageFault):
                recording.append(run.batch([1]), RANK_0)
            with pytest.raises(StorageFault, match="begin to record again"):
                recording.append(run.batch([1]), RANK_0)
        assert log_of(path).removeprefix(whole)
        with Recording(path) as recording:
            assert log_of(path) == whole
            recording.append(run.batch([1]), RANK_0)
            assert recording.stand().recorded == 2

    def test_a_reader_that_saw_a_batch_before_it_failed_forgets_it(self, run: Run, path: Path) -> None:
        run.begun(path).close()
        reader = RecordedLabelSet(path)
        files = Unsynced(reader)
        with Recording(path, files=files) as recording:
            recording.append(run.batch([0]), RANK_0)
            for step, lost in ((5, [1, 2]), (9, [0, 4])):
                files.fails = True
                with pytest.raises(StorageFault, match="not synced"):
                    recording.append(run.batch(lost, step=step, other=1), RANK_0)
                files.fails = False
                if step == 5:
                    assert_holds(reader, run, [0])
            recording.append(run.batch([3]), RANK_0)
            recording.append(run.batch([5]), RANK_0)
            assert_holds(reader, run, [0, 3, 5])
        reader.close()

    def test_what_a_reader_may_have_mapped_is_not_cut_off(self, path: Path) -> None:
        run = small_run()
        run.begun(path).close()
        reader = RecordedLabelSet(path)
        files = Unsynced(reader)
        with Recording(path, files=files) as recording:
            files.fails = True
            with pytest.raises(StorageFault, match="not synced"):
                recording.append(run.batch([0, 1]), RANK_0)
            reader._recorded.log.rows(np.arange(1, 3))
            left = len(log_of(path))
            files.fails = False
            recording.append(run.batch([1]), RANK_0)
            assert len(log_of(path)) == left
            assert_holds(reader, run, [1])
        with Recording(path) as recording:
            assert len(log_of(path)) < left
            recording.append(run.batch([2]), RANK_0)
            assert_holds(reader, run, [1, 2])
        reader.close()

    def test_a_reader_that_is_closed_under_a_fetch_gives_no_rows(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = small_run()
        run.record(path)
        reader = RecordedLabelSet(path)
        located = reader._recorded.located

        def closing(*arguments: Any) -> Any:
            found = located(*arguments)
            reader.close()
            return found

        monkeypatch.setattr(reader._recorded, "located", closing)
        with pytest.raises(Unavailable, match="ask again"):
            reader.fetch([0])

    def test_rows_of_another_place_are_not_given_out(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = small_run()
        run.record(path)
        reader = RecordedLabelSet(path)
        located = reader._recorded.located
        monkeypatch.setattr(reader._recorded, "located", lambda ordinals, views=0: located(ordinals ^ 1, views))
        with pytest.raises(Unavailable, match="changed while"):
            reader.fetch([0, 1])
        reader.close()

    def test_what_it_was_begun_with_is_lost_and_the_rows_are_not(self, path: Path) -> None:
        run = small_run()
        run.record(path)
        rows, terms = log_of(path), Places(path).recording.read_bytes()
        Places(path).recording.unlink()
        with pytest.raises(StorageFault, match=r"recording\.json is missing"):
            Recording(path, run.terms, run.ids)
        with pytest.raises(StorageFault, match=r"recording\.json is missing"):
            run.written(path)
        assert log_of(path) == rows
        Places(path).recording.write_bytes(terms)
        with Recording(path, run.terms, run.ids) as recording:
            assert recording.stand().recorded == 6

    def test_a_batch_larger_than_a_frame_is_refused(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = small_run()
        monkeypatch.setattr(log, "MOST_FRAME_ROWS", 5)
        with run.begun(path) as recording:
            with pytest.raises(TooManyRows, match="split it"):
                recording.append(run.batch(run.places), RANK_0)
            recording.append(run.batch(run.places[:5]), RANK_0)
            assert recording.stand().recorded == 5

    def test_a_folder_removed_under_the_writer_is_an_error_of_the_next_append(self, run: Run, path: Path) -> None:
        with run.begun(path) as recording:
            recording.append(run.batch([0]), RANK_0)
            shutil.rmtree(path)
            assert recording.is_removed
            with pytest.raises(StorageFault, match="removed"):
                recording.append(run.batch([1]), RANK_0)

    def test_a_reader_of_a_recording_that_was_replaced_by_another_says_so(self, path: Path) -> None:
        run = small_run()
        run.record(path)
        reader = open_label_set(path)
        shutil.rmtree(path)
        run.begun(path).close()
        assert reader.is_replaced
        with pytest.raises(DigestChanged, match="replaced"):
            reader.fetch([0])
        reader.close()


def record_and_seal(path: Path, run: Run, files: Files | None = None) -> None:
    """All that there is to do; taken up where it was left."""
    places = Places(path)
    if places.group.exists() and not places.recording.exists():
        return
    with Recording(path, run.terms, run.ids, files=files) as recording:
        if not recording.stand().sealing:
            who = Who(0, recording._recorded.sitting(0) + 1)
            recording.begin(who)
            recording.append(run.batch(run.places[:2]), who)
            recording.append(run.batch(run.places[2:]), who)
            recording.finish(who)
        recording.seal()


def test_killed_before_a_file_operation_it_is_taken_up_and_sealed_the_same(path: Path) -> None:
    """A process, before every third of them; a kill at any of them is among the schedules of `make proof`."""
    run = small_run(4, **TINY, ids="integer")
    counted = Counting(lambda *_: None)
    record_and_seal(path, run, counted)
    undisturbed = files_of(path)
    operations = counted.log
    assert {operation for operation, _ in operations} >= {"append", "write", "fsync", "link", "remove", "make_folder"}
    removed = max(at for at, entry in enumerate(operations) if entry == ("remove", "recording.json"))
    context = multiprocessing.get_context("fork")
    for number in range(0, len(operations), 3):
        shutil.rmtree(path.parent)
        child = context.Process(target=record_and_seal, args=(path, run, killed(number)))
        child.start()
        child.join()
        assert child.exitcode == -9, operations[number]
        record_and_seal(path, run)
        left = files_of(path)
        if number > removed:
            # It is sealed already, and what is left over belongs to nobody.
            left = {name: content for name, content in left.items() if name not in ("recording/log", "recording/ids")}
        else:
            assert not (path / "recording").exists(), operations[number]
        assert left == undisturbed, operations[number]


class TestRecorders:
    """Who may record."""

    def test_one_process_records_and_another_is_told_who(self, path: Path) -> None:
        run = small_run()
        with run.begun(path):
            with pytest.raises(LabelSetLocked, match=str(os.getpid())):
                Recording(path, run.terms, run.ids)
            child = multiprocessing.get_context("fork").Process(target=locked_out, args=(path,))
            child.start()
            child.join()
            assert child.exitcode == 0
        Recording(path).close()

    def test_a_later_sitting_takes_the_place_of_the_one_before(self, path: Path) -> None:
        run = small_run(recorders=2)
        with Recording(path, run.terms, run.ids) as recording:
            first, second, other = Who(0, 10), Who(0, 11), Who(1, 10)
            with pytest.raises(RecorderReplaced, match="has not begun"):
                recording.append(run.batch([0]), first)
            recording.begin(first)
            recording.begin(other)
            recording.append(run.batch([0]), first)
            recording.finish(first)
            assert recording.stand().finished == (0,)
            recording.begin(second)
            assert recording.stand().finished == ()
            attempts: list[Attempt] = [
                lambda: recording.append(run.batch([1]), first),
                lambda: recording.finish(first),
                lambda: recording.begin(first),
            ]
            for refused in attempts:
                with pytest.raises(RecorderReplaced, match="began anew"):
                    refused()
            recording.begin(second)
            recording.append(run.batch([2]), second)
            recording.append(run.batch([3]), other)
            # What the first one has recorded is kept.
            reader = RecordedLabelSet(path)
            assert_holds(reader, run, [0, 2, 3])
            reader.close()

    def test_who_is_which_sitting_is_known_after_a_restart(self, path: Path) -> None:
        run = small_run()
        with Recording(path, run.terms, run.ids) as recording:
            recording.begin(Who(0, 5))
            recording.finish(Who(0, 5))
        with Recording(path, run.terms, run.ids) as recording:
            assert recording.stand().finished == (0,)
            with pytest.raises(RecorderReplaced):
                recording.append(run.batch([0]), Who(0, 4))
            recording.append(run.batch([0]), Who(0, 5))

    @pytest.mark.parametrize("who", [Who(2, 1), Who(-1, 1), Who(0, 0), Who(0, -1), Who(0, 2**64)], ids=str)
    def test_recorders_that_cannot_be_are_refused(self, path: Path, who: Who) -> None:
        run = small_run(recorders=2)
        with Recording(path, run.terms, run.ids) as recording:
            before = log_of(path)
            with pytest.raises(InvalidRequest, match=r"rank|sitting"):
                recording.begin(who)
            attempts: list[Attempt] = [
                lambda: recording.append(run.batch([0]), who),
                lambda: recording.finish(who),
            ]
            for refused in attempts:
                with pytest.raises(RecorderReplaced, match="has not begun"):
                    refused()
            assert log_of(path) == before

    def test_it_tells_when_all_have_finished(self, path: Path) -> None:
        run = small_run(recorders=3)
        with Recording(path, run.terms, run.ids) as recording:
            for rank in range(3):
                recording.begin(Who(rank, 1))
            for rank in (2, 0, 2, 1):
                recording.finish(Who(rank, 1))
            assert recording.stand().finished == (0, 1, 2)


def locked_out(path: Path) -> None:
    with pytest.raises(LabelSetLocked):
        Recording(path)


class TestFolders:
    """What a recording may be begun in and continued with."""

    def test_a_precompute_into_a_recording_is_refused_and_the_other_way_round(
        self, run: Run, path: Path, tmp_path: Path
    ) -> None:
        with run.begun(path), pytest.raises(LabelSetLocked):
            run.written(path)
        before = files_of(path)
        with pytest.raises(IdentityChanged, match="being recorded"):
            run.written(path)
        assert files_of(path) == before
        direct = run.written(path.with_name("direct"))
        written = files_of(direct)
        with pytest.raises(IdentityChanged, match="already"):
            Recording(direct, run.terms, run.ids)
        with pytest.raises(InvalidRequest, match="nothing to continue"):
            Recording(direct)
        assert files_of(direct) == written
        unfinished = build(tmp_path / "store" / "unfinished", reference(2), [0])
        with pytest.raises(IdentityChanged, match="already"):
            Recording(unfinished, run.terms, run.ids)

    def test_other_terms_are_named_with_both_values(self, path: Path) -> None:
        run = small_run(recorders=2)
        run.begun(path).close()
        identity = run.identity
        changed: dict[str, Any] = {
            "k was 4 and is now 5": {"identity": dataclasses.replace(identity, k=5)},
            "teacher.weights was 'seed 0' and is now 'x'": {
                "identity": dataclasses.replace(identity, teacher=dataclasses.replace(identity.teacher, weights="x"))
            },
            "steps was range(5, 105) and is now range(5, 106)": {"steps": range(5, 106)},
            "examples was 6 and is now 7": {"examples": 7},
            "recorders was 2 and is now 1": {"recorders": 1},
        }
        for told, change in changed.items():
            with pytest.raises(IdentityChanged) as caught:
                Recording(path, dataclasses.replace(run.terms, **change), run.ids)
            assert told in str(caught.value)
            assert len(caught.value.details["fields"]) == 1
        with Recording(path, run.terms) as recording:
            recording.append(run.batch(run.places), RANK_0)

    @pytest.mark.parametrize("kind", ["integer", "text"])
    def test_other_ids_are_named_from_the_first_that_differs(self, path: Path, kind: Any) -> None:
        run = small_run(ids=kind)
        run.begun(path).close()
        ids = run.ids_of(range(6))
        other = [*ids[:3], ids[4], ids[3], ids[5]]
        with pytest.raises(IdentityChanged) as caught:
            Recording(path, run.terms, as_ids(other))
        assert caught.value.details["fields"]["ids"] == [f"…{ids[3]!r}…", f"…{ids[4]!r}…"]

    @pytest.mark.parametrize(
        ("change", "ids", "error"),
        [
            ({}, [1, 2, 3, 4, 5], InvalidRequest),
            ({}, [1, 2, 3, 4, 5, 1], InvalidIds),
            ({}, None, InvalidRequest),
            ({"examples": 0}, [], InvalidRequest),
            ({"examples": 2**40}, [1], InvalidRequest),
            ({"recorders": 0}, [1, 2, 3, 4, 5, 6], InvalidRequest),
            ({"recorders": 70_000}, [1, 2, 3, 4, 5, 6], InvalidRequest),
            ({"steps": range(0, 10, 2)}, [1, 2, 3, 4, 5, 6], InvalidRequest),
            ({"steps": range(5, 5)}, [1, 2, 3, 4, 5, 6], InvalidRequest),
            ({"steps": range(-1, 5)}, [1, 2, 3, 4, 5, 6], InvalidRequest),
            ({"steps": range(5, MAX_STEP + 2)}, [1, 2, 3, 4, 5, 6], InvalidRequest),
        ],
        ids=str,
    )
    def test_terms_that_cannot_be_are_refused_before_a_file_is_made(
        self, path: Path, change: dict[str, Any], ids: list[int] | None, error: type[LogitcacheError]
    ) -> None:
        terms = dataclasses.replace(small_run(ids="integer").terms, **change)
        with pytest.raises(error):
            Recording(path, terms, None if ids is None else Ids(np.array(ids, np.int64)))
        assert not path.exists()

    def test_text_ids_are_needed_as_texts(self, path: Path) -> None:
        run = small_run(ids="text")
        with pytest.raises(InvalidIds, match="as texts"):
            Recording(path, run.terms, Ids(run.keys.keys))

    def test_where_it_cannot_be_recorded_nothing_is_changed(self, tmp_path: Path) -> None:
        run = small_run()
        with pytest.raises(InvalidName):
            Recording(tmp_path / "Bad Name", run.terms)
        with pytest.raises(StoreNotFound):
            Recording(tmp_path / "no" / "store" / "set", run.terms)
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "thesis.txt").write_text("mine")
        with pytest.raises(NotALabelSet, match="did not write"):
            Recording(tmp_path / "theirs", run.terms)
        assert [file.name for file in tmp_path.rglob("*")] == ["theirs", "thesis.txt"]

    def test_a_folder_without_a_recording_cannot_be_read_as_one(self, tmp_path: Path) -> None:
        with pytest.raises(LabelSetNotFound):
            RecordedLabelSet(tmp_path / "nothing")
        with pytest.raises(LabelSetNotFound):
            open_label_set(tmp_path / "nothing")


def changed(rows: RecordedRows, **arrays: Any) -> RecordedRows:
    """Rows with other arrays."""
    return dataclasses.replace(rows, soft=dataclasses.replace(rows.soft, **arrays))


class TestRefused:
    """Rows that cannot be recorded; `tests.labels.test_recorded` has every kind."""

    def test_nothing_of_a_batch_with_bad_rows_is_recorded(self, run: Run, path: Path) -> None:
        good = run.batch(run.places[:2])
        bad_logits = good.soft.logits.copy()
        bad_logits[-1, 1] = np.nan
        narrow = {"indices": good.soft.indices[:, :-1], "logits": good.soft.logits[:, :-1]}
        text = run.identity.ids == "text"
        unknown = as_ids(["no", "such"] if text else [-7, 2**62 + 1])
        refused: list[tuple[type[LogitcacheError], RecordedRows]] = [
            (TeacherFault, changed(good, logits=bad_logits)),
            (ShapeMismatch, changed(good, **narrow)),
            (ShapeMismatch, changed(good, temperatures=(1.0, 3.0))),
            (RowsMissing, dataclasses.replace(good, ids=unknown)),
            (InvalidIds, dataclasses.replace(good, ids=as_ids([1, 2] if text else ["one", "two"]))),
            (UnknownView, dataclasses.replace(good, views=np.array([0, run.identity.views]))),
            (InvalidRequest, dataclasses.replace(good, steps=np.array([STEPS.start, STEPS.stop]))),
        ]
        with run.begun(path) as recording:
            before = log_of(path)
            for error, rows in refused:
                with pytest.raises(error) as caught:
                    recording.append(rows, RANK_0)
                assert type(caught.value) is error
                if error is RowsMissing:
                    assert isinstance(caught.value, RowsMissing)
                    named = ["no", "such"] if text else [-7, 2**62 + 1]
                    assert (caught.value.unknown, caught.value.unlabelled) == (named, [])
                assert log_of(path) == before
            recording.append(good, RANK_0)
            reader = RecordedLabelSet(path)
            assert_holds(reader, run, run.places[:2])
            reader.close()


def read_all(path: Path) -> None:
    """Whatever is there: all of it can be read, or an error of ours says what is wrong."""
    for opens in (open_label_set, Recording):
        try:
            found = opens(path)
        except LogitcacheError:
            continue
        if isinstance(found, Recording):
            found.stand()
        else:
            found.describe()
        found.close()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


class TestHostile:
    """Files of a recording that somebody else wrote."""

    @settings(max_examples=25)
    @given(data=st.data())
    def test_a_changed_recording_json_is_refused_or_read(
        self, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        run = small_run(3, ids="text", **TINY)
        path = run.record(tmp_path_factory.mktemp("store") / "run")
        content: Any = json.loads(Places(path).recording.read_bytes())
        within = data.draw(st.sampled_from(["", "terms", "ids", "identity"]))
        inner = content["terms"]["identity"] if within == "identity" else content.get(within, content)
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(JSON)
        Places(path).recording.write_text(json.dumps(content))
        read_all(path)
        shutil.rmtree(path.parent)

    @settings(max_examples=25)
    @given(content=st.binary(max_size=200), which=st.sampled_from(["recording", "recording_ids", "recording_log"]))
    def test_any_bytes_in_its_files_are_refused_or_cut_off(
        self, content: bytes, which: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        run = small_run(3, ids="text", **TINY)
        path = run.record(tmp_path_factory.mktemp("store") / "run")
        getattr(Places(path), which).write_bytes(content)
        read_all(path)
        shutil.rmtree(path.parent)

    @pytest.mark.parametrize(
        "ids",
        [
            b"",
            b"[]",
            b"[1,2,3]",
            b'["a"]',
            b'["a","b",3]',
            b'{"a":1}',
            b"[" * 9999,
            b"\xff",
            b"null",
            b'["a","b","\\ud800"]',
        ],
        ids=lambda ids: repr(ids[:16]),
    )
    @pytest.mark.parametrize("kind", ["text", "integer"])
    def test_ids_that_are_none_are_refused_even_if_they_hash_to_what_is_told(
        self, path: Path, ids: bytes, kind: Any
    ) -> None:
        run = small_run(3, ids=kind, **TINY)
        run.record(path)
        places = Places(path)
        places.recording_ids.write_bytes(ids)
        with pytest.raises(ShardDamaged, match="does not hash"):
            RecordedLabelSet(path)
        content = json.loads(places.recording.read_bytes())
        content["ids"] = {"bytes": len(ids), "sha256": sha256_hex(ids)}
        places.recording.write_bytes(canonical_json(content))
        with pytest.raises(ShardDamaged, match="restore it"):
            RecordedLabelSet(path)

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"examples": 2**46}, NotALabelSet),
            ({"examples": 0}, NotALabelSet),
            ({"recorders": 2**31}, NotALabelSet),
            ({"steps": [0, 2**70]}, NotALabelSet),
            ({"steps": None}, NotALabelSet),
            ({"steps": [0]}, NotALabelSet),
        ],
        ids=str,
    )
    def test_terms_beyond_bounds_are_refused_and_nothing_is_allocated(
        self, path: Path, change: dict[str, Any], error: type[LogitcacheError]
    ) -> None:
        small_run().record(path)
        content = json.loads(Places(path).recording.read_bytes())
        content["terms"] |= change
        Places(path).recording.write_bytes(canonical_json(content))
        with pytest.raises(error):
            RecordedLabelSet(path)

    def test_a_newer_format_and_a_file_too_long_are_told(self, path: Path) -> None:
        small_run().record(path)
        content = json.loads(Places(path).recording.read_bytes())
        Places(path).recording.write_bytes(canonical_json(content | {"format_version": 99}))
        with pytest.raises(NewerFormat, match="upgrade"):
            RecordedLabelSet(path)
        with Places(path).recording.open("wb") as file:
            file.truncate(1 << 30)
        with pytest.raises(NotALabelSet, match="too long"):
            RecordedLabelSet(path)

    @pytest.mark.parametrize("name", ["recording_log", "recording_ids"])
    def test_a_file_that_is_gone_is_an_error_of_storage(self, path: Path, name: str) -> None:
        small_run(ids="text").record(path)
        getattr(Places(path), name).unlink()
        for opens in (RecordedLabelSet, Recording):
            with pytest.raises(StorageFault):
                opens(path)

    @pytest.mark.parametrize("place", [-1, 6, 2**62])
    @pytest.mark.parametrize("options", [{}, {"alignment": "causal"}], ids=str)
    def test_frames_of_another_recording_are_refused(self, path: Path, options: dict[str, Any], place: int) -> None:
        run = small_run(**options)
        run.begun(path).close()
        rows = np.zeros(2, slot_dtype(log_spec(run)))
        rows["place"] = place
        forged(path, run, rows)
        reader = RecordedLabelSet(path)
        with pytest.raises(ShardDamaged, match="another recording"):
            reader.describe()
        with pytest.raises(ShardDamaged, match="another recording"):
            Recording(path)
        reader.close()

    def test_a_header_that_tells_more_rows_than_there_are_allocates_nothing(self, path: Path) -> None:
        run = small_run()
        run.record(path)
        whole = log_of(path)
        header = np.zeros(1, HEADER)
        for count in (2**24, 2**24 + 1, 2**63):
            header[0] = (log.MAGIC, count, 0, Kind.ROWS, 0, 1)
            Places(path).recording_log.write_bytes(whole + header.tobytes() + b"\0" * 200)
            Recording(path).close()
            assert log_of(path) == whole


def forged(path: Path, run: Run, rows: np.ndarray) -> None:
    """Append a whole frame with these rows."""
    found = Log(Places(path).recording_log, slot_dtype(log_spec(run)), read_terms(Places(path))[2])
    list(found.follow())
    writer = LogWriter(found, Files())
    writer.append(Kind.ROWS, 0, 1, rows)
    writer.close()
    found.close()


@pytest.mark.parametrize("batch", [1, 3, 12])
@pytest.mark.parametrize(("ours", "theirs"), [(1, 5), (5, 1), (5, 9), (9, 5)])
def test_the_log_of_another_recording_with_rows_of_another_width_is_not_cut(
    tmp_path: Path, ours: int, theirs: int, batch: int
) -> None:
    runs = {name: small_run(batch, k=k, classes=20) for name, k in (("one", ours), ("other", theirs))}
    for name, run in runs.items():
        with Recording(tmp_path / name, run.terms, run.ids) as recording:
            recording.begin(Who(0, 1))
            recording.append(run.batch(run.places), Who(0, 1))
    log = Places(tmp_path / "one").recording_log
    content = Places(tmp_path / "other").recording_log.read_bytes()
    log.write_bytes(content)
    with pytest.raises(ShardDamaged, match="damaged at byte 0"):
        Recording(tmp_path / "one")
    assert log.read_bytes() == content


@pytest.mark.parametrize("file", ["log", "recording.json"])
def test_the_log_of_another_recording_with_the_same_terms_has_no_rows_here_and_is_not_cut(
    tmp_path: Path, file: str
) -> None:
    run = small_run()
    run.record(tmp_path / "one")
    run.record(tmp_path / "other")
    ours, theirs = (Places(tmp_path / name).recording.parent / file for name in ("one", "other"))
    content = theirs.read_bytes()
    ours.write_bytes(content)
    reader = open_label_set(tmp_path / "one")
    assert reader.describe().rows == 0
    reader.close()
    before = log_of(tmp_path / "one")
    with pytest.raises(ShardDamaged, match="damaged at byte 0"):
        Recording(tmp_path / "one")
    assert log_of(tmp_path / "one") == before
