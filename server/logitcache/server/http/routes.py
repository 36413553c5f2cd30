"""The routes: each some ten lines over a function that is tested on its own.

What touches a disk runs in a worker thread; ``/healthz`` does not, so it stays fast whatever the disks do.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar
from urllib.parse import unquote_to_bytes

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp, Receive, Scope, Send

from logitcache.labels import wire
from logitcache.labels.errors import InvalidIds, InvalidRequest, LogitcacheError, Unavailable
from logitcache.labels.label_set import UNKNOWN, UNLABELLED, Limits
from logitcache.labels.soft_labels import SoftLabels
from logitcache.server.http import openapi
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.load import Load, enough_threads
from logitcache.server.http.messages import (
    JSON,
    SAFETENSORS,
    FetchRequest,
    MissingRequest,
    answer_type,
    media_type,
    parse_fetch,
    parse_missing,
    read_body,
)
from logitcache.server.http.metrics import Metrics
from logitcache.server.http.problems import problem_response
from logitcache.server.http.record import Record
from logitcache.server.http.rows_json import (
    example_to_json,
    fetch_rows,
    most_rows,
    numbers_a_row,
    parse_id,
    parse_rows,
    rows_to_json,
)
from logitcache.server.wording import counted
from logitcache.storage import Readable

Found = TypeVar("Found")

DIGEST_HEADER = "Logitcache-Digest"

SHORT_BODY = 512 << 10
"""Bytes of safetensors that are parsed at once, whatever they are: more than the ids of any batch that is at hand."""


JSON_BYTES = 12
"""Of JSON, and of the objects that it is made of, a byte of rows."""


class _Anything(Convertor[str]):
    """The rest of a path, line breaks included: ``path`` would leave a last one out, and name another example."""

    regex = r"[\s\S]*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("anything", _Anything())


class _Direct(APIRoute):
    """A route whose function takes the request and what stands in its path, and is called without looking for more:
    that search costs more than a small batch. It is declared and documented like any other.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response = await self.endpoint(Request(scope, receive, send), **scope["path_params"])
        await response(scope, receive, send)


