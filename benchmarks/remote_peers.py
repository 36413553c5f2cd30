"""What a label set over HTTP is compared with: the same rows behind a socket, and how a batch of them is read.

A ``fetch`` is that of `peers`; `log.md` tells which ways were tried and lost. Servers run in processes of their own.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import orjson
import redis
from benchmarks.peers import Fetch, named
from benchmarks.rows import FIELDS, RECORD, Arrays
from benchmarks.sequences import Sequences
from benchmarks.store_peers import as_bytes, chunks, keys
from safetensors.numpy import load

from logitcache.client.deadline import Deadline
from logitcache.client.transport import DirectTransport
from logitcache.labels import wire
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import Limits

MSET_ROWS = 1024


def fill_redis(url: str, records: np.ndarray) -> None:
    """One packed record a row under its 8-byte id, by MSETs in pipelines."""
    with _redis(url) as client, client.pipeline(transaction=False) as pipeline:
        for begin, chunk in chunks(records):
            stored = list(zip(keys(np.arange(begin, begin + len(chunk))), as_bytes(chunk), strict=True))
            for first in range(0, len(stored), MSET_ROWS):
                pipeline.mset(dict(stored[first : first + MSET_ROWS]))
            pipeline.execute()


def _redis(url: str) -> redis.Redis:
    return redis.Redis(port=urlsplit(url).port or 0, single_connection_client=True)


def open_redis(url: str) -> Fetch:
    """One MGET a batch, parsed by hiredis, records joined once."""
    client = _redis(url)

    def fetch(ids: np.ndarray) -> np.ndarray:
        values: Any = client.mget(keys(ids))
        return np.frombuffer(b"".join(values), RECORD)

    return fetch


def http_client(url: str) -> httpx.Client:
    """A client that keeps its connection, however long the other methods take in between."""
    return httpx.Client(base_url=url, timeout=60, trust_env=False, limits=httpx.Limits(keepalive_expiry=None))


def open_json(client: httpx.Client, route: str) -> Fetch:
    """The JSON endpoint, read into arrays; the same code reads nested lists and flat ones."""

    def fetch(ids: np.ndarray) -> Arrays:
        response = client.post(route, content=orjson.dumps({"ids": ids}, option=orjson.OPT_SERIALIZE_NUMPY))
        response.raise_for_status()
        told = orjson.loads(response.content)
        return {name: np.array(told[name], RECORD[name].base).reshape(len(ids), *RECORD[name].shape) for name in FIELDS}

    return fetch


def _take(client: httpx.Client, ids: np.ndarray) -> Arrays:
    response = client.post("/take", content=ids.tobytes())
    response.raise_for_status()
    return load(response.content)


def open_binary(client: httpx.Client) -> Fetch:
    """The binary endpoint over `peers.NUMPY_FILES`."""
    return lambda ids: named(_take(client, ids))


def open_binary_sequences(client: httpx.Client, sequences: Sequences) -> Fetch:
    """The binary endpoint over whole sequences."""
    return lambda ids: sequences.flat(_take(client, ids))


Reader = Callable[[str, str, dict[str, str], bytes | None], np.ndarray]
"""The bytes of the body, uint8 (bytes,), that answers a method, a path, headers and content."""


@contextmanager
def client_reader(url: str) -> Iterator[Reader]:
    """What our client reads with, by itself: of nginx as of `logitcache serve`."""
    with closing(DirectTransport(url)) as transport:

        def read(method: str, path: str, headers: dict[str, str], content: bytes | None) -> np.ndarray:
            answer = transport.exchange(method, path, headers, content, Limits().response_bytes, Deadline(60.0))
            if not answer.is_success:
                raise ValueError(f"{method} {path} answers {answer.status}: {bytes(answer.body[:200])!r}")
            return np.frombuffer(answer.body, np.uint8)

        yield read


class RawReader:
    """The least that Python's own library needs to read a body: a kept connection and ``readinto`` a new buffer.

    It checks nothing but the status, and is the same for nginx and for `logitcache serve`.
    """

    def __init__(self, connection: HTTPConnection) -> None:
        self._connection = connection

    def __call__(self, method: str, path: str, headers: dict[str, str], content: bytes | None) -> np.ndarray:
        """The body's bytes, uint8 (bytes,).

        Raises:
            ValueError: the status says that this is not what was asked for.
        """
        self._connection.request(method, path, content, headers)
        response = self._connection.getresponse()
        if response.status not in (200, 206):
            raise ValueError(f"{method} {path} answers {response.status}: {response.read(200)!r}")
        body = np.empty(int(response.headers["Content-Length"]), np.uint8)
        view, begin = memoryview(body.data), 0
        while begin < len(body):
            begin += response.readinto(view[begin:])
        response.read()
        return body


@contextmanager
def raw_reader(url: str) -> Iterator[RawReader]:
    """A raw reader, its connection closed in the end."""
    with closing(HTTPConnection(urlsplit(url).netloc, timeout=60)) as connection:
        yield RawReader(connection)


def raw_answer(reader: Reader, name: str, ids: np.ndarray) -> np.ndarray:
    """The bytes with which our server answers for these ids."""
    headers = {"Content-Type": wire.MEDIA_TYPE, "Accept": wire.MEDIA_TYPE}
    return reader("POST", f"/v1/label-sets/{name}/fetch", headers, wire.encode_ids(as_ids(ids)))


def open_raw(reader: Reader, name: str) -> Fetch:
    """Our server without our client: views of the arrays of its answer, unchecked."""
    return lambda ids: wire.decode_rows(raw_answer(reader, name, ids)).arrays()


def open_nginx(reader: Reader, sequences: Sequences, size: int) -> Fetch:
    """One range of a file, ``size`` bytes long as our answer is: sequences that lie there one after the other.

    The ids must be those that `consecutive` gives.
    """
    stride = sequences.record.itemsize

    def fetch(ids: np.ndarray) -> Arrays:
        begin = int(ids[0]) * stride
        body = reader("GET", "/sequences.bin", {"Range": f"bytes={begin}-{begin + size - 1}"}, None)
        records = np.frombuffer(body, sequences.record, len(ids))
        arrays = {name: records[name] for name in sequences.record.names or ()}
        return arrays | {"row_splits": np.arange(len(ids) + 1) * sequences.length}

    return fetch


def consecutive(ids: np.ndarray, count: int) -> np.ndarray:
    """As many ids as were asked for, one after the other from the first one, all below ``count``."""
    return min(int(ids[0]), count - len(ids)) + np.arange(len(ids))
