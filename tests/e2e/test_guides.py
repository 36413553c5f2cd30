"""The guides are true: their code runs as it stands, one block after the other, in one folder."""

import re
import sys
from pathlib import Path

import pytest
from tests.e2e.test_readme import run

GUIDES = sorted((Path(__file__).parents[2] / "docs" / "guides").glob("*.md"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_code_of_a_guide_runs_as_it_stands(guide: Path, tmp_path: Path) -> None:
    found = re.findall(r"```(python|sh)\n(.*?)```", guide.read_text(), re.DOTALL)
    assert {language for language, _ in found} == {"python", "sh"}
    for number, (language, code) in enumerate(found):
        if named := re.match(r"# (\w+\.py)\n", code):
            (tmp_path / named.group(1)).write_text(code)
        elif language == "sh":
            run(tmp_path, "bash", "-ec", code)
        else:
            (tmp_path / f"block_{number}.py").write_text(code)
            run(tmp_path, sys.executable, "-W", "error", f"block_{number}.py")


@pytest.mark.parametrize("page", sorted(Path(__file__).parents[2].glob("docs/**/*.md")), ids=lambda path: path.stem)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / link).exists(), link
