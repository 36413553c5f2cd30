"""A server that goes away in the middle of an epoch and comes back: the epoch goes on, with the same labels."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.building import Reference, build, reference
from torch.utils.data import DataLoader

from logitcache.client import DeadlineExceeded, connect, with_ids

BATCH = 256


@pytest.fixture(scope="module")
def source() -> Reference:
    return reference(2)


@pytest.fixture(scope="module")
def store(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    build(store / "set", source)
    return store


@contextmanager
def served(store: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`logitcache serve` in a process of its own, and the port that it took."""
    command = [sys.executable, "-m", "logitcache.server", "serve", "--store", str(store), "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if '"url"' in line:
                break
        yield process, int(json.loads(line)["url"].rpartition(":")[2])
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_an_epoch_outlives_its_server(store: Path, source: Reference, end: signal.Signals) -> None:
    ids_of = DataLoader(with_ids(np.zeros((source.layout.examples, 1), np.float32)), batch_size=BATCH, shuffle=True)
    seen: list[np.ndarray] = []
    with served(store) as (first, port), connect(f"http://127.0.0.1:{port}/set", timeout_s=60) as labels:
        steps = labels.attach(ids_of, ids=-1)
        epoch = iter(steps)
        for _ in range(5):
            batch, soft = next(epoch)
            seen.append(check(batch[1].numpy(), soft, source))
        first.send_signal(end)
        first.wait()
        # Batches fetched ahead are still there; the one after them waits for the server to come back.
        with served(store, port):
            for batch, soft in epoch:
                seen.append(check(batch[1].numpy(), soft, source))
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(source.layout.examples))


def check(ids: np.ndarray, soft: object, source: Reference) -> np.ndarray:
    assert np.array_equal(soft.indices, source.order[ids])  # type: ignore[attr-defined]
    return ids


def test_a_server_that_stays_away_is_an_error_at_its_step_that_says_what_to_do(store: Path, source: Reference) -> None:
    loader = DataLoader(with_ids(np.zeros((1000, 1), np.float32)), batch_size=100)
    with served(store) as (process, port), connect(f"http://127.0.0.1:{port}/set", timeout_s=0.5) as labels:
        epoch = iter(labels.attach(loader, ids=-1, depth=1))
        next(epoch)
        process.kill()
        process.wait()
        with pytest.raises(DeadlineExceeded, match="logitcache serve"):
            for _ in epoch:
                continue
