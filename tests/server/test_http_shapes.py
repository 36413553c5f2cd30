"""Fetching text ids, ranges, rows a token and targets over a real socket, in both media types."""

import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from tests.building import Reference
from tests.conformance import assert_rows_equal
from tests.server.test_http_api import problem_of

from logitcache.labels import wire
from logitcache.labels.errors import InvalidIds, InvalidRequest, RangeOutside, TooManyRows
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import Description, row_spec
from logitcache.server.http import openapi, rows_json
from logitcache.server.http.rows_json import fetch_rows
from logitcache.storage import LocalLabelSet

BOOKS, PHOTOS = "/v1/label-sets/books", "/v1/label-sets/photos"
SAFETENSORS = {"Content-Type": wire.MEDIA_TYPE}


def body_of(ids: Any, rows: Any = None, **options: Any) -> bytes:
    return wire.encode_ids(as_ids(ids), rows, **options)


def test_keys_of_texts_fetch_what_the_texts_do(shapes_server: httpx.Client, books: Reference) -> None:
    ids = books.at([5, 1, 5])
    answer = shapes_server.post(f"{BOOKS}/fetch", content=body_of(ids), headers=SAFETENSORS)
    assert_rows_equal(wire.decode_rows(answer.content), books, [5, 1, 5])
    answer = shapes_server.post(f"{BOOKS}/fetch", json={"ids": ids}, headers={"Accept": wire.MEDIA_TYPE})
    assert_rows_equal(wire.decode_rows(answer.content), books, [5, 1, 5])


def test_json_of_ragged_rows_holds_what_safetensors_holds(shapes_server: httpx.Client, books: Reference) -> None:
    long, ranges = np.flatnonzero(books.row_counts >= 5)[:2], np.array([[2, 5], [0, 1]])
    rows = shapes_server.post(f"{BOOKS}/fetch", json={"ids": books.at(long), "rows": ranges.tolist()}).json()
    answer = shapes_server.post(f"{BOOKS}/fetch", content=body_of(books.at(long), ranges), headers=SAFETENSORS)
    soft = wire.decode_rows(answer.content)
    assert_rows_equal(soft, books, long, ranges)
    assert soft.target is not None
    assert soft.target_logit is not None
    assert rows["row_splits"] == [0, 3, 4]
    for name in ("indices", "logits", "logit_max", "tail_logsumexp", "tokens"):
        assert rows[name] == getattr(soft, name).tolist(), name
    assert rows["target"] == [None if target < 0 else target for target in soft.target.tolist()]
    assert rows["target_logit"] == [None if np.isnan(logit) else logit for logit in soft.target_logit.tolist()]
    assert set(rows) <= set(openapi.Rows.model_fields)
    openapi.Rows.model_validate(rows)


