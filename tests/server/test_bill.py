"""What labelling took the teacher: recorded a shard, summed over those committed, told by `info` and the metrics."""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.server import given
from tests.server.conftest import commit_timed, shard_arrays, timed_label_set, timed_writer
from tests.server.test_cli import run
from tests.server.test_operations import metric
from tests.server.test_precompute import request

from logitcache.client import connect
from logitcache.labels.bill import TeacherTime
from logitcache.labels.errors import TeacherFault
from logitcache.labels.selection.top_k import select_top_k
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.server.labelling.precompute import precompute
from logitcache.storage import LocalLabelSet

BATCH = 1024


class Watch:
    """An independent stopwatch, with a time for each block."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, list[float]()

    @contextmanager
    def running(self) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds.append(time.perf_counter() - began)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Slow:
    """A teacher that keeps its device busy for some 150 ms a batch, by its own watch."""

    teacher_id = "slow"

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        with self.watch.running():
            if inputs.is_cuda:
                torch.cuda._sleep(250_000_000)  # cycles
            else:
                time.sleep(0.15)
            return inputs @ torch.ones(given.FEATURES, given.CLASSES, device=inputs.device)


class SlowToRead:
    """A dataset whose batches take half as long to read as to label."""

    def __len__(self) -> int:
        return 9000

    def __getitem__(self, index: int) -> torch.Tensor:
        if index % BATCH == 0:
            time.sleep(0.07)
        return torch.tensor([float(index), 1.0, 2.0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_time_recorded_is_that_of_the_teacher_and_the_selection_by_an_independent_stopwatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    forward, selection = Watch(device), Watch(device)

    def select_watched(*arguments: Any, **options: Any) -> Any:
        with selection.running():
            return select_top_k(*arguments, **options)

    monkeypatch.setattr("logitcache.server.labelling.shard_arrays.select_top_k", select_watched)
    given.run(tmp_path, SlowToRead(), Slow(forward), batch_size=BATCH, device=device)
    # The first forward is the trial that tells how many classes there are.
    stopped = sum(forward.seconds[1:]) + sum(selection.seconds)
    spent = LocalLabelSet(tmp_path / "set").describe().teacher_time
    assert spent is not None
    assert spent.seconds == pytest.approx(stopped, rel=0.05)
    assert spent.rows == 9000
    assert spent.device == ("cpu" if device == "cpu" else torch.cuda.get_device_name())


class Stubborn(given.Linear):
    """Refuses one example."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at = at

    def forward(self, inputs: torch.Tensor) -> Any:
        if self.at is not None and bool((inputs[:, 0] == 3 * self.at).any()):
            raise RuntimeError
        return super().forward(inputs)


def statistics(path: Path) -> list[dict[str, Any]]:
    return [json.loads((path / "statistics" / f"{shard}.json").read_bytes()) for shard in range(3)]


def total(path: Path) -> TeacherTime:
    times = [each["teacher_time"] for each in statistics(path)]
    return TeacherTime(sum(each["seconds"] for each in times), sum(each["rows"] for each in times), "cpu")


def same(one: TeacherTime | None, other: TeacherTime) -> bool:
    assert one is not None
    return (one.rows, one.device) == (other.rows, other.device) and one.seconds == pytest.approx(other.seconds)


def test_a_run_that_goes_on_adds_its_shards_and_counts_none_twice(tmp_path: Path) -> None:
    path, nine_thousand = tmp_path / "set", torch.arange(27_000.0).reshape(9000, 3).unbind()
    with pytest.raises(TeacherFault):
        given.run(tmp_path, nine_thousand, Stubborn(at=5000))
    begun = LocalLabelSet(path).describe().teacher_time
    assert begun is not None
    assert begun.rows == 4096
    assert begun.seconds > 0
    given.run(tmp_path, nine_thousand, Stubborn(at=None))
    assert statistics(path)[0]["teacher_time"]["seconds"] == begun.seconds
    assert total(path).rows == 9000
    assert same(LocalLabelSet(path).describe().teacher_time, total(path))
    before = total(path)
    given.run(tmp_path, nine_thousand, Stubborn(at=None))
    assert total(path) == before


def test_a_repaired_shard_counts_as_it_was_labelled_last_also_in_a_reader_that_was_open(tmp_path: Path) -> None:
    path = tmp_path / "set"
    precompute(request(tmp_path))
    before, reader = total(path), LocalLabelSet(path)
    assert same(reader.describe().teacher_time, before)
    (path / "commits" / "1.json").unlink()
    assert precompute(request(tmp_path)).reproduced
    assert total(path).seconds != before.seconds
    assert not reader.is_replaced  # it looked
    for each in (reader, LocalLabelSet(path)):
        assert same(each.describe().teacher_time, total(path))


UNTIMED: list[Any] = [
    None,
    5,
    {},
    {"seconds": -1.0, "rows": 5, "device": "cpu"},
    {"seconds": 1.0},
    {"seconds": 10**400, "rows": 5, "device": "cpu"},
]


