"""A server that answers what it should not: everything is refused by a typed error before a row of it is used."""

import json
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from tests.client.rows import dense_logits, description, truncated

from logitcache.client import HttpLabelSet
from logitcache.client.httpx_transport import HttpxTransport
from logitcache.labels import wire
from logitcache.labels.errors import DigestChanged, LogitcacheError, MalformedMessage, RowsMissing, TooManyRows
from logitcache.labels.label_set import Description, Limits
from logitcache.labels.problem import MEDIA_TYPE, from_problem
from logitcache.labels.soft_labels import RowSpec, splits_of

DESCRIBED: Description = description(truncated(dense_logits(4, 10), 3, temperatures=(1.0, 2.0)))
SPEC = DESCRIBED.row_spec

CAUSAL = replace(DESCRIBED, identity=replace(DESCRIBED.identity, alignment="causal", targets=True, ids="text"), rows=9)


def body(rows: int = 2, spec: RowSpec = SPEC, *, present: bool = False, **changes: Any) -> bytes:
    fields = spec.fields(rows, rows, present=present)
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in fields.items()}
    return wire.encode(arrays | changes, wire.row_metadata(spec.temperatures, DESCRIBED.digest))


def causal_body(counts: list[int], *, without: tuple[str, ...] = (), **changes: Any) -> bytes:
    """Rows of so many tokens an example, some arrays left out or changed."""
    fields = CAUSAL.row_spec.fields(sum(counts), len(counts), present="present" in changes)
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in fields.items() if name not in without}
    if "row_splits" in arrays:
        arrays["row_splits"][:] = splits_of(np.array(counts))
    return wire.encode(arrays | changes, wire.row_metadata(SPEC.temperatures, DESCRIBED.digest))


def reader(answer: bytes, described: Description = DESCRIBED, status: int = 200) -> HttpLabelSet:
    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=described.to_json())
        kind = wire.MEDIA_TYPE if status == 200 else MEDIA_TYPE
        return httpx.Response(status, content=answer, headers={"Content-Type": kind})

    transport = HttpxTransport("http://x", httpx.MockTransport(respond))
    return HttpLabelSet("http://x", described.name, transport=transport, retries=0)


def test_the_answer_that_is_right_is_taken() -> None:
    assert len(reader(body()).fetch([1, 2])) == 2
    assert reader(body(present=True)).fetch([1, 2], on_missing="mask").present is not None


@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, k=SPEC.k + 1),
        replace(SPEC, temperatures=(1.0, 3.0)),
        replace(SPEC, dtype="float32" if SPEC.dtype == "float16" else "float16"),
        replace(SPEC, index_dtype="uint32" if SPEC.index_dtype == "uint16" else "uint16"),
    ],
    ids=["k", "temperatures", "dtype", "index dtype"],
)
def test_rows_of_another_shape_than_described_are_refused(spec: RowSpec) -> None:
    with pytest.raises(DigestChanged, match="another shape"):
        reader(body(spec=spec)).fetch([1, 2])


def test_a_class_that_the_teacher_does_not_have_is_refused() -> None:
    indices = np.zeros((2, SPEC.k), SPEC.index_dtype)
    indices[1, 0] = DESCRIBED.identity.classes
    with pytest.raises(MalformedMessage, match="class"):
        reader(body(indices=indices)).fetch([1, 2])


def test_a_mask_comes_exactly_when_it_is_asked_for() -> None:
    with pytest.raises(MalformedMessage, match="mask"):
        reader(body(present=True)).fetch([1, 2])
    with pytest.raises(MalformedMessage, match="mask"):
        reader(body()).fetch([1, 2], on_missing="mask")


def test_a_mask_of_other_bytes_than_0_and_1_is_refused() -> None:
    answer = bytearray(body(present=True))
    answer[-1] = 2
    with pytest.raises(MalformedMessage, match="neither 0 nor 1"):
        reader(bytes(answer)).fetch([1, 2], on_missing="mask")


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": {"ids": "x", "response_bytes": 1}},
        {"limits": {"ids": 1.5, "response_bytes": 1}},
        {"limits": {"ids": 0, "response_bytes": 1}},
        {"limits": {"ids": 5, "response_bytes": None}},
        {"limits": {}},
        {"examples": "x"},
        {"examples": True},
        {"generations": 5},
        {"generations": [{"number": 1, "examples": 4}]},
        {"generations": [{"number": 1, "examples": 4, "digest": None}]},
        {"rows": -1},
        {"name": None},
        {"shards": []},
        {"identity": {}},
        {"retained_mass": {"1": {"mean": "x"}}},
        {"label_bytes": -1},
    ],
    ids=str,
)
def test_a_description_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage, match="not the description"):
        Description.from_json(DESCRIBED.to_json() | changes)


def test_a_description_of_a_newer_server_with_more_members_is_read() -> None:
    value = DESCRIBED.to_json() | {"colour": "blue"}
    value["shards"] = value["shards"] | {"warm": 3}
    value["limits"] = value["limits"] | {"streams": 3}
    assert Description.from_json(value) == DESCRIBED


def test_the_description_of_another_label_set_is_refused() -> None:
    other = HttpLabelSet("http://x", "other", transport=reader(b"")._transport, retries=0)
    with pytest.raises(MalformedMessage, match="describes"):
        other.describe()


