"""What a request about examples may look like on the wire, and in which form its answer goes.

Two media types each way: safetensors for programs, JSON for people. A text id travels as its text in JSON and as its
key in safetensors. Parsing is pure; reading a body is bounded before anything is allocated. Knows nothing of label
sets.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Discriminator, FailFast, Field, Tag, WithJsonSchema
from starlette.requests import ClientDisconnect, Request

from logitcache.labels import wire
from logitcache.labels.errors import InvalidIds, InvalidRequest, RequestRefused, TooManyRows, shown
from logitcache.labels.ids import MAX_TEXT_BYTES, Ids, as_ids
from logitcache.labels.label_set import OnMissing
from logitcache.server.complaints import parse_json
from logitcache.server.http.load import Load
from logitcache.server.http.record import Record

JSON = "application/json"
SAFETENSORS = wire.MEDIA_TYPE
OFFERED = (SAFETENSORS, JSON)

MAX_REQUEST_BYTES = {SAFETENSORS: 16 << 20, JSON: 2 << 20}
"""A longer request body is not read: as many ids as a label set's default limits allow take half a MiB, keys of texts
with a range each 2 MiB, and JSON is parsed at some 4 MB/s in the worst case, during which nothing else runs."""

_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")
"""RFC 9110, 12.4.2."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_ON_MISSING: dict[str, OnMissing] = {"error": "error", "mask": "mask"}


def _kind_of_ids(ids: Any) -> str:
    return "<texts>" if isinstance(ids, list) and ids and isinstance(ids[0], str) else "<numbers>"


def _kind_of_rows(rows: Any) -> str:
    return "<ranges>" if isinstance(rows, list) and rows and isinstance(rows[0], list) else "<range>"


def _kind_of_view(view: Any) -> str:
    return "<views>" if isinstance(view, list) else "<view>"


class _FirstOnly(FailFast):
    """One wrong id is enough to refuse: a million complaints would cost more than the labels."""

    # A union of annotated types wants hashes, and pydantic's own mark has none.
    __hash__ = object.__hash__


# What `as_ids` refuses, for whoever reads the documentation: told here, it would be checked twice.
_NUMBER = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_TEXT_BYTES}
_NUMBERS = WithJsonSchema({"type": "array", "minItems": 1, "items": _NUMBER})
_TEXTS = WithJsonSchema({"type": "array", "minItems": 1, "items": _TEXT})

IdList = Annotated[
    Annotated[list[int], _FirstOnly(), Tag("<numbers>"), _NUMBERS]
    | Annotated[list[str], _FirstOnly(), Tag("<texts>"), _TEXTS],
    Discriminator(_kind_of_ids),
]
_Rows = Annotated[
    Annotated[tuple[int, int], Tag("<range>")] | Annotated[list[tuple[int, int]], _FirstOnly(), Tag("<ranges>")],
    Discriminator(_kind_of_rows),
]

_View = Annotated[
    Annotated[int, Tag("<view>")] | Annotated[list[int], _FirstOnly(), Tag("<views>")],
    Discriminator(_kind_of_view),
]


class MissingBody(BaseModel):
    """A question which of these examples have no labels, in JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")

    ids: IdList = Field(
        description="Ids of the examples, all whole numbers or all texts; order and duplicates are kept.",
        examples=[[3, 1, 4], ["n0144_17", "train/7"]],
    )
    digest: str | None = Field(
        None,
        description="The generation meant; another label set answers 409 digest-changed.",
        json_schema_extra={"pattern": f"^({_DIGEST.pattern})?$"},
    )


class FetchBody(MissingBody):
    """A fetch request in JSON."""

    rows: _Rows | None = Field(
        None,
        description="First row and the row after the last, for all examples or one pair an example; causal label sets "
        "alone. All rows unless given.",
        examples=[[0, 512], [[0, 512], [512, 1024], [0, 7]]],
    )
    view: _View = Field(0, description="Which augmentation: one for all examples, or one for each.")
    on_missing: OnMissing = Field("error", description="What to do about ids without labels.")


@dataclass(frozen=True)
class MissingRequest:
    """A question about ids as `LocalLabelSet.states` takes it."""

    ids: Ids
    digest: str | None = None


@dataclass(frozen=True)
class FetchRequest:
    """A fetch request as `LocalLabelSet.fetch` takes it."""

    ids: Ids
    rows: Any = None
    view: Any = 0
    digest: str | None = None
    on_missing: OnMissing = "error"

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `fetch` and `fetch_body`."""
        return {"rows": self.rows, "view": self.view, "digest": self.digest, "on_missing": self.on_missing}


@lru_cache(maxsize=64)
def media_type(content_type: bytes | None) -> str:
    """The media type of a request's body, without its parameters, by its ``Content-Type`` as it arrived.

    Raises:
        RequestRefused: with status 415, when it is none of those offered.
    """
    given = (content_type or b"").decode("latin-1").partition(";")[0].strip().lower()
    if given not in OFFERED:
        raise RequestRefused(
            f"a body of type {given[:80]!r} is not understood; send {JSON} or {SAFETENSORS} and say so in Content-Type",
            status=415,
            offered=list(OFFERED),
        )
    return given


