"""The HTTP API over a real socket: what it gives, and what it refuses and how."""

import math
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save
from tests.server.conftest import EXAMPLES, IDENTITY

from logitcache.labels import wire
from logitcache.labels.errors import (
    DigestChanged,
    InvalidIds,
    InvalidRequest,
    LabelSetNotFound,
    LogitcacheError,
    MalformedMessage,
    RequestRefused,
    RowsMissing,
    TooManyRows,
    UnknownView,
)
from logitcache.labels.ids import Ids
from logitcache.labels.label_set import Description
from logitcache.labels.problem import from_problem

FETCH = "/v1/label-sets/digits/fetch"
SAFETENSORS = {"Content-Type": wire.MEDIA_TYPE}
JSON = {"Content-Type": "application/json"}


def problem_of(answer: httpx.Response, kind: type[LogitcacheError], status: int) -> LogitcacheError:
    """The error in a refusal, after checking everything that all refusals have in common."""
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == status == answer.json()["status"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]
    error = from_problem(answer.json(), answer.status_code)
    assert type(error) is kind
    return error


def ids_body(ids: Any, **options: Any) -> bytes:
    return wire.encode_ids(Ids(np.asarray(ids, np.int64)), **options)


def test_label_sets_are_listed_and_described_as_the_client_reads_them(server: httpx.Client) -> None:
    listed = [Description.from_json(value) for value in server.get("/v1/label-sets").json()]
    one = Description.from_json(server.get("/v1/label-sets/digits").json())
    assert [description.name for description in listed] == ["digits", "half"]
    assert one.identity == IDENTITY
    assert (one.examples, one.labelled, one.generation) == (EXAMPLES, EXAMPLES, 1)
    assert (listed[1].labelled, listed[1].digest) == (4096, None)


def test_safetensors_rows_come_in_the_order_asked_for_with_duplicates(server: httpx.Client) -> None:
    ids = [9_999, 4096, 4095, 0, 4096]
    answer = server.post(FETCH, content=ids_body(ids), headers=SAFETENSORS)
    assert answer.headers["content-type"] == wire.MEDIA_TYPE
    soft = wire.decode_rows(answer.content)
    assert soft.logit_max.tolist() == ids
    assert (soft.fingerprint - np.uint64(2**63)).tolist() == ids
    assert soft.digest == answer.headers["logitcache-digest"] == server.get("/v1/label-sets/digits").json()["digest"]


def test_json_holds_what_safetensors_holds_with_null_for_minus_infinity(server: httpx.Client) -> None:
    ids = [17, 3, 4097]
    rows = server.post(FETCH, json={"ids": ids}).json()
    soft = wire.decode_rows(server.post(FETCH, content=ids_body(ids), headers=SAFETENSORS).content)
    assert rows["logits"] == [[0.0, -0.5, None], [0.0, -0.5, -2.0], [0.0, -0.5, None]]
    assert np.isneginf(soft.logits[[0, 2], 2]).all()
    assert rows["indices"] == soft.indices.tolist()
    assert rows["tail_logsumexp"] == soft.tail_logsumexp.tolist()
    assert rows["logit_max"] == soft.logit_max.tolist()
    assert [int(text, 16) for text in rows["fingerprint"]] == soft.fingerprint.tolist()
    assert (rows["digest"], rows["temperatures"]) == (soft.digest, list(soft.temperatures))


def test_a_request_of_the_safetensors_library_is_understood(server: httpx.Client) -> None:
    body = save({"ids": np.array([5, 6])}, {"on_missing": "mask"})
    soft = wire.decode_rows(server.post(FETCH, content=body, headers=SAFETENSORS).content)
    assert soft.logit_max.tolist() == [5, 6]
    assert soft.present is not None
    assert soft.present.all()


