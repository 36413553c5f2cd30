"""Ranges of rows: one for all examples or one each, and never beyond an example."""

from typing import Any

import numpy as np
import pytest

from logitcache.labels.errors import InvalidRequest, RangeOutside, ShapeMismatch
from logitcache.labels.ids import as_ids
from logitcache.labels.ranges import as_ranges, check_ranges


@pytest.mark.parametrize("rows", [(2, 5), [2, 5], np.array([2, 5], np.uint8), [[2, 5], [2, 5], [2, 5]]], ids=str)
def test_one_range_for_all_and_one_each_are_the_same_thing(rows: Any) -> None:
    assert as_ranges(rows, 3).tolist() == [[2, 5], [2, 5], [2, 5]]


@pytest.mark.parametrize(
    ("rows", "error", "told"),
    [
        ((0, 1, 2), ShapeMismatch, "shape"),
        ([[0, 1]], ShapeMismatch, r"\(1, 2\), not"),
        (5, ShapeMismatch, "shape"),
        ((0.0, 1.0), InvalidRequest, "float64"),
        ((-1, 3), InvalidRequest, "-1 to 3 are no range"),
        ((4, 3), InvalidRequest, "4 to 3 are no range"),
        ("ab", InvalidRequest, "whole numbers"),
        ((0, 2**62), InvalidRequest, "no example has row"),
        ([[0, 1], [2]], InvalidRequest, "pair"),
        ((True, False), InvalidRequest, "bool"),
    ],
    ids=str,
)
def test_what_is_no_range_is_refused(rows: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        as_ranges(rows, 3)


def test_a_range_beyond_its_example_names_it_and_how_many_rows_it_has() -> None:
    ids, positions = as_ids(["a", "b", "c"]), np.arange(3)
    ranges = as_ranges([[0, 3], [0, 4], [9, 9]], 3)
    check_ranges(ranges, np.array([3, 4, 9]), ids, "set", positions)
    with pytest.raises(
        RangeOutside, match=r"rows 0 to 4 of example 'b' .* it has 3: .*\(2 examples: 'b', 'c'\)"
    ) as caught:
        check_ranges(ranges, np.array([3, 3, 8]), ids, "set", positions)
    assert caught.value.ids == ["b", "c"]


def test_a_range_beyond_its_example_names_the_example_though_others_are_left_out() -> None:
    """Of four ids asked for, only the last two have labels."""
    ranges, counts = np.array([[0, 5], [0, 9]]), np.array([5, 8])
    with pytest.raises(RangeOutside, match=r"of example 13 were asked for, .* it has 8") as caught:
        check_ranges(ranges, counts, as_ids([10, 11, 12, 13]), "x", np.array([2, 3]))
    assert caught.value.ids == [13]
