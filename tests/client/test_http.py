"""The reader over HTTP, against a real socket whose other end misbehaves on demand."""

import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from tests.client.faulty_server import Exchange, FaultyServer, answering, busy, encoded
from tests.client.rows import DIGEST, picked

from logitcache.client import HttpLabelSet
from logitcache.client.httpx_transport import HttpxTransport
from logitcache.client.retrying import seconds_to_wait
from logitcache.client.stats import Tally
from logitcache.labels import wire
from logitcache.labels.errors import (
    DeadlineExceeded,
    DigestChanged,
    InvalidIds,
    InvalidName,
    InvalidRequest,
    LabelSetNotFound,
    MalformedMessage,
    RequestRefused,
    RowsMissing,
    ServerBusy,
    ServerFault,
    ServerUnreachable,
)
from logitcache.labels.label_set import LabelSet, Limits
from logitcache.labels.soft_labels import SoftLabels

OTHER_DIGEST = "sha256:" + "2" * 64


class Readers:
    """Makes readers, and closes them at the end of a test."""

    def __init__(self) -> None:
        self.opened: list[HttpLabelSet] = []

    def __call__(self, server: FaultyServer, name: str = "digits", **options: Any) -> HttpLabelSet:
        self.opened.append(HttpLabelSet(server.base_url, name, **options))
        return self.opened[-1]


@pytest.fixture
def reader() -> Iterator[Readers]:
    readers = Readers()
    yield readers
    for opened in readers.opened:
        opened.close()


def assert_rows(found: SoftLabels, soft: SoftLabels, ids: list[int]) -> None:
    for name, expected in picked(soft, ids).items():
        np.testing.assert_array_equal(getattr(found, name), expected)


def test_a_fetch_gives_the_rows_in_the_order_asked_for_with_duplicates(
    reader: Readers, server: FaultyServer, soft: SoftLabels
) -> None:
    label_set: LabelSet = reader(server)
    found = label_set.fetch([7, 3, 7, 99])
    assert_rows(found, soft, [7, 3, 7, 99])
    assert (found.digest, found.temperatures, found.present) == (DIGEST, (1.0, 2.0), None)


def test_the_description_travels_whole(reader: Readers, server: FaultyServer) -> None:
    assert reader(server).describe() == server.describe()


def test_fetched_arrays_are_writeable_views_and_nothing_was_copied(reader: Readers, server: FaultyServer) -> None:
    found = reader(server).fetch([1, 2])
    assert found.logits.flags.writeable
    assert not found.logits.flags.owndata


def test_ids_are_checked_before_anything_is_sent(reader: Readers, server: FaultyServer) -> None:
    with pytest.raises(InvalidIds):
        reader(server).fetch([])
    assert server.requests == []


@pytest.mark.parametrize("rows_a_fetch", [1, 7, 50, 99, 100])
def test_a_fetch_above_the_limit_is_split_and_put_together_in_order(
    reader: Readers, soft: SoftLabels, rows_a_fetch: int
) -> None:
    ids = np.random.default_rng(0).permutation(100).tolist()
    with FaultyServer(soft, limits=Limits(ids=rows_a_fetch)) as server:
        assert_rows(reader(server).fetch(ids), soft, ids)
    assert [len(part) for part in server.fetched_ids] == [
        min(rows_a_fetch, 100 - begin) for begin in range(0, 100, rows_a_fetch)
    ]


def test_a_split_fetch_names_the_missing_ids_of_all_its_parts(reader: Readers, soft: SoftLabels) -> None:
    with (
        FaultyServer(soft, limits=Limits(ids=2)) as server,
        pytest.raises(RowsMissing, match="3 of 6 examples") as error,
    ):
        reader(server).fetch([1, 100, 2, 3, 300, -4])
    assert error.value.ids == [100, 300, -4]


