"""Labels for a device: what another thread prepares, what is left to the one that trains, and that nothing changes."""

from typing import Any

import numpy as np
import pytest
import torch
from tests.client.rows import causal, dense_logits, truncated
from torch.utils._python_dispatch import TorchDispatchMode

from logitcache.client import FetchedLabels, SoftLabelTensors
from logitcache.client.tensors import StagedLabels, staging

CPU = torch.device("cpu")


class Operations(TorchDispatchMode):
    """What torch computes in the thread that is within."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.sources: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        self.sources += args[:1]
        return func(*args, **(kwargs or {}))


def labels_of(kind: str) -> FetchedLabels:
    if kind == "pointwise":
        return FetchedLabels.of(truncated(dense_logits(6, 10), 4, target=[0, 1, -1, 3, 4, 5]))
    if kind == "empty":
        return FetchedLabels.of(truncated(dense_logits(0, 10), 4))
    dense = [dense_logits(length, 10) for length in (3, 1, 4)]
    tokens = [np.arange(length, dtype=np.uint32) for length in (3, 1, 4)]
    return FetchedLabels.of(causal(dense, tokens, 4, present=[True, False, True]))


def tensors_of(found: SoftLabelTensors) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(found).items() if isinstance(value, torch.Tensor)}


def assert_same(found: SoftLabelTensors, soft: FetchedLabels) -> None:
    """Value for value what ``soft.to`` gives on the CPU."""
    expected = soft.to("cpu")
    assert tensors_of(found).keys() == tensors_of(expected).keys()
    for name, tensor in tensors_of(expected).items():
        moved = tensors_of(found)[name].cpu()
        assert moved.dtype == tensor.dtype
        assert np.array_equal(moved.numpy(), tensor.numpy(), equal_nan=tensor.is_floating_point())
    for name in ("row_counts", "missing"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    assert (found.temperatures, found.largest_index) == (expected.temperatures, expected.largest_index)


@pytest.mark.parametrize("kind", ["pointwise", "causal", "empty"])
def test_for_the_cpu_nothing_is_left_to_do(kind: str) -> None:
    soft = labels_of(kind)
    staged = StagedLabels.of(soft, CPU)
    with Operations() as operations:
        found = staged.take()
    assert operations.names == []
    assert_same(found, soft)
    assert staged.held_bytes == sum(tensor.nbytes for tensor in tensors_of(found).values())


@pytest.mark.parametrize("kind", ["pointwise", "causal", "empty"])
def test_for_another_device_copying_there_and_widening_are_left_to_the_thread_that_trains(kind: str) -> None:
    soft = labels_of(kind)
    with Operations() as before:
        staged = staging("meta")(soft)
    assert "aten._to_copy.default" not in before.names
    with Operations() as operations:
        found = staged.take()
    assert set(operations.names) == {"aten._to_copy.default"}
    assert {tensor.device.type for tensor in tensors_of(found).values()} == {"meta"}
    assert {name: tensor.shape for name, tensor in tensors_of(found).items()} == {
        name: tensor.shape for name, tensor in tensors_of(soft.to("cpu")).items()
    }
    assert (found.indices.dtype, found.largest_index) == (torch.int64, soft.to("cpu").largest_index)
    fingerprints = soft.fingerprint.nbytes
    assert staged.held_bytes == sum(array.nbytes for array in soft.arrays().values()) - fingerprints


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pointwise", "causal", "empty"])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", 0])
def test_cuda_labels_wait_in_pinned_memory_and_arrive_as_they_are(kind: str, device: Any) -> None:
    soft = labels_of(kind)
    with Operations() as before:
        staged = staging(device)(soft)
    assert "aten._to_copy.default" not in before.names
    with Operations() as operations:
        found = staged.take()
    assert set(operations.names) == {"aten._to_copy.default"}
    assert all(source.is_pinned() for source in operations.sources if source.device == CPU and source.numel())
    assert {tensor.device for tensor in tensors_of(found).values()} == {torch.device("cuda", 0)}
    assert_same(found, soft)


@pytest.mark.gpu
def test_cuda_labels_are_right_however_soon_their_pinned_memory_is_given_back() -> None:
    stage = staging("cuda")
    busy = torch.ones(4096, 4096, device="cuda")
    batches = [FetchedLabels.of(truncated(dense_logits(512, 50, seed=seed), 20)) for seed in range(30)]
    found = []
    for soft in batches:
        for _ in range(5):
            busy = busy @ busy * 1e-4  # copies queue up behind this, while pinned memory is asked for again
        found.append(stage(soft).take())
    for tensors, soft in zip(found, batches, strict=True):
        assert_same(tensors, soft)
