"""Trying hostile folders one after the other in a process of bounded memory, which imports little to begin with."""

import resource
import shutil
import time
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.attacks.folders import ATTACKS, BASES, Attack, make_base
from tests.building import reference, writer_of

from logitcache.labels.errors import LogitcacheError, RowsMissing
from logitcache.storage import Readable, Recording, open_label_set

ADDRESSES = 6 << 30
"""Bytes of addresses that the process of all attacks may have: a sparse terabyte does not fit, nor 2^40 examples."""

SAMPLES = {
    "points": [0, 4095, 4096, 8191, 8192, 8287],
    "books": None,
    "run": None,
}
"""Ids that are asked for; None for all of a recording, and those at the ends of its shards of a text label set."""

Truth = dict[Any, dict[str, bytes]]


def sample_ids(base: str, path: Path) -> list[Any]:
    with closing(open_label_set(path)) as reader:
        known = reader.example_ids()
    if known is None or known.texts is None:
        return list(SAMPLES[base] or ())
    texts = list(known.texts)
    if base == "run":
        return texts
    edge = reference(2, alignment="causal", ids="text", targets=True).layout.span(1).start
    return [texts[0], texts[edge - 1], texts[edge], texts[-1]]


def rows_of(reader: Readable, id: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in reader.fetch([id]).arrays().items()}


def answers(path: Path, truth: Truth) -> list[str]:
    """What a reader says of each id: ``right``, ``missing``, ``refused``, or what must not be."""
    try:
        reader = open_label_set(path)
    except LogitcacheError:
        return ["refused"] * len(truth)
    found = []
    with closing(reader):
        for id, known in truth.items():
            try:
                found.append("right" if rows_of(reader, id) == known else "WRONG")
            except RowsMissing:
                found.append("missing")
            except LogitcacheError:
                found.append("refused")
        for ask in (reader.describe, reader.example_ids, reader.verify_all, reader.damaged):
            with suppress(LogitcacheError):
                ask()
        with suppress(LogitcacheError):
            reader.states(list(truth))
    return found


def outcome(base: str, found: list[str]) -> str:
    of_shard_1 = {"points": (2, 4), "books": (2, 4), "run": (0, 0)}[base]
    if len(set(found)) == 1:
        return {"right": "served"}.get(found[0], found[0])
    inside = found[slice(*of_shard_1)]
    others = found[: of_shard_1[0]] + found[of_shard_1[1] :]
    return "withdrawn" if (set(inside), set(others)) == ({"missing"}, {"right"}) else str(found)


def written_to(base: str, path: Path) -> None:
    """Somebody goes on writing there."""
    with suppress(LogitcacheError):
        if base == "run":
            with Recording(path) as recording:
                recording.stand()
                recording.seal()
        else:
            source = reference(3, short_by=4000) if base == "points" else BOOKS
            writer_of(path, source).close()


BOOKS = reference(2, alignment="causal", ids="text", targets=True)


def elsewhere(path: Path) -> dict[str, bytes]:
    """All that stands beside the store, which is nobody's to read or to change."""
    found = [file for file in sorted(path.parent.parent.rglob("outside-*/**/*")) if file.is_file()]
    return {str(file): file.read_bytes() for file in found if file.stat().st_size < 1 << 30}


def attack(attack: Attack, sound: dict[str, Path], truth: dict[str, Truth], folder: Path) -> tuple[str, float]:
    """What came of an attack, and in how many seconds."""
    path = Path(shutil.copytree(sound[attack.base], folder / "store" / "set"))
    attack.make(path)
    before = elsewhere(path)
    began = time.monotonic()
    try:
        found = outcome(attack.base, answers(path, truth[attack.base]))
        written_to(attack.base, path)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"[:300]
    seconds = time.monotonic() - began
    if elsewhere(path) != before:
        found += ", and changed what stands outside"
    shutil.rmtree(folder)
    return found, seconds


def all_attacks(names: list[str], folder: Path, told: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    sound = {base: make_base(base, folder / "sound" / base) for base in BASES}
    truth: dict[str, Truth] = {}
    for base, path in sound.items():
        ids = sample_ids(base, path)
        with closing(open_label_set(path)) as reader:
            truth[base] = {id: rows_of(reader, id) for id in ids}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for each in (each for each in ATTACKS if each.name in names):
        told.send((each.name, *attack(each, sound, truth, folder / "attacked")))
    told.send(("memory", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10, 0.0))