def test_a_split_fetch_with_a_mask_tells_what_is_present_in_every_part(reader: Readers, soft: SoftLabels) -> None:
    with FaultyServer(soft, limits=Limits(ids=2)) as server:
        found = reader(server).fetch([1, 2, 100, 3, 300], on_missing="mask")
    assert found.present is not None
    assert found.present.tolist() == [True, True, False, True, False]
    assert np.isnan(found.logits[2]).all()


def test_a_digest_that_changes_between_the_parts_restarts_the_fetch_once(reader: Readers, soft: SoftLabels) -> None:
    with FaultyServer(soft, limits=Limits(ids=2)) as server:
        server.digests.extend([OTHER_DIGEST, DIGEST])
        found = reader(server).fetch([1, 2, 3, 4])
    assert_rows(found, soft, [1, 2, 3, 4])
    assert found.digest == DIGEST
    assert len(server.fetched_ids) == 4


def test_a_digest_that_changes_all_the_time_is_refused(reader: Readers, soft: SoftLabels) -> None:
    with FaultyServer(soft, limits=Limits(ids=2)) as server:
        server.digests.extend([OTHER_DIGEST, DIGEST, OTHER_DIGEST, DIGEST])
        with pytest.raises(DigestChanged):
            reader(server).fetch([1, 2, 3, 4])


def test_another_digest_than_the_pinned_one_is_refused(reader: Readers, server: FaultyServer) -> None:
    with pytest.raises(DigestChanged):
        reader(server).fetch([1], digest=OTHER_DIGEST)


def test_a_problem_becomes_its_error_with_the_request_id(reader: Readers, server: FaultyServer) -> None:
    with pytest.raises(RowsMissing) as error:
        reader(server).fetch([1, 100])
    assert error.value.unknown == [100]
    assert error.value.request_id == "request-7"
    copied = pickle.loads(pickle.dumps(error.value))
    assert (copied.ids, copied.request_id) == ([100], "request-7")
    with pytest.raises(LabelSetNotFound):
        reader(server, "digit").describe()


def test_a_dropped_connection_is_asked_again_at_once(
    reader: Readers, server: FaultyServer, soft: SoftLabels, caplog: pytest.LogCaptureFixture
) -> None:
    tally = Tally()
    label_set = reader(server, tally=tally)
    label_set.describe()
    server.faults.append(Exchange.drop)
    with caplog.at_level(logging.DEBUG, "logitcache.client"):
        assert_rows(label_set.fetch([5]), soft, [5])
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == ["asking again in 0.0 s"]
    assert (tally.snapshot().requests, tally.snapshot().retries) == (2, 1)


@pytest.mark.parametrize("fault", [Exchange.stop_half_way, Exchange.stop_in_the_head])
def test_an_answer_that_is_cut_off_is_asked_for_again(
    reader: Readers, server: FaultyServer, soft: SoftLabels, fault: Callable[[Exchange], None]
) -> None:
    server.faults.extend([fault, fault])
    assert_rows(reader(server).fetch(range(100)), soft, list(range(100)))


@pytest.mark.parametrize("fault", [busy(429), busy(502), busy(503, Retry_After="0"), busy(504)])
def test_an_overloaded_server_is_asked_again(
    reader: Readers, server: FaultyServer, soft: SoftLabels, fault: object
) -> None:
    server.faults.append(fault)  # type: ignore[arg-type]
    assert_rows(reader(server).fetch([5]), soft, [5])


def test_retry_after_is_waited_for(reader: Readers, server: FaultyServer, soft: SoftLabels) -> None:
    server.faults.append(busy(503, Retry_After="1"))
    label_set = reader(server)
    began = time.monotonic()
    assert_rows(label_set.fetch([5]), soft, [5])
    assert time.monotonic() - began >= 1.0


def test_a_retry_after_beyond_the_deadline_gives_up_without_waiting(reader: Readers, server: FaultyServer) -> None:
    server.faults.append(busy(503, Retry_After="3600"))
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="60 s") as error:
        reader(server).fetch([5])
    assert time.monotonic() - began < 30
    assert isinstance(error.value.__cause__, ServerBusy)
    assert error.value.__cause__.retry_after_s == 3600


