"""`attach`: a loader with labels beside its batches is still that loader, and its labels are those of the batch."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.faulty_server import Exchange, FaultyServer, busy
from tests.client.rows import inputs_of
from torch.utils.data import DataLoader, DistributedSampler

from logitcache.client import AttachedLoader, Labels, SoftLabelTensors, connect, with_ids
from logitcache.labels.errors import InvalidRequest, LabelMismatch, RowsMissing, ServerBusy
from logitcache.labels.soft_labels import SoftLabels


@pytest.fixture
def labels(server: FaultyServer) -> Iterator[Labels]:
    with connect(server.url, retries=0) as connected:
        yield connected


class Inputs:
    """A map-style dataset of what the teacher was shown, with an id in each item if wanted."""

    def __init__(self, length: int = 20) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": inputs_of([index])[0]}


def loader_of(length: int = 20, **options: Any) -> DataLoader[Any]:
    return DataLoader(with_ids(Inputs(length)), batch_size=4, **options)


def fetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "logitcache-fetch"]


def assert_labels_belong(batch: Any, found: Any, soft: SoftLabels) -> None:
    assert found.indices.tolist() == soft.indices[np.asarray(batch["id"])].tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("depth", [0, 1, 2, 9, None])
def test_every_batch_comes_in_order_with_its_own_labels(
    labels: Labels, soft: SoftLabels, num_workers: int, depth: int | None
) -> None:
    def shuffled() -> DataLoader[Any]:
        return loader_of(shuffle=True, num_workers=num_workers, generator=torch.Generator().manual_seed(3))

    attached = labels.attach(shuffled(), ids="id", depth=depth)
    assert len(attached) == 5
    plain, expected = shuffled(), []
    for _epoch in range(2):
        expected += [batch["id"].tolist() for batch in plain]
    seen = []
    for _epoch in range(2):
        for batch, found in attached:
            assert_labels_belong(batch, found, soft)
            seen.append(batch["id"].tolist())
    assert seen == expected
    assert fetch_threads() == []
    assert labels.stats.steps == 10


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_that_persist_serve_one_epoch_after_the_other(labels: Labels, soft: SoftLabels, start: str) -> None:
    loader = loader_of(num_workers=2, persistent_workers=True, multiprocessing_context=start)
    attached = labels.attach(loader, ids="id")
    for _epoch in range(2):
        seen = []
        for batch, found in attached:
            assert_labels_belong(batch, found, soft)
            seen += batch["id"].tolist()
        assert seen == [*range(20)]
    loader._iterator._shutdown_workers()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("batch", "ids"),
    [({"id": [4, 5]}, "id"), (("x", [4, 5]), 1), (["x", [4, 5]], -1), ([4, 5], lambda batch: batch)],
)
def test_ids_are_a_key_a_position_or_a_function(labels: Labels, soft: SoftLabels, batch: Any, ids: Any) -> None:
    ((given, found),) = labels.attach([batch], ids=ids)
    assert given is batch
    assert found.indices.tolist() == soft.indices[[4, 5]].tolist()


def test_labels_are_fetched_ahead_by_depth_and_no_more(labels: Labels) -> None:
    pulled: list[int] = []

    def batches() -> Iterator[list[int]]:
        for index in range(10):
            pulled.append(index)
            yield [index]

    steps = iter(labels.attach(batches(), ids=lambda batch: batch, depth=3))
    assert pulled == []
    counts = []
    for _ in range(6):
        next(steps)
        counts.append(len(pulled))
    assert counts == [2, 4, 6, 7, 8, 9]  # two at a step, until three are ahead of the one delivered
    steps.close()  # type: ignore[attr-defined]


def test_batches_and_ids_are_read_in_the_main_thread(labels: Labels) -> None:
    seen = set()

    def ids(batch: list[int]) -> list[int]:
        seen.add(threading.current_thread())
        return batch

    list(labels.attach([[1], [2], [3]], ids=ids))
    assert seen == {threading.main_thread()}


def test_a_fetch_error_is_raised_at_the_step_it_belongs_to(labels: Labels, server: FaultyServer) -> None:
    steps = iter(labels.attach([[1], [2], [999], [3]], ids=lambda batch: batch))
    assert [next(steps)[0], next(steps)[0]] == [[1], [2]]
    with pytest.raises(RowsMissing) as error:
        next(steps)
    assert error.value.ids == [999]
    assert fetch_threads() == []
    server.faults.append(busy(503))
    with pytest.raises(ServerBusy):
        next(iter(labels.attach([[1]], ids=lambda batch: batch)))


def test_an_error_of_the_loader_comes_after_the_batches_before_it(labels: Labels) -> None:
    def batches() -> Iterator[list[int]]:
        yield [1]
        yield [2]
        raise OSError("disk gone")

    steps = iter(labels.attach(batches(), ids=lambda batch: batch, depth=5))
    assert [next(steps)[0], next(steps)[0]] == [[1], [2]]
    with pytest.raises(OSError, match="disk gone"):
        next(steps)
    assert fetch_threads() == []


@pytest.mark.parametrize("ids", ["id", 3])
def test_a_batch_without_such_ids_is_named_at_its_step(labels: Labels, ids: Any) -> None:
    steps = iter(labels.attach([{"id": [1], 3: [1]}, {"x": [1]}], ids=ids))
    next(steps)
    with pytest.raises(InvalidRequest, match=f"ids={ids!r} is not in a batch, which has the keys 'x'"):
        next(steps)


def test_leaving_an_epoch_early_leaves_no_thread(labels: Labels) -> None:
    for _batch, _ in labels.attach(loader_of(), ids="id"):
        break
    assert fetch_threads() == []
    steps = iter(labels.attach(loader_of(), ids="id"))
    next(steps)
    assert fetch_threads() == ["logitcache-fetch"]
    del steps
    assert fetch_threads() == []


def test_leaving_an_epoch_does_not_wait_for_a_server_that_hangs(server: FaultyServer) -> None:
    with connect(server.url, retries=0) as patient:
        steps = iter(patient.attach([[1], [2]], ids=lambda batch: batch, depth=1))
        server.faults.extend([Exchange.serve, Exchange.trickle_body])
        next(steps)
        began = time.monotonic()
        steps.close()  # type: ignore[attr-defined]
        assert time.monotonic() - began < 20  # and not the 60 s that a fetch may take
        server.stopped.set()


def test_inputs_are_checked_in_every_batch(labels: Labels) -> None:
    for batch, found in labels.attach(loader_of(), ids="id", inputs="x"):
        assert len(found) == len(batch["id"])
    changed = [{"id": [1], "x": inputs_of([1])}, {"id": [2], "x": inputs_of([3])}]
    steps = iter(labels.attach(changed, ids="id", inputs="x"))
    next(steps)
    with pytest.raises(LabelMismatch) as error:
        next(steps)
    assert error.value.ids == [2]
    by_position = [(inputs_of([3]), [2])]
    with pytest.raises(LabelMismatch):
        next(iter(labels.attach(by_position, ids=1, inputs=0)))


def test_a_device_gives_tensors_there(labels: Labels, soft: SoftLabels) -> None:
    for batch, found in labels.attach(loader_of(), ids="id", device="cpu"):
        assert isinstance(found, SoftLabelTensors)
        assert_labels_belong(batch, found, soft)


def test_waiting_is_counted_step_by_step(labels: Labels) -> None:
    list(labels.attach(loader_of(), ids="id"))
    stats = labels.stats
    assert (stats.steps, stats.rows) == (5, 20)
    assert stats.waited_ms == pytest.approx(5 * stats.waited_ms_mean)
    assert 0 < stats.waited_ms_median <= stats.waited_ms_p99 <= stats.waited_ms_max <= stats.waited_ms
    assert stats.step_bytes_mean == stats.bytes / 5
    assert stats.hidden_ms == pytest.approx(5 * stats.hidden_ms_mean)


def test_a_depth_or_a_buffer_that_cannot_be_is_refused(labels: Labels) -> None:
    with pytest.raises(InvalidRequest, match="depth=-1"):
        labels.attach([], ids="id", depth=-1)
    with pytest.raises(InvalidRequest, match="buffer_bytes=0"):
        labels.attach([], ids="id", buffer_bytes=0)


def test_set_epoch_reaches_the_sampler_wherever_it_is(labels: Labels) -> None:
    for nested in (False, True):
        sampler: DistributedSampler[Any] = DistributedSampler(Inputs(), num_replicas=1, rank=0)  # type: ignore[arg-type]
        options: dict[str, Any] = {"sampler": sampler}
        if nested:
            options = {"batch_sampler": torch.utils.data.BatchSampler(sampler, 4, False)}
            loader: Iterable[Any] = DataLoader(with_ids(Inputs()), **options)
        else:
            loader = loader_of(**options)
        attached = labels.attach(loader, ids="id")
        orders = []
        for epoch in (0, 1, 0):
            attached.set_epoch(epoch)
            orders.append([index for batch, _ in attached for index in batch["id"].tolist()])
        assert orders[0] == orders[2] != orders[1]


def test_a_loaders_own_set_epoch_comes_first_and_none_is_none(labels: Labels) -> None:
    class Epochs(list[Any]):
        epoch = -1
        extra = "of the loader"

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    loader = Epochs([[1]])
    attached = labels.attach(loader, ids=lambda batch: batch)
    attached.set_epoch(4)
    assert (loader.epoch, attached.extra) == (4, "of the loader")
    for name in ("set_epoch", "state_dict", "load_state_dict", "no_such_thing"):
        assert not hasattr(labels.attach(loader_of(), ids="id"), name)


class StatefulLoader:
    """Batches 0 to 9 with a state like torchdata's StatefulDataLoader: it counts what it gave out, in place."""

    def __init__(self) -> None:
        self.state = {"given": 0}

    def __iter__(self) -> Iterator[list[int]]:
        while self.state["given"] < 10:
            self.state["given"] += 1
            yield [self.state["given"] - 1]
        self.state = {"given": 0}

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = dict(state)


def stateful(labels: Labels) -> AttachedLoader[list[int]]:
    return labels.attach(StatefulLoader(), ids=lambda batch: batch, depth=3)


@pytest.mark.parametrize("consumed", [1, 4, 8, 10])
def test_the_state_is_that_of_the_batch_delivered_and_not_fetched_ahead(labels: Labels, consumed: int) -> None:
    attached = stateful(labels)
    steps = iter(attached)
    for _ in range(consumed):
        next(steps)
    state = attached.state_dict()
    assert state == {"given": consumed}
    steps.close()  # type: ignore[attr-defined]
    assert attached.state_dict() == {"given": consumed}
    resumed = stateful(labels)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == {"given": consumed}
    assert [batch for batch, _ in resumed] == [[index] for index in range(consumed, 10)]


def test_the_state_after_a_whole_epoch_is_the_loaders_own(labels: Labels) -> None:
    attached = stateful(labels)
    assert attached.state_dict() == {"given": 0}
    assert len(list(attached)) == 10
    assert attached.state_dict() == {"given": 0}
    assert len(list(attached)) == 10
