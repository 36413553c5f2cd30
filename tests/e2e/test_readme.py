"""The README is true: its code runs as it stands, and it names every command and route."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.test_restart import served

from logitcache.server.cli import cli
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_its_code_runs_as_it_stands(tmp_path: Path) -> None:
    project, training = blocks("python")
    (tmp_path / "my_project.py").write_text(project)
    [commands] = [block for block in blocks("sh") if "precompute my-labels" in block]
    planned, labelled, serving = commands.splitlines()
    assert serving == "logitcache serve"
    assert "20,000 of 20,000 rows to label" in run(tmp_path, "bash", "-c", planned)
    assert not (tmp_path / "label-sets").exists()
    assert "20,000 labelled now" in run(tmp_path, "bash", "-c", labelled)
    assert "nothing left to label" in run(tmp_path, "bash", "-c", labelled)
    with served(tmp_path / "label-sets") as (_, port):
        assert "http://localhost:8000/" in training
        (tmp_path / "train.py").write_text(training.replace("http://localhost:8000/", f"http://127.0.0.1:{port}/"))
        assert "20,000 rows" in run(tmp_path, sys.executable, "-W", "error", "train.py")
    (tmp_path / "local.py").write_text(training.replace("http://localhost:8000/", "label-sets/"))
    run(tmp_path, sys.executable, "local.py")


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_is_named(command: str) -> None:
    assert re.search(rf"`(logitcache )?{command}\b", README)


def test_every_route_is_named_and_exists(tmp_path: Path) -> None:
    app = create_app(Catalog(tmp_path))
    routes = {re.sub(r":\w+}", "}", path) for path in app.openapi()["paths"]} | {"/docs"}
    named = set(re.findall(r"(/[a-z{][\w{}/-]*)`", README.partition("| route |")[2].partition("\n\n")[0]))
    assert named == routes


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_leads_somewhere(link: str) -> None:
    assert (Path(__file__).parents[2] / link).exists()


def test_every_make_target_and_extra_exists() -> None:
    root = Path(__file__).parents[2]
    makefile, project = (root / "Makefile").read_text(), (root / "pyproject.toml").read_text()
    for target in set(re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for extra in set(re.findall(r"'\.\[(\w+)\]'", README)):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
