"""`connect` and `Labels`: targets, expectations, checked inputs, and use in other processes and threads."""

import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.building import build, grow, grown, reference
from tests.client.faulty_server import Exchange, FaultyServer, busy
from tests.client.rows import DIGEST, TEACHER, inputs_of, picked
from torch.utils.data import DataLoader, Dataset

from logitcache.client import Labels, TeacherId, connect, label_source
from logitcache.client.target import HttpTarget, parse_target
from logitcache.labels.errors import (
    DeadlineExceeded,
    DigestChanged,
    InvalidName,
    InvalidRequest,
    LabelMismatch,
    LabelSetNotFound,
    NotFound,
    RowsMissing,
    ShapeMismatch,
    TeacherMismatch,
)
from logitcache.labels.label_set import Sealed
from logitcache.labels.soft_labels import SoftLabels


@pytest.mark.parametrize(
    ("text", "base_url", "name"),
    [
        ("http://localhost:8000/digits", "http://localhost:8000", "digits"),
        ("http://localhost:8000/digits/", "http://localhost:8000", "digits"),
        ("https://example.org/teachers/r50.v2/", "https://example.org/teachers", "r50.v2"),
        ("http://localhost:8000/v1/label-sets/digits", "http://localhost:8000", "digits"),
        ("http://[::1]:8000/digits", "http://[::1]:8000", "digits"),
        ("HTTPS://Example.org:443/a/digits?#", "https://example.org/a", "digits"),
        ("http://bücher.example/ü b/digits", "http://xn--bcher-kva.example/%C3%BC%20b", "digits"),
        ("http://host/a%2Fb%2520c%3F%0d/dig%69ts", "http://host/a%2Fb%2520c%3F%0d", "digits"),
    ],
)
def test_a_url_is_a_base_and_a_name(text: str, base_url: str, name: str) -> None:
    assert parse_target(text) == HttpTarget(base_url, name)


def test_anything_else_is_a_folder_with_an_absolute_path() -> None:
    assert parse_target("label-sets/digits") == Path.cwd() / "label-sets/digits"
    assert parse_target(Path("/a/b")) == Path("/a/b")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("http://localhost:8000", "names no label set: write http://localhost:8000/NAME"),
        ("http://localhost:8000/", "names no label set"),
        ("ftp://localhost/digits", "write http://HOST:PORT/NAME"),
        ("http:///digits", "write http://HOST:PORT/NAME"),
        ("http://me:secret@host/digits", "no password"),
        ("http://host/digits?view=1", "no password, query"),
        ("http://host:port/digits", "not a URL"),
        ("localhost:8000/digits", "for a server write 'http://localhost:8000/digits'"),
    ],
)
def test_a_target_that_cannot_be_right_says_how_to_write_it(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as error:
        connect(text)
    assert "secret" not in str(error.value)


def test_an_illegal_name_in_a_url_is_refused_before_asking(server: FaultyServer) -> None:
    with pytest.raises(InvalidName):
        connect(f"{server.base_url}/Digits%20")
    assert server.requests == []


def test_connect_reads_the_description_at_once(server: FaultyServer) -> None:
    with pytest.raises(LabelSetNotFound):
        connect(f"{server.base_url}/digit")
    with connect(server.url) as labels:
        assert server.requests == ["/v1/label-sets/digit", "/v1/label-sets/digits"]
        assert labels.describe() == server.describe()
        assert repr(labels) == f"Labels('{server.url}')"


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of any fork beside threads
def test_a_folder_is_read_in_this_process_and_in_its_forks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound):
        connect(tmp_path / "none")
    source = reference(shards=2)
    build(tmp_path / "digits", source)
    monkeypatch.chdir(tmp_path)
    with connect("digits", teacher="reference") as labels:
        monkeypatch.chdir("/")
        assert labels.fetch([5000, 3]).indices.tolist() == source.order[[5000, 3]].tolist()
        assert labels.stats.requests == 0
        loader = DataLoader(Fetching(labels), batch_size=6, num_workers=2, multiprocessing_context="fork")
        for indices, classes, _rows in loader:
            assert classes.tolist() == source.order[indices.numpy()].tolist()


def test_the_name_alone_of_a_label_set_in_the_usual_folder_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "label-sets").mkdir()
    build(tmp_path / "label-sets" / "digits", reference(shards=1, short_by=4000))
    with pytest.raises(LabelSetNotFound, match=r"did you mean '.*/label-sets/digits'\?"):
        connect("digits")
    with pytest.raises(LabelSetNotFound) as told:
        connect("digit")
    assert "did you mean" not in str(told.value)
    connect("label-sets/digits").close()