@lru_cache(maxsize=64)
def answer_type(accept: bytes | None, default: str) -> str:
    """The media type of the answer: the best of those that ``Accept`` allows, ``default`` among equals.

    Raises:
        RequestRefused: with status 406, when it allows none of those offered.
    """
    allowed = (accept or b"*/*").decode("latin-1")
    ranges = dict(_media_range(part) for part in allowed.split(","))

    def quality(offer: str) -> float:
        kind = offer.partition("/")[0]
        return next((ranges[name] for name in (offer, f"{kind}/*", "*/*") if name in ranges), 0.0)

    best = max((default, *OFFERED), key=quality)
    if quality(best) <= 0:
        raise RequestRefused(
            f"Accept: {allowed[:200]} allows none of what is offered here: {JSON} and {SAFETENSORS}",
            status=406,
            offered=list(OFFERED),
        )
    return best


def _media_range(text: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    told = next((value[2:] for value in parameters if value.startswith("q=")), "1")
    return name, float(told) if _QUALITY.fullmatch(told) else 0.0


async def read_body(request: Request, kind: str, most: int | None = None) -> bytes:
    """The whole body of a request, refused as soon as it is known to be longer than its media type may be, or ``most``.

    Raises:
        RequestRefused: with status 415, when it is compressed.
        TooManyRows: it is longer; the rest is not read, and the connection closes after the answer.
    """
    most = most or MAX_REQUEST_BYTES[kind]
    load: Load = request.app.state.load
    record = Record.of(request.scope)
    headers = dict(request.scope["headers"])
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise RequestRefused("a compressed body is not unpacked here: send it as it is", status=415)
    declared = headers.get(b"content-length", b"0")
    size = int(declared) if declared.isdigit() else 0
    parts: list[bytes] = []
    more = size <= most
    if more:
        size = 0  # what came counts, and not what was promised
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        load.hold(record, len(parts[-1]))
        more = message.get("more_body", False) and size <= most
    if size > most:
        raise TooManyRows(
            f"the request's body is longer than the {most >> 20} MiB that are read as {kind}: split the ids over "
            "several requests",
            limit_bytes=most,
        )
    return b"".join(parts)


def parse_fetch(body: bytes, kind: str) -> FetchRequest:
    """A fetch request out of a body of one of the media types offered.

    Raises:
        RequestRefused, MalformedMessage: the body does not parse at all.
        InvalidIds, InvalidRequest: it parses and says something that cannot be.
    """
    if kind == JSON:
        asked = parse_json(FetchBody, body)
        return FetchRequest(as_ids(asked.ids), asked.rows, asked.view, _digest(asked.digest), asked.on_missing)
    arrays, options = _parse_safetensors("fetch", body, {"rows", "view"}, {"view", "digest", "on_missing"})
    view = options.get("view", "0")
    if not (view.removeprefix("-").isascii() and view.removeprefix("-").isdecimal() and len(view) < 20):
        raise InvalidRequest(f"view: {view[:40]!r} is not a whole number")
    if (on_missing := _ON_MISSING.get(options.get("on_missing", "error"))) is None:
        raise InvalidRequest(f"on_missing: {options['on_missing'][:40]!r} is neither 'error' nor 'mask'")
    if "view" in arrays and "view" in options:
        raise InvalidRequest("view: give one for all or one for each id, not both")
    chosen = arrays.get("view", int(view))
    return FetchRequest(_ids(arrays), arrays.get("rows"), chosen, _digest(options.get("digest")), on_missing)


def parse_missing(body: bytes, kind: str) -> MissingRequest:
    """A question about ids out of a body; errors as in `parse_fetch`."""
    if kind == JSON:
        asked = parse_json(MissingBody, body)
        return MissingRequest(as_ids(asked.ids), _digest(asked.digest))
    arrays, options = _parse_safetensors("missing", body, {"rows"}, {"digest"})
    if "rows" in arrays:
        raise InvalidRequest("rows: whether an example has labels is not asked by the row")
    return MissingRequest(_ids(arrays), _digest(options.get("digest")))


def _parse_safetensors(
    what: str, body: bytes, others: set[str], known: set[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Its arrays, ids among them, and its options."""
    arrays, options = wire.parse(body)
    ids = arrays.get("ids")
    if ids is None or set(arrays) - others - {"ids"} or ids.dtype not in (np.int64, np.uint64):
        found = shown(f"{name[:40]} ({array.dtype})" for name, array in arrays.items()) or "nothing"
        raise InvalidIds(
            f"a {what} request holds an array ids (int64 (ids,), or uint64 (ids, 2) for the keys of texts) "
            f"and may hold {' and '.join(sorted(others))} (int64); this one holds {found}"
        )
    for name in others & set(arrays):
        if arrays[name].dtype != np.int64:
            raise InvalidRequest(f"{name}: {arrays[name].dtype} is not int64")
    if unknown := sorted(set(options) - known):
        raise InvalidRequest(f"a {what} request has no option {unknown[0][:40]!r}; it has {', '.join(sorted(known))}")
    return arrays, options


def _ids(arrays: Mapping[str, np.ndarray]) -> Ids:
    ids = arrays["ids"]
    return as_ids(ids) if ids.dtype == np.int64 else _keys(ids)


def _keys(keys: np.ndarray) -> Ids:
    """Ids by the keys of their texts; see `logitcache.labels.ids.text_keys`."""
    if keys.ndim != 2 or keys.shape[1] != 2 or not len(keys):
        raise InvalidIds(f"ids: keys of texts are uint64 (ids, 2) with at least one id, not of shape {keys.shape}")
    return Ids(keys)


def _digest(text: str | None) -> str | None:
    if text and not _DIGEST.fullmatch(text):
        raise InvalidRequest(f"digest: {text[:80]!r} is not sha256: and 64 hexadecimal digits")
    return text or None
