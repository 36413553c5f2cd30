"""The pages under ``docs`` name what exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_attack_that_is_told_of_names_tests_that_there_are() -> None:
    rows = re.findall(r"^\| .* \| (`.*`) \|$", (ROOT / "docs" / "security.md").read_text(), re.MULTILINE)
    named = [name.strip("`").split("::") for row in rows for name in row.split(", ") if "::" in name]
    assert len(named) > 20
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (file, test)


def test_every_file_of_tests_that_a_page_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/]+\.py)`", page.read_text())}
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
