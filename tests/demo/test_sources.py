"""Sources of the standard library: which files are read, and where they are cut."""

from pathlib import Path

import pytest

from logitcache.labels.errors import DatasetFault
from logitcache.server.demo.sources import Source, standard_library

PROGRAM = '''"""What it is."""

import os

def first():
    return 1

@decorated
@twice
def second():
    def inner():
        pass

class Third:
    x = 1
'''


def test_a_file_is_cut_where_definitions_begin_and_their_decorators_stay_with_them() -> None:
    source = Source("a.py", tuple(PROGRAM.splitlines(keepends=True)))
    parts = ["".join(source.lines[line] for line in lines) for lines in source.definitions()]
    assert "".join(parts) == PROGRAM
    begun = [part.split("\n", 1)[0] for part in parts]
    assert begun == ['"""What it is."""', "def first():", "@decorated", "    def inner():", "class Third:"]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder like a standard library's."""
    for name in ("z.py", "a.py", "json/decoder.py", "test/test_a.py", "site-packages/b.py", "_sysconfigdata_x.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("def f():\n    return 'ü'\n", encoding="utf-8")
    (tmp_path / "empty.py").touch()
    return tmp_path


def test_sources_come_in_the_order_of_their_paths_without_tests_and_other_packages(library: Path) -> None:
    found = standard_library(120, library)
    assert [source.path for source in found] == ["a.py", "json/decoder.py", "z.py"]
    assert found[0].lines == ("def f():\n", "    return 'ü'\n")


def test_of_too_much_text_every_nth_file_is_read(library: Path) -> None:
    assert [source.path for source in standard_library(50, library)] == ["a.py", "z.py"]


def test_a_python_without_its_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetFault, match="0 bytes of Python sources") as raised:
        standard_library(1_000_000, tmp_path)
    assert str(tmp_path) in raised.value.message