@pytest.mark.parametrize("ids", ["ordinal", "text"])
def test_ids_that_a_pinned_generation_does_not_have_are_told_with_the_pin(tmp_path: Path, ids: Any) -> None:
    source = reference(1, short_by=4000, ids=ids)
    larger = grown(source, 10)
    build(tmp_path / "set", source)
    with connect(tmp_path / "set") as labels:
        pin = labels.describe().digest
    grow(tmp_path / "set", larger)
    with connect(tmp_path / "set", digest=pin) as labels, connect(tmp_path / "set") as newest:
        with pytest.raises(RowsMissing, match=rf"pinned to {pin} of 96 examples: pin a newer digest") as told:
            labels.fetch(larger.at([3, 100]))
        assert told.value.unknown == larger.at([100])
        assert len(newest.fetch(larger.at([3, 100]))) == 2
        beyond = [10**6] if ids == "ordinal" else ["nobody"]
        with pytest.raises(RowsMissing) as told:
            newest.fetch(beyond)
        assert "pinned" not in str(told.value)


def test_a_folder_has_no_limit_of_ids_in_one_fetch(tmp_path: Path) -> None:
    source = reference(shards=1)
    ids = np.arange(200_000) % len(source.logits)
    with connect(build(tmp_path / "digits", source)) as labels:
        np.testing.assert_array_equal(labels.fetch(ids).indices, source.order[ids])


def test_labels_of_the_expected_teacher_and_digest_are_taken(server: FaultyServer) -> None:
    for teacher in (None, TEACHER, "resnet-tiny", "sha256:aa"):
        connect(server.url, teacher=teacher, digest=DIGEST).close()


@pytest.mark.parametrize("teacher", ["resnet", "none", TeacherId("resnet-tiny", "sha256:bb", "none")])
def test_labels_of_another_teacher_are_refused_with_both(server: FaultyServer, teacher: str | TeacherId) -> None:
    with pytest.raises(TeacherMismatch, match=r"sha256:aa.*, not by ") as error:
        connect(server.url, teacher=teacher)
    assert set(error.value.details) == {"expected", "served"}


def test_another_digest_than_the_pinned_one_is_refused(server: FaultyServer) -> None:
    with pytest.raises(DigestChanged, match=DIGEST):
        connect(server.url, digest="sha256:3")
    with connect(server.url, digest=DIGEST) as labels:
        server.digests.append("sha256:4")
        with pytest.raises(DigestChanged):
            labels.fetch([1])


def test_rows_of_a_generation_that_the_server_does_not_describe_are_refused(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_source, "SEEN_BY_ALL_S", 0.05)
    with connect(server.url) as labels:
        server.digests.append("sha256:4")
        with pytest.raises(DigestChanged, match=r"rows of sha256:4 .*several servers"):
            labels.fetch([1])


def test_a_generation_that_another_process_of_the_server_describes_a_moment_later_is_followed(
    server: FaultyServer, soft: SoftLabels
) -> None:
    old, new = server.describe(), Sealed(2, len(soft), "sha256:4")
    asked = iter([old, old])
    server.describe = lambda: next(asked, replace(old, generations=(*old.generations, new)))  # type: ignore[method-assign]
    with connect(server.url) as labels:
        server.digests.append("sha256:4")
        assert labels.fetch([1]).digest == "sha256:4"


def test_fetch_gives_rows_and_counts_them(server: FaultyServer, soft: SoftLabels) -> None:
    with connect(server.url) as labels:
        found = labels.fetch(torch.tensor([4, 1, 4]))
        for name, expected in picked(soft, [4, 1, 4]).items():
            np.testing.assert_array_equal(getattr(found, name), expected)
        stats = labels.stats
    # A row: 4 x (2 + 4) bytes of head, 3 float32 columns, a fingerprint.
    assert (stats.rows, stats.bytes, stats.requests, stats.retries) == (3, 3 * (24 + 12 + 8), 2, 0)


@pytest.mark.parametrize("shape", [{}, {"alignment": "causal", "longest": 6}])
def test_examples_that_are_masked_are_no_rows_served(tmp_path: Path, shape: dict[str, Any]) -> None:
    source = reference(1, short_by=4000, **shape)
    with connect(build(tmp_path / "set", source)) as labels:
        assert labels.fetch([5, 10**6, 7], on_missing="mask").examples == 3
        assert labels.stats.rows == source.row_counts[[5, 7]].sum()