@pytest.mark.parametrize("entry", UNTIMED)
def test_statistics_that_tell_no_time_are_left_out(tmp_path: Path, entry: Any) -> None:
    path = tmp_path / "set"
    precompute(request(tmp_path))
    (path / "statistics" / "0.json").write_text(json.dumps({"teacher_time": entry}))
    (path / "statistics" / "1.json").unlink()
    known = statistics_of_the_last(path)
    assert LocalLabelSet(path).describe().teacher_time == known
    page = run("info", "set", store=tmp_path).stdout
    assert f"{known}; not recorded of the other rows" in page


@pytest.mark.parametrize(
    "change",
    [{"rows": math.inf}, {"rows": 10**400}, {"rows": -1}, {"sum": math.inf}, {"sum": 10**400}, {"min": math.nan}],
)
def test_a_retained_mass_that_is_no_number_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "set"
    precompute(request(tmp_path))
    expected = set(LocalLabelSet(path).describe().retained_mass)
    content = statistics(path)[0]
    for entry in content["retained_mass"].values():
        entry |= change
    (path / "statistics" / "0.json").write_text(json.dumps(content))
    found = LocalLabelSet(path).describe().retained_mass
    assert set(found) == expected
    assert all(0 < value <= 1 for entry in found.values() for value in entry.values())
    with running(create_app(Catalog(tmp_path))) as url:
        assert httpx.get(f"{url}/v1/label-sets").json()[0]["retained_mass"] == found


def statistics_of_the_last(path: Path) -> TeacherTime:
    return TeacherTime.from_json(json.loads((path / "statistics" / "2.json").read_bytes())["teacher_time"])


def test_info_tells_the_teachers_time_its_device_and_what_a_row_took(own_store: Path) -> None:
    timed_label_set(own_store / "timed")
    told = "16.4 s on some GPU for 8,192 rows, 2 ms a row; not recorded of the other rows"
    for name, fact in (("timed", told), ("digits", "not recorded")):
        (line,) = [line for line in run("info", name, store=own_store).stdout.splitlines() if "teacher time" in line]
        assert line.removeprefix("teacher time").strip() == fact


def test_metrics_tell_what_was_spent_and_what_the_rows_served_saved(timed: httpx.Client) -> None:
    spent, saved = (f'logitcache_teacher_seconds{end}{{label_set="timed"}}' for end in ("", "_saved"))
    assert metric(timed, spent) == pytest.approx(16.384)
    assert metric(timed, saved) == 0
    for ids in ([1, 2, 3], [9000, 5]):
        timed.post("/v1/label-sets/timed/fetch", json={"ids": ids})
    assert metric(timed, saved) == pytest.approx(0.01)
    assert metric(timed, spent) == pytest.approx(16.384)
    assert 'logitcache_teacher_seconds{label_set="digits"}' not in timed.get("/metrics").text


@pytest.mark.parametrize("media", ["application/json", "application/vnd.safetensors"])
def test_rows_of_examples_that_are_masked_saved_nothing(timed: httpx.Client, media: str) -> None:
    asked = {"ids": [1, 2, 10**6], "on_missing": "mask"}
    timed.post("/v1/label-sets/timed/fetch", json=asked, headers={"Accept": media}).raise_for_status()
    assert metric(timed, 'logitcache_rows_served_total{label_set="timed"}') == 2
    assert metric(timed, 'logitcache_teacher_seconds_saved{label_set="timed"}') == pytest.approx(0.004)


@pytest.mark.parametrize("served", [False, True])
def test_the_bill_knows_the_shards_that_came_since_connecting(own_store: Path, served: bool) -> None:
    with timed_writer(own_store / "timed") as writer, contextlib.ExitStack() as stack:
        commit_timed(writer, 0)
        target = own_store / "timed"
        url = stack.enter_context(running(create_app(Catalog(own_store)))) if served else ""
        labels = stack.enter_context(connect(f"{url}/timed" if served else target))
        labels.fetch([0])
        bill = labels.stats.bill
        assert bill is not None
        assert bill.teacher.rows == 4096
        commit_timed(writer, 1)
        labels.fetch([4096], on_missing="wait")
        bill = labels.stats.bill
        assert bill is not None
        assert (bill.teacher.rows, bill.served) == (8192, 2)
        writer.commit(2, shard_arrays(writer.layout.span(2)), {})
        writer.seal()
        labels.fetch([9000], on_missing="wait")
        assert labels.stats.bill is not None
        asked = labels.stats.requests
        assert labels.stats.requests == asked  # nobody asks for what cannot change any more


def test_counts_are_told_of_labels_that_cannot_be_described_any_more(own_store: Path) -> None:
    with timed_writer(own_store / "timed") as writer:
        commit_timed(writer, 0)
    with running(create_app(Catalog(own_store))) as url:
        labels = connect(f"{url}/timed", timeout_s=2, retries=0)
        labels.fetch([0])
    assert labels.stats.rows == 1
    labels.close()
    assert labels.stats.bill is not None


def test_the_server_describes_it(timed: httpx.Client) -> None:
    answer = timed.get("/v1/label-sets/timed").json()
    assert answer["teacher_time"] == {"seconds": 16.384, "rows": 8192, "device": "some GPU"}
    assert answer["served"] is None
    assert timed.get("/v1/label-sets/digits").json()["teacher_time"] is None
