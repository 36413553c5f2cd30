"""The routes by which a run records: it begins, sends rows, and finishes. Each a few lines over `recordings`."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from logitcache.labels.errors import InvalidRequest, RequestRefused
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.recorded import RecordedRows, RecordingTerms, Stand, Who
from logitcache.server.complaints import parse_json
from logitcache.server.http import openapi
from logitcache.server.http.id_lists import without_ids
from logitcache.server.http.messages import JSON, SAFETENSORS, IdList, media_type, read_body
from logitcache.server.http.record import Record
from logitcache.server.http.recordings import Recordings

recording = APIRouter(prefix="/v1/label-sets", tags=["recording"], responses=openapi.OF_WRITING)

Done = TypeVar("Done")

MOST_BYTES = 64 << 20
"""A longer body is not read: rows of a sequence of 100,000 tokens are less, and so are a million ids of 64 bytes."""


class WhoBody(BaseModel):
    """One of the recorders of a recording."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rank: int = Field(0, ge=0, description="Its number among them.")
    sitting: int = Field(ge=1, lt=2**63, description="Larger each time that it begins; nanoseconds of a clock, say.")

    def who(self) -> Who:
        """The recorder."""
        return Who(self.rank, self.sitting)


class BeginBody(WhoBody):
    """A recorder that begins. Where ids are not the examples' ordinals, they are told, or another label set's."""

    terms: dict[str, Any] = Field(
        description="identity (as in the description of a label set; its teacher is the recorder), steps ([first, the "
        "one after the last]), examples and recorders (how many record together).",
    )
    ids: IdList | None = Field(None, description="Ids of the examples in their order.")
    like: str | None = Field(None, description="A label set of this server with the same examples.")


class FinishBody(WhoBody):
    """A recorder that has recorded all that it has."""

    part: bool = Field(False, description="Seal what was recorded, though examples are missing.")


async def _recordings(request: Request) -> Recordings:
    recordings: Recordings = request.app.state.recordings
    return recordings


InRecordings = Annotated[Recordings, Depends(_recordings)]


@recording.put("/{name}/recording", openapi_extra=openapi.json_body(BeginBody), responses=openapi.STAND_ANSWER)
async def begin_recording(name: openapi.Name, recordings: InRecordings, request: Request) -> JSONResponse:
    """Begin to record a label set, or go on. Begun with something else before, it is refused."""
    body = await _body(request, name, JSON, MOST_BYTES)

    def begin() -> Stand:
        asked, terms, ids = parse_begin(body)
        return recordings.begin(name, terms, asked.who(), ids, asked.like)

    return _told(await _written(request, name, begin))


def parse_begin(body: bytes) -> tuple[BeginBody, RecordingTerms, Ids | None]:
    """What is to be recorded, out of a JSON body, with the ids of its examples where they are told.

    Raises:
        RequestRefused, InvalidIds, InvalidRequest, TooManyRows: as of `without_ids` and `parse_json`.
    """
    rest, ids = without_ids(body)
    asked = parse_json(BeginBody, rest)
    if ids is None and asked.ids is not None:
        ids = as_ids(asked.ids)
    try:
        return asked, RecordingTerms.from_json(asked.terms), ids
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(f"terms: {error}") from None


@recording.post("/{name}/record", openapi_extra=openapi.RECORD_BODY, responses=openapi.RECORD_ANSWER)
async def record_rows(name: openapi.Name, recordings: InRecordings, request: Request) -> JSONResponse:
    """Rows that a run recorded: durable when this is answered, and served from then on."""
    body = await _body(request, name, SAFETENSORS, MOST_BYTES)

    def append() -> int:
        rows, who = RecordedRows.decode(body)
        recordings.append(name, rows, who)
        return len(rows.soft)

    return JSONResponse({"rows": await _written(request, name, append)})


@recording.post("/{name}/recording/finish", openapi_extra=openapi.json_body(FinishBody), responses=openapi.STAND_ANSWER)
async def finish_recording(name: openapi.Name, recordings: InRecordings, request: Request) -> JSONResponse:
    """A recorder has finished. When all have and no example lacks rows, the label set is sealed behind this: ask again
    until `digest` is there."""
    body = await _body(request, name, JSON)

    def finish() -> Stand:
        asked = parse_json(FinishBody, body)
        return recordings.finish(name, asked.who(), part=asked.part)

    return _told(await _written(request, name, finish))


async def _body(request: Request, name: str, kind: str, most: int | None = None) -> bytes:
    """The body of a request that may be answered at all."""
    sent = media_type(dict(request.scope["headers"]).get(b"content-type"))
    if sent != kind:
        raise RequestRefused(f"a body of type {sent} is not understood here: send {kind}", status=415, offered=[kind])
    recordings: Recordings = request.app.state.recordings
    recordings.check(name)
    return await read_body(request, kind, most)


async def _written(request: Request, name: str, work: Callable[[], Done]) -> Done:
    state = request.app.state
    state.load.check_queue(state.writers)
    done = await to_thread.run_sync(work, limiter=state.writers)
    Record.of(request.scope).label_set = name  # not before it is known to be one
    return done


def _told(stand: Stand) -> JSONResponse:
    return JSONResponse(asdict(stand))