def test_the_wait_for_a_server_counts_its_retries(server: FaultyServer) -> None:
    with connect(server.url) as labels:
        server.faults.extend([busy(503), Exchange.drop])
        labels.fetch([1])
        assert labels.stats.retries == 2


@pytest.mark.parametrize("batch", [torch.Tensor.numpy, list, lambda inputs: inputs])
def test_inputs_that_the_teacher_was_shown_are_accepted(server: FaultyServer, batch: Any) -> None:
    with connect(server.url) as labels:
        assert len(labels.fetch([3, 1, 2], inputs=batch(inputs_of([3, 1, 2])))) == 3


def test_inputs_that_the_teacher_was_not_shown_are_named_by_their_ids(server: FaultyServer) -> None:
    with connect(server.url) as labels:
        with pytest.raises(LabelMismatch, match=r"of 2 examples .*\(ids: 3, 2\)") as error:
            labels.fetch([3, 1, 2, 2], inputs=inputs_of([1, 1, 3, 3]))
        assert error.value.ids == [3, 2]
        with pytest.raises(LabelMismatch):
            labels.fetch([3], inputs=inputs_of([3]).double())


def test_inputs_are_checked_for_present_rows_alone(server: FaultyServer) -> None:
    with connect(server.url) as labels:
        found = labels.fetch([3, 900], inputs=inputs_of([3, 7]), on_missing="mask")
        assert found.present is not None
        assert found.present.tolist() == [True, False]
        with pytest.raises(RowsMissing):
            labels.fetch([3, 900], inputs=inputs_of([3, 7]))


def test_a_wrong_number_or_kind_of_inputs_is_refused(server: FaultyServer) -> None:
    with connect(server.url) as labels:
        with pytest.raises(ShapeMismatch, match="2 inputs were given for 3 ids"):
            labels.fetch([3, 1, 2], inputs=inputs_of([3, 1]))
        with pytest.raises(InvalidRequest, match="str"):
            labels.fetch([3], inputs=["three"])


def test_closed_labels_say_so(server: FaultyServer) -> None:
    labels = connect(server.url)
    labels.close()
    with pytest.raises(InvalidRequest, match="closed: connect again"):
        labels.fetch([1])


def test_pickled_labels_open_their_own_connection_and_keep_their_options(server: FaultyServer) -> None:
    with connect(server.url, digest=DIGEST, teacher=TEACHER, timeout_s=0.5) as labels:
        blob = pickle.dumps(labels)
    with pickle.loads(blob) as copied:
        assert len(copied.fetch([1, 2])) == 2
        server.faults.append(busy(503, Retry_After="10"))
        with pytest.raises(DeadlineExceeded, match=r"0\.5 s"):
            copied.fetch([1])
    assert len(server.connections) == 2
    server.soft = type(server.soft)(**vars(server.soft) | {"digest": "sha256:5"})
    with pytest.raises(DigestChanged):
        pickle.loads(blob).fetch([1])


class Fetching(Dataset[Any]):
    """A dataset whose workers read labels, as a training script may do."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return index, self.labels.fetch([index]).indices[0].astype(np.int64), self.labels.stats.rows


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_make_their_own_connections(server: FaultyServer, soft: SoftLabels, method: str) -> None:
    with connect(server.url) as labels:
        labels.fetch([0])
        loader = DataLoader(Fetching(labels), batch_size=3, num_workers=2, multiprocessing_context=method)
        for indices, classes, rows in loader:
            assert classes.tolist() == soft.indices[indices.numpy()].tolist()
            assert int(rows.max()) <= 6  # a worker counts what it fetched itself
        assert labels.fetch([5]).indices.tolist() == soft.indices[[5]].tolist()
        assert labels.stats.rows == 2
    assert len(server.connections) >= 3  # one a process, and another where one was idle for too long


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_waits_for_no_lock_that_a_thread_of_the_parent_held(server: FaultyServer) -> None:
    with connect(server.url) as labels:
        with labels._here().lock:
            child = multiprocessing.get_context("fork").Process(target=labels.fetch, args=([1],))
            child.start()
            child.join(20)
        alive, code = child.is_alive(), child.exitcode
        child.kill()
        assert (alive, code) == (False, 0)