@pytest.mark.parametrize(
    ("sent", "accept", "given"),
    [
        ("application/json", "*/*", "application/json"),
        ("application/json", wire.MEDIA_TYPE, wire.MEDIA_TYPE),
        (wire.MEDIA_TYPE, "*/*", wire.MEDIA_TYPE),
        (wire.MEDIA_TYPE, "text/html, application/json;q=0.5", "application/json"),
        (wire.MEDIA_TYPE, "application/*", wire.MEDIA_TYPE),
        ("application/json", f"{wire.MEDIA_TYPE};q=0.1, */*;q=0.01", wire.MEDIA_TYPE),
        ("application/json; charset=utf-8", "application/json;q=0, */*", wire.MEDIA_TYPE),
    ],
)
def test_the_answer_takes_the_form_that_accept_prefers(
    server: httpx.Client, sent: str, accept: str, given: str
) -> None:
    body = b'{"ids": [1]}' if "json" in sent else ids_body([1])
    answer = server.post(FETCH, content=body, headers={"Content-Type": sent, "Accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == given


def test_an_accept_that_allows_nothing_on_offer_is_406(server: httpx.Client) -> None:
    answer = server.post(FETCH, json={"ids": [1]}, headers={"Accept": "text/html"})
    assert "application/json" in problem_of(answer, RequestRefused, 406).message


@pytest.mark.parametrize("quality", ["nan", "inf", "1_0", "-1", "2", "0.0001", "", "0", "+1"])
def test_a_quality_that_is_none_allows_nothing(server: httpx.Client, quality: str) -> None:
    answer = server.post(FETCH, json={"ids": [1]}, headers={"Accept": f"*/*;q={quality}"})
    problem_of(answer, RequestRefused, 406)


def test_long_headers_are_not_told_back(server: httpx.Client) -> None:
    long = "x" * 30_000
    assert len(server.post(FETCH, json={"ids": [1]}, headers={"Accept": long}).content) < 1000
    assert len(server.post(FETCH, content=b"", headers={"Content-Type": long}).content) < 1000


@pytest.mark.parametrize("sent", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_body_of_another_type_is_415(server: httpx.Client, sent: str | None) -> None:
    answer = server.post(FETCH, content=b'{"ids": [1]}', headers={"Content-Type": sent} if sent else {})
    assert "Content-Type" in problem_of(answer, RequestRefused, 415).message


def test_an_unknown_route_and_another_method_are_problems(server: httpx.Client) -> None:
    assert "/docs" in problem_of(server.get("/v1/nothing"), RequestRefused, 404).message
    answer = server.get(FETCH)
    assert "use POST" in problem_of(answer, RequestRefused, 405).message
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_not_json_is_400(server: httpx.Client, body: bytes) -> None:
    problem_of(server.post(FETCH, content=body, headers=JSON), RequestRefused, 400)


@pytest.mark.parametrize("body", [b"", b"x" * 7, b"\xff" * 64, ids_body([1])[:-1], ids_body([1]) + b"x"])
def test_a_body_that_is_not_safetensors_is_400(server: httpx.Client, body: bytes) -> None:
    problem_of(server.post(FETCH, content=body, headers=SAFETENSORS), MalformedMessage, 400)


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([], "empty"),
        ([2**63], "9223372036854775808"),
        ([-(2**63) - 1], "-9223372036854775809"),
        ([10**30], "10000"),
        ([1.5], "ids.0"),
        (["7"], "are whole numbers, these are texts"),
        (["7", 7], "ids.1"),
        ([7, "7"], "ids.1"),
        ([3, True], "ids.1"),
        ([None], "ids.0"),
        ([[1]], "ids.0"),
        ("7", "ids"),
        (7, "ids"),
    ],
)
def test_ids_that_cannot_be_are_refused_and_named(server: httpx.Client, ids: Any, named: str) -> None:
    assert named in problem_of(server.post(FETCH, json={"ids": ids}), InvalidIds, 422).message


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"ids": [1], "veiw": 0}, "veiw"),
        ({"ids": [1], "view": "0"}, "view"),
        ({"ids": [1], "view": 1.5}, "view"),
        ({"ids": [1], "on_missing": "skip"}, "on_missing"),
        ({"ids": [1], "digest": 7}, "digest"),
        ([1], "body"),
    ],
)
def test_a_wrong_or_unknown_field_is_named(server: httpx.Client, body: Any, named: str) -> None:
    assert named in problem_of(server.post(FETCH, json=body), InvalidRequest, 422).message


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (wire.encode({"ids": np.arange(3, dtype=np.int32)}), InvalidIds),
        (wire.encode({"ids": np.zeros((2, 2), np.int64)}), InvalidIds),
        (wire.encode({"ids": np.zeros(0, np.int64)}), InvalidIds),
        (wire.encode({"rows": np.zeros(1, np.int64)}), InvalidIds),
        (ids_body([1], veiw=0), InvalidRequest),
        (ids_body([1], view="one"), InvalidRequest),
        (ids_body([1], view="²"), InvalidRequest),
        (ids_body([1], on_missing="skip"), InvalidRequest),
        (ids_body([1], view=1), UnknownView),
        (ids_body([1], view=-1), UnknownView),
    ],
)
def test_a_safetensors_request_that_cannot_be_is_refused(
    server: httpx.Client, body: bytes, kind: type[LogitcacheError]
) -> None:
    problem_of(server.post(FETCH, content=body, headers=SAFETENSORS), kind, 422)


def test_missing_rows_are_named_unknown_apart_from_unlabelled(server: httpx.Client) -> None:
    answer = server.post("/v1/label-sets/half/fetch", json={"ids": [0, -1, EXAMPLES, 5000]})
    error = problem_of(answer, RowsMissing, 404)
    assert isinstance(error, RowsMissing)
    assert (error.unknown, error.unlabelled) == ([-1, EXAMPLES], [5000])


