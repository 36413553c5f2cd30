"""The reader of a local folder: the conformance of all readers, and what only it can do."""

import dataclasses
import gc
import json
import mmap
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.building import ROWS_PER_SHARD, Reference, commit_shards, complete_and_partial, reference, writer_of
from tests.conformance import LabelSetConformance, assert_rows_equal, fetch_beyond_the_limit

from logitcache.labels import wire
from logitcache.labels.errors import LabelSetNotFound, NewerFormat, NotALabelSet, RowsMissing, StoreNotFound
from logitcache.labels.label_set import Limits
from logitcache.storage import LocalLabelSet, label_set_names
from logitcache.storage.layout import Layout


@pytest.fixture(scope="session")
def store(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete_and_partial(tmp_path_factory.mktemp("store"), source)


@pytest.fixture
def complete(store: Path) -> Iterator[LocalLabelSet]:
    reader = LocalLabelSet(store / "complete")
    yield reader
    reader.close()


@pytest.fixture
def partial(store: Path) -> Iterator[LocalLabelSet]:
    reader = LocalLabelSet(store / "partial")
    yield reader
    reader.close()


class TestConformance(LabelSetConformance):
    """The local reader behaves as every reader does."""


def refreshed(reader: LocalLabelSet) -> LocalLabelSet:
    """Look at the folder now, without waiting for the half second."""
    reader._shards.refresh()
    return reader


def test_too_many_ids_at_once_are_refused(store: Path) -> None:
    reader = LocalLabelSet(store / "complete", limits=Limits(ids=100))
    fetch_beyond_the_limit(reader)
    reader.close()


def test_the_body_for_the_wire_holds_the_rows_that_fetch_gives(complete: LocalLabelSet) -> None:
    ids = np.array([9000, 1, 1, 5000])
    body, digest = complete.fetch_body(ids)
    soft, decoded = complete.fetch(ids), wire.decode_rows(body)
    assert soft.digest == decoded.digest == digest
    for name in ("indices", "logits", "logit_max", "tail_logsumexp", "fingerprint"):
        assert np.array_equal(getattr(soft, name), getattr(decoded, name))


def test_commits_and_the_generation_appear_without_reopening(source: Reference, tmp_path: Path) -> None:
    with writer_of(tmp_path / "s" / "x", source) as writer:
        commit_shards(writer, source, [1])
        reader = LocalLabelSet(tmp_path / "s" / "x")
        with pytest.raises(RowsMissing):
            reader.fetch([0])
        commit_shards(writer, source, [0, 2])
        assert_rows_equal(refreshed(reader).fetch([0, ROWS_PER_SHARD]), source, np.array([0, ROWS_PER_SHARD]))
        assert reader.describe().digest is None
        digest = writer.seal().digest
    assert refreshed(reader).describe().digest == digest == reader.fetch([3]).digest
    reader.close()


def test_fetched_rows_stay_valid_after_closing(store: Path, source: Reference) -> None:
    reader = LocalLabelSet(store / "complete")
    soft = reader.fetch([5, 9000])
    reader.close()
    del reader
    gc.collect()
    assert_rows_equal(soft, source, np.array([5, 9000]))


def test_eight_threads_read_what_one_reads(complete: LocalLabelSet, source: Reference) -> None:
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(20):
                ids = rng.integers(0, source.layout.examples, 100)
                assert np.array_equal(complete.fetch(ids).indices, source.order[ids])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_forked_child_reads_through_the_mappings_it_inherits(store: Path, source: Reference) -> None:
    reader = LocalLabelSet(store / "complete")
    reader.verify_all()
    pid = os.fork()
    if pid == 0:
        same = np.array_equal(reader.fetch([8000]).indices, source.order[[8000]])
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    reader.close()


def test_opening_reserves_addresses_and_no_memory_for_a_large_label_set(tmp_path: Path) -> None:
    small = reference(1, short_by=4000)
    source = dataclasses.replace(
        small, layout=Layout.pointwise(small.identity, small.layout.examples, 64 * ROWS_PER_SHARD)
    )
    with writer_of(tmp_path / "s" / "x", source) as writer:
        commit_shards(writer, source, [0])
    for path in [tmp_path / "s/x/zarr.json", *(tmp_path / "s/x").glob("*/zarr.json")]:
        content = json.loads(path.read_bytes())
        if "shape" in content:
            content["shape"][0] = 10**9
        else:
            content["attributes"]["logitcache"]["examples"] = 10**9
        path.write_text(json.dumps(content))
    before = anonymous_bytes()
    reader = LocalLabelSet(tmp_path / "s" / "x")
    # No page for the 40 GB that are not there.
    assert anonymous_bytes() - before < 64 << 20
    with pytest.raises(RowsMissing):
        reader.fetch([10**9 - 1])
    reader.close()


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def test_a_store_lists_its_label_sets_and_nothing_else(store: Path, tmp_path: Path) -> None:
    assert label_set_names(store) == ["complete", "partial"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "README").touch()
    assert label_set_names(tmp_path) == []
    with pytest.raises(StoreNotFound, match="precompute"):
        label_set_names(tmp_path / "nowhere")


def test_what_is_not_a_label_set_is_told_apart(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound):
        LocalLabelSet(tmp_path / "nowhere" / "x")
    with pytest.raises(LabelSetNotFound) as caught:
        LocalLabelSet(store / "compleet")
    assert caught.value.details["available"] == ["complete", "partial"]
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotALabelSet, match=r"no zarr\.json"):
        LocalLabelSet(tmp_path / "folder")
    for content, error in [
        ("{", NotALabelSet),
        ("[1]", NotALabelSet),
        ('{"zarr_format": 3, "node_type": "group", "attributes": {"other": 1}}', NotALabelSet),
        ('{"attributes": {"logitcache": {"format_version": 1}}}', NotALabelSet),
        ('{"attributes": {"logitcache": {"format_version": 2, "all": "new"}}}', NewerFormat),
        ('{"attributes": ' + "[" * 100_000, NotALabelSet),
    ]:
        (tmp_path / "folder" / "zarr.json").write_text(content)
        with pytest.raises(error):
            LocalLabelSet(tmp_path / "folder")


