"""What labelling took the teacher: recorded a shard, summed over those committed, told by `info` and the metrics."""

import contextlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given as given_hypothesis
from hypothesis import strategies
from tests.server import given
from tests.server.conftest import IDENTITY, shard_arrays
from tests.server.test_cli import run
from tests.server.test_operations import metric
from tests.server.test_precompute import request

from logitcache.client import connect
from logitcache.labels.bill import Served, TeacherTime
from logitcache.labels.errors import DiskFull, LogitcacheError, StoreNotWritable, TeacherFault
from logitcache.labels.selection.top_k import select_top_k
from logitcache.server.http import app
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.server.labelling.precompute import precompute
from logitcache.storage import LocalLabelSet
from logitcache.storage.files import Files
from logitcache.storage.layout import Layout
from logitcache.storage.served import ServedTally
from logitcache.storage.writer import LabelSetWriter

BATCH = 1024

LEAVES = strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text()


def in_its_members(inner: strategies.SearchStrategy[Any]) -> strategies.SearchStrategy[dict[str, Any]]:
    """Objects with the members that a count has; ``"identity": true`` stands for the right one."""
    return strategies.fixed_dictionaries({"identity": strategies.just(True), "rows": inner, "seconds": inner})


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


def timed_writer(path: Path) -> LabelSetWriter:
    """Of 10,000 rows."""
    return LabelSetWriter(path, Layout.pointwise(IDENTITY, 10_000, 4096))


def commit_timed(writer: LabelSetWriter, shard: int) -> None:
    """Rows at 2 ms each, but for the 1,808 of the last shard, which took no time that is known."""
    spent = {"seconds": 8.192, "rows": 4096, "device": "some GPU"} if shard < 2 else None
    writer.commit(shard, shard_arrays(writer.layout.span(shard)), {"teacher_time": spent})


def timed_label_set(path: Path) -> None:
    """Complete."""
    with timed_writer(path) as writer:
        for shard in range(3):
            commit_timed(writer, shard)
        writer.seal()


@pytest.fixture
def timed(own_store: Path) -> Iterator[httpx.Client]:
    timed_label_set(own_store / "timed")
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        yield client


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


def served_rows(store: Path, name: str = "timed") -> int | None:
    """What a reader of the folder is told."""
    served = LocalLabelSet(store / name).describe().served
    return None if served is None else served.rows


def fetch_once(store: Path, *ids: int, name: str = "timed") -> None:
    """By a server that has stopped by now."""
    with running(create_app(Catalog(store))) as url:
        httpx.post(f"{url}/v1/label-sets/{name}/fetch", json={"ids": ids}).raise_for_status()


def line_of_info(store: Path, fact: str) -> str:
    page = run("info", "timed", store=store).stdout.splitlines()
    return next((line.removeprefix(fact).strip() for line in page if line.split()[0] == fact), "")


def test_what_was_served_and_paid_for_fetching_goes_on_after_a_restart(own_store: Path) -> None:
    timed_label_set(own_store / "timed")
    assert line_of_info(own_store, "bill").endswith("; no rows were served yet")
    fetch_once(own_store, 1, 2, 3)
    first = LocalLabelSet(own_store / "timed").describe().served
    assert first is not None
    assert first.rows == 3
    assert "; 3 rows served would have taken it 6 ms, and took " in line_of_info(own_store, "bill")
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        saved = 'logitcache_teacher_seconds_saved{label_set="timed"}'
        assert metric(client, saved) == pytest.approx(0.006)
        client.get("/v1/label-sets/timed/examples/5").raise_for_status()
        assert metric(client, saved) == pytest.approx(0.008)
        told = client.get("/v1/label-sets/timed").json()["served"]
        took = metric(client, 'logitcache_fetch_seconds_total{label_set="timed"}')
        assert told == {"rows": 4, "seconds": pytest.approx(first.seconds + took)}
    assert LocalLabelSet(own_store / "timed").describe().to_json()["served"] == told


