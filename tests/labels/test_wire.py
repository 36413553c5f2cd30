"""The wire: safetensors bytes that any reader reads, and refusal of everything else."""

import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from tests.attacks.bodies import header

from logitcache.labels import wire
from logitcache.labels.errors import MalformedMessage
from logitcache.labels.soft_labels import RowSpec

DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int32", "int64", "float16", "float32"]

some_arrays = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from(DTYPES).flatmap(
        lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, min_side=0))
    ),
    max_size=5,
)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


@given(some_arrays, st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_arrays_come_back_as_they_were_sent(content: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    arrays, found = wire.parse(wire.encode(content, metadata))
    assert found == metadata
    assert arrays.keys() == content.keys()
    assert all(same(arrays[name], content[name]) for name in content)


@given(some_arrays)
def test_the_safetensors_library_reads_what_we_write(content: dict[str, np.ndarray]) -> None:
    arrays = safetensors.numpy.load(wire.encode(content))
    assert arrays.keys() == content.keys()
    assert all(same(arrays[name], content[name]) for name in content)


@given(some_arrays)
def test_we_read_what_the_safetensors_library_writes(content: dict[str, np.ndarray]) -> None:
    body = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in content.items()}, {"a": "b"})
    arrays, metadata = wire.parse(body)
    assert metadata == {"a": "b"}
    assert all(arrays[name].tobytes() == content[name].tobytes() for name in content)


@pytest.mark.parametrize("index_dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("rows", [1, 7, 4096])
@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize(("ragged", "targets"), [(False, False), (False, True), (True, False), (True, True)])
def test_every_array_of_a_body_of_rows_is_aligned(
    index_dtype: str, dtype: str, rows: int, *, present: bool, ragged: bool, targets: bool
) -> None:
    spec = RowSpec(3, index_dtype, dtype, (1.0, 2.0), ragged, targets)
    examples = 1 + rows // 3 if ragged else rows
    body, views = wire.allocate(
        spec.fields(rows, examples, present=present), wire.row_metadata(spec.temperatures, None)
    )
    assert all(view.flags.aligned and np.shares_memory(view, body) for view in views.values())
    for view in views.values():
        view[...] = 1
    if ragged:
        views["row_splits"][:] = np.linspace(0, rows, examples + 1).astype(int)
    soft = wire.decode_rows(body)
    assert all(getattr(soft, name).flags.aligned for name in views)
    assert np.shares_memory(soft.indices, body)
    assert (soft.temperatures, soft.digest) == ((1.0, 2.0), None)
    assert (soft.present is not None) == present


def test_a_body_is_read_anew_where_only_its_header_or_only_its_arrays_were_seen_before() -> None:
    first, second = wire.encode({"a": np.arange(3)}, {"x": "1"}), wire.encode({"a": np.arange(3) + 7}, {"x": "1"})
    for body, expected in ((first, [0, 1, 2]), (second, [7, 8, 9]), (first, [0, 1, 2])):
        arrays, metadata = wire.parse(bytearray(body))
        assert (arrays["a"].tolist(), metadata) == (expected, {"x": "1"})
        arrays["a"][:], metadata["x"] = 5, "2"
    for body in (first[:-8], first + b"8bytes.."):
        with pytest.raises(MalformedMessage):
            wire.parse(body)
    assert wire.parse(wire.encode({"b": np.arange(3)}, {"x": "1"}))[0].keys() == {"b"}
    assert wire.parse(wire.encode({"a": np.arange(3)}, {"x": "2"}))[1] == {"x": "2"}


def test_headers_that_never_come_again_take_no_more_memory_than_a_few_of_them() -> None:
    spec = RowSpec(1, "uint16", "float16", (1.0,))
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in spec.fields(1, 1).items()}

    def read(numbers: range) -> int:
        for number in numbers:
            wire.parse(header({"__metadata__": {"x": f"{number:01500}"}}))
            wire.decode_rows(wire.encode(arrays, wire.row_metadata(spec.temperatures, f"{number:01500}")))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = read(range(260))
        assert read(range(260, 460)) - before < 500_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_no_body_does_more_than_parse_or_be_refused(noise: bytes, place: int, value: int) -> None:
    body = bytearray(wire.encode({"ids": np.arange(9)}, {"view": "0"}))
    body[place % len(body)] = value
    for candidate in (bytes(body), noise, bytes(body) + noise):
        try:
            wire.parse(candidate)
        except MalformedMessage:
            continue


def test_rows_that_disagree_with_each_other_are_refused() -> None:
    spec = RowSpec(3, "uint16", "float16", (1.0,))
    good = {name: np.zeros(shape, dtype) for name, (dtype, shape) in spec.fields(4, 4).items()}
    metadata = wire.row_metadata(spec.temperatures, "sha256:x")
    assert wire.decode_rows(wire.encode(good, metadata)).digest == "sha256:x"
    bad: list[dict[str, np.ndarray]] = [
        good | {"logits": np.zeros((4, 2), np.float16)},
        good | {"logit_max": np.zeros(5, np.float32)},
        good | {"tail_logsumexp": np.zeros((4, 2), np.float32)},
        good | {"indices": np.zeros((4, 3), np.int32)},
        good | {"surprise": np.zeros(4, np.uint8)},
        {name: array for name, array in good.items() if name != "fingerprint"},
    ]
    for arrays in bad:
        with pytest.raises(MalformedMessage, match="soft labels"):
            wire.decode_rows(wire.encode(arrays, metadata))
    for broken in ({}, {"temperatures": "no"}, {"temperatures": "[null]"}):
        with pytest.raises(MalformedMessage):
            wire.decode_rows(wire.encode(good, broken))


@pytest.mark.parametrize(
    "splits", [[0, 2, 5], [1, 2, 4], [0, 3, 2], [0, 4], [0, 2, 3, 4], [0, -1, 4], [0, 2**62, 4]], ids=str
)
def test_splits_that_do_not_split_the_rows_are_refused(splits: list[int]) -> None:
    spec = RowSpec(3, "uint16", "float16", (1.0,), ragged=True)
    good = {name: np.zeros(shape, dtype) for name, (dtype, shape) in spec.fields(4, 2).items()}
    good["row_splits"] = np.array([0, 1, 4])
    metadata = wire.row_metadata(spec.temperatures, None)
    assert wire.decode_rows(wire.encode(good, metadata)).rows_of(1) == slice(1, 4)
    with pytest.raises(MalformedMessage, match="soft labels"):
        wire.decode_rows(wire.encode(good | {"row_splits": np.array(splits)}, metadata))


def test_splits_whose_differences_wrap_are_refused() -> None:
    spec = RowSpec(3, "uint16", "float16", (1.0,), ragged=True)
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in spec.fields(4, 3).items()}
    arrays["row_splits"] = np.array([0, 2**63 - 1, -2, 4])
    with pytest.raises(MalformedMessage, match="do not split 4 rows"):
        wire.decode_rows(wire.encode(arrays, wire.row_metadata(spec.temperatures, None)))


def test_pointwise_rows_are_as_many_as_their_examples() -> None:
    spec = RowSpec(3, "uint16", "float16", (1.0,))
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in spec.fields(4, 3).items()}
    with pytest.raises(MalformedMessage, match="soft labels"):
        wire.decode_rows(wire.encode(arrays, wire.row_metadata(spec.temperatures, None)))
