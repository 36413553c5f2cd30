"""Hostile JSON in requests: refused by a typed error, at once, in bounded memory, or read as the json module reads it.

Sound bodies of every route are changed at random from a seed written down here: their bytes, and what they say.
"""

import copy
import json
import random
from typing import Any

import numpy as np
import pytest
from tests.attacks.bounded import Bounded, Reader, said_apart
from tests.server.conftest import IDENTITY

from logitcache.labels.errors import InvalidIds, InvalidRequest, LogitcacheError, RequestRefused, TooManyRows
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.recorded import RecordingTerms
from logitcache.server.complaints import parse_json
from logitcache.server.http.messages import JSON, parse_fetch, parse_missing
from logitcache.server.http.recording_routes import FinishBody, parse_begin
from logitcache.server.jobs.job import Asked

SEED, CHANGED = 20261123, 2_000
"""Of the changes in the default suite. The proof makes 200,000 from the next seed."""

DIGEST = "sha256:" + "0123456789abcdef" * 4

TERMS = RecordingTerms(IDENTITY, range(50), 300, recorders=2).to_json()

READERS: dict[str, Reader] = {
    "fetch": lambda body: parse_fetch(body, JSON),
    "missing": lambda body: parse_missing(body, JSON),
    "begin": parse_begin,
    "finish": lambda body: parse_json(FinishBody, body),
    "job": lambda body: parse_json(Asked, body).request(),
}
"""Who reads a body of JSON, by what it asks."""

ERRORS = (RequestRefused, InvalidIds, InvalidRequest, TooManyRows)

SOUND: dict[str, list[Any]] = {
    "fetch": [
        {"ids": [3, 1, 4]},
        {"ids": list(range(-150, 150)), "digest": DIGEST, "view": [1] * 300},
        {"ids": ["n0144_17", "train/7", "é😀\n"], "rows": [0, 512], "on_missing": "mask"},
        {"ids": [1, 2], "rows": [[0, 5], [5, 9]], "view": 3},
    ],
    "missing": [{"ids": [3, 1, 4]}, {"ids": ["a", "b"], "digest": DIGEST}],
    "begin": [
        {"rank": 0, "sitting": 5, "terms": TERMS},
        {"rank": 0, "sitting": 5, "terms": TERMS, "ids": list(range(300))},
        {"ids": [f"photo-{number}" for number in range(300)], "rank": 1, "sitting": 5, "terms": TERMS},
        {"rank": 0, "sitting": 5, "terms": TERMS, "like": "digits"},
    ],
    "finish": [{"rank": 0, "sitting": 5}, {"rank": 1, "sitting": 2**40, "part": True}],
    "job": [
        {"label_set": "digits", "teacher": "resnet", "dataset": "train", "top_k": 10},
        {
            "label_set": "a.b-c_d",
            "teacher": ["x", "y"],
            "dataset": "d",
            "top_k": 2,
            "temperatures": [2.5],
            "views": 4,
        },
    ],
}

NASTY: list[Any] = [
    *(-1, 0, 1, 4096, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**400, 1.0, 0.5, 1e308, True, None),
    *("", "x", "0", "../up", "a\x00b", "\ud800", "\u2028", "ids", "__proto__", "x" * 5000, [], {}, [[]], {"": {}}),
    *([1, "a"], ["a", 1], [None], [True], [1.0], [2**63], [[1, 2]], [[2, 1]], {"ids": [1]}, ["x" * 5000], [0] * 9),
]

PIECES = [
    *(
        b'"',
        b"\\",
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b"\\u",
        b"\\ud83d",
        b"NaN",
        b"1e999",
        b"-",
        b"0",
        b"\x00",
        b"\xff",
    ),
    *(
        b'"ids":[1],',
        b'"ids": [',
        b"[" * 500,
        b'{"a":' * 500,
        b" " * 2000,
        b"9" * 5000,
        b"\xef\xbb\xbf",
        b"\r\n",
        b"/*",
    ),
]


def changed(draw: random.Random, value: Any) -> bytes:
    """A body that says this, with a value, or a few bytes, changed."""
    value = json.loads(json.dumps(value))
    if draw.random() < 0.6:
        for _ in range(draw.choice((1, 1, 2))):
            change_inside(draw, value)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, None, 1)))
    body = text.encode(errors="surrogatepass")
    for _ in range(draw.choice((0, 1, 1, 4)) if draw.random() < 0.6 else 0):
        at = draw.randrange(len(body) + 1)
        until = min(len(body), at + draw.choice((0, 0, 1, 8, 100)))
        put = draw.choice((draw.choice(PIECES), draw.randbytes(1), body[at:until] * 2))
        body = body[:at] + put + body[until:]
    return body


def change_inside(draw: random.Random, value: Any) -> None:
    """Change a value somewhere in it."""
    while True:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places or draw.random() < 0.1:
            if isinstance(value, dict):
                value[draw.choice(["ids", "rows", "x", "", "terms", "view"])] = copy.deepcopy(draw.choice(NASTY))
            else:
                value.append(copy.deepcopy(draw.choice(NASTY)))
            return
        place = draw.choice(places)
        if isinstance(value[place], dict | list) and draw.random() < 0.7:
            value = value[place]
            continue
        if draw.random() < 0.15:
            del value[place]
        else:
            value[place] = copy.deepcopy(draw.choice(NASTY))
        return


def assert_read_alike(body: bytes, ids: Ids | None) -> None:
    """The ids that we took are those that the json module reads."""
    if ids is not None:
        said = json.loads(body.decode())["ids"]
        theirs = as_ids(said)
        assert np.array_equal(ids.keys, theirs.keys)
        assert ids.texts is None or list(ids.texts) == said


def ids_of(name: str, found: Any) -> Ids | None:
    taken: Ids | None = {"fetch": lambda: found.ids, "missing": lambda: found.ids, "begin": lambda: found[2]}.get(
        name, lambda: None
    )()
    return taken


def fuzz(seed: int, count: int) -> Bounded:
    """Change sound bodies at random so often, and give each to its own reader and to another."""
    draw = random.Random(seed)
    with Bounded() as bounded:
        for _ in range(count):
            name = draw.choice(list(SOUND))
            body = changed(draw, draw.choice(SOUND[name]))
            for reader in {name, draw.choice(list(SOUND))}:
                found = bounded.read(body, READERS[reader], ERRORS)
                if not isinstance(found, LogitcacheError):
                    assert_read_alike(body, ids_of(reader, found))
    return bounded


def test_the_bodies_that_are_changed_are_sound() -> None:
    for name, values in SOUND.items():
        for value in values:
            READERS[name](json.dumps(value).encode())


@pytest.mark.usefixtures("unchecked_annotations")
def test_json_changed_at_random_is_refused_or_read_as_the_json_module_reads_it() -> None:
    bounded = fuzz(SEED, CHANGED)
    assert bounded.found["taken"] > CHANGED / 20, "the changes are too coarse to find anything"
    print(f"\nJSON changed at random (seed {SEED}): {CHANGED:,} bodies: {bounded}")


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_much_more_json_changed_at_random() -> None:
    told = said_apart("from tests.attacks.test_json_bodies import SEED, fuzz; print(fuzz(SEED + 1, 200_000))")
    print(f"\nJSON changed at random (seed {SEED + 1}): 200,000 bodies: {told}")