def test_an_unknown_problem_that_says_retry_is_asked_again(
    reader: Readers, server: FaultyServer, soft: SoftLabels
) -> None:
    told = b'{"code": "moon-phase", "retry": true, "detail": "not today"}'
    server.faults.append(answering(500, "application/problem+json", told))
    assert_rows(reader(server).fetch([5]), soft, [5])


def test_without_retries_the_first_error_is_raised(reader: Readers, server: FaultyServer) -> None:
    for fault, kind in ((busy(503), ServerBusy), (Exchange.drop, ServerUnreachable)):
        server.faults.append(fault)
        with pytest.raises(kind):
            reader(server, retries=0).fetch([5])


def test_retries_are_bounded_when_a_number_is_given(reader: Readers, server: FaultyServer, soft: SoftLabels) -> None:
    server.faults.extend([busy(503), busy(503)])
    assert_rows(reader(server, retries=2).fetch([5]), soft, [5])
    server.faults.extend([busy(503), busy(503), busy(503)])
    with pytest.raises(ServerBusy):
        reader(server, retries=2).fetch([5])
    with pytest.raises(InvalidRequest, match="retries=-1"):
        reader(server, retries=-1)


@pytest.mark.parametrize("fault", [Exchange.trickle_body, Exchange.trickle_headers])
def test_a_trickle_of_bytes_ends_at_the_deadline(reader: Readers, server: FaultyServer, fault: object) -> None:
    label_set = reader(server, timeout_s=0.5)
    label_set.describe()
    server.faults.append(fault)  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"/v1/label-sets/digits/fetch gave no answer within 0\.5 s") as error:
        label_set.fetch([5])
    assert 0.5 <= time.monotonic() - began < 2.0
    assert isinstance(error.value.__cause__, ServerUnreachable)


def test_a_server_that_is_not_there_is_named_with_what_to_check(reader: Readers, soft: SoftLabels) -> None:
    with FaultyServer(soft) as server:
        pass
    with pytest.raises(ServerUnreachable, match=rf"http://127\.0\.0\.1:{server.port}.*`logitcache serve`"):
        reader(server, retries=0).describe()
    with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
        reader(server, timeout_s=0.3).describe()


