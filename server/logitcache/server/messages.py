"""What a fetch request may look like on the wire, and in which form its answer goes.

Two media types each way: safetensors for programs, JSON for people. Parsing is pure; reading a body is bounded before
anything is allocated. Knows nothing of label sets.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from starlette.requests import Request

from logitcache.labels import wire
from logitcache.labels.errors import InvalidIds, InvalidRequest, RequestRefused, TooManyRows, shown
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import OnMissing
from logitcache.server.problems import invalid_request
from logitcache.server.record import Record

JSON = "application/json"
SAFETENSORS = wire.MEDIA_TYPE
OFFERED = (SAFETENSORS, JSON)

MAX_REQUEST_BYTES = {SAFETENSORS: 16 << 20, JSON: 2 << 20}
"""A longer request body is not read: as many ids as a label set's default limits allow take half a MiB, and JSON is
parsed at some 4 MB/s in the worst case, during which nothing else runs."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

_ON_MISSING: dict[str, OnMissing] = {"error": "error", "mask": "mask"}


class FetchBody(BaseModel):
    """A fetch request in JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")

    # One wrong id is enough to refuse: a million complaints would cost more than the labels.
    ids: Annotated[list[int], FailFast()] = Field(
        description="Ids of the examples; order and duplicates are kept.", examples=[[3, 1, 4]]
    )
    view: int = Field(0, description="Which augmentation; label sets of this version have one, 0.")
    digest: str | None = Field(None, description="The content expected; another is answered with 409 digest-changed.")
    on_missing: OnMissing = Field("error", description="What to do about ids without labels.")


@dataclass(frozen=True)
class FetchRequest:
    """A fetch request as `LocalLabelSet.fetch` takes it."""

    ids: np.ndarray
    view: int = 0
    digest: str | None = None
    on_missing: OnMissing = "error"

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `fetch` and `fetch_body`."""
        return {"view": self.view, "digest": self.digest, "on_missing": self.on_missing}


def media_type(content_type: str | None) -> str:
    """The media type of a request's body, without its parameters.

    Raises:
        RequestRefused: with status 415, when it is none of those offered.
    """
    given = (content_type or "").partition(";")[0].strip().lower()
    if given not in OFFERED:
        raise RequestRefused(
            f"a body of type {given!r} is not understood; send {JSON} or {SAFETENSORS} and say so in Content-Type",
            status=415,
            offered=list(OFFERED),
        )
    return given


def answer_type(accept: str | None, default: str) -> str:
    """The media type of the answer: the best of those that ``Accept`` allows, ``default`` among equals.

    Raises:
        RequestRefused: with status 406, when it allows none of those offered.
    """
    ranges = dict(_media_range(part) for part in (accept or "*/*").split(","))

    def quality(offer: str) -> float:
        kind = offer.partition("/")[0]
        return next((ranges[name] for name in (offer, f"{kind}/*", "*/*") if name in ranges), 0.0)

    best = max((default, *OFFERED), key=quality)
    if quality(best) <= 0:
        raise RequestRefused(
            f"Accept: {accept} allows none of what is offered here: {JSON} and {SAFETENSORS}",
            status=406,
            offered=list(OFFERED),
        )
    return best


def _media_range(text: str) -> tuple[str, float]:
    name, *parameters = (part.strip().lower() for part in text.split(";"))
    try:
        return name, next((float(value[2:]) for value in parameters if value.startswith("q=")), 1.0)
    except ValueError:
        return name, 0.0


async def read_body(request: Request, kind: str) -> bytes:
    """The whole body of a request, refused as soon as it is known to be longer than its media type may be.

    Raises:
        TooManyRows: it is longer; the rest is not read, and the connection closes after the answer.
    """
    most = MAX_REQUEST_BYTES[kind]
    declared = request.headers.get("content-length", "0")
    size = int(declared) if declared.isdecimal() else 0
    parts: list[bytes] = []
    if size <= most:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                break
            parts.append(part)
    if size > most:
        Record.of(request.scope).body_refused = True
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
    return _parse_json(body) if kind == JSON else _parse_safetensors(body)


def _parse_json(body: bytes) -> FetchRequest:
    try:
        parsed = FetchBody.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        if found[0]["type"] == "json_invalid":
            raise RequestRefused(f"the body is not JSON: {found[0]['msg'].partition(': ')[2]}") from None
        raise invalid_request(found) from None
    return FetchRequest(as_ids(parsed.ids), parsed.view, _digest(parsed.digest), parsed.on_missing)


def _parse_safetensors(body: bytes) -> FetchRequest:
    arrays, options = wire.parse(body)
    if set(arrays) != {"ids"} or arrays["ids"].dtype != np.int64:
        found = shown(f"{name[:40]} ({array.dtype})" for name, array in arrays.items()) or "nothing"
        raise InvalidIds(f"a fetch request holds one array, ids (int64); this one holds {found}")
    if unknown := sorted(set(options) - {"view", "digest", "on_missing"}):
        raise InvalidRequest(f"a fetch request has no option {unknown[0][:40]!r}; it has view, digest and on_missing")
    view = options.get("view", "0")
    if not (view.removeprefix("-").isascii() and view.removeprefix("-").isdecimal() and len(view) < 20):
        raise InvalidRequest(f"view: {view[:40]!r} is not a whole number")
    if (on_missing := _ON_MISSING.get(options.get("on_missing", "error"))) is None:
        raise InvalidRequest(f"on_missing: {options['on_missing'][:40]!r} is neither 'error' nor 'mask'")
    return FetchRequest(as_ids(arrays["ids"]), int(view), _digest(options.get("digest")), on_missing)


def _digest(text: str | None) -> str | None:
    if text and not _DIGEST.fullmatch(text):
        raise InvalidRequest(f"digest: {text[:80]!r} is not sha256: and 64 hexadecimal digits")
    return text or None