@pytest.mark.parametrize(
    "problem",
    [
        {"code": "rows-missing", "detail": "x", "message": "y", "self": 1},
        {"code": "server-busy", "detail": "x", "retry_after_s": 10**400},
        {"code": "server-busy", "detail": "x", "retry_after_s": -1},
        {"code": ["x"], "detail": {"a": 1}},
    ],
    ids=str,
)
def test_a_strange_problem_is_still_an_error_of_ours(problem: dict[str, Any]) -> None:
    error = from_problem(problem, 503)
    assert isinstance(error, LogitcacheError)
    assert error.retry_after_s is None


def test_the_causal_answer_that_is_right_is_taken() -> None:
    soft = reader(causal_body([2, 3]), CAUSAL).fetch(["a", "b"])
    assert (soft.rows_of(1), len(soft)) == (slice(2, 5), 5)
    present = np.array([True, False])
    assert len(reader(causal_body([2, 0], present=present), CAUSAL).fetch(["a", "b"], on_missing="mask")) == 2


@pytest.mark.parametrize(
    "splits", [[0, 2, 4], [1, 2, 5], [0, 6, 5], [0, -1, 5], [0, 5], [0, 2, 4, 5], [0, 2**62, 5]], ids=str
)
def test_row_splits_that_do_not_split_the_rows_are_refused(splits: list[int]) -> None:
    with pytest.raises(MalformedMessage):
        reader(causal_body([2, 3], row_splits=np.array(splits)), CAUSAL).fetch(["a", "b"])


@pytest.mark.parametrize("splits", [[0, 5, 5], [0, 0, 5], [0, 1, 5]], ids=str)
def test_row_splits_that_give_an_example_other_rows_than_asked_for_are_refused(splits: list[int]) -> None:
    hostile = reader(causal_body([2, 3], row_splits=np.array(splits)), CAUSAL)
    with pytest.raises(MalformedMessage, match="which are not those that were asked for"):
        hostile.fetch(["a", "b"], rows=[(4, 6), (0, 3)])
    if 0 in np.diff(splits):
        with pytest.raises(MalformedMessage, match="sends 0 rows of the example at position"):
            hostile.fetch(["a", "b"])


def test_rows_of_an_example_that_is_marked_as_missing_are_refused() -> None:
    hostile = causal_body([2, 1], present=np.array([True, False]))
    with pytest.raises(MalformedMessage, match="1 rows of the example at position 1"):
        reader(hostile, CAUSAL).fetch(["a", "b"], on_missing="mask")


@pytest.mark.parametrize("absent", [("tokens",), ("target",), ("target_logit",), ("row_splits",), ("fingerprint",)])
def test_an_array_that_belongs_to_the_others_may_not_be_absent(absent: tuple[str, ...]) -> None:
    with pytest.raises(MalformedMessage, match="does not hold soft labels"):
        reader(causal_body([2, 3], without=absent), CAUSAL).fetch(["a", "b"])


@pytest.mark.parametrize("absent", [("row_splits", "tokens"), ("target", "target_logit")])
def test_labels_without_what_the_description_promises_are_of_another_label_set(absent: tuple[str, ...]) -> None:
    with pytest.raises(DigestChanged, match="another shape"):
        reader(causal_body([1, 1], without=absent), CAUSAL).fetch(["a", "b"])


def test_rows_of_tokens_where_an_example_has_one_row_are_of_another_label_set() -> None:
    with pytest.raises(DigestChanged, match="another shape"):
        reader(causal_body([1, 1])).fetch([1, 2])


@pytest.mark.parametrize("target", [10, -2])
def test_a_target_that_is_no_class_of_the_teacher_is_refused(target: int) -> None:
    with pytest.raises(MalformedMessage, match=str(target)):
        reader(causal_body([2, 3], target=np.full(5, target, np.int32)), CAUSAL).fetch(["a", "b"])


def test_a_ragged_answer_beyond_the_servers_own_limit_is_not_read_to_its_end() -> None:
    small = replace(CAUSAL, limits=Limits(response_bytes=1000))
    with pytest.raises(MalformedMessage, match="more than the"):
        reader(causal_body([60_000, 1]), small).fetch(["a", "b"])


def test_a_server_that_refuses_every_size_is_asked_down_to_one_example_and_believed() -> None:
    problem = json.dumps({"code": "too-many-rows", "detail": "still too many"}).encode()
    with pytest.raises(TooManyRows, match="still too many"):
        reader(problem, CAUSAL, status=413).fetch([f"{number}" for number in range(100)])


@pytest.mark.parametrize(
    "unknown", [["5d41402abc4b2a765d41402abc4b2a76"], [7, None, ["x"]], 7, "b"], ids=["a key of no text", *"123"]
)
def test_a_problem_that_names_what_was_not_asked_for_is_still_an_error_of_ours(unknown: Any) -> None:
    problem = json.dumps({"code": "rows-missing", "detail": "gone", "unknown": unknown, "message": 1}).encode()
    with pytest.raises(RowsMissing, match="gone"):
        reader(problem, CAUSAL, status=404).fetch(["a", "b"])


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"state": np.zeros(3, np.uint8)},
        {"state": np.zeros(2, np.int32)},
        {"state": np.zeros((2, 1), np.uint8)},
        {"state": np.array([0, 3], np.uint8)},
        {"state": np.zeros(2, np.uint8), "more": np.zeros(1, np.uint8)},
    ],
    ids=str,
)
def test_states_that_are_none_are_refused(arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(MalformedMessage):
        reader(wire.encode(arrays), CAUSAL).states(["a", "b"])