def test_missing_rows_are_masked_when_asked_and_null_in_json(server: httpx.Client) -> None:
    body = {"ids": [0, 5000], "on_missing": "mask"}
    rows = server.post("/v1/label-sets/half/fetch", json=body).json()
    assert rows["present"] == [True, False]
    assert rows["logits"][1] == [None, None, None]
    assert rows["digest"] is None


def test_another_digest_is_409_and_the_response_says_which_is_served(server: httpx.Client) -> None:
    served = server.get("/v1/label-sets/digits").json()["digest"]
    answer = server.post(FETCH, json={"ids": [1], "digest": "sha256:" + "0" * 64})
    assert problem_of(answer, DigestChanged, 409).details["served"] == served
    assert server.post(FETCH, json={"ids": [1], "digest": served}).status_code == 200


def test_a_misspelt_label_set_is_answered_with_the_near_one(server: httpx.Client) -> None:
    for answer in (server.get("/v1/label-sets/digist"), server.post("/v1/label-sets/digist/fetch", json={"ids": [1]})):
        error = problem_of(answer, LabelSetNotFound, 404)
        assert "did you mean 'digits'" in error.message
        assert error.details["available"] == ["digits", "half"]


@pytest.mark.parametrize("name", ["Digits", "..", "%2e%2e", "a" * 65, "digits%00"])
def test_a_name_that_no_label_set_can_have_is_refused(server: httpx.Client, name: str) -> None:
    answer = server.get(f"/v1/label-sets/{name}")
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"


def test_more_rows_than_json_may_hold_are_told_to_take_safetensors(server: httpx.Client) -> None:
    body = {"ids": list(range(1025))}
    assert "safetensors" in problem_of(server.post(FETCH, json=body), TooManyRows, 413).message
    assert server.post(FETCH, json={"ids": list(range(1024))}).status_code == 200
    assert server.post(FETCH, json=body, headers={"Accept": wire.MEDIA_TYPE}).status_code == 200


def test_a_million_ids_are_told_the_limit(server: httpx.Client) -> None:
    ids = np.zeros(1_000_000, np.int64)
    error = problem_of(server.post(FETCH, content=ids_body(ids), headers=SAFETENSORS), TooManyRows, 413)
    assert error.details["limit"] == 65_536
    answer = server.post(FETCH, json={"ids": ids.tolist()}, headers={"Accept": wire.MEDIA_TYPE})
    problem_of(answer, TooManyRows, 413)


def test_a_body_declared_too_long_is_refused_before_it_is_sent(server: httpx.Client) -> None:
    head = f"POST {FETCH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {1 << 40}\r\n\r\n"
    with socket.create_connection((server.base_url.host, server.base_url.port or 0), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"2 MiB" in answer


def test_a_chunked_body_is_refused_once_it_is_too_long(server: httpx.Client) -> None:
    sent = []

    def endless() -> Iterator[bytes]:
        for number in range(1000):
            sent.append(number)
            yield b" " * (1 << 20)

    error = problem_of(server.post(FETCH, content=endless(), headers=JSON), TooManyRows, 413)
    assert "split" in error.message
    assert len(sent) < 100


def test_one_example_is_told_with_probabilities_that_sum_to_one(server: httpx.Client) -> None:
    example = server.get("/v1/label-sets/digits/examples/4096").json()
    assert (example["id"], example["logit_max"], example["indices"]) == (4096, 4096.0, [6, 7, 8])
    for probabilities, residual in zip(example["probabilities"], example["residual_mass"], strict=True):
        assert math.isclose(sum(probabilities) + residual, 1)
    assert int(example["fingerprint"], 16) == 2**63 + 4096


@pytest.mark.parametrize("id", ["seven", "1.0", "1_0", "٣", "9223372036854775808", "9" * 5000, "a/b", ""])
def test_an_example_id_that_is_not_a_64_bit_number_is_refused(server: httpx.Client, id: str) -> None:
    problem_of(server.get(f"/v1/label-sets/digits/examples/{id}"), InvalidIds, 422)


def test_an_example_that_is_not_there_or_a_view_that_is_not_there_is_named(server: httpx.Client) -> None:
    assert "-5" in problem_of(server.get("/v1/label-sets/digits/examples/-5"), RowsMissing, 404).message
    answer = server.get("/v1/label-sets/digits/examples/5", params={"view": "one"})
    assert answer.json()["fields"][0]["field"] == "view"
    problem_of(server.get("/v1/label-sets/digits/examples/5", params={"view": 2}), UnknownView, 422)


def test_openapi_tells_both_body_types_and_the_docs_page_opens(server: httpx.Client) -> None:
    api = server.get("/openapi.json").json()
    fetch = api["paths"]["/v1/label-sets/{name}/fetch"]["post"]
    both = {"application/json", wire.MEDIA_TYPE}
    assert set(fetch["requestBody"]["content"]) == both == set(fetch["responses"]["200"]["content"])
    assert "identity" in api["components"]["schemas"]["Description"]["properties"]
    for path, operations in api["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
    assert "openapi.json" in server.get("/docs").text