def test_a_port_where_nobody_listens_is_told_of_at_once_while_it_is_waited_for(
    reader: Readers, soft: SoftLabels, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyServer(soft) as server:
        pass
    with pytest.raises(DeadlineExceeded) as error:
        reader(server, timeout_s=0.5).describe()
    assert isinstance(error.value.__cause__, ServerUnreachable)
    first = caplog.records[0]
    assert first.levelno == logging.WARNING
    assert f"cannot connect to {server.base_url}: " in first.getMessage()
    assert "refused; is `logitcache serve` running there?; asking again in 0." in first.getMessage()


def test_what_was_wrong_is_told_where_the_last_attempt_had_no_time(reader: Readers, server: FaultyServer) -> None:
    label_set = reader(server, timeout_s=0.5)
    label_set.describe()
    server.faults.extend([busy(503, Retry_After="0"), Exchange.trickle_headers])
    with pytest.raises(DeadlineExceeded, match=r"the last error was: .* status 503") as error:
        label_set.fetch([5])
    assert isinstance(error.value.__cause__, ServerBusy)


def test_a_server_that_goes_away_and_comes_back_is_survived(reader: Readers, soft: SoftLabels) -> None:
    tried = threading.Event()

    class Noticing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            tried.set()

    logger, handler = logging.getLogger("logitcache.client"), Noticing()
    with FaultyServer(soft) as server:
        label_set = reader(server)
        label_set.fetch([1])
    logger.addHandler(handler)
    try:
        with ThreadPoolExecutor(1) as pool:
            fetching = pool.submit(label_set.fetch, [4, 2])
            assert tried.wait(30)
            with FaultyServer(soft, port=server.port):
                assert_rows(fetching.result(30), soft, [4, 2])
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize("body", [b"", b"garbage" * 100, b"\xff" * 64])
def test_a_garbage_body_is_refused_and_not_asked_for_again(reader: Readers, server: FaultyServer, body: bytes) -> None:
    label_set = reader(server)
    server.faults.append(answering(200, wire.MEDIA_TYPE, body))
    with pytest.raises(MalformedMessage):
        label_set.fetch([5])
    assert len(server.requests) == 2


def test_fewer_rows_than_ids_are_refused(reader: Readers, server: FaultyServer) -> None:
    server.fewer_rows = 1
    with pytest.raises(MalformedMessage, match="2 examples for 3 ids"):
        reader(server).fetch([5, 6, 7])


def test_more_bytes_than_an_answer_can_have_are_refused(reader: Readers, server: FaultyServer) -> None:
    server.faults.append(answering(200, wire.MEDIA_TYPE, bytes(2 << 20)))
    with pytest.raises(MalformedMessage, match="more than the"):
        reader(server).fetch([5])


def test_an_html_page_is_not_taken_for_labels(reader: Readers, server: FaultyServer) -> None:
    pages = {200: MalformedMessage, 302: ServerFault, 404: RequestRefused, 500: ServerFault}
    for status, kind in pages.items():
        server.faults.append(answering(status, "text/html", b"<html>"))
        with pytest.raises(kind, match=r"127\.0\.0\.1"):
            reader(server).fetch([5])


def test_a_compressed_answer_is_refused_and_says_who_must_change(reader: Readers, server: FaultyServer) -> None:
    for encoding in ("identity", "Identity", " identity"):
        server.faults.append(encoded(encoding))
        assert len(reader(server).fetch([5])) == 1
    server.faults.append(encoded("gzip"))
    with pytest.raises(MalformedMessage, match=r"compressed as 'gzip'.* a proxy in between"):
        reader(server).fetch([5])


@pytest.mark.parametrize("base_url", ["http://host/a b", "http://host/ü", "http://host/\r\nX: y", ""])
def test_a_base_url_that_is_not_percent_encoded_is_refused(base_url: str) -> None:
    with pytest.raises(InvalidRequest, match="not percent-encoded"):
        HttpLabelSet(base_url, "digits")


def test_a_name_that_no_label_set_can_have_is_refused() -> None:
    with pytest.raises(InvalidName):
        HttpLabelSet("http://host", "digits HTTP/1.1\r\nX: y")


def test_another_transport_can_be_put_in_place_of_the_network() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(404, json={"code": "label-set-not-found", "detail": "none"})

    with pytest.raises(LabelSetNotFound, match="none"):
        transport = HttpxTransport("http://nowhere", httpx.MockTransport(respond))
        HttpLabelSet("http://nowhere", "digits", transport=transport).describe()


def test_threads_share_one_reader(reader: Readers, server: FaultyServer, soft: SoftLabels) -> None:
    label_set = reader(server)
    batches = [[(index * 7 + step) % 100 for index in range(20)] for step in range(40)]
    with ThreadPoolExecutor(4) as pool:
        for ids, found in zip(batches, pool.map(label_set.fetch, batches), strict=True):
            assert_rows(found, soft, ids)


def test_a_connection_is_kept_between_fetches(reader: Readers, server: FaultyServer) -> None:
    label_set = reader(server)
    for index in range(5):
        label_set.fetch([index])
    assert len(server.connections) == 1


def test_retry_after_is_read_as_seconds_or_as_a_date() -> None:
    assert seconds_to_wait("2.5") == 2.5
    assert seconds_to_wait("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (seconds_to_wait("Wed, 21 Oct 2099 07:28:00 GMT") or 0) > 3600
    assert [seconds_to_wait(text) for text in (None, "soon", "nan", "inf")] == [None] * 4
    assert seconds_to_wait("-3") == 0.0
