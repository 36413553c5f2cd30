"""Label sets that somebody hostile made, or made of a sound one: what each is, and what a reader must do about it.

Each begins with a copy of a sound label set (`BASES`) and changes it with `Attack.make`. What a reader may do is one of
four `Outcome`s; in none does it give out a row that is not the sound label set's, hang, or take memory that the bytes
of the folder do not account for.
"""

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tests.building import build, reference
from tests.runs import RANK_0, small_run

from logitcache.labels.identity import canonical_json, sha256_hex
from logitcache.storage.log import HEADER, MAGIC, Kind

Outcome = Literal["refused", "withdrawn", "missing", "served"]
"""``refused``: an error at opening, or at each fetch. ``withdrawn``: shard 1 has no labels any more, the others have.
``missing``: no label is there. ``served``: all are given out. All of it in a process that may have 6 GiB of addresses.
"""

SECRET = b"nothing of a store: a file of somebody else's\n"

TERABYTE = 1 << 40


@dataclass(frozen=True)
class Attack:
    """One hostile label set; ``make`` changes the sound one of its base that stands in a folder."""

    name: str
    base: str
    outcome: Outcome
    make: Callable[[Path], object]


def make_base(name: str, path: Path) -> Path:
    """A sound label set: pointwise, causal with texts, or a recording of texts that is not sealed."""
    if name == "points":
        return build(path, reference(3, short_by=4000))
    if name == "books":
        return build(path, reference(2, alignment="causal", ids="text", targets=True))
    run = small_run(6, ids="text")
    with run.begun(path) as recording:
        for place in run.places:
            recording.append(run.batch([place]), RANK_0)
    return path


BASES = ("points", "books", "run")


def outside(path: Path) -> Path:
    """A folder beside the store, for what links lead to."""
    folder = path.parent.parent / f"outside-{path.parent.name}-{path.name}"
    folder.mkdir(exist_ok=True)
    return folder


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def of(file: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda path: change(path / file)


# What may stand in the place of a file.


def pipe(file: Path) -> None:
    clear(file)
    os.mkfifo(file)


def folder(file: Path) -> None:
    clear(file)
    file.mkdir()


def sparse(file: Path) -> None:
    clear(file)
    with file.open("wb") as made:
        made.truncate(TERABYTE)


def sparse_behind(file: Path) -> None:
    with file.open("ab") as made:
        made.truncate(TERABYTE)


def link_to_itself(file: Path) -> None:
    clear(file)
    file.symlink_to(file.name)


def link_to_the_same(file: Path) -> None:
    """What a reader that followed it would find is sound."""
    moved = outside(file.parent) / file.name
    if file.exists():
        shutil.move(file, moved)
    file.symlink_to(moved)


def link_to_a_secret(file: Path) -> None:
    clear(file)
    secret = outside(file.parent) / "secret"
    secret.write_bytes(SECRET)
    file.symlink_to(secret)


def link_to_a_device(file: Path) -> None:
    clear(file)
    file.symlink_to("/dev/zero")


def bound_socket(file: Path) -> None:
    clear(file)
    before = Path.cwd()
    os.chdir(file.parent)  # a socket's path may have a hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
    finally:
        os.chdir(before)


SPECIAL = (pipe, folder, sparse, link_to_itself, link_to_the_same, link_to_a_secret, link_to_a_device, bound_socket)

# What may stand in a JSON file.

TEXTS: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(4096),
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "text": b'"zarr"',
    "deep-lists": b"[" * 200_000,
    "deep-objects": b'{"a":' * 200_000,
    "large-number": b"9" * 100_000,
    "exponent": b"1e999999",
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "byte-order-mark": b"\xef\xbb\xbf{}",
    "not-utf-8": b'{"a": "\xff"}',
    "raw-surrogate": b'{"a": "\xed\xa0\x80"}',
    "pickle": pickle.dumps({"attributes": {}}),
    "two-megabytes": b" " * (2 << 20) + b"{}",
}


