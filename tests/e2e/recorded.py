"""A recording that tests make over and over: what its rows are, and a server that can be killed while it is made."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from logitcache.client import connect, record
from logitcache.labels.soft_labels import SoftLabels

EXAMPLES, CLASSES, K = 300, 12, 5
TABLE = torch.randn(EXAMPLES, CLASSES, generator=torch.Generator().manual_seed(1)) * 4
OPTIONS: dict[str, Any] = {"run": "run-1", "steps": range(1000), "classes": CLASSES, "top_k": K, "temperatures": [2.0]}


def batches(seed: int = 0, size: int = 32, examples: int = EXAMPLES) -> list[np.ndarray]:
    """Ordinals of all examples in random order."""
    order = np.random.default_rng(seed).permutation(examples)
    return [order[begin : begin + size] for begin in range(0, examples, size)]


def all_of(target: str | Path, ids: Any, digest: str | None = None, **options: Any) -> SoftLabels:
    with connect(target, digest=digest) as labels:
        return labels.fetch(ids, **options)


def rows_of(ids: np.ndarray) -> torch.Tensor:
    """Logits that any example has by its ordinal."""
    return TABLE[torch.from_numpy(ids % EXAMPLES)] + torch.from_numpy(ids // EXAMPLES % 97)[:, None]


def undisturbed(path: Path, examples: int, seed: int) -> str:
    with record(path, **OPTIONS, examples=examples) as recorder:
        for batch in batches(seed, 1024, examples):
            recorder.add(batch, rows_of(batch), step=1)
    assert recorder.digest is not None
    return recorder.digest


def all_of_folder(path: Path, examples: int) -> tuple[SoftLabels, str]:
    digest = undisturbed(path / "run-1", examples, 0)
    return all_of(path / "run-1", range(examples)), digest


def whole(store: Path) -> str:
    """The digest of an undisturbed recording in a folder, by one recorder."""
    with record(store / "whole" / "run-1", **OPTIONS, examples=EXAMPLES) as recorder:
        for batch in batches(seed=5):
            recorder.add(batch, TABLE[torch.from_numpy(batch)])
    assert recorder.digest is not None
    return recorder.digest


@dataclass
class Served:
    """`logitcache serve --record` in a process of its own, which can be killed and started anew on its port."""

    store: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        options = ("--store", str(self.store), "--port", str(self.port), "--record")
        command = [sys.executable, "-m", "logitcache.server", "serve", *options]
        with (self.store.parent / "serve.log").open("ab") as log:
            began = log.tell()
            self.process = subprocess.Popen(command, stderr=log, text=True)
        while True:
            lines = (self.store.parent / "serve.log").read_bytes()[began:].splitlines(keepends=True)
            for line in lines:
                if b'"url"' in line and line.endswith(b"\n"):
                    self.port = int(json.loads(line)["url"].rpartition(":")[2])
                    return
            assert self.process.poll() is None, lines
            time.sleep(0.02)

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def served(store: Path) -> Iterator[Served]:
    store.mkdir(exist_ok=True)
    server = Served(store)
    server.start()
    try:
        yield server
    finally:
        server.kill()
