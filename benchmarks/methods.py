"""The methods that are compared, opened: their stores written, their servers running, each ready to fetch.

Each function writes what it needs into a folder and gives the wanted methods in the order of the tables. Another method
is another line here, and a pair in `goals`.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from benchmarks import peers, programs, remote_peers, store_peers
from benchmarks.rows import Source, write_label_set
from benchmarks.sequences import BATCH, Sequences, write_sequences
from benchmarks.servers import Server, started
from benchmarks.timing import Method

from logitcache.client import connect

Makers = dict[str, Callable[[], Method]]
"""How each method is opened, by its name."""


@contextmanager
def opened_rows(folder: Path, source: Source, wanted: Collection[str]) -> Iterator[list[Method]]:
    """The wanted methods that fetch single rows."""
    label_set = write_label_set(folder / "store" / "rows", source)
    records = peers.write_records(folder / "records.npy", source)
    files = peers.write_numpy_files(folder / "files", source)
    with ExitStack() as stack:
        makers = {
            **_in_process(stack, folder, label_set, records, files),
            **_behind_sockets(stack, folder, label_set, records, files),
        }
        yield [make() for name, make in makers.items() if name in wanted]


def _in_process(stack: ExitStack, folder: Path, label_set: Path, records: np.ndarray, files: Path) -> Makers:
    def lmdb() -> peers.Fetch:
        return store_peers.open_lmdb(store_peers.write_lmdb(folder / "rows.lmdb", records))

    def columns() -> peers.Fetch:
        return store_peers.open_columns(store_peers.write_arrow(folder / "columns", records, store_peers.columns))

    def packed() -> peers.Fetch:
        return store_peers.open_packed(store_peers.write_arrow(folder / "packed", records, store_peers.packed))

    return {
        "memmap": lambda: Method("memmap", peers.memmap(files)),
        "memmap, records": lambda: Method("memmap, records", peers.memmap_of_records(folder / "records.npy")),
        "local": lambda: Method("local", stack.enter_context(connect(label_set)).fetch),
        "LMDB": lambda: Method("LMDB", lmdb()),
        "HF datasets": lambda: Method("HF datasets", columns()),
        "HF datasets, packed": lambda: Method("HF datasets, packed", packed()),
        "zarr-python": lambda: Method("zarr-python", store_peers.open_zarr(label_set), touches_every_page=True),
    }


def _behind_sockets(stack: ExitStack, folder: Path, label_set: Path, records: np.ndarray, files: Path) -> Makers:
    @cache
    def endpoint(module: str) -> Server:
        return stack.enter_context(_endpoint(module, files, folder))

    def asking(name: str, server: Server, opened: Callable[..., peers.Fetch], *arguments: str) -> Method:
        client = stack.enter_context(remote_peers.http_client(server.url))
        return Method(name, opened(client, *arguments), server.pid)

    def http() -> Method:
        server = stack.enter_context(_served(folder))
        return Method("HTTP", stack.enter_context(connect(f"{server.url}/{label_set.name}")).fetch, server.pid)

    def redis() -> Method:
        server = stack.enter_context(programs.redis(folder))
        remote_peers.fill_redis(server.url, records)
        return Method("Redis", remote_peers.open_redis(server.url), server.pid)

    return {
        "HTTP": http,
        "Redis": redis,
        "JSON": lambda: asking("JSON", endpoint("json_endpoint"), remote_peers.open_json, "/nested"),
        "JSON, flat": lambda: asking("JSON, flat", endpoint("json_endpoint"), remote_peers.open_json, "/flat"),
        "binary": lambda: asking("binary", endpoint("binary_endpoint"), remote_peers.open_binary),
    }


@contextmanager
def opened_sequences(folder: Path, source: Sequences, wanted: Collection[str]) -> Iterator[list[Method]]:
    """The wanted methods that fetch whole sequences."""
    label_set = write_sequences(folder / "store" / "sequences", source)
    files = peers.write_sequence_files(folder / "files", source)
    with ExitStack() as stack:
        server = stack.enter_context(_served(folder))
        local = stack.enter_context(connect(label_set))
        remote = stack.enter_context(connect(f"{server.url}/{label_set.name}"))
        endpoint = stack.enter_context(_endpoint("binary_endpoint", files, folder))
        client = stack.enter_context(remote_peers.http_client(endpoint.url))
        methods = [
            Method("memmap", peers.memmap_of_sequences(files, source)),
            Method("local", local.fetch),
            Method("HTTP", remote.fetch, server.pid),
            Method("binary", remote_peers.open_binary_sequences(client, source), endpoint.pid),
        ]
        if programs.NGINX.path is not None:
            reader = stack.enter_context(remote_peers.raw_reader(server.url))
            size = len(remote_peers.raw_answer(reader, label_set.name, np.arange(BATCH)))
            methods.append(Method("HTTP, raw reader", remote_peers.open_raw(reader, label_set.name), server.pid))
            methods += [_nginx_range(name, stack, folder, files, source, size) for name in programs.NGINX_SENDING]
        yield [method for method in methods if method.name in wanted]


def _nginx_range(name: str, stack: ExitStack, folder: Path, files: Path, source: Sequences, size: int) -> Method:
    def prepare(ids: np.ndarray) -> np.ndarray:
        return remote_peers.consecutive(ids, source.count)

    server = stack.enter_context(programs.nginx(folder / name, files, programs.NGINX_SENDING[name]))
    opened = remote_peers.raw_reader if "raw reader" in name else remote_peers.client_reader
    reader = stack.enter_context(opened(server.url))
    return Method(name, remote_peers.open_nginx(reader, source, size), server.pid, prepare)


@contextmanager
def _served(folder: Path) -> Iterator[Server]:
    """`logitcache serve` as it comes: middleware, metrics, request ids, and its log in a file."""
    store = str(folder / "store")
    with started("logitcache.server", "serve", "--store", store, "--port", "0", log=folder / "serve.log") as server:
        yield server


@contextmanager
def _endpoint(module: str, files: Path, folder: Path) -> Iterator[Server]:
    with started(f"benchmarks.{module}", str(files), log=folder / f"{module}.log") as server:
        yield server
