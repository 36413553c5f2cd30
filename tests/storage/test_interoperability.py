"""A label set is a plain Zarr v3 group: libraries that know nothing of logitcache read the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from tests.building import Reference, build, grow, grown, reference

from logitcache.storage import LocalLabelSet

KINDS: dict[str, dict[str, Any]] = {
    "narrow": {},
    "wide": {"dtype": "float32", "classes": 70_000, "temperatures": (1.0, 2.5), "targets": True, "ids": "integer"},
    "causal": {"alignment": "causal", "ids": "text", "targets": True},
}
ARRAYS = ("ids", "fingerprint", "indices", "logits", "scalars", "target", "tokens", "row_start", "row_count")


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest) -> Reference:
    options = KINDS[request.param]
    begun = reference(1, short_by=3800, **options)
    return begun if request.param == "wide" else grown(begun, 40)


@pytest.fixture(scope="module")
def label_set(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "x"
    if source.layout.shards == 1:
        return build(path, source)
    return grow(build(path, source.first(1)), source)


def slots_of(source: Reference, name: str) -> np.ndarray | None:
    """What an array holds from its first slot to the last that is used; None when there is no such array."""
    layout = source.layout
    if name not in layout.arrays:
        return None
    array = layout.arrays[name]
    slots = np.zeros((layout.shards * layout.slots(array), *array.row_shape), array.dtype)
    for shard in range(layout.shards):
        rows = source.arrays(layout.span(shard))[name]
        slots[shard * layout.slots(array) :][: len(rows)] = rows
    return slots[: layout.array_shape(array)[0]]


@pytest.mark.parametrize("name", ARRAYS)
def test_zarr_python_reads_every_number(label_set: Path, source: Reference, name: str) -> None:
    expected, group = slots_of(source, name), zarr.open_group(label_set, mode="r")
    assert (expected is None) == (name not in group)
    if expected is None:
        return
    array = group[name]
    assert isinstance(array, zarr.Array)
    assert array.dtype == expected.dtype
    assert np.array_equal(np.asarray(array[:]), expected, equal_nan=name in ("scalars", "logits"))
    assert array.metadata.to_dict()["dimension_names"] is not None


@pytest.mark.parametrize("name", ARRAYS)
def test_tensorstore_reads_every_number(label_set: Path, source: Reference, name: str) -> None:
    expected = slots_of(source, name)
    if expected is None:
        return
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{label_set / name}/"}}
    array = tensorstore.open(spec, read=True).result().read().result()
    assert np.array_equal(array, expected, equal_nan=name in ("scalars", "logits"))


def test_the_columns_of_the_scalars_are_named_in_the_metadata(label_set: Path, source: Reference) -> None:
    scalars = zarr.open_group(label_set, mode="r")["scalars"]
    names = [f"tail_logsumexp@{value:g}" for value in source.identity.temperatures]
    assert scalars.attrs["columns"] == ["logit_max", *names, *(["target_logit"] if source.identity.targets else [])]


def test_a_shard_of_zeros_is_stored_as_a_file(tmp_path: Path) -> None:
    source = reference(1, short_by=4000)
    source.logits[:] = 0.0
    path = build(tmp_path / "s" / "x", source)
    assert (path / "logits" / "c.0.0").stat().st_size == source.layout.chunk_bytes(source.layout.arrays["logits"])
    reader = LocalLabelSet(path)
    assert (reader.fetch([0, 95]).logits == 0).all()
    reader.close()


def test_chunk_files_are_whole_pages(label_set: Path) -> None:
    sizes = [path.stat().st_size for path in label_set.glob("*/c.*")]
    assert sizes
    assert all(size % 4096 == 0 for size in sizes)
