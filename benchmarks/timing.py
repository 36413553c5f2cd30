"""Timing several methods of one thing, interleaved: who is fast because the machine was quiet is found out.

In each round every method fetches one block of batches at every batch size, in an order that is rotated from round to
round; nothing is compared but blocks of the same round. It knows nothing of label sets.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.servers import cpu_clock

FEWEST_BATCHES = 3
MOST_BATCHES = 1000


def _as_they_are(ids: np.ndarray) -> Any:
    return ids


@dataclass(frozen=True)
class Method:
    """A way to fetch a batch: ``fetch`` takes int64 ids (rows,), or what ``prepare`` makes of them before the clock
    starts; ``server_pid`` is the process that answers, if any.
    """

    name: str
    fetch: Callable[[Any], Any]
    server_pid: int | None = None
    prepare: Callable[[np.ndarray], Any] = _as_they_are


@dataclass(frozen=True)
class Block:
    """What a block of batches took, in seconds a batch."""

    wall_s: float
    client_cpu_s: float
    server_cpu_s: float | None


Blocks = dict[str, dict[int, list[Block]]]
"""By method and batch size: one block a round."""


@dataclass(frozen=True)
class Schedule:
    """Batch sizes in rows, rounds that count, and seconds that a block should last."""

    batch_sizes: Sequence[int]
    rounds: int
    block_s: float


def measure(
    methods: Sequence[Method],
    rows: int,
    schedule: Schedule,
    rng: np.random.Generator,
    on_round: Callable[[int], None],
) -> Blocks:
    """Blocks of every method and batch size; every batch asks for ids drawn anew, evenly from 0 to ``rows`` - 1.

    A first round tells how many batches make a block of each method, warms everything up, and does not count.
    """
    blocks: Blocks = {method.name: {size: [] for size in schedule.batch_sizes} for method in methods}
    batches: dict[tuple[str, int], int] = {}
    for method, size in _in_turn(methods, schedule.batch_sizes, 0):
        tried = _time(method, rng.integers(rows, size=(FEWEST_BATCHES, size)))
        wanted = math.ceil(schedule.block_s / tried.wall_s)
        batches[method.name, size] = min(max(wanted, FEWEST_BATCHES), MOST_BATCHES)
        _time(method, rng.integers(rows, size=(batches[method.name, size], size)))
    for round in range(schedule.rounds):
        on_round(round)
        for method, size in _in_turn(methods, schedule.batch_sizes, round):
            ids = rng.integers(rows, size=(batches[method.name, size], size))
            blocks[method.name][size].append(_time(method, ids))
    return blocks


def _in_turn(methods: Sequence[Method], sizes: Sequence[int], round: int) -> Iterator[tuple[Method, int]]:
    first = round % len(methods)
    for size in sizes:
        for method in (*methods[first:], *methods[:first]):
            yield method, size


def _time(method: Method, batches: np.ndarray) -> Block:
    """Fetch a block; ids are (batches, rows)."""
    fetch, server_cpu_s = method.fetch, _server_clock(method)
    prepared = [method.prepare(ids) for ids in batches]
    server_began, client_began, began = server_cpu_s(), time.process_time(), time.perf_counter()
    for ids in prepared:
        fetch(ids)
    wall, client, server = time.perf_counter() - began, time.process_time() - client_began, server_cpu_s()
    count = len(batches)
    spent = None if method.server_pid is None else (server - server_began) / count
    return Block(wall / count, client / count, spent)


def _server_clock(method: Method) -> Callable[[], float]:
    return cpu_clock(method.server_pid) if method.server_pid is not None else lambda: 0.0


def warm_up(methods: Sequence[Method], rows: int, step: int, batch_size: int) -> None:
    """Fetch every ``step``-th row once by every method: each page is in memory and mapped, each shard verified."""
    for method in methods:
        for ids in np.array_split(np.arange(0, rows, step), math.ceil(rows / step / batch_size)):
            method.fetch(method.prepare(ids))
