"""The HTTP application: routes, problems and the middleware, put together over one catalog.

It holds no state besides the catalog, the jobs and its counters, so any number of apps can live in a process. How it is
run is `serve`'s to say.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from logitcache.server.http.catalog import Catalog
from logitcache.server.http.job_routes import jobs as job_routes
from logitcache.server.http.metrics import Metrics
from logitcache.server.http.middleware import Observed
from logitcache.server.http.problems import add_handlers
from logitcache.server.http.routes import label_sets, operations
from logitcache.server.jobs.queue import Jobs


def create_app(catalog: Catalog, jobs: Jobs | None = None) -> FastAPI:
    """An ASGI application that serves this catalog and runs these jobs, and closes both when it shuts down."""
    app = FastAPI(
        title="logitcache",
        version=version("logitcache"),
        summary="A teacher's soft labels, precomputed once and served to every training loop.",
        lifespan=_lifespan,
        redirect_slashes=False,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
    )
    app.state.catalog = catalog
    app.state.jobs = jobs
    app.state.metrics = Metrics(catalog, jobs)
    app.add_middleware(Observed, metrics=app.state.metrics)
    add_handlers(app)
    app.include_router(label_sets)
    app.include_router(job_routes)
    app.include_router(operations)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    jobs: Jobs | None = app.state.jobs
    if jobs is not None:
        await run_in_threadpool(jobs.start)
    yield
    if jobs is not None:
        await run_in_threadpool(jobs.close)
    await run_in_threadpool(app.state.catalog.close)