def test_json_holds_fewer_rows_where_they_have_many_logits(
    shapes_server: httpx.Client, books: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = row_spec(books.layout.identity)
    one = spec.k + len(spec.columns)
    monkeypatch.setattr(rows_json, "MAX_JSON_NUMBERS", 4 * one + one - 1)
    first = {"rows": [0, 1]}
    assert shapes_server.post(f"{BOOKS}/fetch", json={"ids": books.at(range(4))} | first).status_code == 200
    answer = shapes_server.post(f"{BOOKS}/fetch", json={"ids": books.at(range(5))} | first)
    assert "application/vnd.safetensors" in problem_of(answer, TooManyRows, 413).message
    assert answer.json()["limit"] == 4
    long = books.at([int(np.argmax(books.row_counts))])[0]
    path = f"{BOOKS}/examples/{quote(str(long), safe='')}"
    with_probabilities = one + len(spec.temperatures) * (spec.k + 1)
    most = (5 * one - 1) // with_probabilities
    assert problem_of(shapes_server.get(path), TooManyRows, 413).details["limit"] == most
    assert shapes_server.get(path, params={"rows": f"0:{most}"}).status_code == 200


def test_json_holds_a_single_long_row_and_none_that_is_longer(
    shapes_server: httpx.Client, books: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = row_spec(books.layout.identity)
    one = spec.k + len(spec.columns) + len(spec.temperatures) * (spec.k + 1)
    path, params = f"{BOOKS}/examples/{quote(str(books.at([0])[0]), safe='')}", {"rows": "0:1"}
    monkeypatch.setattr(rows_json, "MAX_JSON_NUMBERS", -(-one // 4))
    assert shapes_server.get(path, params=params).status_code == 200
    monkeypatch.setattr(rows_json, "MAX_JSON_NUMBERS", (one - 1) // 4)
    assert problem_of(shapes_server.get(path, params=params), TooManyRows, 413).details["limit"] == 0


def test_a_target_that_is_none_is_null(shapes_server: httpx.Client, books: Reference) -> None:
    rows = shapes_server.post(f"{BOOKS}/fetch", json={"ids": books.at(range(20))}).json()
    none = books.targets[books.rows(range(20))] < 0
    assert none.any()
    assert [target is None for target in rows["target"]] == none.tolist()
    assert [logit is None for logit in rows["target_logit"]] == none.tolist()


def test_one_range_goes_for_all_examples(shapes_server: httpx.Client, books: Reference) -> None:
    rows = shapes_server.post(f"{BOOKS}/fetch", json={"ids": books.at([5, 1]), "rows": [0, 1]}).json()
    assert rows["row_splits"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([0], "rows.1"),
        ([0, 1, 2], "rows"),
        ([[0, 1], [0]], "rows.1.1"),
        ([[0, 1], 5], "rows.1"),
        ([0, 1.5], "rows.1"),
        ([0, "1"], "rows.1"),
        (["0", 1], "rows.0"),
        ([True, 1], "rows.0"),
        ([[0, 1]], "(1, 2)"),
        ([5, 2], "5 to 2"),
        ([-1, 2], "-1 to 2"),
        ([0, 10**30], "whole numbers"),
        ([], "rows"),
        ("0:1", "rows"),
        (5, "rows"),
    ],
)
def test_rows_that_are_no_ranges_are_refused_and_named(
    shapes_server: httpx.Client, books: Reference, rows: Any, named: str
) -> None:
    answer = shapes_server.post(f"{BOOKS}/fetch", json={"ids": books.at([5, 1]), "rows": rows})
    assert answer.status_code == 422
    assert named in answer.json()["detail"]


def test_a_range_outside_names_the_text_in_json_and_its_key_in_safetensors(
    shapes_server: httpx.Client, books: Reference
) -> None:
    answer = shapes_server.post(f"{BOOKS}/fetch", json={"ids": books.at([5]), "rows": [0, 41]})
    error = problem_of(answer, RangeOutside, 422)
    assert error.details["ids"] == books.at([5])
    answer = shapes_server.post(
        f"{BOOKS}/fetch", content=body_of(books.at([5]), np.array([[0, 41]])), headers=SAFETENSORS
    )
    (high, low) = as_ids(books.at([5])).keys[0].tolist()
    assert problem_of(answer, RangeOutside, 422).details["ids"] == [f"{high:016x}{low:016x}"]


@pytest.mark.parametrize(
    ("path", "ids", "named"),
    [
        (BOOKS, [5], "are texts, these are whole numbers"),
        ("/v1/label-sets/digits", ["5"], "are whole numbers, these are texts"),
        (BOOKS, ["a", 5], "ids.1"),
        (BOOKS, ["a\0b"], "NUL"),
        (BOOKS, [""], "empty"),
        (BOOKS, ["😀" * 1025], "4,096"),
    ],
)
def test_ids_of_another_kind_or_form_are_refused(shapes_server: httpx.Client, path: str, ids: Any, named: str) -> None:
    for route in ("fetch", "missing"):
        assert named in problem_of(shapes_server.post(f"{path}/{route}", json={"ids": ids}), InvalidIds, 422).message


@pytest.mark.parametrize(
    ("arrays", "kind"),
    [
        ({"ids": np.zeros((2, 3), np.uint64)}, InvalidIds),
        ({"ids": np.zeros((0, 2), np.uint64)}, InvalidIds),
        ({"ids": np.zeros(2, np.uint64)}, InvalidIds),
        ({"ids": np.zeros((2, 2), np.int64)}, InvalidIds),
        ({"ids": np.zeros(2, np.int64)}, InvalidIds),
        ({"ids": np.zeros((1, 2), np.uint64), "rows": np.zeros((1, 2), np.int32)}, InvalidRequest),
        ({"ids": np.zeros((1, 2), np.uint64), "more": np.zeros(1, np.int64)}, InvalidIds),
    ],
)
def test_safetensors_arrays_that_cannot_be_are_refused(
    shapes_server: httpx.Client, arrays: dict[str, np.ndarray], kind: type[InvalidRequest]
) -> None:
    problem_of(shapes_server.post(f"{BOOKS}/fetch", content=wire.encode(arrays), headers=SAFETENSORS), kind, 422)


def test_json_counts_rows_and_not_examples(shapes_server: httpx.Client, books: Reference) -> None:
    ids = books.at(range(200))
    error = problem_of(shapes_server.post(f"{BOOKS}/fetch", json={"ids": ids}), TooManyRows, 413)
    assert error.details["rows"] == books.row_counts[:200].sum()
    assert "1,024" in error.message
    assert len(shapes_server.post(f"{BOOKS}/fetch", json={"ids": ids, "rows": [0, 1]}).json()["tokens"]) == 200


def test_an_answer_too_large_for_json_is_refused_before_it_is_made(shapes_store: Path, books: Reference) -> None:
    with closing(LocalLabelSet(shapes_store / "books")) as label_set:
        ids = as_ids(books.at([int(np.argmax(books.row_counts))] * 1000))
        answer_bytes = len(label_set.fetch_body(ids)[0])
        tracemalloc.start()
        with pytest.raises(TooManyRows):
            fetch_rows(label_set, ids)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < answer_bytes / 4


def test_descriptions_are_as_the_documentation_says(shapes_server: httpx.Client, books: Reference) -> None:
    value = shapes_server.get(BOOKS).json()
    assert set(value) == set(openapi.Description.model_fields)
    openapi.Description.model_validate(value)
    described = Description.from_json(value)
    assert (described.identity, described.rows) == (books.identity, len(books.logits))
    assert value["digest"] == described.generations[0].digest
    assert value in shapes_server.get("/v1/label-sets").json()
    schemas = shapes_server.get("/openapi.json").json()["components"]["schemas"]
    assert set(schemas["Description"]["properties"]) == set(value)


def test_rows_of_tokens_are_counted_as_rows_in_the_metrics(shapes_server: httpx.Client, books: Reference) -> None:
    def served() -> float:
        lines = shapes_server.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith('logitcache_rows_served_total{label_set="books"}')]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    before = served()
    shapes_server.post(f"{BOOKS}/fetch", content=body_of(books.at([5, 1])), headers=SAFETENSORS)
    assert served() - before == books.row_counts[[5, 1]].sum()
