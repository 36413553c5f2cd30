"""Every kind of label set over HTTP: ids of the dataset's own, rows a token, targets, answers that must be split."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, SHAPES, Reference, build, complete_and_partial, reference
from tests.conformance import ShapesConformance, assert_rows_equal

from logitcache.client import HttpLabelSet, Labels, connect
from logitcache.client.stats import Tally
from logitcache.labels.errors import (
    InvalidIds,
    InvalidRequest,
    LogitcacheError,
    RangeOutside,
    RowsMissing,
    TooManyRows,
)
from logitcache.labels.label_set import LabelSet, Limits
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage import LocalLabelSet

SMALL = Limits(ids=300, response_bytes=50_000)
"""So that a fetch of everything travels in many parts, and of a few hundred causal examples in more than their number
tells."""


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest) -> Reference:
    return reference(3, **SHAPES[request.param])


@pytest.fixture(scope="module")
def store(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_and_partial(tmp_path_factory.mktemp("store"), source)


@pytest.fixture(scope="module", params=[SMALL, Limits()], ids=["split", "whole"])
def url(store: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    with running(create_app(Catalog(store, limits=request.param))) as base:
        yield base


@pytest.fixture
def complete(url: str) -> Iterator[HttpLabelSet]:
    reader = HttpLabelSet(url, "complete")
    yield reader
    reader.close()


@pytest.fixture
def partial(url: str) -> Iterator[HttpLabelSet]:
    reader = HttpLabelSet(url, "partial")
    yield reader
    reader.close()


class TestShapes(ShapesConformance):
    """The HTTP reader reads label sets of every shape, whether a fetch is one request or many."""


def told(reader: LabelSet, kind: type[LogitcacheError], ids: Any, **options: Any) -> tuple[str, dict[str, Any]]:
    with pytest.raises(kind) as caught:
        reader.fetch(ids, **options)
    return caught.value.message, caught.value.details


@pytest.mark.parametrize("name", ["complete", "partial"])
def test_errors_read_as_the_local_readers_do(store: Path, url: str, source: Reference, name: str) -> None:
    are_texts = source.identity.ids == "text"
    unknown: list[Any] = ["no/such", "😀"] if are_texts else [-3, 2**62]
    later = source.at(source.layout.span(1)[:20])
    with closing(LocalLabelSet(store / name)) as local, closing(HttpLabelSet(url, name)) as remote:
        for missing in ([*source.at([1]), *unknown, *later, *later], unknown):
            assert told(remote, RowsMissing, missing) == told(local, RowsMissing, missing)
        other_kind = [5] if are_texts else ["five"]
        assert told(remote, InvalidIds, other_kind) == told(local, InvalidIds, other_kind)
        with pytest.raises(InvalidIds):
            remote.states(other_kind)
        if source.identity.alignment == "causal":
            ids, beyond = source.at([2, 4, 2]), (0, 301)
            assert told(remote, RangeOutside, ids, rows=beyond) == told(local, RangeOutside, ids, rows=beyond)
        else:
            with pytest.raises(InvalidRequest, match="has one row; ask for no range"):
                remote.fetch(source.at([1]), rows=(0, 1))


def test_what_is_missing_in_any_part_is_named(partial: HttpLabelSet, source: Reference) -> None:
    count = source.layout.shard_examples[0]
    ordinals = np.arange(max(0, count - 700), min(count + 700, source.layout.examples))
    with pytest.raises(RowsMissing) as caught:
        partial.fetch(source.at(ordinals))
    assert caught.value.unlabelled == source.at(ordinals[ordinals >= count])
    assert partial.states(source.at(ordinals)).tolist() == [int(ordinal >= count) for ordinal in ordinals]


@pytest.fixture(scope="module")
def texts() -> Reference:
    """Long examples under text ids."""
    return reference(3, alignment="causal", ids="text")


@pytest.fixture(scope="module")
def texts_url(texts: Reference, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("store")
    build(store / "texts", texts)
    with running(create_app(Catalog(store, limits=SMALL))) as base:
        yield base


def test_ranges_outside_in_any_part_are_named_with_their_texts(texts: Reference, texts_url: str) -> None:
    with connect(f"{texts_url}/texts") as labels, pytest.raises(RangeOutside) as caught:
        labels.fetch(texts.ids, rows=(0, 250))
    assert caught.value.ids == texts.at(np.flatnonzero(texts.row_counts < 250))


def test_parts_are_halved_until_they_fit_and_the_size_is_remembered(texts: Reference, texts_url: str) -> None:
    tally = Tally()
    reader = HttpLabelSet(texts_url, "texts", tally=tally)
    ordinals = np.arange(texts.layout.examples)
    requests = []
    for _ in range(3):
        before = tally.snapshot().requests
        assert_rows_equal(reader.fetch(texts.ids), texts, ordinals)
        requests.append(tally.snapshot().requests - before)
    assert requests[1] < requests[0]
    assert requests[2] == requests[1]
    reader.close()


def test_ranges_that_fit_need_no_second_try(texts: Reference, texts_url: str) -> None:
    with connect(f"{texts_url}/texts") as labels:
        before = labels.stats.requests
        assert_rows_equal(labels.fetch(texts.ids, rows=(0, 1)), texts, range(len(texts.ids)), (0, 1))
        assert labels.stats.requests == before + 1


def test_one_example_above_the_limit_says_to_ask_for_fewer_rows(texts: Reference, tmp_path: Path) -> None:
    build(tmp_path / "texts", texts)
    longest = int(np.argmax(texts.row_counts))
    catalog = Catalog(tmp_path, limits=Limits(response_bytes=5_000))
    with running(create_app(catalog)) as base, connect(f"{base}/texts") as labels:
        for rows in (None, (0, 200)):
            with pytest.raises(TooManyRows, match="fewer rows"):
                labels.fetch(texts.at([longest]), rows=rows)
        soft = labels.fetch(texts.at([longest, 1]), rows=[(100, 170), (0, 1)])
        assert_rows_equal(soft, texts, [longest, 1], [(100, 170), (0, 1)])


NASTY = (
    "a/b",
    "a%2Fb",
    "../x",
    "a\nb",
    "a\n",
    "a",
    "\x01\x7f\t",
    "😀" * 1024,
    "-x",
    "--",
    " ",
    "é",
    "e\u0301",
    "5",
    "?rows=0",
    "#",
    "train/",
    "/",
)
"""Ids that a path, a command line or a careless look-up would take for another."""


@pytest.fixture(scope="module", params=["folder", "http"])
def nasty(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Labels, Reference]]:
    source = reference(1, short_by=ROWS_PER_SHARD - len(NASTY), ids="text")
    source = replace(source, ids=NASTY)
    store = tmp_path_factory.mktemp("store")
    build(store / "nasty", source)
    if request.param == "folder":
        with connect(store / "nasty") as labels:
            yield labels, source
        return
    with running(create_app(Catalog(store))) as base, connect(f"{base}/nasty") as labels:
        yield labels, source


def test_ids_of_any_text_are_those_texts_and_no_others(nasty: tuple[Labels, Reference]) -> None:
    labels, source = nasty
    assert_rows_equal(labels.fetch(NASTY), source, range(len(NASTY)))
    assert_rows_equal(labels.fetch(np.array(NASTY[::-1])), source, range(len(NASTY))[::-1])
    others = ["a//b", "a/B", "\u00e9 ", "05", "a\r\n", "😀" * 1023]
    assert labels.missing([*others, *NASTY, others[0]]) == others
    with pytest.raises(RowsMissing, match="'a//b'") as caught:
        labels.fetch([*NASTY, *others])
    assert caught.value.unknown == others


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["a\0b"], "NUL"),
        ([""], "empty"),
        (["😀" * 1025], "4,100 bytes"),
        (["\ud83d"], "surrogate"),
        (["a", 5], "5"),
        ([5, "a"], "'a'"),
        ([5], "are texts, these are whole numbers"),
    ],
)
def test_ids_that_no_text_label_set_has_are_refused(nasty: tuple[Labels, Reference], wrong: Any, says: str) -> None:
    for call in (nasty[0].fetch, nasty[0].missing):
        with pytest.raises(InvalidIds, match=says):
            call(wrong)
