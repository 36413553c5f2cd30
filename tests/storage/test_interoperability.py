"""A label set is a plain Zarr v3 group: libraries that know nothing of logitcache read the same numbers."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr
from tests.building import Reference, build, reference

from logitcache.storage import LocalLabelSet

ARRAYS = ("ids", "fingerprint", "indices", "logits", "scalars")


@pytest.fixture(scope="module", params=[("float16", 20), ("float32", 70_000)], ids=["narrow", "wide"])
def source(request: pytest.FixtureRequest) -> Reference:
    dtype, classes = request.param
    if classes == 20:
        return reference(3, dtype=dtype)
    return reference(1, short_by=4000, dtype=dtype, classes=classes, temperatures=(1.0, 2.5))


@pytest.fixture(scope="module")
def label_set(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("store") / "x", source)


@pytest.mark.parametrize("name", ARRAYS)
def test_zarr_python_reads_every_number(label_set: Path, source: Reference, name: str) -> None:
    array = zarr.open_group(label_set, mode="r")[name]
    assert isinstance(array, zarr.Array)
    expected = source.arrays(range(source.layout.examples))[name]
    assert array.dtype == expected.dtype
    assert np.array_equal(np.asarray(array[:]), expected)
    assert array.metadata.to_dict()["dimension_names"] is not None


@pytest.mark.parametrize("name", ARRAYS)
def test_tensorstore_reads_every_number(label_set: Path, source: Reference, name: str) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{label_set / name}/"}}
    array = tensorstore.open(spec, read=True).result().read().result()
    assert np.array_equal(array, source.arrays(range(source.layout.examples))[name])


def test_the_columns_of_the_scalars_are_named_in_the_metadata(label_set: Path, source: Reference) -> None:
    scalars = zarr.open_group(label_set, mode="r")["scalars"]
    names = [f"tail_logsumexp@{value:g}" for value in source.identity.temperatures]
    assert scalars.attrs["columns"] == ["logit_max", *names]


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
