"""A JSON endpoint over the same rows, as a person would write one with FastAPI and orjson.

``python -m benchmarks.json_endpoint FOLDER`` serves the ``.npy`` files of a folder from memory; see `endpoint`.
"""

import sys
from pathlib import Path

import numpy as np
import orjson
from benchmarks.endpoint import serve
from benchmarks.rows import Arrays
from fastapi import FastAPI, Request, Response


def create_app(folder: Path) -> FastAPI:
    """``POST /nested`` answers with a list a row, ``POST /flat`` with one list an array."""
    stored = _load(folder)
    app = FastAPI()

    async def taken(request: Request) -> Arrays:
        # orjson here, too: a pydantic model of a list of integers takes longer.
        ids = np.array(orjson.loads(await request.body())["ids"])
        return {name: array[ids] for name, array in stored.items()}

    @app.post("/nested")
    async def nested(request: Request) -> Response:
        return _answer(await taken(request))

    @app.post("/flat")
    async def flat(request: Request) -> Response:
        return _answer({name: array.reshape(-1) for name, array in (await taken(request)).items()})

    return app


def _load(folder: Path) -> Arrays:
    stored = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    scalars = stored.pop("scalars")
    stored["fingerprint"] = stored["fingerprint"][:, 0].copy()
    # orjson takes contiguous arrays only, so columns are separated once and not at every request.
    return stored | {"logit_max": scalars[:, 0].copy(), "tail_logsumexp": scalars[:, 1:].copy()}


def _answer(arrays: Arrays) -> Response:
    return Response(orjson.dumps(arrays, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


if __name__ == "__main__":
    serve(create_app(Path(sys.argv[1])))
