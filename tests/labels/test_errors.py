"""One tree, stable codes, the same error on both sides of the wire."""

import pickle
import re

import pytest

from logitcache.labels import errors
from logitcache.labels.problem import from_problem, to_problem

KINDS = sorted(errors.BY_CODE.values(), key=lambda kind: kind.__name__)


def test_the_tree_drawn_at_the_top_is_the_tree_of_the_classes() -> None:
    drawn = re.findall(r"^[ │├└─]*([A-Z]\w+)\b", errors.__doc__ or "", re.MULTILINE)[1:]
    assert sorted({"LogitcacheError", *drawn}) == sorted({kind.__name__ for kind in KINDS} | {"LogitcacheError"})
    assert len(drawn) == len(set(drawn))


def test_codes_are_distinct() -> None:
    every: list[type[errors.LogitcacheError]] = [errors.LogitcacheError, *errors._subclasses(errors.LogitcacheError)]
    assert len({kind.code for kind in every}) == len(every) == len(errors.BY_CODE)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_the_same_after_the_wire(kind: type[errors.LogitcacheError]) -> None:
    error = kind("what and what to do", unknown=[3], unlabelled=[4])
    error.retry_after_s = 1.5
    problem = to_problem(error, request_id="abc")
    back = from_problem(problem, problem["status"])
    assert type(back) is kind
    assert (back.message, back.details) == (error.message, error.details)
    assert (back.request_id, back.retry_after_s, back.retry) == ("abc", 1.5, kind.retry)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_a_worker_process(kind: type[errors.LogitcacheError]) -> None:
    back = pickle.loads(pickle.dumps(kind("message", ids=[1, 2])))
    assert type(back) is kind
    assert (str(back), back.details) == ("message", {"ids": [1, 2]})


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        ("<html>", 502, errors.ServerBusy),
        ({}, 429, errors.ServerBusy),
        (None, 503, errors.ServerBusy),
        ([], 404, errors.RequestRefused),
        ({"code": "from-the-future", "detail": "x"}, 418, errors.RequestRefused),
        ({"code": 7}, 500, errors.ServerFault),
    ],
)
def test_what_is_no_problem_of_ours_is_grouped_by_its_status(
    body: object, status: int, kind: type[errors.LogitcacheError]
) -> None:
    assert type(from_problem(body, status)) is kind


def test_missing_rows_list_unknown_ids_before_unlabelled_ones() -> None:
    error = errors.RowsMissing("x", unknown=[9, 8], unlabelled=[1])
    assert error.ids == [9, 8, 1]


def test_a_message_shows_a_few_values_and_counts_the_rest() -> None:
    assert errors.shown(range(8)) == "0, 1, 2 and 5 more"
    assert errors.shown(["a"]) == "'a'"
