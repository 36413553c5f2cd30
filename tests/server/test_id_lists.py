"""Ids are read out of a body in JSON a piece at a time, wherever and however they stand in it."""

import json
from typing import Any

import numpy as np
import pytest

from logitcache.labels.ids import as_ids
from logitcache.server.http.id_lists import without_ids

IDS_OF_ALL_FORMS: list[list[int] | list[str]] = [
    [3, -1, 2**63 - 1],
    list(range(20_000)),
    ["]", '"', "\\", '","', "\n\t", "ids", "é😀", "a" * 4096, "\x01" * 4096],
    [f"photo-{number}" for number in range(20_000)],
]


@pytest.mark.parametrize("ids", IDS_OF_ALL_FORMS)
@pytest.mark.parametrize("options", [{}, {"indent": 4}, {"separators": (",", ":")}, {"ensure_ascii": False}])
def test_ids_are_found_wherever_they_stand_and_however_they_are_written(ids: Any, options: dict[str, Any]) -> None:
    others = {"rank": 0, "terms": {"ids": ["no", {"ids": [1]}], "identity": '"ids": ['}}
    for asked in ({"ids": ids, **others}, {**others, "ids": ids}):
        rest, found = without_ids(json.dumps(asked, **options).encode())
        assert json.loads(rest) == others | {"ids": None}
        assert found is not None
        assert np.array_equal(found.keys, as_ids(ids).keys)
        assert found.texts == (ids if isinstance(ids[0], str) else None)
