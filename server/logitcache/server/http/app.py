"""The HTTP application: routes, problems and the middleware, put together over one catalog.

It holds no state besides the catalog, the jobs and its counters, so any number of apps can live in a process. How it is
run is `serve`'s to say.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from logitcache.server.http import openapi
from logitcache.server.http.access import Access, Guarded
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.job_routes import jobs as job_routes
from logitcache.server.http.load import Load
from logitcache.server.http.metrics import Metrics
from logitcache.server.http.middleware import Observed
from logitcache.server.http.problems import add_handlers
from logitcache.server.http.recording_routes import recording
from logitcache.server.http.recordings import Recordings
from logitcache.server.http.routes import Shortcut, batches, label_sets, operations
from logitcache.server.jobs.queue import Jobs

READERS = 8
"""Threads that read label sets at once: more than processors, because some wait for a disk."""

WRITERS = 4
"""Threads that record at once: one waits for the disk while others check rows."""

PROBES = 2
"""Threads for `/readyz` and `/metrics`, which are answered while all others are taken."""

SAVE_EVERY_S = 10.0
"""How often is written down what was served: what a crash may lose of it."""

ROUTERS = (batches, label_sets, recording, job_routes, operations)


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The documentation of all routes."""
        return self.openapi_schema or openapi.completed(super().openapi())


def create_app(
    catalog: Catalog,
    jobs: Jobs | None = None,
    *,
    record: bool = False,
    access: Access | None = None,
    load: Load | None = None,
) -> FastAPI:
    """An ASGI application that serves this catalog, runs these jobs, and takes what runs record if ``record`` says so;
    it closes all of them when it shuts down. Whoever can connect may ask, unless ``access`` says otherwise; how
    much is taken on at once is ``load``'s to say.
    """
    app = _App(
        title="logitcache",
        version=version("logitcache"),
        summary="A teacher's soft labels, precomputed once and served to every training loop.",
        description=openapi.ABOUT,
        lifespan=_lifespan,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # ours is /metrics
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        # Not by include_router, which keeps routers nested and has each request looked up twice. The batches first.
        routes=[route for router in ROUTERS for route in router.routes],
    )
    app.state.catalog = catalog
    app.state.jobs = jobs
    app.state.recordings = Recordings(catalog, allowed=record)
    app.state.readers = CapacityLimiter(READERS)
    app.state.writers = CapacityLimiter(WRITERS)
    app.state.probes = CapacityLimiter(PROBES)
    app.state.load = load or Load()
    app.state.metrics = Metrics(catalog, app.state.load, jobs)
    app.add_middleware(Shortcut)
    app.add_middleware(Guarded, access=access or Access())
    app.add_middleware(Observed, metrics=app.state.metrics, load=app.state.load)  # the outer one
    add_handlers(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    jobs: Jobs | None = app.state.jobs
    if jobs is not None:
        await run_in_threadpool(jobs.start)
    saving = asyncio.create_task(_save_tallies(app.state.catalog))
    yield
    saving.cancel()
    await asyncio.wait([saving])
    if jobs is not None:
        await run_in_threadpool(jobs.close)
    await run_in_threadpool(app.state.recordings.close)
    await run_in_threadpool(app.state.catalog.close)


async def _save_tallies(catalog: Catalog) -> None:
    while True:
        await asyncio.sleep(SAVE_EVERY_S)
        await run_in_threadpool(catalog.save_tallies)
