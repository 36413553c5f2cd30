"""A JSON endpoint over the same rows, as a person would write one with FastAPI and orjson; a process of its own.

``python -m benchmarks.json_endpoint FOLDER`` serves the ``.npy`` files of a folder on a free port and names its URL on
stderr, as ``logitcache serve`` does. It has neither middleware nor metrics nor an access log: none of that slows it.
"""

import json
import socket
import sys
from pathlib import Path

import numpy as np
import orjson
import uvicorn
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


def main(folder: Path) -> None:
    """Serve until terminated."""
    listener = socket.create_server(("127.0.0.1", 0))
    # As asyncio sets it for sockets that it binds itself: else an answer's last piece waits 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(create_app(folder), log_level="warning", access_log=False, timeout_keep_alive=120)
    print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
