"""Label sets that an earlier version wrote are read by this one, and by a reader that knows docs/format.md alone."""

import base64
import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.golden.reader import Reader, canonical

from logitcache.labels.identity import canonical_json
from logitcache.storage import LocalLabelSet
from logitcache.storage.manifest import read_layout
from logitcache.storage.writer import LabelSetWriter

ARCHIVES = sorted(Path(__file__).parent.glob("format-*.zip"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a label set, and what must be found in it."""
    folder = tmp_path_factory.mktemp("golden")
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(folder)
    told = json.loads((folder / "expected.json").read_bytes())
    told["arrays"] = {
        name: np.frombuffer(base64.b64decode(data), dtype).reshape(shape)
        for name, (dtype, shape, data) in told["arrays"].items()
    }
    (label_set,) = [path for path in folder.iterdir() if path.is_dir()]
    return label_set, told


def first_rows(told: dict[str, Any]) -> np.ndarray:
    counts = told["arrays"].get("row_count", np.ones(len(told["ids"]))).astype(int)
    return np.concatenate([[0], np.cumsum(counts)])


def test_there_is_a_golden_label_set_of_each_kind() -> None:
    assert len(ARCHIVES) == 5


def test_golden_bytes_are_those_that_were_written() -> None:
    """Regenerating an archive would hide that a version no longer reads what an earlier one wrote."""
    listed = (Path(__file__).parent / "SHA256SUMS").read_text().split()
    assert listed == [part for path in ARCHIVES for part in (hashlib.sha256(path.read_bytes()).hexdigest(), path.name)]


def test_this_version_reads_every_generation(golden: tuple[Path, dict[str, Any]]) -> None:
    path, told = golden
    arrays, first = told["arrays"], first_rows(told)
    reader = LocalLabelSet(path)
    description = reader.describe()
    assert [each.digest for each in description.generations] == told["digests"]
    for digest, examples in zip(told["digests"], told["examples"], strict=True):
        order = np.random.default_rng(0).permutation(examples)
        soft = reader.fetch([told["ids"][at] for at in order], digest=digest)
        rows = np.concatenate([np.arange(first[at], first[at + 1]) for at in order])
        columns = description.row_spec.columns
        assert soft.digest == digest
        assert np.array_equal(soft.indices, arrays["indices"][rows])
        assert np.array_equal(soft.logits, arrays["logits"][rows])
        assert np.array_equal(soft.logit_max, arrays["scalars"][rows, columns.index("logit_max")])
        tails = arrays["scalars"][rows, 1 : 1 + len(soft.temperatures)]
        assert np.array_equal(soft.tail_logsumexp, tails)
        assert np.array_equal(soft.fingerprint, arrays["fingerprint"][order, 0])
        for name in ("tokens", "target"):
            found = getattr(soft, name)
            assert (found is None) == (name not in arrays)
            assert found is None or np.array_equal(found, arrays[name][rows])
        if soft.target_logit is not None:
            assert np.array_equal(soft.target_logit, arrays["scalars"][rows, -1], equal_nan=True)
    assert all(report.ok for report in reader.verify_all())
    reader.close()


def test_a_reader_written_from_the_documentation_alone_finds_the_same(golden: tuple[Path, dict[str, Any]]) -> None:
    path, told = golden
    first = first_rows(told)
    for digest, examples in zip(told["digests"], told["examples"], strict=True):
        reader = Reader(path, digest)
        assert set(reader.places) == set(told["ids"][:examples])
        for at in range(examples):
            for name, rows in reader.fetch(told["ids"][at]).items():
                where: Any = at if name == "fingerprint" else slice(first[at], first[at + 1])
                assert np.array_equal(rows, told["arrays"][name][where], equal_nan=name in ("scalars", "logits"))
    assert Reader(path).digest == told["digests"][-1]


def test_canonical_json_is_as_the_documentation_says() -> None:
    value = {"b": ['\x7f\x1f\b\x80😀/é"\\', 1.0, 0.01, 2.5], "a": None}
    expected = rb'{"a":null,"b":["\u007f\u001f\b\u0080\ud83d\ude00/\u00e9\"\\",1.0,0.01,2.5]}'
    assert canonical_json(value) == canonical(value) == expected


def test_that_reader_is_short_and_knows_numpy_and_json_alone() -> None:
    source = (Path(__file__).parent / "reader.py").read_text()
    imports = {line.split()[1] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imports == {"hashlib", "json", "numpy", "pathlib", "typing"}
    assert len(source.splitlines()) <= 100


@pytest.mark.parametrize("victim", ["commits/0.json", "indices/c.1.0"])
def test_that_reader_refuses_damage(golden: tuple[Path, dict[str, Any]], tmp_path: Path, victim: str) -> None:
    path = damaged(golden, tmp_path, victim)
    with pytest.raises(ValueError, match=r"damaged|another commit|Expecting|delimiter|Invalid|codec|Unterminated"):
        Reader(path)


def test_both_readers_pass_over_a_damaged_generation(golden: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, digests = damaged(golden, tmp_path, "generations/3.json"), golden[1]["digests"]
    assert Reader(path).digest == digests[1]
    assert Reader(path, digests[0]).digest == digests[0]
    with pytest.raises(ValueError, match="no generation sha256"):
        Reader(path, digests[2])
    reader = LocalLabelSet(path)
    assert [each.digest for each in reader.describe().generations] == digests[:2]
    reader.close()


def damaged(golden: tuple[Path, dict[str, Any]], tmp_path: Path, victim: str) -> Path:
    path = shutil.copytree(golden[0], tmp_path / "set")
    data = bytearray((path / victim).read_bytes())
    data[20] ^= 1
    (path / victim).write_bytes(data)
    return Path(path)


def test_this_version_writes_the_same_bytes(golden: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Commits, generations and texts byte for byte: their hashes stand for the chunk files."""
    layout = read_layout(golden[0])
    with LabelSetWriter(golden[0], layout) as old, LabelSetWriter(tmp_path / "set", layout.first(1)) as new:
        for shard in range(layout.shards):
            if shard:
                new.grow(layout.first(shard + 1))
            arrays = {name: old.stored(shard, name) for name in layout.arrays}
            new.commit(shard, arrays, {}, old.stored_texts(shard) if layout.identity.ids == "text" else None)
            new.seal()
    hashed = [*golden[0].glob("commits/*"), *golden[0].glob("generations/*"), *golden[0].glob("texts/*")]
    assert len(hashed) >= 2 * layout.shards
    for file in hashed:
        assert (tmp_path / "set" / file.relative_to(golden[0])).read_bytes() == file.read_bytes(), file
