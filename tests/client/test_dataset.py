"""`with_ids`."""

import pickle
from collections import UserDict
from typing import Any

import pytest

from logitcache.client import with_ids
from logitcache.labels.errors import InvalidRequest


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"x": 5}, {"x": 5, "id": 1}),
        (UserDict({"x": 5}), {"x": 5, "id": 1}),
        ((5, 6), (5, 6, 1)),
        ([5, 6], [5, 6, 1]),
        (5, (5, 1)),
        ("text", ("text", 1)),
    ],
)
def test_an_item_gets_its_ordinal_in_its_own_form(item: Any, expected: Any) -> None:
    dataset = with_ids([None, item])
    assert len(dataset) == 2
    assert dataset[1] == expected == dataset[-1]
    assert pickle.loads(pickle.dumps(dataset))[1] == expected


def test_the_items_themselves_are_not_changed() -> None:
    items = [{"x": 5}]
    with_ids(items)[0]
    assert items == [{"x": 5}]


def test_an_item_that_has_an_id_is_refused() -> None:
    with pytest.raises(InvalidRequest, match='item 0 has an "id" already'):
        with_ids([{"id": 9}])[0]
