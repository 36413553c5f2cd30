"""What is compared with what, and how many times as fast we want to be: set before they were measured.

A goal is a bound on the median ratio of rates within the rounds, one for each batch size. A pair without one is shown
for what it tells. A goal that is missed is printed as missed and fails nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["local", "http", "sequences"]


@dataclass(frozen=True)
class Pair:
    """Our method, the other one, and the least ratio of rates that we want, by batch size in rising order."""

    method: str
    against: str
    least: tuple[float, ...] = ()


PAIRS: dict[Part, tuple[Pair, ...]] = {
    "local": (
        Pair("local", "memmap", (0.9, 0.9, 0.9)),
        Pair("local", "memmap, records"),
        Pair("local", "LMDB", (15, 15, 15)),
        Pair("local", "HF datasets", (150, 150, 150)),
        Pair("local", "HF datasets, packed"),
        Pair("local", "zarr-python", (5000, 5000, 5000)),
    ),
    "http": (
        Pair("HTTP", "Redis", (2, 5, 8)),
        Pair("HTTP", "LMDB", (1.5, 3, 5)),
        Pair("HTTP", "JSON", (10, 20, 40)),
        Pair("HTTP", "JSON, flat"),
        Pair("HTTP", "binary", (2, 2, 2)),
    ),
    "sequences": (
        Pair("HTTP", "nginx range", (1,)),
        Pair("HTTP", "nginx range, copied", (1,)),
        Pair("HTTP", "nginx range, raw reader"),
        Pair("HTTP, raw reader", "nginx range, raw reader"),
        Pair("HTTP", "binary", (4,)),
        Pair("local", "memmap"),
    ),
}


def methods_of(pairs: Iterable[Pair]) -> list[str]:
    """The methods that these pairs need, each once."""
    return list(dict.fromkeys(name for pair in pairs for name in (pair.method, pair.against)))


def judged(ratios: Sequence[dict[str, Any]], pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """The ratios of `report.ratios`, each with its goals and whether they were met, by batch size."""
    least = {(pair.method, pair.against): pair.least for pair in pairs}
    found = []
    for ratio in ratios:
        rates = ratio["rate"]
        wanted = dict(zip(rates, least[ratio["method"], ratio["against"]], strict=False))
        met = {size: rates[size]["median"] >= goal for size, goal in wanted.items()}
        found.append(ratio | {"goal": wanted, "met": met})
    return found
