"""A run records its own rows: they are those that precompute stores, here and over HTTP."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.building import build, reference
from tests.e2e.recorded import CLASSES, EXAMPLES, OPTIONS, TABLE, K, all_of, batches, whole
from tests.e2e.test_benchmarks import figures
from tests.server.given import FEATURES, sequences
from tests.server.given import run as precompute
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.utils.data import DataLoader, DistributedSampler

from logitcache.client import RecorderReplaced, connect, record, waiting, with_ids, with_views
from logitcache.labels.errors import (
    DigestChanged,
    DiskFull,
    IdentityChanged,
    InvalidRequest,
    LabelMismatch,
    RequestRefused,
    RowsMissing,
    ShapeMismatch,
    TeacherFault,
)
from logitcache.labels.soft_labels import SoftLabels
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage.files import Files, explained


class Looked(torch.nn.Module):
    """Logits that stand in a table: the same bits in whatever batch. The first feature, or the token, says which."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(TABLE.clone())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        which = inputs[:, 0].long().abs() % EXAMPLES if inputs.is_floating_point() else inputs
        return self.table[which]


def images() -> torch.Tensor:
    """What each example is: its ordinal, and noise."""
    inputs = torch.randn(EXAMPLES, FEATURES, generator=torch.Generator().manual_seed(2))
    inputs[:, 0] = torch.arange(EXAMPLES)
    return inputs


INPUTS = images()


