"""The routes: each some ten lines over a function that is tested on its own.

What touches a disk runs in a worker thread; ``/healthz`` does not, so it stays fast whatever the disks do.
"""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool

from logitcache.labels.errors import LogitcacheError, Unavailable
from logitcache.labels.label_set import Description
from logitcache.server import openapi
from logitcache.server.catalog import Catalog
from logitcache.server.messages import JSON, SAFETENSORS, answer_type, media_type, parse_fetch, read_body
from logitcache.server.metrics import Metrics
from logitcache.server.record import Record
from logitcache.server.rows_json import check_json_rows, example_to_json, parse_id, rows_to_json
from logitcache.server.wording import counted

DIGEST_HEADER = "Logitcache-Digest"

label_sets = APIRouter(prefix="/v1/label-sets", tags=["label sets"], responses=openapi.PROBLEMS)
operations = APIRouter(tags=["operations"])


async def _catalog(request: Request) -> Catalog:
    catalog: Catalog = request.app.state.catalog
    return catalog


async def _metrics(request: Request) -> Metrics:
    metrics: Metrics = request.app.state.metrics
    return metrics


InCatalog = Annotated[Catalog, Depends(_catalog)]


@label_sets.get("")
def list_label_sets(catalog: InCatalog) -> list[Description]:
    """Every label set of the store that can be opened."""
    return list(catalog.descriptions())


@label_sets.get("/{name}")
def describe_label_set(name: str, catalog: InCatalog, request: Request) -> Description:
    """Identity, progress, statistics, digest and limits of one label set."""
    label_set = catalog.get(name)
    Record.of(request.scope).label_set = name
    return label_set.describe()


@label_sets.post("/{name}/fetch", openapi_extra=openapi.FETCH_BODY, responses=openapi.FETCH_ANSWER)
async def fetch_rows(name: str, catalog: InCatalog, request: Request) -> Response:
    """Soft labels of a batch of examples, in the order asked for."""
    kind = media_type(request.headers.get("content-type"))
    answer = answer_type(request.headers.get("accept"), default=kind)
    body = await read_body(request, kind)
    return await run_in_threadpool(_fetch, catalog, name, body, kind, answer, Record.of(request.scope))


def _fetch(catalog: Catalog, name: str, body: bytes, kind: str, answer: str, record: Record) -> Response:
    label_set = catalog.get(name)
    record.label_set = name
    asked = parse_fetch(body, kind)
    if answer == JSON:
        check_json_rows(len(asked.ids))
        soft = label_set.fetch(asked.ids, **asked.options())
        response: Response = JSONResponse(rows_to_json(soft), headers=_digest(soft.digest))
    else:
        rows, digest = label_set.fetch_body(asked.ids, **asked.options())
        response = Response(rows.data, headers=_digest(digest), media_type=SAFETENSORS)
    record.rows = len(asked.ids)
    return response


def _digest(digest: str | None) -> dict[str, str]:
    return {DIGEST_HEADER: digest} if digest else {}


@label_sets.get("/{name}/examples/{id:path}", responses=openapi.EXAMPLE_ANSWER)
def fetch_example(name: str, id: str, catalog: InCatalog, request: Request, view: int = 0) -> JSONResponse:
    """One example for a person to read, with the probabilities of the stored classes."""
    record = Record.of(request.scope)
    label_set = catalog.get(name)
    record.label_set = name
    number = parse_id(id)
    soft = label_set.fetch([number], view=view)
    record.rows = 1
    return JSONResponse(example_to_json(number, soft), headers=_digest(soft.digest))


@operations.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """The process answers."""
    return "ok\n"


@operations.get("/readyz", response_class=PlainTextResponse, responses=openapi.PROBLEMS)
def readyz(catalog: InCatalog) -> str:
    """The store can be listed, so fetches can be answered."""
    try:
        names = catalog.names()
    except LogitcacheError as error:
        raise _not_ready(error) from None
    return f"ready: {counted(len(names), 'label set')}\n"


def _not_ready(error: LogitcacheError) -> Unavailable:
    unavailable = Unavailable(f"not ready: {error.message}", cause=error.code)
    unavailable.retry_after_s = 5.0
    return unavailable


@operations.get("/metrics", response_class=Response)
def metrics(kept: Annotated[Metrics, Depends(_metrics)]) -> Response:
    """Counters and gauges in Prometheus' text format."""
    return Response(generate_latest(kept.registry), media_type=CONTENT_TYPE_LATEST)