def test_the_count_is_written_down_while_the_server_runs(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_label_set(own_store / "timed")
    monkeypatch.setattr(app, "SAVE_EVERY_S", 0.01)
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/label-sets/timed/fetch", json={"ids": [1, 2, 3]}).raise_for_status()
        given_up = time.monotonic() + 30
        while served_rows(own_store) != 3:
            assert time.monotonic() < given_up
            client.get("/healthz")


def test_passes_to_pay_are_told_once_something_was_served_and_may_be_none_ever(own_store: Path) -> None:
    timed_label_set(own_store / "timed")
    passes = 'logitcache_passes_to_pay{label_set="timed"}'
    tally = ServedTally(own_store / "timed" / "served.json", IDENTITY)
    for rows, seconds, expected in ((0, 0.0, None), (1000, 1.0, 2.0), (0, 1.0, math.inf)):
        if rows or seconds:
            tally.count(rows, seconds)
            tally.save()
        with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
            if expected is None:
                assert passes not in client.get("/metrics").text
            else:
                assert metric(client, passes) == pytest.approx(expected)
        assert ("itself" in line_of_info(own_store, "bill")) == (expected is not None)
    assert "never pays for itself" in line_of_info(own_store, "bill")


def test_what_is_refused_or_not_a_fetch_counts_as_nothing(timed: httpx.Client) -> None:
    timed.post("/v1/label-sets/timed/fetch", json={"ids": [10**6]})
    timed.post("/v1/label-sets/timed/fetch", json={"ids": "x"})
    timed.post("/v1/label-sets/timed/missing", json={"ids": [1, 2]}).raise_for_status()
    assert timed.get("/v1/label-sets/timed").json()["served"] is None
    assert metric(timed, 'logitcache_fetch_seconds_total{label_set="timed"}') == 0


def refuse(error: LogitcacheError) -> Callable[..., None]:
    def refused(*_: Any, **__: Any) -> None:
        raise error

    return refused


@pytest.mark.parametrize("error", [StoreNotWritable("read-only"), DiskFull("full")])
def test_a_store_that_cannot_be_written_is_served_and_its_count_forgotten(
    own_store: Path, monkeypatch: pytest.MonkeyPatch, error: LogitcacheError
) -> None:
    timed_label_set(own_store / "timed")
    monkeypatch.setattr(Files, "write", refuse(error))
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/label-sets/timed/fetch", json={"ids": [1, 2, 3]}).raise_for_status()
        assert client.get("/v1/label-sets/timed").json()["served"]["rows"] == 3
    assert served_rows(own_store) is None
    assert not list((own_store / "timed").glob("served*"))


def test_what_cannot_be_written_at_first_is_written_later(tmp_path: Path) -> None:
    path = tmp_path / "served.json"
    path.mkdir()
    tally = ServedTally(path, IDENTITY)
    tally.count(3, 0.5)
    tally.save()
    assert list(tmp_path.iterdir()) == [path]
    path.rmdir()
    tally.save()
    assert ServedTally(path, IDENTITY).so_far() == Served(3, 0.5)


def of_this_identity(path: Path) -> dict[str, Any]:
    tally = ServedTally(path, IDENTITY)
    tally.count(3, 0.5)
    tally.save()
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


HOSTILE = (b"", b"[]", b"5", b"null", b"\xff", b"[" * 10**5, b"9" * 10**5, b"{}")
CHANGES: tuple[dict[str, Any], ...] = (
    {"rows": -1},
    {"rows": 2**53 + 1},
    {"rows": 10**400},
    {"rows": 1.5},
    {"rows": True},
    {"rows": None},
    {"seconds": -1.0},
    {"seconds": math.nan},
    {"seconds": math.inf},
    {"seconds": 10**400},
    {"seconds": "1"},
    {"identity": "0" * 64},
    {"identity": None},
)


def test_a_count_that_does_not_read_or_is_of_another_identity_is_none(own_store: Path) -> None:
    timed_label_set(own_store / "timed")
    path = own_store / "timed" / "served.json"
    right = of_this_identity(path)
    assert served_rows(own_store) == 3
    for content in (*HOSTILE, *(json.dumps(right | change).encode() for change in CHANGES)):
        path.write_bytes(content)
        assert served_rows(own_store) is None, content[:80]
    fetch_once(own_store, 1)
    assert served_rows(own_store) == 1


@given_hypothesis(strategies.recursive(LEAVES, lambda inner: strategies.lists(inner) | in_its_members(inner)))
def test_whatever_stands_in_the_file_is_a_count_that_can_be_described_or_none(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "served.json"
        if isinstance(content, dict) and content.get("identity") is True:
            content["identity"] = of_this_identity(path)["identity"]
        path.write_text(json.dumps(content))
        tally = ServedTally(path, IDENTITY)
        before = tally.so_far() or Served()
        tally.count(5, 0.5)
        after = tally.so_far()
    assert after is not None
    assert Served.from_json(json.loads(json.dumps(asdict(after)))) == after
    assert before.rows <= after.rows <= before.rows + 5


def test_a_label_set_made_anew_starts_at_nothing(own_store: Path) -> None:
    timed_label_set(own_store / "timed")
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/label-sets/timed/fetch", json={"ids": [1, 2, 3]}).raise_for_status()
        # Out of the server's sight first: of one that is half there it would set aside what it misses.
        shutil.rmtree((own_store / "timed").rename(own_store.parent / "removed"))
        another = replace(IDENTITY, teacher=replace(IDENTITY.teacher, weights="sha256:bb"))
        with LabelSetWriter(own_store / "timed", Layout.pointwise(another, 4096, 4096)) as writer:
            writer.commit(0, shard_arrays(writer.layout.span(0)), {})
            writer.seal()
    assert served_rows(own_store) is None
    assert not (own_store / "timed" / "served.json").exists()


def test_a_label_set_begun_anew_in_its_old_folder_starts_at_nothing(own_store: Path) -> None:
    path = own_store / "timed"
    timed_label_set(path)
    fetch_once(own_store, 1, 2, 3)
    for file in (path / "zarr.json", *path.glob("commits/*"), *path.glob("generations/*")):
        file.unlink()
    timed_label_set(path)
    assert served_rows(own_store) is None


def test_a_label_set_that_is_labelled_further_keeps_its_count(own_store: Path) -> None:
    fetch_once(own_store, 1, 2, name="half")
    with timed_writer(own_store / "half") as writer:
        commit_timed(writer, 1)
    assert served_rows(own_store, "half") == 2


def test_the_server_describes_it(timed: httpx.Client) -> None:
    answer = timed.get("/v1/label-sets/timed").json()
    assert answer["teacher_time"] == {"seconds": 16.384, "rows": 8192, "device": "some GPU"}
    assert answer["served"] is None
    assert timed.get("/v1/label-sets/digits").json()["teacher_time"] is None


def test_servers_that_share_a_store_add_up(tmp_path: Path) -> None:
    path = tmp_path / "served.json"
    tallies = [ServedTally(path, IDENTITY) for _ in range(4)]

    def counted(tally: ServedTally) -> None:
        for _ in range(50):
            tally.count(2, 0.25)
            tally.save()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(counted, tallies))
    assert {each.so_far() for each in tallies} == {Served(400, 50.0)}
