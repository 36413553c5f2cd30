"""How many examples the HTTP reader asks for at once, where only the server knows how many rows they have."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from tests.client.rows import DIGEST, dense_logits, description, truncated

from logitcache.client import HttpLabelSet
from logitcache.client.httpx_transport import HttpxTransport
from logitcache.labels import problem, wire
from logitcache.labels.errors import DigestChanged, LogitcacheError, RangeOutside, RowsMissing, TooManyRows
from logitcache.labels.label_set import Limits
from logitcache.labels.soft_labels import splits_of

FLAT = description(truncated(dense_logits(4, 10), 3))
CAUSAL = replace(
    FLAT,
    identity=replace(FLAT.identity, alignment="causal"),
    limits=Limits(ids=64, response_bytes=200 * FLAT.row_spec.row_bytes),
)
ROWS = 100
"""Rows of an example whose id is below `LONG`; any other has one."""
LONG = 40


class Server:
    """Answers as the real one would, and notes how many examples it was asked for."""

    def __init__(self) -> None:
        self.described, self.long_rows = CAUSAL, ROWS
        self.sizes: list[int] = []
        self.digests: list[str] = []
        self.wanted: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=self.described.to_json())
        arrays, options = wire.parse(request.content)
        ids = arrays["ids"]
        self.sizes.append(len(ids))
        self.wanted.append(options.get("digest"))
        try:
            return self.rows(ids, np.where(ids < LONG, self.long_rows, 1), options.get("digest"))
        except LogitcacheError as error:
            content = problem.to_problem(error)
            return httpx.Response(error.status, json=content, headers={"Content-Type": problem.MEDIA_TYPE})

    def rows(self, ids: np.ndarray, counts: np.ndarray, wanted: str | None) -> httpx.Response:
        if (ids < 0).any():
            raise RowsMissing("some are missing", unknown=ids[ids < 0].tolist(), unlabelled=[])
        if (ids == 7).any():
            raise RangeOutside("example 7 is short", ids=[7])
        self.described.limits.check(CAUSAL.row_spec, len(ids), int(counts.sum()))
        digest = self.digests.pop(0) if self.digests else DIGEST
        if wanted not in (None, digest):
            raise DigestChanged("it changed", served=digest)
        fields = CAUSAL.row_spec.fields(int(counts.sum()), len(ids))
        held = {name: np.zeros(shape, dtype) for name, (dtype, shape) in fields.items()}
        held["row_splits"][:] = splits_of(counts)
        held["tokens"][:] = np.repeat(ids, counts)
        body = wire.encode(held, wire.row_metadata(CAUSAL.identity.temperatures, digest))
        return httpx.Response(200, content=body, headers={"Content-Type": wire.MEDIA_TYPE})


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def reader(server: Server) -> HttpLabelSet:
    return HttpLabelSet("http://x", CAUSAL.name, transport=over(server), retries=0)


def over(server: Callable[[httpx.Request], httpx.Response]) -> HttpxTransport:
    return HttpxTransport("http://x", httpx.MockTransport(server))


def assert_whole(soft: Any, ids: list[int]) -> None:
    counts = [ROWS if id < LONG else 1 for id in ids]
    assert soft.tokens.tolist() == np.repeat(ids, counts).tolist()
    assert np.diff(soft.row_splits).tolist() == counts


def test_a_part_is_halved_until_its_answer_fits_and_the_next_fetch_begins_there(
    reader: HttpLabelSet, server: Server
) -> None:
    ids = list(range(10, 18))
    assert_whole(reader.fetch(ids), ids)
    assert server.sizes == [8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    server.sizes.clear()
    assert_whole(reader.fetch(ids), ids)
    assert server.sizes == [1] * 8


def test_parts_grow_again_when_answers_are_small(reader: HttpLabelSet, server: Server) -> None:
    reader.fetch([10, 11, 12, 13])
    server.sizes.clear()
    ids = list(range(100, 163))
    assert_whole(reader.fetch(ids), ids)
    assert server.sizes == [1, 2, 4, 8, 16, 32]


def test_a_small_fetch_makes_no_smaller_parts_of_the_next(reader: HttpLabelSet, server: Server) -> None:
    reader.fetch([100])
    reader.fetch(list(range(100, 163)))
    assert server.sizes == [1, 63]


def test_parts_after_the_first_ask_for_its_content(reader: HttpLabelSet, server: Server) -> None:
    reader.fetch(list(range(100, 170)))
    assert server.wanted == [None, DIGEST]
    server.wanted.clear()
    reader.fetch(list(range(100, 170)), digest=DIGEST)
    assert server.wanted == [DIGEST, DIGEST]


def test_an_answer_of_many_rows_an_example_may_be_as_large_as_the_limit(server: Server) -> None:
    rows = 2 * wire.MAX_HEADER_BYTES // CAUSAL.row_spec.row_bytes
    described = replace(CAUSAL, limits=Limits(ids=64, response_bytes=(rows + 1) * CAUSAL.row_spec.row_bytes))
    server.described, server.long_rows = described, rows
    reader = HttpLabelSet("http://x", CAUSAL.name, transport=over(server), retries=0)
    assert len(reader.fetch([10])) == rows


def test_long_examples_among_short_ones_come_whole_and_in_order(reader: HttpLabelSet) -> None:
    ids = np.random.default_rng(0).permutation(np.r_[10:30, 100:300]).tolist()
    assert_whole(reader.fetch(ids), ids)


def test_ranges_are_counted_before_anything_is_sent(reader: HttpLabelSet, server: Server) -> None:
    with pytest.raises(TooManyRows, match="fewer rows"):
        reader.fetch([10], rows=(0, 5000))
    assert server.sizes == []


def test_missing_ids_come_before_ranges_outside_and_both_are_of_all_parts(reader: HttpLabelSet, server: Server) -> None:
    reader.fetch([10, 11, 12, 13])
    with pytest.raises(RowsMissing, match="2 of 5 examples have no labels") as caught:
        reader.fetch([10, -1, 7, 12, -2])
    assert caught.value.unknown == [-1, -2]
    with pytest.raises(RangeOutside, match="short") as outside:
        reader.fetch([10, 7, 12])
    assert outside.value.ids == [7]


def test_parts_are_of_one_digest_or_asked_for_again(reader: HttpLabelSet, server: Server) -> None:
    server.digests = ["sha256:" + "2" * 64]
    soft = reader.fetch(list(range(100, 200)))
    assert soft.digest == DIGEST
    assert server.sizes == [64, 36, 64, 36]
