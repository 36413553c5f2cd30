"""``on_missing="wait"``: labels that are still to come are waited for, and what cannot come is told at once."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, Reference, build, commit_shards, reference, writer_of
from tests.conformance import assert_rows_equal

from logitcache.client import DeadlineExceeded, Labels, RowsMissing, connect, waiting
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running

LAST = 2 * ROWS_PER_SHARD
"""An example of the last of three shards."""


@pytest.fixture
def source() -> Reference:
    return reference(3)


@pytest.fixture
def path(tmp_path: Path, source: Reference) -> Path:
    """A label set of three shards, of which the first is labelled."""
    return build(tmp_path / "store" / "set", source, [0])


@pytest.fixture(params=["folder", "server"])
def opened(request: pytest.FixtureRequest, path: Path) -> Iterator[Callable[..., Labels]]:
    """Connects to that label set."""
    with ExitStack() as stack:
        target = str(path)
        if request.param == "server":
            target = stack.enter_context(running(create_app(Catalog(path.parent)))) + "/set"
        yield lambda **options: stack.enter_context(connect(target, **options))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens in the pauses of whoever waits, one after the other."""
    happening: list[Callable[[], object]] = []

    class Clock:
        """In the place of the module `time`."""

        def sleep(self, seconds: float) -> None:
            assert seconds > 0
            if happening:
                happening.pop(0)()
            time.sleep(0.02)

    monkeypatch.setattr(waiting, "time", Clock())
    return happening


def committing(path: Path, source: Reference, *shards: int) -> Callable[[], None]:
    def commit() -> None:
        with writer_of(path, source) as writer:
            commit_shards(writer, source, [*shards])
            if not writer.missing:
                writer.seal()

    return commit


def test_a_fetch_waits_until_all_of_its_examples_are_labelled(
    opened: Callable[..., Labels], path: Path, source: Reference, pauses: list[Callable[[], object]]
) -> None:
    labels, ids = opened(), np.array([LAST, 3, ROWS_PER_SHARD])
    pauses += [committing(path, source, 1), committing(path, source, 2)]
    assert_rows_equal(labels.fetch(ids, on_missing="wait"), source, ids)
    assert pauses == []
    assert_rows_equal(labels.fetch(ids, on_missing="wait"), source, ids)  # nothing to wait for


def test_an_attached_loader_waits_at_the_batch_that_has_no_labels_yet(
    opened: Callable[..., Labels], path: Path, source: Reference, pauses: list[Callable[[], object]]
) -> None:
    pauses.append(committing(path, source, 1, 2))
    batches = [[0, 1], [LAST, 2], [5, ROWS_PER_SHARD]]
    for ids, soft in opened().attach(batches, ids=lambda batch: batch, on_missing="wait"):
        assert_rows_equal(soft, source, np.array(ids))


def test_waiting_ends_with_the_time_allowed_and_names_what_is_missing(
    opened: Callable[..., Labels], pauses: list[Callable[[], object]]
) -> None:
    labels = opened(timeout_s=0.3)
    began = time.monotonic()
    with pytest.raises(
        DeadlineExceeded, match=r"waited 0.3 s for labels.*without labels: .*larger timeout_s"
    ) as caught:
        labels.fetch([0, LAST], on_missing="wait")
    assert 0.3 <= time.monotonic() - began < 5
    assert isinstance(caught.value.__cause__, RowsMissing)
    assert caught.value.__cause__.ids == [LAST]


def test_ids_that_no_waiting_brings_are_an_error_at_once(
    opened: Callable[..., Labels], source: Reference, pauses: list[Callable[[], object]]
) -> None:
    pauses.append(lambda: pytest.fail("it waited"))
    with pytest.raises(RowsMissing) as caught:
        opened().fetch([LAST, len(source.ids)], on_missing="wait")
    assert caught.value.unknown == [len(source.ids)]
    assert caught.value.unlabelled == [LAST]
