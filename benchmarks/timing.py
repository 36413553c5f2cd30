"""Timing several methods of one thing, interleaved: who is fast because the machine was quiet is found out.

In each round every method fetches one block of batches at every batch size, in an order that is rotated from round to
round; nothing is compared but blocks of the same round. A method so slow that one batch outlasts a block takes part in
fewer rounds, evenly spread. It knows nothing of label sets.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.servers import cpu_clock

FEWEST_BATCHES = 3
"""In a block, unless one batch lasts longer than the block should."""

MOST_BATCHES = 1000

FEWEST_ROUNDS = 3
"""In which even the slowest method takes part."""


def _as_they_are(ids: np.ndarray) -> Any:
    return ids


@dataclass(frozen=True)
class Method:
    """A way to fetch a batch: ``fetch`` takes int64 ids (rows,), or what ``prepare`` makes of them before the clock
    starts; ``server_pid`` is the process that answers, if any; what ``touches_every_page`` with a single batch needs no
    warming.
    """

    name: str
    fetch: Callable[[Any], Any]
    server_pid: int | None = None
    prepare: Callable[[np.ndarray], Any] = _as_they_are
    touches_every_page: bool = False


@dataclass(frozen=True)
class Block:
    """What a block of batches took, in seconds a batch; in which round."""

    round: int
    wall_s: float
    client_cpu_s: float
    server_cpu_s: float | None


Blocks = dict[str, dict[int, list[Block]]]
"""By method and batch size: one block for each round in which the method took part."""


@dataclass(frozen=True)
class Schedule:
    """Batch sizes in rows, rounds that count, and seconds that a block should last."""

    batch_sizes: Sequence[int]
    rounds: int
    block_s: float


@dataclass(frozen=True)
class _Share:
    """How many batches make a block of a method at one batch size, and how many rounds have such a block."""

    batches: int
    turns: int

    @classmethod
    def of(cls, schedule: Schedule, batch_s: float) -> "_Share":
        """The share of a method that takes so long for a batch: in all about ``rounds`` times ``block_s``."""
        slower = batch_s / schedule.block_s
        if slower > 1:
            return cls(1, min(schedule.rounds, max(FEWEST_ROUNDS, int(schedule.rounds / slower))))
        return cls(min(max(math.ceil(1 / slower), FEWEST_BATCHES), MOST_BATCHES), schedule.rounds)

    def has(self, round: int, rounds: int) -> bool:
        """It takes part in this round; its rounds are spread evenly, and the last is among them."""
        return (round + 1) * self.turns // rounds > round * self.turns // rounds


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
    shares: dict[tuple[str, int], _Share] = {}

    def block(method: Method, size: int, batches: int, round: int) -> Block:
        return _time(method, rng.integers(rows, size=(batches, size)), round)

    for method, size in _in_turn(methods, schedule.batch_sizes, 0):
        tried = block(method, size, 1, -1)
        if tried.wall_s < schedule.block_s:
            tried = block(method, size, FEWEST_BATCHES, -1)
        share = shares[method.name, size] = _Share.of(schedule, tried.wall_s)
        if share.batches > 1:
            block(method, size, share.batches, -1)
    for round in range(schedule.rounds):
        on_round(round)
        for method, size in _in_turn(methods, schedule.batch_sizes, round):
            share = shares[method.name, size]
            if share.has(round, schedule.rounds):
                blocks[method.name][size].append(block(method, size, share.batches, round))
    return blocks


def _in_turn(methods: Sequence[Method], sizes: Sequence[int], round: int) -> Iterator[tuple[Method, int]]:
    first = round % len(methods)
    for size in sizes:
        for method in (*methods[first:], *methods[:first]):
            yield method, size


def _time(method: Method, batches: np.ndarray, round: int) -> Block:
    """Fetch a block; ids are (batches, rows)."""
    fetch, server_cpu_s = method.fetch, _server_clock(method)
    prepared = [method.prepare(ids) for ids in batches]
    server_began, client_began, began = server_cpu_s(), time.process_time(), time.perf_counter()
    for ids in prepared:
        fetch(ids)
    wall, client, server = time.perf_counter() - began, time.process_time() - client_began, server_cpu_s()
    count = len(batches)
    spent = None if method.server_pid is None else (server - server_began) / count
    return Block(round, wall / count, client / count, spent)


def _server_clock(method: Method) -> Callable[[], float]:
    return cpu_clock(method.server_pid) if method.server_pid is not None else lambda: 0.0


def warm_up(methods: Sequence[Method], rows: int, step: int, batch_size: int) -> None:
    """Fetch every ``step``-th row once by every method: each page is in memory and mapped, each shard verified."""
    for method in (method for method in methods if not method.touches_every_page):
        for ids in np.array_split(np.arange(0, rows, step), math.ceil(rows / step / batch_size)):
            method.fetch(method.prepare(ids))