class Shortcut:
    """Takes batches to their routes by the shape of their path alone; the rest, and what is not plain, goes the
    framework's way, which costs a tenth of a small batch (measured: 0.04 ms of 0.42).
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._routes = {route.path.rpartition("/")[2]: route for route in batches.routes if isinstance(route, _Direct)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, our own errors included."""
        if scope["type"] == "http" and scope["method"] == "POST":
            prefix, _, rest = scope["path"].partition("/v1/label-sets/")
            name, _, what = rest.partition("/")
            if not prefix and name and (route := self._routes.get(what)) is not None:
                scope.update(route=route, path_params={"name": name})
                try:
                    await route.app(scope, receive, send)
                except LogitcacheError as error:
                    await problem_response(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


_label_sets: Any = {"prefix": "/v1/label-sets", "tags": ["label sets"], "responses": openapi.OF_READING}
batches = APIRouter(**_label_sets, route_class=_Direct)
label_sets = APIRouter(**_label_sets, dependencies=[Depends(enough_threads)])
operations = APIRouter(tags=["operations"], responses=openapi.problems(421))


async def _catalog(request: Request) -> Catalog:
    catalog: Catalog = request.app.state.catalog
    return catalog


async def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


InCatalog = Annotated[Catalog, Depends(_catalog)]


@batches.post("/{name}/fetch", openapi_extra=openapi.FETCH_BODY, responses=openapi.FETCH_ANSWER)
async def fetch_batch(request: Request, name: openapi.Name) -> Response:
    """Soft labels of a batch of examples, in the order asked for."""
    return await _answered(parse_fetch, _fetch, request, name)


@batches.post("/{name}/missing", openapi_extra=openapi.MISSING_BODY, responses=openapi.MISSING_ANSWER)
async def find_missing(request: Request, name: openapi.Name) -> Response:
    """Which of these examples have no labels."""
    return await _answered(parse_missing, _missing, request, name)


@label_sets.get("", responses=openapi.LIST_ANSWER)
def list_label_sets(catalog: InCatalog) -> JSONResponse:
    """Every label set of the store that can be opened."""
    return JSONResponse([description.to_json() for description in catalog.descriptions()])


@label_sets.get("/{name}", responses=openapi.DESCRIPTION_ANSWER)
def describe_label_set(name: openapi.Name, catalog: InCatalog, request: Request) -> JSONResponse:
    """Identity, progress, generations, statistics, digest and limits of one label set."""
    label_set = catalog.get(name)
    Record.of(request.scope).label_set = name
    return JSONResponse(label_set.describe().to_json())


async def _answered(
    parse: Callable[[bytes, str], Any], answer: Callable[..., Response], request: Request, name: str
) -> Response:
    """What ``answer`` makes of what a request's body says: at once where rows are at hand, else in a worker thread.

    A thread costs more than a small gather, which itself gives the loop back sooner than a thread would.
    """
    state, headers, record = request.app.state, dict(request.scope["headers"]), Record.of(request.scope)
    catalog: Catalog = state.catalog
    sent = media_type(headers.get(b"content-type"))
    wanted = answer_type(headers.get(b"accept"), default=sent)
    body = await read_body(request, sent)
    if sent == wanted == SAFETENSORS and len(body) <= SHORT_BODY and (label_set := catalog.at_hand(name)) is not None:
        record.label_set = name
        asked = parse(body, sent)
        if label_set.is_at_hand(len(asked.ids)):
            return answer(label_set, asked, wanted, record, state.load)

    def answered() -> Response:
        label_set = catalog.get(name)
        record.label_set = name
        return answer(label_set, parse(body, sent), wanted, record, state.load)

    state.load.check_queue(state.readers)
    return await to_thread.run_sync(answered, limiter=state.readers)


def _fetch(label_set: Readable, asked: FetchRequest, wanted: str, record: Record, load: Load) -> Response:
    record.tally = label_set.tally
    most = _json_bytes(label_set, len(asked.ids)) if wanted == JSON else _most_bytes(label_set, len(asked.ids))
    load.hold(record, most)
    if wanted == JSON:
        soft = fetch_rows(label_set, asked.ids, **asked.options())
        record.rows, record.misses = soft.rows_present, _misses(soft)
        return JSONResponse(rows_to_json(soft), headers=_digest(soft.digest))
    rows, digest = label_set.fetch_body(asked.ids, **asked.options())
    known = not label_set.row_spec.ragged and asked.on_missing == "error"  # without a look at the answer
    if known:
        record.rows = len(asked.ids)
    else:
        soft = wire.decode_rows(rows)
        record.rows, record.misses = soft.rows_present, _misses(soft)
    load.settle(record, most, rows.nbytes)
    return Response(rows.data, headers=_digest(digest), media_type=SAFETENSORS)


def _missing(label_set: Readable, asked: MissingRequest, wanted: str, _record: Record, _load: Load) -> Response:
    states = label_set.states(asked.ids, digest=asked.digest)
    if wanted == SAFETENSORS:
        return Response(wire.encode({"state": states}), media_type=SAFETENSORS)
    return JSONResponse({"unknown": asked.ids.at(states == UNKNOWN), "unlabelled": asked.ids.at(states == UNLABELLED)})


def _misses(soft: SoftLabels) -> int:
    """How many examples of an answer with a mask have no labels."""
    return 0 if soft.present is None else int(len(soft.present) - soft.present.sum())


def _most_bytes(label_set: Readable, ids: int) -> int:
    """Of an answer to so many ids, before it is made.

    Of token sequences it is told afterwards: no more are made at once than there are threads, each within the limits.
    """
    spec = label_set.row_spec
    return 0 if spec.ragged else min(Limits().response_bytes, spec.nbytes(ids, ids))


def _json_bytes(label_set: Readable, ids: int, *, probabilities: bool = False) -> int:
    """Of an answer in JSON to so many ids, before it is made."""
    spec = label_set.row_spec
    most = most_rows(spec, probabilities)
    rows = most if spec.ragged else min(ids, most)
    more = 4 * rows * (numbers_a_row(spec, probabilities) - numbers_a_row(spec, False))
    return JSON_BYTES * (spec.nbytes(rows, min(ids, most)) + more)


def _digest(digest: str | None) -> dict[str, str]:
    return {DIGEST_HEADER: digest} if digest else {}


@label_sets.get("/{name}/examples/{id:anything}", responses=openapi.EXAMPLE_ANSWER)
def fetch_example(
    name: openapi.Name, id: str, catalog: InCatalog, request: Request, view: int = 0, rows: str | None = None
) -> JSONResponse:
    """One example for a person to read, with the probabilities of the stored classes.

    All that follows ``examples/`` is its id, slashes included. Of a causal example, ``rows=START:STOP`` gives a part.
    """
    record = Record.of(request.scope)
    label_set = catalog.get(name)
    record.label_set, record.tally = name, label_set.tally
    _check_encoding(request)
    if unknown := sorted(set(request.query_params) - {"view", "rows"}):
        raise InvalidRequest(f"an example has no option {unknown[0][:40]!r}; it has view and rows")
    wanted = parse_id(id, label_set.identity.ids)
    load: Load = request.app.state.load
    load.hold(record, _json_bytes(label_set, 1, probabilities=True))
    soft = fetch_rows(label_set, [wanted], probabilities=True, view=view, rows=parse_rows(rows))
    record.rows = len(soft)
    return JSONResponse(example_to_json(wanted, soft), headers=_digest(soft.digest))


def _check_encoding(request: Request) -> None:
    """Refuse a path that is not UTF-8: what cannot be decoded was replaced by now, and would name another example."""
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()
    except UnicodeDecodeError:
        raise InvalidIds("the id in the path is not UTF-8: percent-encode the bytes of its UTF-8") from None


@operations.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """The process answers."""
    return "ok\n"


@operations.get("/readyz", response_class=PlainTextResponse, responses=openapi.problems(503))
async def readyz(catalog: InCatalog, request: Request) -> str:
    """The store can be listed, so fetches can be answered."""
    try:
        names = await _probed(request, catalog.names)
    except LogitcacheError as error:
        raise _not_ready(error) from None
    return f"ready: {counted(len(names), 'label set')}\n"


def _not_ready(error: LogitcacheError) -> Unavailable:
    unavailable = Unavailable(f"not ready: {error.message}", cause=error.code)
    unavailable.retry_after_s = 5.0
    return unavailable


@operations.get("/metrics", response_class=Response, responses=openapi.METRICS_ANSWER)
async def metrics(kept: Annotated[Metrics, Depends(_metrics)], request: Request) -> Response:
    """Counters and gauges in Prometheus' text format."""
    told = await _probed(request, partial(generate_latest, kept.registry))
    return Response(told, media_type=CONTENT_TYPE_LATEST)


async def _probed(request: Request, look: Callable[[], Found]) -> Found:
    """What a probe finds, in one of the threads that are for probes alone: they tell how a busy server stands, too."""
    state = request.app.state
    state.load.check_queue(state.probes)
    return await to_thread.run_sync(look, limiter=state.probes)
