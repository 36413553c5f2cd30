"""Hostile safetensors bodies: whoever reads one refuses it by a typed error, at once, and in bounded memory.

The table is `tests.attacks.bodies`. Beyond it, sound bodies are changed at random from a seed written down here, and
headers are grown by hypothesis; what is taken after all must be what the safetensors library reads in the same bytes.
"""

import copy
import itertools
import json
import random
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attacks import bodies
from tests.attacks.bounded import Bounded, Reader, said_apart
from tests.client.rows import dense_logits, description, truncated

from logitcache.client import HttpLabelSet
from logitcache.client.httpx_transport import HttpxTransport
from logitcache.labels import wire
from logitcache.labels.errors import InvalidIds, InvalidRequest, LogitcacheError, MalformedMessage, WrongLabels
from logitcache.labels.recorded import RecordedRows
from logitcache.server.http.messages import SAFETENSORS, parse_fetch, parse_missing

SEED, CHANGED = 20261121, 3_000
"""Of the changes at random in the default suite. The proof makes 200,000 from the next seed."""

READERS: dict[str, tuple[Reader, tuple[type[LogitcacheError], ...]]] = {
    "any body": (wire.parse, (MalformedMessage,)),
    "rows": (wire.decode_rows, (MalformedMessage,)),
    "recorded rows": (RecordedRows.decode, (MalformedMessage, InvalidIds)),
    "a fetch request": (lambda body: parse_fetch(body, SAFETENSORS), (MalformedMessage, InvalidRequest)),
    "a missing request": (
        lambda body: parse_missing(body, SAFETENSORS),
        (MalformedMessage, InvalidRequest),
    ),
}
"""Who reads a body, and the errors that are documented for it."""


@pytest.mark.usefixtures("unchecked_annotations")
def test_every_body_of_the_table_is_refused_in_bounded_memory_and_time() -> None:
    tables = {"rows": bodies.ROWS, "recorded rows": bodies.RECORDED}
    with Bounded() as bounded:
        for name, (reader, errors) in READERS.items():
            for what, body in (bodies.BODIES | tables.get(name, {})).items():
                found = bounded.read(body, reader, errors)
                assert isinstance(found, LogitcacheError), f"{name} took {what}"
                assert len(found.message) < 3000, f"{name} told of {what} at length"
    count = len(bodies.BODIES) + len(bodies.ROWS) + len(bodies.RECORDED)
    print(f"\nhostile bodies: {count} of the table, read {bounded.found.total():,} times: {bounded}")


def test_the_bodies_that_the_table_was_made_from_are_taken() -> None:
    for name, sound in bodies.SOUND.items():
        for body in sound:
            READERS[name][0](body)


def test_a_reader_over_http_uses_nothing_of_a_hostile_answer() -> None:
    described = description(truncated(dense_logits(bodies.EXAMPLES, 10), bodies.K, temperatures=bodies.TEMPERATURES))
    answer = b""

    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=described.to_json())
        return httpx.Response(200, content=answer, headers={"Content-Type": wire.MEDIA_TYPE})

    label_set = HttpLabelSet("http://x", "digits", transport=HttpxTransport("http://x", httpx.MockTransport(respond)))
    with Bounded() as bounded:
        for what, answer in (bodies.BODIES | bodies.ROWS).items():
            found = bounded.read(answer, lambda _: label_set.fetch(range(bodies.EXAMPLES)), (LogitcacheError,))
            assert isinstance(found, MalformedMessage | WrongLabels), what
    print(f"\nhostile answers to a fetch: {bounded.found.total()}: {bounded}")


def assert_read_alike(body: bytes, arrays: dict[str, np.ndarray]) -> None:
    """What we took is what the safetensors library reads, and lies in the body."""
    theirs = dict(safetensors.deserialize(body))  # type: ignore[no-untyped-call]
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (list(array.shape), array.tobytes()) == (theirs[name]["shape"], bytes(theirs[name]["data"])), name
    assert sum(array.nbytes for array in arrays.values()) + 8 + int.from_bytes(body[:8], "little") == len(body)


NASTY: list[Any] = [
    *(-1, 0, 1, 2, 7, 8, 2**31, 2**32, 2**47, 2**48, 2**63, 2**64, 10**30, 1.0, 0.5, True, None, "", "x", "U8", "I64"),
    *("BOOL", "F16", "[1,2]", "\ud800", [], {}, [0], [1], [0, 8], [8, 0], [2**47, 2**47], [1] * 9, {"dtype": "U8"}),
]


def _nasty(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(NASTY))  # what is put in may be changed in its turn


