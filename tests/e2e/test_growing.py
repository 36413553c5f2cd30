"""A label set that grows while clients read it: pinned ones keep their content, the others follow and never mix."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.building import Reference, build, commit_shards, grow, grown, reference, writer_of
from tests.conformance import assert_rows_equal

from logitcache.client import Labels, connect
from logitcache.labels.errors import DigestChanged, RowsMissing
from logitcache.labels.label_set import Limits
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running

Connect = Callable[..., Labels]

KINDS: dict[str, dict[str, Any]] = {
    "pointwise": {},
    "causal, texts": {"alignment": "causal", "ids": "text"},
}


@pytest.fixture(scope="module", params=KINDS)
def small(request: pytest.FixtureRequest) -> Reference:
    return reference(2, **KINDS[request.param])


@pytest.fixture(scope="module")
def large(small: Reference) -> Reference:
    return grown(small, 300)


@pytest.fixture
def path(small: Reference, tmp_path: Path) -> Path:
    return build(tmp_path / "store" / "set", small)


@pytest.fixture(params=["folder", "http", "http in parts"])
def connected(path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Opens the label set, any number of times."""
    monkeypatch.setattr("logitcache.server.http.catalog.LOOK_AGAIN_S", 0.0)
    limits = Limits(ids=150) if request.param == "http in parts" else Limits()
    with ExitStack() as stack:
        target = str(path)
        if request.param != "folder":
            target = stack.enter_context(running(create_app(Catalog(path.parent, limits=limits)))) + "/set"
        yield lambda **options: stack.enter_context(connect(target, **options))


def followed(labels: Labels, digest: str | None, ids: Any) -> Any:
    """What is fetched once the newer generation is served: within a second or so, counted in fetches."""
    for _ in range(100_000):
        soft = labels.fetch(ids)
        if soft.digest == digest:
            return soft
    raise AssertionError("the newer generation was never served")


def test_pinned_clients_keep_their_content_and_others_follow(
    connected: Connect, path: Path, small: Reference, large: Reference
) -> None:
    pinned_first: Labels = connected()
    first = pinned_first.describe().digest
    pinned: Labels = connected(digest=first)
    free: Labels = connected()
    ordinals = np.arange(0, small.layout.examples, 7)
    for labels in (pinned, free):
        assert_rows_equal(labels.fetch(small.at(ordinals)), small, ordinals)
    grow(path, large)
    new = np.arange(small.layout.examples, large.layout.examples)
    later: Labels = connected()
    second = later.describe().digest
    assert second != first
    assert [sealed.digest for sealed in later.describe().generations] == [first, second]
    every = np.concatenate([ordinals, new])
    soft = followed(free, second, large.at(ordinals[:5]))
    assert_rows_equal(soft, large, ordinals[:5])
    assert_rows_equal(free.fetch(large.at(every)), large, every)
    for labels in (pinned, connected(digest=first)):
        soft = labels.fetch(small.at(ordinals))
        assert soft.digest == first
        assert_rows_equal(soft, small, ordinals)
        with pytest.raises(RowsMissing) as caught:
            labels.fetch(large.at(new[:3]))
        assert caught.value.unknown == large.at(new[:3])
        assert labels.missing(large.at([0, *new[:2]])) == large.at(new[:2])
    assert free.missing(large.at([0, *new[:2]])) == []
    with pytest.raises(DigestChanged, match="none of its 2 generations"):
        connected(digest="sha256:" + "0" * 64)


def test_while_new_shards_are_labelled_the_old_generation_is_whole(
    connected: Connect, path: Path, small: Reference, large: Reference
) -> None:
    labels: Labels = connected()
    first = labels.describe().digest
    labels.fetch(small.at([1]))
    with writer_of(path, large) as writer:
        writer.grow(large.layout)
        late: Labels = connected()
        for reader in (labels, late):
            soft = reader.fetch(small.at([1, 2]))
            assert soft.digest == first
            with pytest.raises(RowsMissing):
                reader.fetch(large.at([small.layout.examples]))
        commit_shards(writer, large, writer.missing)
        second = writer.seal().digest
    assert_rows_equal(followed(labels, second, large.at([1])), large, [1])
    assert_rows_equal(labels.fetch(large.at([small.layout.examples])), large, [small.layout.examples])


def test_every_fetch_during_an_append_is_of_one_generation(
    connected: Connect, path: Path, small: Reference, large: Reference
) -> None:
    labels = connected()
    first, ordinals, done = labels.describe().digest, np.arange(0, small.layout.examples, 9), threading.Event()

    def fetching() -> list[Any]:
        found = [labels.fetch(small.at(ordinals))]
        while not done.is_set():
            found.append(labels.fetch(small.at(ordinals)))
        return found

    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(fetching)
        try:
            grow(path, large)
        finally:
            done.set()
        found = under_way.result(60)
    second = followed(labels, connected().describe().digest, small.at([1])).digest
    assert {soft.digest for soft in found} <= {first, second}
    for soft in (found[0], found[-1]):
        assert_rows_equal(soft, small, ordinals)


def test_a_server_keeps_a_label_set_open_that_grows(
    path: Path, small: Reference, large: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.server.http.catalog.LOOK_AGAIN_S", 0.0)
    catalog = Catalog(path.parent)
    opened = catalog.get("set")
    assert opened.describe().examples == small.layout.examples
    grow(path, large)
    assert catalog.get("set") is opened
    assert not opened.is_replaced
    assert_rows_equal(opened.fetch(large.at([large.layout.examples - 1])), large, [large.layout.examples - 1])
    path.rename(path.with_name("old"))
    build(path, large)
    assert catalog.get("set") is not opened
    catalog.close()
