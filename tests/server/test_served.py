"""What was served is counted, written down beside the label set, and goes on after a restart."""

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given as given_hypothesis
from hypothesis import strategies
from tests.server.conftest import IDENTITY, commit_timed, shard_arrays, timed_label_set, timed_writer
from tests.server.test_cli import run
from tests.server.test_operations import metric

from logitcache.labels.bill import Served
from logitcache.labels.errors import DiskFull, LogitcacheError, StoreNotWritable
from logitcache.server.http import app
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage import LocalLabelSet
from logitcache.storage.files import Files
from logitcache.storage.layout import Layout
from logitcache.storage.served import ServedTally
from logitcache.storage.writer import LabelSetWriter

LEAVES = strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text()


def in_its_members(inner: strategies.SearchStrategy[Any]) -> strategies.SearchStrategy[dict[str, Any]]:
    """Objects with the members that a count has; ``"identity": true`` stands for the right one."""
    return strategies.fixed_dictionaries({"identity": strategies.just(True), "rows": inner, "seconds": inner})


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
