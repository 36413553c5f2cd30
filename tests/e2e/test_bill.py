"""The bill as a training run sees it, of a folder and of a server: what its rows would have cost, and what they did."""

import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
from tests.server.conftest import commit_timed, timed_label_set, timed_writer, write_label_set
from tests.server.test_cli import run
from tests.server.test_operations import metric

from logitcache.client import Labels, connect, with_ids
from logitcache.labels.bill import TeacherTime
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage.writer import LabelSetWriter

SPENT = TeacherTime(16.384, 8192, "some GPU")


@pytest.mark.parametrize("over_http", [False, True], ids=["folder", "http"])
def test_the_fetch_time_is_that_of_an_independent_stopwatch(tmp_path: Path, over_http: bool) -> None:
    timed_label_set(tmp_path / "timed")
    # So many that what a call does besides is far less than the bound.
    ids = np.random.default_rng(0).integers(10_000, size=60_000)
    with running(create_app(Catalog(tmp_path))) as url:
        labels = connect(f"{url}/timed" if over_http else tmp_path / "timed")
        labels.fetch(ids)  # opens files and connections
        before, stopped = labels.stats.fetch_ms, 0.0
        for _ in range(50):
            began = time.perf_counter()
            labels.fetch(ids)
            stopped += time.perf_counter() - began
        stats = labels.stats
        labels.close()
    assert stats.fetch_ms - before == pytest.approx(1000 * stopped, rel=0.05)
    assert stats.bill is not None
    assert (stats.bill.teacher, stats.bill.served) == (SPENT, 51 * len(ids))
    assert stats.bill.saved_s == pytest.approx(51 * len(ids) * 0.002)
    assert stats.bill.fetch_s == stats.fetch_ms / 1000
    assert stats.bill.is_paid


def test_attached_labels_are_on_the_bill_and_server_and_client_agree_on_what_they_saved(tmp_path: Path) -> None:
    timed_label_set(tmp_path / "timed")
    dataset = with_ids(torch.utils.data.TensorDataset(torch.zeros(10_000, 2)))
    with running(create_app(Catalog(tmp_path))) as url, connect(f"{url}/timed") as labels:
        loader = torch.utils.data.DataLoader(dataset, batch_size=512, shuffle=True)
        assert len([soft for _, soft in labels.attach(loader, ids=-1)]) == 20
        with httpx.Client(base_url=url) as client:
            saved = metric(client, 'logitcache_teacher_seconds_saved{label_set="timed"}')
            took = metric(client, 'logitcache_fetch_seconds_total{label_set="timed"}')
            passes = metric(client, 'logitcache_passes_to_pay{label_set="timed"}')
        bill = labels.stats.bill
        assert bill is not None
        assert bill.saved_s == pytest.approx(saved) == pytest.approx(20.0)
        assert bill.epochs_to_pay == pytest.approx(1, rel=0.5)
        assert str(bill) in str(labels.stats)
        described = labels.describe().bill
    assert bill.fetch_s is not None
    assert 0 < took <= bill.fetch_s
    assert bill.epochs_to_pay is not None
    assert 1 < passes <= bill.epochs_to_pay
    assert described is not None
    assert (described.teacher, described.served) == (bill.teacher, bill.served)
    assert described.fetch_s == pytest.approx(took)
    (told,) = [line for line in run("info", "timed", store=tmp_path).stdout.splitlines() if line.startswith("bill ")]
    assert told.removeprefix("bill").strip() == str(described)


def test_the_time_that_a_fetch_waits_for_labels_is_not_what_fetching_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with timed_writer(tmp_path / "timed") as writer, connect_after(writer, tmp_path / "timed") as labels:

        def pause(_seconds: float) -> None:
            if 1 in writer.missing:
                commit_timed(writer, 1)
            time.sleep(0.6)

        monkeypatch.setattr("logitcache.client.waiting.time", SimpleNamespace(sleep=pause))
        labels.fetch([1, 5000], on_missing="wait")
        assert 0 < labels.stats.fetch_ms < 500


def connect_after(writer: LabelSetWriter, path: Path) -> Labels:
    commit_timed(writer, 0)
    return connect(path)


def test_a_label_set_that_tells_no_time_has_no_bill(tmp_path: Path) -> None:
    write_label_set(tmp_path / "digits")
    with connect(tmp_path / "digits") as labels:
        labels.fetch([1, 2, 3])
        assert labels.stats.bill is None
        assert labels.stats.fetch_ms > 0
