"""Every row, locally and over HTTP, is the teacher's own top-k of a plain forward in the same batches."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.e2e.workload import CLASSES, Points, teacher, workload

from logitcache.client import LabelMismatch, connect
from logitcache.labels.soft_labels import SoftLabels
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.server.labelling.precompute import precompute

SHARDS = 52
ROWS_PER_SHARD = 4096
EXAMPLES = SHARDS * ROWS_PER_SHARD - 1234
BATCH = 512
K = 4
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)

FLOAT16_ULP = 2.0**-11
"""Rounding to float16 changes a number by at most this fraction of it."""

RESIDUAL_RELATIVE = 1e-3
RESIDUAL_ABOVE = 1e-8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    os.environ["WORKLOAD_EXAMPLES"] = str(EXAMPLES)
    asked = workload(store, batch_size=BATCH, temperatures=(0.5, 2.0, 4.0))
    summary = precompute(asked.request)
    del os.environ["WORKLOAD_EXAMPLES"]
    assert summary.shards == SHARDS
    return store


@pytest.fixture(scope="module")
def url(store: Path) -> Iterator[str]:
    with running(create_app(Catalog(store))) as base:
        yield f"{base}/points"


@pytest.fixture(scope="module")
def plain() -> torch.Tensor:
    """Logits of a plain forward, in the batches that precompute forms: anew at each shard."""
    model, inputs = teacher().eval(), Points(EXAMPLES).inputs
    parts = []
    with torch.no_grad():
        for first in range(0, EXAMPLES, ROWS_PER_SHARD):
            shard = inputs[first : first + ROWS_PER_SHARD]
            parts += [model(batch) for batch in shard.split(BATCH)]
    return torch.cat(parts)


def check(soft: SoftLabels, ids: np.ndarray, plain: torch.Tensor) -> None:
    logits = plain[torch.from_numpy(ids)]
    top = logits.topk(K, dim=1)
    assert np.array_equal(soft.indices, top.indices.numpy())
    assert np.array_equal(soft.logit_max, top.values[:, 0].numpy())
    targets = ids % CLASSES
    assert soft.target is not None
    assert soft.target_logit is not None
    assert np.array_equal(soft.target, targets)
    of_targets = logits.gather(1, torch.from_numpy(targets)[:, None]) - top.values[:, :1]
    assert np.array_equal(soft.target_logit, of_targets[:, 0].numpy())
    dense = logits.double()
    centred = (top.values.double() - dense.amax(1, keepdim=True)).numpy()
    for temperature in TEMPERATURES:
        log_probs = torch.log_softmax(dense / temperature, 1)
        head = log_probs.gather(1, top.indices).numpy()
        # The logit's own rounding, and that of the normaliser: a mean of the others' weighted by their probability.
        share = (np.exp(head) * np.abs(centred)).sum(1, keepdims=True)
        bound = (np.abs(centred) + share) * FLOAT16_ULP / temperature + 2e-6
        assert (np.abs(soft.log_probs(temperature) - head) <= bound).all()
        rest = log_probs.exp().scatter(1, top.indices, 0.0).sum(1).numpy()
        large = rest > RESIDUAL_ABOVE
        assert large.any()
        relative = np.abs(soft.residual_mass(temperature) / rest - 1)[large]
        assert relative.max() < RESIDUAL_RELATIVE, f"T={temperature}: {relative.max()}"


def orders() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(os.getpid())
    edges = np.arange(ROWS_PER_SHARD, EXAMPLES, ROWS_PER_SHARD)
    across = np.concatenate([edges, edges - 1, edges, edges[::-1], edges - 1])
    return {"every row, permuted": rng.permutation(EXAMPLES), "duplicates across shard edges": rng.permutation(across)}


@pytest.mark.parametrize("order", list(orders()))
@pytest.mark.parametrize("where", ["local", "http"])
def test_rows_equal_the_teachers_own(store: Path, url: str, plain: torch.Tensor, where: str, order: str) -> None:
    ids = orders()[order]
    with connect(store / "points" if where == "local" else url) as labels:
        # One fetch of everything: over HTTP the SDK splits it by the limits.
        check(labels.fetch(ids), ids, plain)


def test_both_readers_give_the_same_bytes(store: Path, url: str) -> None:
    rng = np.random.default_rng(os.getpid())
    with connect(store / "points") as local, connect(url) as remote:
        for ids in (rng.integers(0, EXAMPLES, size) for size in (1, 33, 4096)):
            one, other = local.fetch(ids), remote.fetch(ids)
            for name in ("indices", "logits", "logit_max", "tail_logsumexp", "fingerprint", "target", "target_logit"):
                assert getattr(one, name).tobytes() == getattr(other, name).tobytes()
            assert one.digest == other.digest


def test_the_inputs_that_the_teacher_saw_pass_and_others_are_named(store: Path, url: str) -> None:
    inputs = Points(EXAMPLES).inputs
    ids = [5, 4096, 200_000]
    for target in (store / "points", url):
        with connect(target) as labels:
            labels.fetch(ids, inputs=inputs[ids])
            with pytest.raises(LabelMismatch, match="4096") as caught:
                labels.fetch(ids, inputs=inputs[[5, 4097, 200_000]])
            assert caught.value.ids == [4096]
