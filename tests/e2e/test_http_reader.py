"""The HTTP reader against the real server: the conformance of all readers, and what lies between the two."""

import functools
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import httpx
import numpy as np
import pytest
import torch
from tests.building import ROWS_PER_SHARD, Reference, build, commit_shards, complete_and_partial, reference, writer_of
from tests.conformance import LabelSetConformance, assert_rows_equal

from logitcache.client import HttpLabelSet, Labels, TeacherMismatch, connect, distillation_loss
from logitcache.labels.errors import (
    DigestChanged,
    LabelSetNotFound,
    NewerFormat,
    RowsMissing,
    StorageFault,
    WrongLabels,
)
from logitcache.labels.label_set import Limits
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.protocol import MAX_HEAD_BYTES
from logitcache.server.http.serve import running

T = TypeVar("T")

SMALL = Limits(ids=1000)
"""So that a fetch of everything is split, and parts begin and end inside shards."""


@pytest.fixture(scope="module")
def source() -> Reference:
    return reference(3)


@pytest.fixture(scope="module")
def store(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_and_partial(tmp_path_factory.mktemp("store"), source)


@pytest.fixture(scope="module")
def url(store: Path) -> Iterator[str]:
    with running(create_app(Catalog(store, limits=SMALL))) as base:
        yield base


@pytest.fixture(scope="module", params=[SMALL, Limits()], ids=["split", "whole"])
def either_url(store: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    with running(create_app(Catalog(store, limits=request.param))) as base:
        yield base


@pytest.fixture
def complete(either_url: str) -> Iterator[HttpLabelSet]:
    reader = HttpLabelSet(either_url, "complete")
    yield reader
    reader.close()


@pytest.fixture
def partial(either_url: str) -> Iterator[HttpLabelSet]:
    reader = HttpLabelSet(either_url, "partial")
    yield reader
    reader.close()


class TestConformance(LabelSetConformance):
    """The HTTP reader behaves as every reader does, whether a fetch is one request or many."""


@pytest.fixture
def own_store(source: Reference, tmp_path: Path) -> Path:
    build(tmp_path / "store" / "set", source)
    return tmp_path / "store"


def test_a_fetch_above_the_limits_is_split_and_put_together(url: str, source: Reference) -> None:
    ids = np.arange(0, source.layout.examples, 2)
    with connect(f"{url}/complete") as labels:
        assert_rows_equal(labels.fetch(ids), source, ids)
        # One request for the description besides those for rows.
        assert labels.stats.requests >= -(-len(ids) // SMALL.ids)


def test_missing_rows_of_all_parts_are_named_together(url: str, source: Reference) -> None:
    ids = np.arange(ROWS_PER_SHARD - 1500, ROWS_PER_SHARD + 1500)
    with connect(f"{url}/partial") as labels, pytest.raises(RowsMissing) as caught:
        labels.fetch(ids)
    assert caught.value.unlabelled == list(range(ROWS_PER_SHARD, ROWS_PER_SHARD + 1500))


def test_masked_parts_are_put_together(url: str) -> None:
    ids = np.arange(ROWS_PER_SHARD - 1500, ROWS_PER_SHARD + 1500)
    with connect(f"{url}/partial") as labels:
        soft = labels.fetch(ids, on_missing="mask")
    assert soft.present is not None
    assert soft.present.tolist() == [True] * 1500 + [False] * 1500


def test_attach_can_mask_what_is_not_labelled_and_the_loss_then_takes_the_targets_alone(url: str) -> None:
    ids = torch.tensor([ROWS_PER_SHARD - 1, ROWS_PER_SHARD])
    student, targets = torch.randn(2, 20), torch.tensor([3, 4])
    with connect(f"{url}/partial") as labels:
        with pytest.raises(RowsMissing):
            list(labels.attach([{"id": ids}], ids="id"))
        [(_, soft)] = labels.attach([{"id": ids}], ids="id", on_missing="mask")
    assert soft.present is not None
    assert soft.present.tolist() == [True, False]
    losses = distillation_loss(student, soft, targets=targets, temperature=2.0, reduction="none")
    assert torch.isfinite(losses).all()
    assert torch.allclose(losses[1], torch.nn.functional.cross_entropy(student[1:], targets[1:]))


def test_a_misspelt_label_set_is_answered_with_those_that_are_near(url: str) -> None:
    with pytest.raises(LabelSetNotFound, match="complete") as caught:
        connect(f"{url}/complet")
    assert "complete" in caught.value.details["available"]
    assert caught.value.request_id


def test_a_label_set_made_while_the_server_runs_is_served(source: Reference, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with running(create_app(Catalog(store))) as base:
        with pytest.raises(LabelSetNotFound):
            connect(f"{base}/new")
        build(store / "new", source)
        labels = retry_for_a_second(lambda: connect(f"{base}/new"), LabelSetNotFound)
        assert_rows_equal(labels.fetch([7]), source, np.array([7]))
        labels.close()


def test_commits_and_generations_made_meanwhile_are_served_within_a_second(source: Reference, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with writer_of(store / "set", source) as writer:
        commit_shards(writer, source, [0])
        with running(create_app(Catalog(store))) as base, connect(f"{base}/set") as labels:
            with pytest.raises(RowsMissing):
                labels.fetch([ROWS_PER_SHARD])
            commit_shards(writer, source, [1, 2])
            soft = retry_for_a_second(lambda: labels.fetch([ROWS_PER_SHARD]), RowsMissing)
            assert_rows_equal(soft, source, np.array([ROWS_PER_SHARD]))
            digest = writer.seal().digest
            pinned = retry_for_a_second(lambda: connect(f"{base}/set", digest=digest), DigestChanged)
            assert pinned.fetch([0]).digest == digest
            pinned.close()


def retry_for_a_second(call: Callable[[], T], error: type[Exception]) -> T:
    """The first result without this error, or the error once a second and a half have gone by."""
    end = time.monotonic() + 1.5
    while True:
        try:
            return call()
        except error:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def test_a_damaged_shard_is_found_before_a_row_of_it_is_served(
    own_store: Path, source: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    chunk = own_store / "set" / "logits" / "c.1.0"
    content = bytearray(chunk.read_bytes())
    content[100] ^= 4
    chunk.write_bytes(content)
    with running(create_app(Catalog(own_store))) as base, connect(f"{base}/set") as labels:
        digest = labels.describe().digest
        with pytest.raises(RowsMissing, match="withdrawn as damaged: 1") as caught:
            labels.fetch([0, ROWS_PER_SHARD])
        assert caught.value.unlabelled == [ROWS_PER_SHARD]
        assert labels.describe().shards.damaged == 1
        metrics = httpx.get(f"{base}/metrics").text
        assert 'logitcache_label_set_shards{label_set="set",state="damaged"} 1.0' in metrics
        with writer_of(own_store / "set", source) as writer:
            commit_shards(writer, source, writer.missing)
            writer.seal()
        soft = retry_for_a_second(lambda: labels.fetch([0, ROWS_PER_SHARD]), RowsMissing)
        assert_rows_equal(soft, source, np.array([0, ROWS_PER_SHARD]))
        assert soft.digest == digest
    assert "withdrawn" in caplog.text


def test_a_folder_that_cannot_be_read_does_not_take_the_others_down(own_store: Path, source: Reference) -> None:
    shutil.copytree(own_store / "set", own_store / "newer")
    group = own_store / "newer" / "zarr.json"
    group.write_text(group.read_text().replace('"format_version": 1,', '"format_version": 2,'))
    (own_store / "foreign").mkdir()
    (own_store / "foreign" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with running(create_app(Catalog(own_store))) as base:
        with pytest.raises(NewerFormat, match="upgrade"):
            connect(f"{base}/newer")
        with pytest.raises(StorageFault, match="did not write"):
            connect(f"{base}/foreign")
        with connect(f"{base}/set") as labels:
            assert_rows_equal(labels.fetch([1]), source, np.array([1]))


def test_another_label_set_in_the_same_place_is_noticed(source: Reference, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build(store / "set", source)
    with running(create_app(Catalog(store))) as base:
        pinned = connect(f"{base}/set", teacher="seed 0")
        free = connect(f"{base}/set")
        assert pinned.fetch([1]).digest == free.fetch([1]).digest
        (store / "set").rename(tmp_path / "old")
        build(store / "set", reference(3, seed=9))
        with pytest.raises((TeacherMismatch, DigestChanged), match=r"seed 9|replaced"):
            fetch_for_five_seconds(pinned)
        with pytest.raises(DigestChanged, match="replaced"):
            fetch_for_five_seconds(free)
        # Once the server has opened the new one, a client that knew the old one still refuses it.
        retry_for_a_second(lambda: connect(f"{base}/set", teacher="seed 9"), WrongLabels).close()
        with pytest.raises(TeacherMismatch, match="seed 9"):
            pinned.fetch([1])
        for ask in (free.missing, free.fetch):
            with pytest.raises(DigestChanged, match=r"replaced by another label set .*teacher.weights changed"):
                ask([1])
        pinned.close()
        free.close()


def test_a_label_set_made_anew_by_the_same_teacher_is_noticed(source: Reference, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build(store / "set", source)
    with running(create_app(Catalog(store))) as base:
        labels = connect(f"{base}/set")
        labels.fetch([1])
        (store / "set").rename(tmp_path / "old")
        # The same identity over re-ordered data: only the content tells.
        build(store / "set", replace(source, logits=source.logits[::-1].copy()))
        with pytest.raises(DigestChanged):
            fetch_for_five_seconds(labels)
        retry_for_a_second(lambda: fetch_once(f"{base}/set"), WrongLabels)
        with pytest.raises(DigestChanged, match=r"made anew: .* its examples may be others"):
            labels.fetch([1])
        labels.close()


def test_a_repair_that_makes_a_new_generation_is_followed(source: Reference, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build(store / "set", source)
    with running(create_app(Catalog(store))) as base, connect(f"{base}/set") as labels:
        first = labels.fetch([1]).digest
        chunk = store / "set" / "logits" / "c.1.0"
        chunk.rename(tmp_path / "gone")
        other = replace(source, logits=source.logits + 1.0)
        with writer_of(store / "set", other) as writer:
            commit_shards(writer, other, writer.missing)
            second = writer.seal().digest
        assert second != first
        end = time.monotonic() + 5
        while labels.fetch([1]).digest != second:
            assert time.monotonic() < end


def fetch_once(target: str) -> None:
    with connect(target) as labels:
        labels.fetch([1])


def fetch_for_five_seconds(labels: Labels) -> None:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        labels.fetch([1])
        time.sleep(0.05)


def test_bytes_that_are_not_http_are_answered_with_a_problem(url: str) -> None:
    address = httpx.URL(url)
    for garbage in (
        b"\x16\x03\x01 hello\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * MAX_HEAD_BYTES,
        b"".join((b"GET / HTTP/1.1\r\nHost: x\r\n", *(b"X-Many: x\r\n" for _ in range(MAX_HEAD_BYTES // 10)))),
    ):
        with socket.create_connection((address.host, address.port or 0), timeout=10) as connection:
            connection.sendall(garbage)
            answer = b"".join(iter(functools.partial(connection.recv, 65_536), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400")
        assert b"application/problem+json" in head
        assert json.loads(body)["code"] == "request-refused"