@pytest.fixture(params=["folder", "server"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """What stands before the names of label sets of a store: a folder's path, or a server's address."""
    (tmp_path / "store").mkdir()
    with ExitStack() as stack:
        if request.param == "folder":
            yield str(tmp_path / "store")
        else:
            yield stack.enter_context(running(create_app(Catalog(tmp_path / "store"), record=True)))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "store").mkdir(exist_ok=True)
    with running(create_app(Catalog(tmp_path / "store"), record=True)) as url:
        yield url


def assert_same(found: SoftLabels, expected: SoftLabels) -> None:
    """Every array has the same bits."""
    mine, theirs = found.arrays(), expected.arrays()
    assert set(mine) == set(theirs)
    for name, array in theirs.items():
        assert (mine[name].dtype, mine[name].tobytes()) == (array.dtype, array.tobytes()), name


# Rows recorded are rows precomputed.


@pytest.mark.parametrize("ids", ["ordinal", "integer", "text"])
def test_recorded_rows_are_those_that_precompute_stores_bit_for_bit(store: str, tmp_path: Path, ids: str) -> None:
    names: list[Any] = list(range(EXAMPLES))
    if ids != "ordinal":
        names = [7 * number - 900 if ids == "integer" else f"train/é-{number}.png" for number in names]
    items = [{"input": INPUTS[i], **({} if ids == "ordinal" else {"id": names[i]})} for i in range(EXAMPLES)]
    precompute(tmp_path / "store", items, Looked(), top_k=K)  # as label set `set`
    model = Looked()
    with connect(f"{store}/set") as labels:
        with labels.record("run-1", run="run-1", steps=range(1000)) as recorder:
            for batch in batches():
                inputs = INPUTS[torch.from_numpy(batch)]
                recorder.add([names[i] for i in batch], model(inputs), inputs=inputs)
        expected = labels.fetch(names)
        identity = labels.describe().identity
    assert recorder.digest is not None
    found = all_of(f"{store}/run-1", names, recorder.digest)
    assert_same(found, expected)
    with connect(f"{store}/run-1") as labels:
        described = labels.describe()
    assert replace(described.identity, teacher=identity.teacher) == identity
    assert described.identity.teacher.weights == "moving; steps 0 to 999; train mode"
    own = {"examples": EXAMPLES} if ids == "ordinal" else {"ids": names}
    with record(f"{store}/run-2", **OPTIONS | own) as other:
        for batch in batches(seed=1, size=70):
            inputs = INPUTS[torch.from_numpy(batch)]
            other.add([names[i] for i in batch], model(inputs), inputs=inputs, step=int(batch[0]))
    assert_same(all_of(f"{store}/run-2", names), expected)
    assert other.digest == recorder.digest


def test_recorded_rows_of_tokens_are_those_that_precompute_stores(store: str, tmp_path: Path) -> None:
    tokens = sequences([7, 1, 30, 2, 5, 64, 3, 11, 30, 4], CLASSES)
    asked = [np.where(np.arange(len(line)) % 3, line, -100) for line in tokens]
    items = [{"input_ids": line, "labels": wanted} for line, wanted in zip(tokens, asked, strict=True)]
    precompute(tmp_path / "store", items, Looked(), top_k=K)
    model, width = Looked(), max(map(len, tokens))
    with connect(f"{store}/set") as labels:
        assert labels.describe().identity.targets
        with labels.record("run-1", run="run-1", steps=range(5)) as recorder:
            for batch in ([3, 1, 9], [5, 0, 2, 4], [6, 8, 7]):
                inputs = torch.full((len(batch), width), 7)
                mask, targets = torch.zeros(len(batch), width, dtype=torch.int64), torch.full((len(batch), width), 3)
                for row, ordinal in enumerate(batch):
                    length = len(tokens[ordinal])
                    inputs[row, :length] = torch.from_numpy(tokens[ordinal])
                    targets[row, :length] = torch.from_numpy(asked[ordinal])
                    mask[row, :length] = 1
                logits = model(inputs)
                recorder.add(batch, logits, inputs=inputs, attention_mask=mask, targets=targets)
        expected = labels.fetch(range(10))
    assert recorder.digest is not None
    assert expected.target is not None
    assert (expected.target >= 0).any()
    with connect(f"{store}/run-1") as labels:
        assert_same(labels.fetch(range(10)), expected)
        labels.fetch([5, 1], inputs=[tokens[5], tokens[1]])
        with pytest.raises(LabelMismatch):
            labels.fetch([5, 1], inputs=[tokens[5], tokens[1] + 1])


class Jittered:
    """Items that are drawn anew at each reading, but for their ordinal."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.randn(FEATURES)
        noise[0] = (index + 50 * int(torch.randint(0, 5, ()))) % EXAMPLES
        return noise


def test_recorded_views_are_those_that_precompute_stores(store: str, tmp_path: Path) -> None:
    precompute(tmp_path / "store", Jittered(), Looked(), top_k=K, views=3, rows_per_shard=3 * 4096)
    model, ids = Looked(), np.tile(np.arange(EXAMPLES), 2)
    with connect(f"{store}/set") as labels:
        dataset: Any = with_views(Jittered(), labels.describe().identity)
        with labels.record("run-1", run="run-1", steps=range(1000), views=2) as recorder:
            for view in (1, 0):
                dataset.set_epoch(view)
                for inputs, seen in DataLoader(dataset, batch_size=64, shuffle=True):
                    recorder.add(seen["id"], model(inputs), inputs=inputs, view=seen["view"])
        views = np.repeat([0, 1], EXAMPLES)
        assert_same(all_of(f"{store}/run-1", ids, view=views), labels.fetch(ids, view=views))
        with pytest.raises(InvalidRequest, match="views=4"):
            labels.record("run-2", run="run-1", steps=range(9), views=4)


def test_a_label_set_that_is_not_finished_is_no_measure_for_a_recording(store: str, tmp_path: Path) -> None:
    build(tmp_path / "store" / "half", reference(2, ids="text"), [0])
    with connect(f"{store}/half") as labels, pytest.raises(InvalidRequest, match="finish"):
        labels.record("run-1", run="run-1", steps=range(9))


# Reading meanwhile, and what is refused.


def test_whoever_waits_for_rows_gets_them_from_the_recorder(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record(f"{store}/run-1", **OPTIONS, examples=EXAMPLES)
    asked: list[int] = []

    class Clock:
        """In the place of the module `time`: each pause of whoever waits brings some rows."""

        def sleep(self, seconds: float) -> None:
            begin = 100 * len(asked)
            asked.append(begin)
            recorder.add(range(begin, begin + 100), TABLE[begin : begin + 100])
            recorder.flush()

    monkeypatch.setattr(waiting, "time", Clock())
    with connect(f"{store}/run-1") as labels:
        with pytest.raises(RowsMissing, match="record"):
            labels.fetch([5])
        soft = labels.fetch([5, 250], on_missing="wait")
        assert asked == [0, 100, 200]
        assert np.array_equal(soft.indices, TABLE[[5, 250]].topk(K).indices)
        with pytest.raises(DigestChanged, match="no digest yet"):
            connect(f"{store}/run-1", digest="sha256:" + "1" * 64)
        digest = recorder.finish()
        assert_same(labels.fetch([5, 250]), replace(soft, digest=digest))
        assert labels.describe().digest == digest
    recorder.close()


def test_errors_read_the_same_here_and_over_http(store: str) -> None:
    names = [f"n/{number}" for number in range(EXAMPLES)]
    recorder = record(f"{store}/run-1", **OPTIONS, ids=names)
    with pytest.raises(ShapeMismatch, match="11 classes: this label set has 12"):
        recorder.add(names[:2], TABLE[:2, :11])
    with pytest.raises(InvalidRequest, match="0 to 999"):
        recorder.add(names[:2], TABLE[:2], step=1000)
    recorder.add(["n/1", "n/x", "é"], TABLE[:3])
    with pytest.raises(RowsMissing, match=r"'n/x'.*'é'.*300 examples") as caught:
        recorder.flush()
    assert caught.value.unknown == ["n/x", "é"]
    broken = TABLE[:3].clone()
    broken[1] = torch.nan
    recorder.add(names[:3], broken)
    with pytest.raises(TeacherFault) as faulty:
        recorder.flush()
    assert faulty.value.details["ids"] == ["n/1"]
    with connect(f"{store}/run-1") as labels:
        assert labels.missing(names) == names
    recorder.close()
    with pytest.raises(IdentityChanged, match="k was 5 and is now 6"):
        record(f"{store}/run-1", **OPTIONS | {"top_k": 6}, ids=names)
    with pytest.raises(IdentityChanged, match="ids"):
        record(f"{store}/run-1", **OPTIONS, ids=names[::-1])


def test_a_server_that_does_not_record_names_the_flag(tmp_path: Path) -> None:
    build(tmp_path / "set", reference(1))
    with running(create_app(Catalog(tmp_path))) as url, connect(f"{url}/set") as labels:
        with pytest.raises(RequestRefused, match="logitcache serve --record"):
            labels.record("run-1", run="run-1", steps=range(9))
        with pytest.raises(RequestRefused, match="logitcache serve --record"):
            record(f"{url}/run-1", **OPTIONS, examples=9)


def test_a_second_recorder_of_one_rank_takes_the_place_of_the_first(server: str) -> None:
    first = record(f"{server}/run-1", **OPTIONS, examples=EXAMPLES)
    first.add(range(100), TABLE[:100])
    first.flush()
    with record(f"{server}/run-1", **OPTIONS, examples=EXAMPLES) as second:
        first.add([100], TABLE[[100]])
        with pytest.raises(RecorderReplaced, match="its own rank"):
            first.flush()
        second.add(range(100, EXAMPLES), TABLE[100:])
    assert second.digest is not None
    first.close()


# Several recorders.


def test_several_recorders_seal_once_what_one_would_have(server: str, tmp_path: Path) -> None:
    recorders = [record(f"{server}/run-1", **OPTIONS, examples=EXAMPLES, rank=rank, recorders=2) for rank in (0, 1)]
    for number, batch in enumerate(batches()):
        recorders[number % 2].add(batch, TABLE[torch.from_numpy(batch)])
    assert recorders[1].finish() is None
    digest = recorders[0].finish()
    assert digest == recorders[1].finish() == whole(tmp_path)
    for recorder in recorders:
        recorder.close()


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    """The inputs."""

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return INPUTS[index]


def trained(rank: int, ranks: int, url: str, folder: Path) -> None:
    """One rank of a run, in a process of its own: it records the part of the data that its sampler gives it."""
    options = {"init_method": (folder / "meeting").as_uri(), "rank": rank, "world_size": ranks}
    distributed.init_process_group("gloo", **options)  # type: ignore[arg-type]
    sampler: DistributedSampler[Any] = DistributedSampler(Rows(), ranks, rank, seed=3)
    loader: Any = DataLoader(with_ids(Rows()), batch_size=16, sampler=sampler)
    model = torch.nn.parallel.DistributedDataParallel(Looked())
    with record(f"{url}/run-1", **OPTIONS, examples=EXAMPLES, rank=rank, recorders=ranks) as recorder:
        for step, (inputs, ids) in enumerate(loader):
            recorder.add(ids, model(inputs), step=step)
    (folder / f"{rank}.json").write_text(json.dumps(recorder.digest))
    distributed.barrier()
    distributed.destroy_process_group()
    os._exit(0)  # threads of gloo and autograd that outlive an interpreter abort its process now and then


def test_two_processes_of_one_run_seal_once_what_one_would_have(server: str, tmp_path: Path) -> None:
    spawn(trained, (2, server, tmp_path), nprocs=2)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert whole(tmp_path) in told
    with connect(f"{server}/run-1", digest=whole_digest(told)) as labels:
        assert np.array_equal(labels.fetch(range(EXAMPLES)).indices, TABLE.topk(K).indices)


def whole_digest(told: list[str | None]) -> str:
    """The one digest that the last to finish was told, or all of them."""
    (digest,) = {each for each in told if each is not None}
    return digest


# A disk that is full, a server that is away.


def test_a_full_disk_is_told_and_rows_are_sent_when_there_is_room(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with record(f"{server}/run-1", **OPTIONS, examples=EXAMPLES) as recorder:
        recorder.add(range(100), TABLE[:100])
        recorder.flush()

        def full(self: Files, handle: int, path: Path, end: int, data: Any) -> None:
            os.pwrite(handle, bytes(data)[: len(data) // 2], end)
            with explained(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(Files, "append", full)
            recorder.add(range(100, EXAMPLES), TABLE[100:])
            with pytest.raises(DiskFull):
                recorder.flush()
        recorder.flush()
    assert recorder.digest == whole(tmp_path)


# The benchmark.


@pytest.mark.smoke
def test_the_benchmark_records_the_same_rows_everywhere(tmp_path: Path) -> None:
    run, told = figures(tmp_path, "recording.py", "--quick")
    ways = ("logits", "rows", "awaited")
    assert set(run["methods"]) == {*(f"logitcache, {way}" for way in ways), "SQLite", "LMDB"}
    assert all(isinstance(met, bool) for met in run["goals"].values())
    assert all(goal in told for goal in run["goals"])


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_a_million_rows_are_recorded_and_sealed_to_one_digest_in_whatever_order(tmp_path: Path) -> None:
    run, told = figures(tmp_path, "recording.py")
    assert run["settings"]["rows"] == 1_000_000
    print(f"\n{told}")