COUNTS = "[4096, 4096, 3096]"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (COUNTS, "[4096, 4096, 4097]"),
        (COUNTS, "[4096, 4096, 0]"),
        (COUNTS, "[4096, 4096, -1]"),
        (COUNTS, "[4096, 4096, true]"),
        (f'"examples": {COUNTS}', '"examples": [4096, 4096]'),
        (COUNTS, "[]"),
        (COUNTS, str([1] * 6001)),
        (COUNTS, "7"),
        (f'"rows": {COUNTS}', '"rows": [4096, 4096, 3095]'),
        (f'"rows": {COUNTS}', '"rows": [4096, 4096, 3097]'),
        ('"examples_per_shard": 4096', '"examples_per_shard": 8192'),
        ('"shards": {', '"shards": {"more": [], '),
        ('"rows_per_shard": 4096', '"rows_per_shard": 4095'),
        ('"rows_per_shard": 4096', '"rows_per_shard": 0'),
        ('"k": 4', '"k": 21'),
        ('"k": 4', '"k": 4.0'),
        ('"classes": 20', '"classes": 4294967296'),
        ('"dtype": "float16"', '"dtype": "object"'),
        ('"alignment": "pointwise"', '"alignment": "bidirectional"'),
        ('"ids": "ordinal"', '"ids": 7'),
        ('"targets": false', '"targets": 0'),
        ('"views": 1', '"views": 1000000000'),
        ('"temperatures": [', '"temperatures": [0, '),
    ],
)
def test_a_damaged_manifest_is_refused_before_anything_is_allocated(
    store: Path, tmp_path: Path, old: str, new: str
) -> None:
    shutil.copytree(store / "complete", tmp_path / "s" / "x")
    path = tmp_path / "s" / "x" / "zarr.json"
    text = json.dumps(json.loads(path.read_text()))
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(NotALabelSet, match=r"the manifest is damaged: "):
        LocalLabelSet(tmp_path / "s" / "x")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"float16"', '"float32"'),
        ('"uint16"', '"int16"'),
        ('"bytes"', '"zstd"'),
        ("4096", "8192"),
        ('"little"', '"big"'),
        ('"separator": "."', '"separator": "/"'),
    ],
)
def test_an_array_of_another_shape_or_codec_is_refused(store: Path, tmp_path: Path, old: str, new: str) -> None:
    shutil.copytree(store / "complete", tmp_path / "s" / "x")
    changed = 0
    for name in ("indices", "logits"):
        path = tmp_path / "s" / "x" / name / "zarr.json"
        text = path.read_text()
        changed += old in text
        path.write_text(text.replace(old, new))
    assert changed
    with pytest.raises(NotALabelSet, match="was changed after it was made"):
        LocalLabelSet(tmp_path / "s" / "x")


def test_rows_are_gathered_from_one_mapping_an_array_however_many_shards(complete: LocalLabelSet) -> None:
    complete.verify_all()
    rows = complete._shards.rows["logits"]
    assert rows.shape[0] >= 3 * ROWS_PER_SHARD
    assert rows.shape[1:] == (4,)
    assert not rows.flags.writeable
    base = rows
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert isinstance(base, mmap.mmap | memoryview)


def test_a_description_survives_json(complete: LocalLabelSet) -> None:
    from logitcache.labels.label_set import Description

    description = complete.describe()
    assert Description.from_json(json.loads(json.dumps(description.to_json()))) == description
    assert pickle.loads(pickle.dumps(description)) == description