def changed(draw: random.Random, body: bytes) -> bytes:
    """A body with some bytes, its length, or a part of its header changed."""
    how = draw.randrange(8)
    if how == 0:
        noisy = bytearray(body)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(draw.choice((8, 200, len(noisy)))) % len(noisy)
            noisy[at] = draw.choice((draw.randrange(256), noisy[at] ^ 1 << draw.randrange(8), 0x20))
        return bytes(noisy)
    if how == 1:
        return body[: draw.randrange(len(body))] + draw.randbytes(draw.choice((0, 0, 1, 8)))
    if how == 2:
        begin, end = sorted(draw.randrange(len(body)) for _ in range(2))
        return body[:begin] + draw.choice((b"", body[begin:end] * 2, draw.randbytes(9))) + body[end:]
    length = int.from_bytes(body[:8], "little")
    if how == 3:
        told = draw.choice((0, 1, length - 1, length + 1, length + 8, len(body), 2**16, 2**32, 2**63, 2**64 - 1))
        return told.to_bytes(8, "little") + body[8:]
    entries = json.loads(body[8 : 8 + length])
    for _ in range(draw.choice((1, 1, 1, 3))):
        entry = draw.choice([*entries.values()]) if entries else entries
        if draw.random() < 0.2 or not isinstance(entry, dict) or not entry:
            entries[draw.choice([*entries, "x", "__metadata__"])] = _nasty(draw)
            continue
        name = draw.choice([*entry])
        value = entry[name]
        if isinstance(value, list) and value and draw.random() < 0.8:
            at = draw.randrange(len(value))
            value[at] = _nasty(draw) if draw.random() < 0.5 else draw.randint(-1, 40)
        elif draw.random() < 0.2:
            del entry[name]
        else:
            entry[name] = _nasty(draw)
    text = json.dumps(entries).encode()
    if how > 5:  # a header of the old length: its arrays lie where they lay
        text = text.ljust(length)
    return len(text).to_bytes(8, "little") + text + body[8 + length :]


def fuzz(seed: int, count: int) -> Bounded:
    """Change sound bodies at random so often, and give each to every reader."""
    draw, sound = random.Random(seed), list(itertools.chain(*bodies.SOUND.values()))
    with Bounded() as bounded:
        for _ in range(count):
            body = changed(draw, draw.choice(sound))
            for name, (reader, errors) in READERS.items():
                found = bounded.read(body, reader, errors)
                if name == "any body" and not isinstance(found, LogitcacheError):
                    assert_read_alike(body, found[0])
    return bounded


@pytest.mark.usefixtures("unchecked_annotations")
def test_sound_bodies_changed_at_random_are_refused_or_read_as_the_library_reads_them() -> None:
    bounded = fuzz(SEED, CHANGED)
    assert bounded.found["taken"] > CHANGED / 100, "the changes are too coarse to find anything"
    print(f"\nbodies changed at random (seed {SEED}): {CHANGED:,}, by {len(READERS)} readers: {bounded}")


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_many_more_bodies_changed_at_random() -> None:
    told = said_apart("from tests.attacks.test_bodies import SEED, fuzz; print(fuzz(SEED + 1, 200_000))")
    print(f"\nbodies changed at random (seed {SEED + 1}): 200,000, by {len(READERS)} readers: {told}")


sides = st.integers(-1, 3) | st.sampled_from([2**16, 2**47, 2**48, 2**63, 2**64, 10**40]) | st.floats() | st.none()
offsets = st.integers(-1, 40) | sides
dtypes = st.sampled_from(["U8", "BOOL", "U16", "F16", "I32", "F32", "I64", "U64", "F64", "O", ""]) | st.text(max_size=3)
entries_of = st.fixed_dictionaries(
    {"dtype": dtypes, "shape": st.lists(sides, max_size=4), "data_offsets": st.lists(offsets, min_size=1, max_size=3)}
)
anything = st.recursive(
    st.none() | st.booleans() | sides | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3)
)
headers = st.dictionaries(
    st.sampled_from(["ids", "rows", "view", "indices", "logits", "__metadata__"]) | st.text(max_size=3),
    entries_of | anything | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    max_size=4,
)


@settings(max_examples=400)
@given(headers, st.binary(max_size=64))
def test_grown_headers_are_refused_or_read_as_the_library_reads_them(entries: dict[str, Any], payload: bytes) -> None:
    body = bodies.header(entries, payload)
    with Bounded() as bounded:
        for name, (reader, errors) in READERS.items():
            found = bounded.read(body, reader, errors)
            if name == "any body" and not isinstance(found, LogitcacheError):
                assert_read_alike(body, found[0])
