"""Whatever bytes stand in a label set's small files: a reader gives errors of ours, or rows that are right.

A sound file is changed as hypothesis chooses: a value in its JSON, or some of its bytes. The default suite tries 100
changes, `make proof` 20,000.
"""

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.attacks.folders import BASES, make_base
from tests.attacks.trial import answers, rows_of, sample_ids

from logitcache.labels.identity import canonical_json
from logitcache.storage import open_label_set

FILES = {
    "points": ["zarr.json", "logits/zarr.json", "commits/1.json", "generations/1.json", "statistics/1.json"],
    "books": ["zarr.json", "tokens/zarr.json", "commits/1.json", "generations/1.json", "texts/1.json"],
    "run": ["recording/recording.json", "recording/ids", "recording/log"],
}
CASES = [(base, file) for base, files in FILES.items() for file in files]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)

Sound = dict[str, tuple[Path, dict[Any, dict[str, bytes]]]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """By base a sound label set, and the rows of some of its ids."""
    found: Sound = {}
    for base in BASES:
        path = make_base(base, tmp_path_factory.mktemp("sound") / base)
        ids = sample_ids(base, path)
        with closing(open_label_set(path)) as reader:
            found[base] = path, {id: rows_of(reader, id) for id in ids}
    return found


def places_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value can be changed: the first few members and items at every level."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    return [at, *(place for key, each in inner for place in places_in(each, (*at, key)))]


def changed(content: bytes, data: st.DataObject) -> bytes:
    if content[:1] in (b"{", b"[") and data.draw(st.booleans()):
        value = json.loads(content)
        place = data.draw(st.sampled_from(places_in(value)))
        if not place:
            return json.dumps(data.draw(JSON)).encode()
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = data.draw(JSON)
        try:
            return canonical_json(value)
        except ValueError:
            return json.dumps(value).encode()
    at = data.draw(st.integers(0, len(content)))
    until = data.draw(st.integers(at, min(len(content), at + 100)))
    return content[:at] + data.draw(st.binary(max_size=100)) + content[until:]


def check(data: st.DataObject, sound: Sound, folder: Path) -> None:
    base, file = data.draw(st.sampled_from(CASES))
    path, truth = sound[base]
    shutil.rmtree(folder / "store", ignore_errors=True)
    copy = Path(shutil.copytree(path, folder / "store" / "set", copy_function=linked_or_copied(file)))
    (copy / file).write_bytes(changed((path / file).read_bytes(), data))
    assert set(answers(copy, truth)) <= {"right", "missing", "refused"}


def linked_or_copied(file: str) -> Any:
    """Copy what is changed or is small; other files are given another name, which costs nothing."""

    def place(source: str, target: str) -> str:
        if target.endswith(file) or Path(source).stat().st_size < 4096:
            return shutil.copy2(source, target)
        Path(target).hardlink_to(source)
        return target

    return place


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=100, suppress_health_check=QUIET)
@given(data=st.data())
def test_a_changed_file_gives_an_error_of_ours_or_right_rows(data: st.DataObject, sound: Sound, tmp_path: Path) -> None:
    check(data, sound, tmp_path)


@pytest.mark.proof
@pytest.mark.timeout(7200)
@settings(max_examples=20_000, suppress_health_check=QUIET)
@given(data=st.data())
def test_changed_files_by_the_thousand_give_errors_of_ours_or_right_rows(
    data: st.DataObject, sound: Sound, tmp_path: Path
) -> None:
    check(data, sound, tmp_path)
