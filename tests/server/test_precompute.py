"""Precompute as a caller sees it: equal rows, resuming, refusals that name what is wrong and lose nothing."""

import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests.server import specimens

from logitcache.labels.errors import (
    DatasetChanged,
    DatasetFault,
    DiskFull,
    IdentityChanged,
    InvalidName,
    InvalidRequest,
    LabelSetLocked,
    LogitcacheError,
    NotALabelSet,
    SpecNotFound,
    TeacherFault,
)
from logitcache.labels.identity import declared
from logitcache.server.cli import cli
from logitcache.server.labelling import space
from logitcache.server.labelling.plan import plan
from logitcache.server.labelling.precompute import precompute
from logitcache.server.labelling.preparation import Request
from logitcache.server.labelling.teachers import weights_digest
from logitcache.storage import LocalLabelSet
from logitcache.storage.writer import LabelSetWriter

HERE = "tests.server.specimens"


def request(store: Path, *, teacher: str = "good_teacher", dataset: str = "data", **changes: Any) -> Request:
    base = Request("set", f"{HERE}:{teacher}", f"{HERE}:{dataset}", store, 3, (2.0,), 500, "cpu", rows_per_shard=4096)
    return dataclasses.replace(base, **changes)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


class Notes:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.activities: list[tuple[str, int]] = []
        self.rows = 0
        self.notes: list[str] = []
        self.seen: list[str] = []

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        self.activities.append((activity, rows))

    def advance(self, rows: int) -> None:
        self.rows += rows

    def note(self, text: str) -> None:
        self.notes.append(text)

    def under_way(self, told: Callable[[], str]) -> None:
        self.seen.append(told())


def rows(path: Path) -> Any:
    reader = LocalLabelSet(path)
    soft = reader.fetch(np.arange(reader.layout.examples))
    reader.close()
    return soft


def test_rows_are_those_of_the_teacher_in_eval_mode(store: Path) -> None:
    precompute(request(store))
    model = specimens.good_teacher().eval()
    with torch.no_grad():
        inputs = specimens.data().inputs
        plain = torch.cat([model(batch) for shard in inputs.split(4096) for batch in shard.split(500)])
    top = plain.topk(3, dim=1)
    soft = rows(store / "set")
    assert np.array_equal(soft.indices, top.indices.numpy())
    assert np.allclose(soft.logits + soft.logit_max[:, None], top.values.numpy(), atol=2e-3)


def test_the_summary_tells_rows_digest_and_retained_mass(store: Path) -> None:
    summary = precompute(request(store, temperatures=(2.0, 50.0)))
    assert (summary.rows, summary.labelled, summary.shards) == (9000, 9000, 3)
    soft = rows(store / "set")
    for name, temperature in (("1", 1.0), ("2", 2.0)):
        residual = soft.residual_mass(temperature)
        assert summary.retained_mass[name]["mean"] == pytest.approx(1 - residual.mean())
        assert summary.retained_mass[name]["min"] == pytest.approx(1 - residual.max())
    assert summary.digest in str(summary)
    assert f"T=2: mean {summary.retained_mass['2']['mean']:.4f}" in str(summary)
    assert summary.retained_mass["50"]["mean"] < 0.5
    assert "T=1, 2, 50 less than half is stored: use a larger --top-k" in str(summary)


def test_the_same_line_again_labels_nothing_and_gives_the_same_digest(store: Path) -> None:
    first, notes = precompute(request(store)), Notes()
    again = precompute(request(store), notes)
    assert (again.digest, again.generation, again.labelled) == (first.digest, 1, 0)
    assert notes.activities == [("checking what is labelled", 9000)]
    assert "nothing left to label" in str(again)


