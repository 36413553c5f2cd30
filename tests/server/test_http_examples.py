"""One example by the path of its id, and which ids are missing, over a real socket."""

from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from tests.building import Reference
from tests.server.conftest import NASTY
from tests.server.test_http_api import problem_of

from logitcache.labels import wire
from logitcache.labels.errors import InvalidIds, InvalidRequest, RowsMissing, TooManyRows
from logitcache.labels.ids import as_ids
from logitcache.server.http import openapi

BOOKS, PHOTOS = "/v1/label-sets/books", "/v1/label-sets/photos"
SAFETENSORS = {"Content-Type": wire.MEDIA_TYPE}


def body_of(ids: Any, rows: Any = None, **options: Any) -> bytes:
    return wire.encode_ids(as_ids(ids), rows, **options)


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_the_path_of_an_example_is_its_text_whatever_that_is(
    shapes_server: httpx.Client, photos: Reference, text: str
) -> None:
    example = shapes_server.get(f"{PHOTOS}/examples/{quote(text, safe='')}").json()
    assert example["id"] == text
    assert example["indices"] == photos.order[NASTY.index(text)].tolist()


def test_slashes_of_an_id_need_no_escape(shapes_server: httpx.Client, photos: Reference) -> None:
    example = shapes_server.get(f"{PHOTOS}/examples/a/b").json()
    assert example["indices"] == photos.order[NASTY.index("a/b")].tolist()


@pytest.mark.parametrize(
    ("escaped", "says"), [("a%00b", "NUL"), ("%FF", "UTF-8"), ("a%ED%A0%BD", "UTF-8"), ("", "empty")]
)
def test_a_path_that_holds_no_id_is_refused(shapes_server: httpx.Client, escaped: str, says: str) -> None:
    assert says in problem_of(shapes_server.get(f"{PHOTOS}/examples/{escaped}"), InvalidIds, 422).message


def test_an_unknown_text_in_a_path_is_told_as_it_is(shapes_server: httpx.Client) -> None:
    error = problem_of(shapes_server.get(f"{PHOTOS}/examples/a%2525%0A"), RowsMissing, 404)
    assert isinstance(error, RowsMissing)
    assert error.unknown == ["a%25\n"]


def test_one_example_of_each_alignment_is_as_the_documentation_says(
    shapes_server: httpx.Client, books: Reference, photos: Reference
) -> None:
    flat = shapes_server.get(f"{PHOTOS}/examples/a").json()
    assert set(flat) == set(openapi.Example.model_fields)
    openapi.Example.model_validate(flat)
    ragged = shapes_server.get(f"{BOOKS}/examples/{quote(str(books.ids[5]))}").json()
    assert set(ragged) == set(openapi.CausalExample.model_fields)
    openapi.CausalExample.model_validate(ragged)
    rows = books.rows([5])
    assert ragged["tokens"] == books.tokens[rows].tolist()
    assert ragged["indices"] == books.order[rows].tolist()
    for probabilities, residual in zip(ragged["probabilities"], ragged["residual_mass"], strict=True):
        assert np.allclose(np.sum(probabilities, axis=1) + residual, 1)
        assert len(residual) == len(rows)


def test_a_part_of_a_long_example_can_be_read(shapes_server: httpx.Client) -> None:
    path = "/v1/label-sets/novels/examples/0"
    error = problem_of(shapes_server.get(path), TooManyRows, 413)
    assert error.details["rows"] > 1024
    assert len(shapes_server.get(path, params={"rows": "1000:1005"}).json()["tokens"]) == 5
    for wrong in ("5", "a:b", "5:", "-1:5", "1:2:3"):
        problem_of(shapes_server.get(path, params={"rows": wrong}), InvalidRequest, 422)
    problem_of(shapes_server.get(f"{PHOTOS}/examples/a", params={"rows": "0:1"}), InvalidRequest, 422)


def test_missing_ids_are_told_apart_once_each_in_order(shapes_server: httpx.Client, books: Reference) -> None:
    later = books.at(books.layout.span(1)[:2])
    answer = shapes_server.post("/v1/label-sets/part/missing", json={"ids": [later[1], *books.at([1]), *later]})
    assert answer.json() == {"unknown": [], "unlabelled": [later[1], later[0]]}
    openapi.Missing.model_validate(answer.json())
    answer = shapes_server.post(f"{BOOKS}/missing", json={"ids": ["nö", *later, "b/c", "nö"]})
    assert answer.json() == {"unknown": ["nö", "b/c"], "unlabelled": []}


def test_missing_ids_are_states_in_safetensors(shapes_server: httpx.Client, books: Reference) -> None:
    later = books.at(books.layout.span(1)[:1])
    body = body_of([*later, *books.at([1])])
    answer = shapes_server.post("/v1/label-sets/part/missing", content=body, headers=SAFETENSORS)
    assert answer.headers["content-type"] == wire.MEDIA_TYPE
    arrays, _ = wire.parse(answer.content)
    assert {name: array.tolist() for name, array in arrays.items()} == {"state": [1, 0]}
    told = shapes_server.post(
        f"{BOOKS}/missing", content=body_of(["x"]), headers=SAFETENSORS | {"Accept": "application/json"}
    )
    (high, low) = as_ids(["x"]).keys[0].tolist()
    assert told.json()["unknown"] == [f"{high:016x}{low:016x}"]


def test_a_question_for_missing_ids_takes_a_digest_and_nothing_else(
    shapes_server: httpx.Client, books: Reference
) -> None:
    digest = shapes_server.get(BOOKS).json()["digest"]
    ids = books.at([1])
    assert shapes_server.post(f"{BOOKS}/missing", json={"ids": ids, "digest": digest}).status_code == 200
    assert shapes_server.post(f"{BOOKS}/missing", json={"ids": ids, "digest": "sha256:" + "0" * 64}).status_code == 409
    for wrong in ({"ids": ids, "view": 0}, {"ids": ids, "rows": [0, 1]}, {}):
        problem_of(shapes_server.post(f"{BOOKS}/missing", json=wrong), InvalidRequest if wrong else InvalidIds, 422)
    for body in (body_of(ids, np.array([[0, 1]])), body_of(ids, view=0)):
        problem_of(shapes_server.post(f"{BOOKS}/missing", content=body, headers=SAFETENSORS), InvalidRequest, 422)
    ids_alone = wire.encode({"ids": np.zeros(70_000, np.int64)})
    problem_of(
        shapes_server.post("/v1/label-sets/digits/missing", content=ids_alone, headers=SAFETENSORS), TooManyRows, 413
    )
