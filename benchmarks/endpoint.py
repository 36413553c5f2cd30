"""A FastAPI app as a server of its own on a free port of loopback, for the endpoints that we compare with.

It names its URL on stderr, as ``logitcache serve`` does, and has neither middleware nor metrics nor an access log: none
of that slows it.
"""

import json
import socket
import sys

import uvicorn
from fastapi import FastAPI


def serve(app: FastAPI) -> None:
    """Serve until terminated."""
    listener = socket.create_server(("127.0.0.1", 0))
    # As asyncio sets it for sockets that it binds itself: else an answer's last piece waits 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_keep_alive=120)
    print(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}), file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listener])