def test_the_batch_size_of_the_first_run_is_kept_when_none_is_given(store: Path, tmp_path: Path) -> None:
    whole = precompute(request(tmp_path / "other", batch_size=300))
    with pytest.raises(KeyboardInterrupt):
        precompute(request(store, name="part", batch_size=300), Interrupting(4096))
    resumed = precompute(request(store, name="part", batch_size=None))
    assert resumed.digest == whole.digest
    recorded = json.loads((store / "part" / "statistics" / "2.json").read_bytes())["run"]
    assert recorded["batch_size"] == 300
    assert recorded["device"] == "cpu"


class Interrupting(Notes):
    """Ctrl-C after so many rows."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def advance(self, rows: int) -> None:
        super().advance(rows)
        if self.rows > self.after:
            raise KeyboardInterrupt


def test_another_batch_size_is_allowed_and_told(store: Path) -> None:
    interrupted = Interrupting(4096)
    with pytest.raises(KeyboardInterrupt):
        precompute(request(store), interrupted)
    assert interrupted.notes == ["stopped: 1 of 3 shards are committed and kept; the same command goes on from there"]
    notes = Notes()
    precompute(request(store, batch_size=100), notes)
    assert any("batch size 100 is not the 500" in note for note in notes.notes)


@pytest.mark.parametrize("dataset", ["Mappings", "Tensors"])
def test_an_item_may_be_an_input_a_pair_or_a_mapping(store: Path, dataset: str) -> None:
    one = precompute(request(store, dataset=dataset, targets=False))
    assert one.digest == precompute(request(store, name="y", targets=False)).digest


def test_workers_read_the_same_rows(store: Path) -> None:
    one = precompute(request(store))
    assert precompute(request(store, name="other", loader_workers=2)).digest == one.digest


@pytest.mark.gpu
def test_a_gpu_labels_what_a_cpu_does_and_the_same_bytes_each_time(store: Path) -> None:
    digests = {precompute(request(store, name=name, device="cuda")).digest for name in ("one", "two")}
    assert len(digests) == 1
    precompute(request(store, name="cpu"))
    there, here = rows(store / "one"), rows(store / "cpu")
    assert np.array_equal(there.indices[:, 0], here.indices[:, 0])
    assert np.allclose(there.logits, here.logits, atol=1e-2)
    assert np.array_equal(there.fingerprint, here.fingerprint)


def test_a_teacher_that_never_predicts_some_classes_is_stored(store: Path) -> None:
    precompute(request(store, teacher="padded_teacher", top_k=specimens.CLASSES))
    soft = rows(store / "set")
    assert np.isneginf(soft.logits[:, -2:]).all()
    assert np.isfinite(soft.logits[:, :-2]).all()
    assert not np.isnan(soft.log_probs(2.0)[:, :-2]).any()


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("nan_teacher", r"gave NaN for example 5,000; 1 of the 500 examples"),
        ("inf_teacher", r"gave \+inf for example 5,000"),
        ("silent_teacher", r"gave -inf for every class for example 5,000"),
        ("raising_teacher", r"raised RuntimeError on examples 4,596 to 5,095: the teacher's own trouble"),
        ("growing_teacher", r"returned 12 classes for examples 4,596 to 5,095, before it was 11"),
    ],
)
def test_a_teacher_that_fails_half_way_is_named_and_the_shards_before_are_kept(
    store: Path, teacher: str, message: str
) -> None:
    notes = Notes()
    with pytest.raises(TeacherFault, match=message):
        precompute(request(store, teacher=teacher), notes)
    assert notes.notes == ["stopped: 1 of 3 shards are committed and kept; the same command goes on from there"]
    reader = LocalLabelSet(store / "set")
    assert reader.describe().labelled == 4096
    reader.close()
    # A mended teacher under another SPEC is another teacher, though its weights are the same.
    with pytest.raises(IdentityChanged, match=r"^[^;]*teacher\.name was [^;]*$"):
        precompute(request(store, teacher="mended_teacher"))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("Tuples", "returned tuple .* not a tensor of logits"),
        ("Integers", "returned torch.int64"),
        ("Sequences", r"returned shape \(500, 3, 11\) .* not \(batch, classes\) = \(500, ...\)"),
        ("Pooled", r"returned shape \(1, 11\)"),
        ("plain_function", "return a torch.nn.Module, or a callable with a `teacher_id`"),
        ("broken_maker", "it raised OSError: checkpoint.pt: no such file"),
    ],
)
def test_a_teacher_of_another_shape_is_refused_before_anything_is_written(
    store: Path, teacher: str, message: str
) -> None:
    with pytest.raises(TeacherFault, match=message):
        precompute(request(store, teacher=teacher))
    assert not store.exists()


def test_a_callable_says_its_own_id(store: Path) -> None:
    precompute(request(store, teacher="named_teacher"))
    teacher = LocalLabelSet(store / "set").describe().identity.teacher
    assert (teacher.name, teacher.weights) == (f"{HERE}:named_teacher", "checkpoint 7")
    assert teacher.preprocessing.startswith("sha256:")
    precompute(request(store, teacher="WhollyNamed", name="other"))
    assert LocalLabelSet(store / "other").describe().identity.teacher == specimens.WhollyNamed.teacher_id


@pytest.mark.parametrize(
    ("dataset", "kind", "message"),
    [
        ("Augmented", DatasetChanged, "other inputs each time it is read .*64 of 64.*nothing was labelled"),
        ("SometimesAugmented", DatasetChanged, "1 of 64 examples tried: 8999"),
        ("Texts", DatasetFault, "input of example 0 is str"),
        ("Triples", DatasetFault, "example 0 has 3 parts"),
        ("Both", DatasetFault, "example 0 is a mapping, .* it has both 'input' and 'input_ids'"),
        ("Nameless", DatasetFault, "must have 'input' or 'input_ids': it has neither, but 'image'"),
        ("Targets", DatasetFault, r"example 8,999 has the target 11, the teacher has 11 classes .*--no-targets"),
        ("empty", DatasetFault, "is empty"),
        ("iterable", DatasetFault, "return a map-style dataset"),
        ("broken_maker", DatasetFault, "raised OSError"),
    ],
)
def test_a_dataset_that_cannot_be_labelled_is_refused_before_anything_is_written(
    store: Path, dataset: str, kind: type[LogitcacheError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        precompute(request(store, dataset=dataset))
    assert not store.exists()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("Raising", r"^the dataset raised ValueError for example 5,000: cannot identify image file$"),
        ("Ragged", r"input of example 5,000 is torch.float32 of shape \(5,\), that of example 4,596 .*\(6,\)"),
    ],
)
def test_an_example_that_fails_half_way_is_named_and_the_shards_before_are_kept(
    store: Path, dataset: str, message: str, workers: int
) -> None:
    with pytest.raises(DatasetFault, match=message) as caught:
        precompute(request(store, dataset=dataset, loader_workers=workers))
    assert caught.value.details == {"example": 5000}
    assert multiprocessing.active_children() == []
    assert LocalLabelSet(store / "set").describe().labelled == 4096


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("shrunk", "has 9,000 examples, the dataset shrank to 8,999"),
        ("reordered", r"2 of the 4,096 examples 0 to 4,095 .*\(10, 4000; other input\): the dataset was re-ordered"),
        ("relabelled", r"1 of the 4,096 examples 4,096 to 8,191 .*\(5000; other targets\)"),
    ],
)
def test_another_dataset_is_refused_and_nothing_is_lost(store: Path, dataset: str, message: str) -> None:
    digest = precompute(request(store)).digest
    with pytest.raises(DatasetChanged, match=message):
        precompute(request(store, dataset=dataset))
    assert precompute(request(store)).digest == digest


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"teacher": f"{HERE}:good_techer"}, SpecNotFound, "did you mean 'good_teacher'"),
        ({"dataset": f"{HERE}:dta"}, SpecNotFound, "did you mean 'data'"),
        ({"teacher": "no.such.module:x"}, SpecNotFound, "there is no module 'no'"),
        ({"teacher": "good_teacher"}, SpecNotFound, "module:callable"),
        ({"teacher": f"{HERE}:not_callable"}, SpecNotFound, "is a int, not a callable"),
        ({"name": "../x"}, InvalidName, "1 to 64"),
        ({"top_k": 12}, InvalidRequest, "--top-k 12 is more than the teacher's 11 classes: use at most 11"),
        ({"top_k": 0}, InvalidRequest, "at least one class"),
        ({"temperatures": (0.0,)}, InvalidRequest, "not between 0.01 and 1000"),
        ({"temperatures": (float("nan"),)}, InvalidRequest, "not between"),
        ({"batch_size": 0}, InvalidRequest, "--batch-size 0"),
        ({"loader_workers": -1}, InvalidRequest, "--loader-workers -1"),
        ({"rows_per_shard": 1000}, InvalidRequest, "multiple of 4,096"),
        ({"device": "cuda:99"}, InvalidRequest, "--device 'cuda:99' cannot be used here"),
        ({"device": "gpu"}, InvalidRequest, "--device 'gpu' cannot be used here"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_and_nothing_is_written(
    store: Path, changes: dict[str, Any], kind: type[LogitcacheError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        precompute(dataclasses.replace(request(store), **changes))
    assert not store.exists()


def test_another_dtype_k_and_teacher_are_refused_field_by_field(store: Path) -> None:
    precompute(request(store))
    with pytest.raises(IdentityChanged) as caught:
        precompute(request(store, teacher="good_teacher_like", top_k=4, dtype="float32", temperatures=(3.0,)))
    fields = caught.value.details["fields"]
    assert set(fields) == {"k", "dtype", "temperatures", "teacher.name", "teacher.weights"}
    assert fields["k"] == [3, 4]


def test_two_precomputes_of_one_label_set_do_not_meet(store: Path) -> None:
    precompute(request(store))
    layout = LocalLabelSet(store / "set").layout
    with (
        LabelSetWriter(store / "set", layout),
        pytest.raises(LabelSetLocked, match="being written by another process"),
    ):
        precompute(request(store))


def test_a_foreign_folder_is_left_alone(store: Path) -> None:
    (store / "set").mkdir(parents=True)
    (store / "set" / "paper.tex").touch()
    with pytest.raises(NotALabelSet):
        precompute(request(store))


def test_too_little_space_is_told_before_any_work(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda path: 1_000_000)
    with pytest.raises(DiskFull, match=r"needs 1\.\d+ MB for 3 more shards, 1 MB are free: make room, name another"):
        precompute(request(store))
    assert not store.exists()
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        precompute(request(store), Interrupting(4097))
    # Where it exists, neither of the two arguments may change.
    monkeypatch.setattr(space, "free_bytes", lambda path: 1_000_000)
    with pytest.raises(DiskFull, match=r"for 2 more shards, 1 MB are free: make room$"):
        precompute(request(store))
    monkeypatch.undo()
    assert precompute(request(store)).labelled == 9000 - 4096


def test_the_plan_says_size_and_time_and_writes_nothing(store: Path) -> None:
    planned = plan(request(store))
    assert not store.exists()
    text = str(planned)
    assert "9,000 of 9,000 rows to label, in 3 of 3 shards" in text
    assert "rows/s" in text
    precompute(request(store))
    stored = sum(file.stat().st_blocks * 512 for file in (store / "set").glob("*/c.*"))
    assert stored <= planned.needed_bytes <= 1.2 * stored + space.SPARE_BYTES
    again = plan(request(store))
    assert (again.missing, again.missing_rows, again.needed_bytes) == (0, 0, 0)
    with pytest.raises(IdentityChanged):
        plan(request(store, top_k=4))


def test_the_command_line_says_whether_targets_are_stored(store: Path) -> None:
    line = ["precompute", "set", "--teacher", f"{HERE}:good_teacher", "--dataset", f"{HERE}:small_data", "--top-k", "3"]
    for option, told in ([], True), (["--targets"], True), (["--no-targets"], False):
        result = CliRunner().invoke(cli, [*line, "--store", str(store), "--plan", *option], catch_exceptions=False)
        assert ("temperatures 1, and targets" in result.output) is told


def test_a_repaired_shard_is_told_with_whether_its_bytes_came_back(store: Path) -> None:
    digest = precompute(request(store)).digest
    chunk = store / "set" / "logits" / "c.1.0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    notes = Notes()
    summary = precompute(request(store), notes)
    assert (summary.digest, summary.repaired, summary.reproduced, summary.labelled) == (digest, (1,), True, 4096)
    assert "repaired    shards 1: the same bytes again" in str(summary)
    assert any("shard 1" in note and "quarantine" in note for note in notes.notes)


def test_a_repair_of_changed_data_is_refused_and_the_label_set_stays_as_it_is(store: Path) -> None:
    digest = precompute(request(store)).digest
    chunk = store / "set" / "logits" / "c.1.0"
    chunk.write_bytes(b"\1" * chunk.stat().st_size)
    with pytest.raises(DatasetChanged, match="before shard 1 was damaged"):
        precompute(request(store, dataset="changed_in_the_second_shard"))
    reader = LocalLabelSet(store / "set")
    assert (reader.describe().digest, reader.describe().labelled) == (digest, 9000 - 4096)
    reader.close()
    assert precompute(request(store)).digest == digest


@pytest.mark.parametrize("workers", [0, 1])
def test_inputs_that_carry_a_graph_are_read_as_they_are(store: Path, workers: int) -> None:
    precompute(request(store, name="plain"))
    precompute(request(store, dataset="Differentiable", loader_workers=workers))
    assert np.array_equal(rows(store / "set").fingerprint, rows(store / "plain").fingerprint)


# torch tells of it by a signal, which may come while a file is being opened.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_is_told_with_what_to_do(store: Path) -> None:
    with pytest.raises(DatasetFault, match=r"a process that reads the dataset ended: .*--loader-workers 0"):
        precompute(request(store, dataset="Dying", loader_workers=1))
    assert precompute(request(store, dataset="Dying")).rows == 9000


def test_the_store_stays_where_it_was_meant_when_user_code_changes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    precompute(request(Path("here"), dataset="Wandering"))
    assert Path.cwd() == Path("/")
    assert (tmp_path / "here" / "set" / "zarr.json").exists()
    monkeypatch.chdir(tmp_path)
    reader = LocalLabelSet("here/set")
    monkeypatch.chdir("/")
    reader._shards._looked_at = 0.0
    assert len(reader.fetch([0])) == 1
    reader.close()


def test_weights_that_do_not_exist_yet_are_a_fault_of_the_teacher(store: Path) -> None:
    with pytest.raises(TeacherFault, match="cannot be hashed or moved to cpu"):
        precompute(request(store, teacher="lazy_teacher"))


def test_inputs_of_a_shard_are_not_kept_until_it_is_written(store: Path) -> None:
    specimens.Counting.most = 0
    precompute(request(store, teacher="Counting", batch_size=64))
    # 64 batches a shard: the one before may still be in the caller's hands, and the loader's.
    assert specimens.Counting.most <= 3


def test_buffers_that_no_checkpoint_keeps_are_part_of_the_weights() -> None:
    torch.manual_seed(0)
    one = weights_digest(specimens.with_buffer(1.0))
    torch.manual_seed(0)
    assert weights_digest(specimens.with_buffer(2.0)) != one
    torch.manual_seed(0)
    assert weights_digest(specimens.with_buffer(1.0)) == one


def test_a_temperature_from_any_iterable_is_declared() -> None:
    assert declared(value for value in (4.0, 2.0, 4.0)) == (1.0, 2.0, 4.0)
