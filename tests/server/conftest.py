"""A small store on disk, and the real app over it on a real socket."""

import io
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.building import Reference, build, reference

from logitcache.labels.identity import Identity, TeacherId
from logitcache.server import logs
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage.layout import Layout
from logitcache.storage.places import Places
from logitcache.storage.writer import LabelSetWriter

EXAMPLES = 10_000
ROWS_PER_SHARD = 4096
IDENTITY = Identity(TeacherId("resnet", "sha256:aa", "crop"), k=3, classes=10, temperatures=(1.0, 2.0), dtype="float16")


def shard_arrays(span: range) -> dict[str, np.ndarray]:
    """Rows that tell their own id: `logit_max` and `fingerprint` hold it, and one row in ten has a -inf logit."""
    ids = np.arange(span.start, span.stop)
    logits = np.tile(np.array([0, -0.5, -2], np.float16), (len(ids), 1))
    logits[ids % 10 == 7, 2] = -np.inf
    scalars = np.stack([ids.astype(np.float32), np.full(len(ids), -3.0), np.full(len(ids), -1.5)], 1).astype(np.float32)
    return {
        "ids": ids.astype(np.int64),
        "fingerprint": (ids.astype(np.uint64) + np.uint64(2**63))[:, None],
        "indices": np.stack([ids % 10, (ids + 1) % 10, (ids + 2) % 10], 1).astype(np.uint16),
        "logits": logits,
        "scalars": scalars,
    }


def write_label_set(path: Path, shards: int = 3) -> None:
    """A label set of `EXAMPLES` with its first shards labelled; sealed when all three are."""
    with LabelSetWriter(path, Layout.pointwise(IDENTITY, EXAMPLES, ROWS_PER_SHARD)) as writer:
        for shard in range(shards):
            writer.commit(shard, shard_arrays(writer.layout.span(shard)), {"retained_mass": {}})
        if not writer.missing:
            writer.seal()


@pytest.fixture(scope="session")
def finished_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the complete label set ``digits`` and the unfinished ``half``. Only to be read."""
    store = tmp_path_factory.mktemp("store")
    write_label_set(store / "digits")
    write_label_set(store / "half", shards=1)
    return store


@pytest.fixture
def own_store(finished_store: Path, tmp_path: Path) -> Path:
    """A copy of the store for a test that changes it."""
    without = shutil.ignore_patterns(Places(finished_store).served.name)  # what a server counts there meanwhile
    return Path(shutil.copytree(finished_store, tmp_path / "label-sets", ignore=without))


@pytest.fixture(scope="session")
def server(finished_store: Path) -> Iterator[httpx.Client]:
    """A client of a server over the finished store."""
    with running(create_app(Catalog(finished_store))) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def own_server(own_store: Path) -> Iterator[httpx.Client]:
    """A client of a server over this test's own store."""
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        yield client


NASTY = (
    "a/b",
    "a%2Fb",
    "../x",
    "a\nb",
    "a\n",
    "a",
    "\x01\t\x7f",
    "😀" * 1024,
    "?rows=0:1",
    "#",
    " ",
    "7",
    "train/",
    "/",
)
"""Text ids that a path could take for another."""


@pytest.fixture(scope="session")
def books() -> Reference:
    """Rows a token under text ids, with targets."""
    return reference(2, alignment="causal", ids="text", targets=True, longest=40)


@pytest.fixture(scope="session")
def photos() -> Reference:
    """A few examples under the worst of texts."""
    return replace(reference(1, short_by=ROWS_PER_SHARD - len(NASTY), ids="text", targets=True), ids=NASTY)


@pytest.fixture(scope="session")
def shapes_store(books: Reference, photos: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    build(store / "books", books)
    build(store / "part", books, [0])
    build(store / "photos", photos)
    build(store / "digits", reference(1))
    build(store / "novels", reference(1, alignment="causal", longest=3000, short_by=500))
    return store


@pytest.fixture(scope="session")
def shapes_server(shapes_store: Path) -> Iterator[httpx.Client]:
    with running(create_app(Catalog(shapes_store))) as url, httpx.Client(base_url=url) as client:
        yield client


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The log as a machine reads it; loggers are given back as they were."""
    roots = [logging.getLogger(name) for name in logs.ROOTS]
    before = [(root.handlers[:], root.level, root.propagate) for root in roots]
    stream = io.StringIO()
    logs.configure(stream)
    yield stream
    for root, (handlers, level, propagate) in zip(roots, before, strict=True):
        root.handlers[:] = handlers
        root.setLevel(level)
        root.propagate = propagate


def timed_writer(path: Path) -> LabelSetWriter:
    """Of 10,000 rows."""
    return LabelSetWriter(path, Layout.pointwise(IDENTITY, 10_000, 4096))


def commit_timed(writer: LabelSetWriter, shard: int) -> None:
    """Rows at 2 ms each, but for the 1,808 of the last shard, which took no time that is known."""
    spent = {"seconds": 8.192, "rows": 4096, "device": "some GPU"} if shard < 2 else None
    writer.commit(shard, shard_arrays(writer.layout.span(shard)), {"teacher_time": spent})


def timed_label_set(path: Path) -> None:
    """Complete."""
    with timed_writer(path) as writer:
        for shard in range(3):
            commit_timed(writer, shard)
        writer.seal()


@pytest.fixture
def timed(own_store: Path) -> Iterator[httpx.Client]:
    timed_label_set(own_store / "timed")
    with running(create_app(Catalog(own_store))) as url, httpx.Client(base_url=url) as client:
        yield client