def text(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


def edited(change: Callable[[Any], object]) -> Callable[[Path], object]:
    """Change what a JSON file holds."""

    def edit(file: Path) -> None:
        content = json.loads(file.read_bytes())
        change(content)
        file.write_bytes(canonical_json(content))

    return edit


def put(*keys: Any, value: Any) -> Callable[[Path], object]:
    """Put a value into a JSON file, at the end of these members and positions."""

    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return edited(change)


def manifest(*keys: Any, value: Any) -> Callable[[Path], object]:
    return of("zarr.json", put("attributes", "logitcache", *keys, value=value))


def identity(name: str, value: Any) -> Callable[[Path], object]:
    return manifest("identity", name, value=value)


def twice(member: str) -> Callable[[Path], object]:
    """A member that stands in a JSON file a second time, at its end, where many readers take the last."""

    def change(file: Path) -> None:
        content = file.read_bytes().rstrip()
        value = canonical_json(json.loads(content)[member])
        file.write_bytes(content[:-1] + b"," + canonical_json(member) + b":" + value + b"}")

    return change


def claiming(shards: int, slots: int) -> Callable[[Path], object]:
    """A manifest, and arrays that agree with it, of so many shards of so many slots; the bytes are those of before."""

    def change(path: Path) -> None:
        def shapes(found: Any) -> None:
            found["shape"][0] = shards * slots
            found["chunk_grid"]["configuration"]["chunk_shape"][0] = slots

        for file in path.glob("*/zarr.json"):
            edited(shapes)(file)
        manifest("shards", value={"examples": [slots] * shards, "rows": [slots] * shards})(path)
        manifest("rows_per_shard", value=slots)(path)
        manifest("examples_per_shard", value=slots)(path)

    return change


def wide(path: Path) -> None:
    """A row with two thousand million classes."""
    most = 2**31 - 1
    for name, dtype in (("indices", "uint32"), ("logits", "float16")):
        put("data_type", value=dtype)(path / name / "zarr.json")
        put("shape", 1, value=most)(path / name / "zarr.json")
        put("chunk_grid", "configuration", "chunk_shape", 1, value=most)(path / name / "zarr.json")
    identity("classes", most)(path)
    identity("k", most)(path)


def ids_of_holes(path: Path) -> None:
    """16 million ids that take no block of the disk, hashed as committed: in memory they would be half a gigabyte."""
    slots, examples = 1 << 24, 1 << 24
    shutil.rmtree(path / "generations")
    (path / "generations").mkdir()
    for number in range(3):
        (path / "commits" / f"{number}.json").unlink()
    claiming(1, slots)(path)
    identity("ids", "integer")(path)
    zeros: dict[int, str] = {}
    files = {}
    for name, row in (("ids", 8), ("fingerprint", 8), ("indices", 8), ("logits", 8), ("scalars", 12)):
        chunk = path / name / ("c.0" if name == "ids" else "c.0.0")
        with chunk.open("wb") as made:
            made.truncate(slots * row)
        if row not in zeros:
            zeros[row] = sha256_hex(bytes(slots * row))
        files[name] = {"bytes": slots * row, "sha256": zeros[row]}
    commit = {"shard": 0, "first_example": 0, "examples": examples, "rows": examples, "files": files}
    (path / "commits" / "0.json").write_bytes(canonical_json(commit))


def pickled_chunk(file: Path) -> None:
    with file.open("wb") as made:
        np.save(made, np.array([{"a": 1}] * 9, object), allow_pickle=True)


def swapped(one: str, other: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        first, second = path / one, path / other
        aside = first.with_name("aside")
        first.rename(aside)
        second.rename(first)
        aside.rename(second)

    return change


def copied(one: str, over: str) -> Callable[[Path], object]:
    return lambda path: (path / over).write_bytes((path / one).read_bytes())


def linked_root(path: Path) -> None:
    """The label set itself is a link to a sound one outside of the store."""
    moved = outside(path) / "moved"
    shutil.move(path, moved)
    path.symlink_to(moved)


def linked_beside(path: Path) -> None:
    """The label set itself is a link to another one of the same store."""
    moved = path.with_name(f"{path.name}.moved")
    shutil.move(path, moved)
    path.symlink_to(moved.name)


def file_for_folder(file: Path) -> None:
    clear(file)
    file.write_bytes(SECRET)


def linked_folder(file: Path) -> None:
    """A link to a folder with a file of somebody else's, which a writer that clears up would remove."""
    moved = outside(file.parent) / file.name
    if file.exists():
        shutil.move(file, moved)
    moved.mkdir(exist_ok=True)
    (moved / "secret").write_bytes(SECRET)
    file.symlink_to(moved)


def many_files(path: Path) -> None:
    """Commits and generations that belong to nothing, by the thousand."""
    for number in range(3000):
        (path / "commits" / f"{number + 10}.json").touch()
        (path / "generations" / f"{number + 10}.json").write_bytes(b"{}")


def strange_names(path: Path) -> None:
    for name in ("-1", "01", "1e3", "²", "9" * 240, "1\n", " 1", "٣", "0x1", "None"):
        (path / "commits" / f"{name}.json").write_bytes(b"{}")
        (path / "generations" / f"{name}.json").write_bytes(b"{}")


def header(rows: int, kind: int = Kind.ROWS) -> bytes:
    found = np.zeros(1, HEADER)
    found[0] = (MAGIC, rows, 0, kind, 0, 1)
    return found.tobytes()


def appended(content: bytes, holes_up_to: int = 0) -> Callable[[Path], object]:
    def change(file: Path) -> None:
        with file.open("ab") as opened:
            opened.write(content)
            opened.truncate(max(holes_up_to, opened.tell()))

    return change


def named_ids(ids: bytes) -> Callable[[Path], object]:
    """These bytes as the ids of a recording, hashed as its terms say."""

    def change(path: Path) -> None:
        (path / "recording" / "ids").write_bytes(ids)
        put("ids", value={"bytes": len(ids), "sha256": sha256_hex(ids)})(path / "recording" / "recording.json")

    return change


def _attacks() -> list[Attack]:
    found: list[Attack] = []

    def add(name: str, base: str, outcome: Outcome, make: Callable[[Path], object]) -> None:
        found.append(Attack(f"{base}: {name}", base, outcome, make))

    # Something else in the place of each file that a reader reads. Links are refused at opening where they stand in the
    # label set's own folder, and with the shard or record that they are for where they stand further down.
    files: dict[str, dict[str, Outcome]] = {
        "points": {
            "zarr.json": "refused",
            "logits/zarr.json": "refused",
            "commits/1.json": "withdrawn",
            "generations/1.json": "served",
            "logits/c.1.0": "withdrawn",
            "statistics/1.json": "served",
            "stamps.json": "served",
            "served.json": "served",
            "lock": "served",
        },
        "books": {"texts/1.json": "withdrawn", "ids/c.1.0": "withdrawn"},
        "run": {"recording/recording.json": "refused", "recording/ids": "refused", "recording/log": "refused"},
    }
    for base, outcomes in files.items():
        for file, outcome in outcomes.items():
            for change in SPECIAL:
                linked = "/" not in file and change.__name__.startswith("link")
                expected: Outcome = "refused" if linked else outcome
                if (file, change) == ("recording/log", sparse):
                    expected = "missing"
                add(f"{file} is {change.__name__.replace('_', ' ')}", base, expected, of(file, change))

    # A file or a link in the place of each folder.
    for name in ("logits", "commits", "generations", "statistics", "staging", "quarantine"):
        lacking: Outcome = "refused" if name in ("logits", "commits", "generations") else "served"
        add(f"{name} is a file", "points", lacking, of(name, file_for_folder))
        add(f"{name} is a linked folder", "points", "refused", of(name, linked_folder))
    add("texts is a linked folder", "books", "refused", of("texts", linked_folder))
    add("recording is a linked folder", "run", "refused", of("recording", linked_folder))
    add("a link that nobody asks for", "points", "refused", of("notes", link_to_a_secret))
    for base in BASES:
        add("a link out of the store", base, "refused", linked_root)
        add("a link within the store", base, "refused", linked_beside)

    # Anything in the place of JSON.
    for content, written in TEXTS.items():
        add(f"zarr.json reads {content}", "points", "refused", of("zarr.json", text(written)))
        add(f"ids/zarr.json reads {content}", "points", "refused", of("ids/zarr.json", text(written)))
        add(f"commit reads {content}", "points", "withdrawn", of("commits/1.json", text(written)))
        add(f"generation reads {content}", "points", "served", of("generations/1.json", text(written)))
        add(f"statistics read {content}", "points", "served", of("statistics/1.json", text(written)))
        add(f"stamps read {content}", "points", "served", of("stamps.json", text(written)))
        add(f"tally reads {content}", "points", "served", of("served.json", text(written)))
        add(f"recording.json reads {content}", "run", "refused", of("recording/recording.json", text(written)))
        add(f"texts read {content}", "books", "withdrawn", of("texts/1.json", text(written)))
        add(f"ids of a recording read {content}", "run", "refused", named_ids(written))
    add("a member twice", "points", "refused", of("zarr.json", twice("attributes")))
    add("a member of an array twice", "points", "refused", of("logits/zarr.json", twice("shape")))
    add("a member of a commit twice", "points", "withdrawn", of("commits/1.json", twice("rows")))
    add("a member of a generation twice", "points", "served", of("generations/1.json", twice("digest")))
    add("a member of a recording twice", "run", "refused", of("recording/recording.json", twice("terms")))

    # A manifest that claims what it has not, or what nobody has.
    for value in (0, -1, 2**31, 2**63, 2**64, 2**4000, 1.5, True, None, "4096", [4096]):
        add(f"rows_per_shard {value!r:.20}", "points", "refused", manifest("rows_per_shard", value=value))
        add(f"k {value!r:.20}", "points", "refused", identity("k", value))
        add(f"views {value!r:.20}", "points", "refused", identity("views", value) if value is not True else wide_views)
        add(f"shards {value!r:.20}", "points", "refused", manifest("shards", "rows", 1, value=value))
        add(f"examples recorded {value!r:.20}", "run", "refused", recorded_terms("examples", value))
    for name in ("teacher", "classes", "temperatures", "dtype", "alignment", "targets", "ids", "selection", "seed"):
        add(f"{name} is an object", "points", "refused", identity(name, {"a": [1]}))
        add(f"{name} is a large text", "points", "refused", identity(name, "x" * 500_000))
    add(
        "half a surrogate pair",
        "points",
        "refused",
        identity("teacher", {"name": "\ud800", "weights": "", "preprocessing": ""}),
    )
    add("100,000 temperatures", "points", "refused", identity("temperatures", [1 + n / 1e6 for n in range(100_000)]))
    add("2^40 examples", "points", "refused", claiming(512, 2**31))
    add("6,000 shards of 2^31", "points", "refused", claiming(6000, 2**31))
    add("6,001 shards", "points", "refused", claiming(6001, 4096))
    add("rows of 2^31 classes", "points", "refused", wide)
    add("ids of holes", "points", "missing", ids_of_holes)

    # Arrays that are not ours.
    codecs: dict[str, Any] = {
        "blosc": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "blosc", "configuration": {}}],
        "pickle": [{"name": "numcodecs.pickle", "configuration": {"protocol": 5}}],
        "numcodecs-json": [{"name": "numcodecs.json2", "configuration": {}}],
        "vlen-bytes": [{"name": "vlen-bytes"}],
        "sharding": [{"name": "sharding_indexed", "configuration": {"chunk_shape": [64, 4]}}],
        "none": [],
    }
    for name, value in codecs.items():
        add(f"codec {name}", "points", "refused", of("logits/zarr.json", put("codecs", value=value)))
    for dtype in ("object", "O", "|O8", "string", "bytes", "float64", "numpy.datetime64", {"name": "r16"}, None, 7):
        add(f"dtype {dtype}", "points", "refused", of("logits/zarr.json", put("data_type", value=dtype)))
        add(f"dtype of the identity {dtype}", "points", "refused", identity("dtype", dtype))
    others: dict[str, Any] = {
        "zarr_format": 2,
        "node_type": "group",
        "chunk_grid": {"name": "rectangular", "configuration": {"chunk_shape": [[4096], [4]]}},
        "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
        "fill_value": 1,
        "shape": [2**62, 5],
        "storage_transformers": [{"name": "elsewhere"}],
    }
    for key, value in others.items():
        add(f"array with another {key}", "points", "refused", of("logits/zarr.json", put(key, value=value)))
    add("pickled array", "points", "withdrawn", of("logits/c.1.0", pickled_chunk))
    add("a chunk and a terabyte", "points", "withdrawn", of("logits/c.1.0", sparse_behind))

    # Commits and generations that belong elsewhere.
    add("commit of another shard", "points", "withdrawn", copied("commits/0.json", "commits/1.json"))
    add("chunks of two arrays swapped", "points", "withdrawn", swapped("logits/c.1.0", "indices/c.1.0"))
    add(
        "commit of 2^62 bytes",
        "points",
        "withdrawn",
        of("commits/1.json", put("files", "logits", "bytes", value=2**62)),
    )
    add(
        "commit of no hash",
        "points",
        "withdrawn",
        of("commits/1.json", put("files", "logits", "sha256", value="x" * 64)),
    )
    add("commit of a file above", "points", "withdrawn", of("commits/1.json", put("files", "../secret", value={})))
    add(
        "generation of 10,000 commits",
        "points",
        "served",
        of("generations/1.json", put("commits", value=["0" * 64] * 10_000)),
    )
    add("thousands of records", "points", "served", many_files)
    add("records of strange names", "points", "served", strange_names)

    # Logs.
    log = "recording/log"
    add("a log and a terabyte", "run", "served", of(log, sparse_behind))
    add("a header of 2^63 rows", "run", "served", of(log, appended(header(2**63))))
    add("a header of 2^22 rows", "run", "served", of(log, appended(header(2**22), TERABYTE)))
    add("a header of an unknown kind", "run", "served", of(log, appended(header(0, 99) + bytes(200))))
    add("beginnings of frames", "run", "served", of(log, appended((header(2**23) + bytes(200)) * 500)))
    add("an empty log", "run", "missing", of(log, text(b"")))
    add("rows of 2^31 classes recorded", "run", "refused", wide_terms)
    return found


def wide_views(path: Path) -> None:
    identity("views", 4096)(path)


def recorded_terms(name: str, value: Any) -> Callable[[Path], object]:
    return of("recording/recording.json", put("terms", name, value=value))


def wide_terms(path: Path) -> None:
    file = path / "recording" / "recording.json"
    for name in ("classes", "k"):
        put("terms", "identity", name, value=2**31 - 1)(file)


ATTACKS = _attacks()
