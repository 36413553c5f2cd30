"""A server that answers what it should not: everything is refused by a typed error before a row of it is used."""

from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
from tests.client.rows import dense_logits, description, truncated

from logitcache.client import HttpLabelSet
from logitcache.labels import wire
from logitcache.labels.errors import DigestChanged, LogitcacheError, MalformedMessage
from logitcache.labels.label_set import Description
from logitcache.labels.problem import from_problem
from logitcache.labels.soft_labels import RowSpec

DESCRIBED: Description = description(truncated(dense_logits(4, 10), 3, temperatures=(1.0, 2.0)))
SPEC = DESCRIBED.row_spec


def body(rows: int = 2, spec: RowSpec = SPEC, *, present: bool = False, **changes: Any) -> bytes:
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in spec.fields(rows, present=present).items()}
    return wire.encode(arrays | changes, wire.row_metadata(spec.temperatures, DESCRIBED.digest))


def reader(answer: bytes) -> HttpLabelSet:
    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=DESCRIBED.to_json())
        return httpx.Response(200, content=answer, headers={"Content-Type": wire.MEDIA_TYPE})

    return HttpLabelSet("http://x", DESCRIBED.name, transport=httpx.MockTransport(respond), retries=0)


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
        {"digest": 5},
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
    other = HttpLabelSet("http://x", "other", transport=reader(b"")._client._transport, retries=0)
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
