"""Files damaged by the hundred, before a server opens their label set and while it serves it: no wrong row comes out.

Every trial damages one file of a copy of a sound label set, lets a client fetch over HTTP what that label set has, and
compares it bit by bit; then everything is verified, and fetched again. When damage was found is counted by its class,
the file and the moment. While a label set is served, its chunk files and its log are mapped: here they are damaged by
putting another file in their place. Bytes that change in a mapped file itself are the last test's.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.attacks.folders import BASES, make_base
from tests.attacks.trial import rows_of, sample_ids
from tests.building import build, reference
from tests.runs import small_run

from logitcache.client import HttpLabelSet
from logitcache.labels.errors import LogitcacheError
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage import LocalLabelSet, open_label_set

SEED = 20271
"""Of the choice of files, bits and lengths, written down before the run."""

DEFAULT_TRIALS, PROOF_TRIALS = 48, 576

Truth = dict[Any, dict[str, bytes]]


def flipped(file: Path, other: Path, rng: random.Random) -> bytes:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def truncated(file: Path, other: Path, rng: random.Random) -> bytes:
    content = file.read_bytes()
    return content[: rng.randrange(len(content))]


def appended(file: Path, other: Path, rng: random.Random) -> bytes:
    return file.read_bytes() + rng.randbytes(rng.randrange(1, 5000))


def empty(file: Path, other: Path, rng: random.Random) -> bytes:
    return b""


def deleted(file: Path, other: Path, rng: random.Random) -> None:
    return None


def of_another_shard(file: Path, other: Path, rng: random.Random) -> bytes:
    beside = [file.with_name(file.name.replace("1", "0", 1)), file.with_name("ids"), file]
    return next(each for each in beside if each.is_file()).read_bytes()


def of_another_label_set(file: Path, other: Path, rng: random.Random) -> bytes:
    return other.read_bytes()


def of_another_kind(file: Path, other: Path, rng: random.Random) -> bytes:
    files = [each for each in other.parent.parent.rglob("*") if each.is_file() and each.name != other.name]
    return rng.choice(sorted(files)).read_bytes()


DAMAGES: tuple[Callable[[Path, Path, random.Random], bytes | None], ...] = (
    flipped,
    truncated,
    appended,
    empty,
    deleted,
    of_another_shard,
    of_another_label_set,
    of_another_kind,
)


def damaged_files(path: Path, base: str) -> list[str]:
    """The files that rows depend on; of each kind that of shard 1 where there is one a shard."""
    if base == "run":
        return ["recording/recording.json", "recording/ids", "recording/log"]
    chunks = [str(file.relative_to(path)) for file in sorted(path.glob("*/c.1*"))]
    texts = ["texts/1.json"] if base == "books" else []
    return ["zarr.json", "logits/zarr.json", "commits/1.json", "generations/1.json", *chunks, *texts]


def kind_of(file: str) -> str:
    return "chunk" if "/c." in file else file


def put(file: Path, content: bytes | None) -> None:
    """Another file under its name, as what copies files makes it; what is mapped stays mapped."""
    if content is None:
        file.unlink()
        return
    aside = file.with_name("aside")
    aside.write_bytes(content)
    aside.rename(file)


def told_by(url: str, name: str, truth: Truth) -> set[str]:
    """What fetches over HTTP gave: ``right``, ``error``, ``WRONG``."""
    found = set()
    try:
        reader = HttpLabelSet(url, name, retries=0)
    except LogitcacheError:
        return {"error"}
    with closing(reader):
        for id, known in truth.items():
            try:
                rows = {field: array.tobytes() for field, array in reader.fetch([id]).arrays().items()}
                found.add("right" if rows == known else "WRONG")
            except LogitcacheError:
                found.add("error")
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path, Truth]]:
    """By base: a label set, another one of the same shape, and rows of the first."""
    folder = tmp_path_factory.mktemp("sound")
    found = {}
    for base in BASES:
        path, other = make_base(base, folder / base), folder / f"{base}-other"
        if base == "run":
            small_run(6, ids="text", seed=5).record(other)
        elif base == "points":
            build(other, reference(3, short_by=4000, seed=5))
        else:
            build(other, reference(2, alignment="causal", ids="text", targets=True, seed=5))
        ids = sample_ids(base, path)
        with closing(open_label_set(path)) as reader:
            found[base] = path, other, {id: rows_of(reader, id) for id in ids}
    return found


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    (tmp_path / "store").mkdir()
    made = Catalog(tmp_path / "store", verify="strict")
    yield made
    made.close()


def trial(number: int, url: str, catalog: Catalog, sound: Any, rng: random.Random) -> tuple[str, str, str, str]:
    """Damage, file, moment, and when it was found."""
    base = BASES[number // 2 % len(BASES)]
    serving = number % 2 == 1
    path, other, truth = sound[base]
    name = f"set-{number}"
    copy = Path(shutil.copytree(path, catalog.store / name))
    file = rng.choice(damaged_files(copy, base))
    damage = DAMAGES[number // 6 % len(DAMAGES)]
    catalog.look_again()
    if serving:
        catalog.get(name).verify_all()
        assert told_by(url, name, truth) == {"right"}
    put(copy / file, damage(copy / file, other / file, rng))
    found = told_by(url, name, truth)
    assert found <= {"right", "error"}, (damage.__name__, base, file, serving)
    when = "at the next fetch" if serving else "at opening or first fetch"
    if "error" not in found:
        when = "harmless"
        try:
            reports = catalog.get(name).verify_all()
        except LogitcacheError:
            when = "by verify"
        else:
            when = when if all(report.ok for report in reports) else "by verify"
        catalog.look_again()
        found = told_by(url, name, truth)
        assert found <= {"right", "error"}, (damage.__name__, base, file, serving)
        if when == "harmless" and "error" in found:
            when = "at the next look"
    return damage.__name__, f"{base} {kind_of(file)}", "serving" if serving else "before", when


def trials(count: int, catalog: Catalog, sound: Any) -> None:
    rng = random.Random(SEED)
    with running(create_app(catalog)) as url:
        found = Counter(trial(number, url, catalog, sound, rng) for number in range(count))
    for moment in ("before", "serving"):
        for damage in DAMAGES:
            counted: Counter[str] = Counter()
            for (name, _, at, when), times in found.items():
                if (name, at) == (damage.__name__, moment):
                    counted[when] += times
            print(f"{moment:8} {damage.__name__:21} {dict(counted)}")
    harmless = Counter(file for (_, file, _, when), times in found.items() if when == "harmless" for _ in range(times))
    print(f"{found.total()} damages, seed {SEED}: 0 wrong rows; harmless: {dict(harmless)}")


def test_damaged_files_give_right_rows_or_errors(catalog: Catalog, sound: Any) -> None:
    trials(DEFAULT_TRIALS, catalog, sound)


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_files_damaged_by_the_hundred_give_right_rows_or_errors(catalog: Catalog, sound: Any) -> None:
    trials(PROOF_TRIALS, catalog, sound)


def test_bytes_that_change_in_a_file_that_is_served_are_found_when_it_is_verified_again_and_not_before(
    sound: Any, tmp_path: Path
) -> None:
    """What no stamp and no fetch can tell: the file was hashed, and is the same file still."""
    path, _, truth = sound["points"]
    copy = Path(shutil.copytree(path, tmp_path / "store" / "set"))
    with closing(LocalLabelSet(copy)) as reader:
        reader.verify_all()
        with (copy / "logits" / "c.1.0").open("r+b") as chunk:
            chunk.write(b"\x11")
        assert rows_of(reader, 4096) != truth[4096]
        assert [report.shard for report in reader.verify_all() if not report.ok] == [1]
        with pytest.raises(LogitcacheError, match="damaged"):
            reader.fetch([4096])
