"""A binary endpoint over the same rows, as a person would write one with FastAPI, NumPy and safetensors.

``python -m benchmarks.binary_endpoint FOLDER`` maps the ``.npy`` files of a folder and serves them; see `endpoint`.
"""

import sys
from pathlib import Path

import numpy as np
from benchmarks.endpoint import serve
from benchmarks.peers import mapped
from fastapi import FastAPI, Request, Response
from safetensors.numpy import save


def create_app(folder: Path) -> FastAPI:
    """``POST /take`` takes int64 ids as raw bytes and answers with each array's rows as safetensors."""
    stored = {path.stem: mapped(path) for path in folder.glob("*.npy")}
    app = FastAPI()

    @app.post("/take")
    async def take(request: Request) -> Response:
        ids = np.frombuffer(await request.body(), np.int64)
        taken = {name: array.take(ids, axis=0) for name, array in stored.items()}
        return Response(save(taken), media_type="application/vnd.safetensors")

    return app


if __name__ == "__main__":
    serve(create_app(Path(sys.argv[1])))
