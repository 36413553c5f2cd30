"""The wheel as users get it: what it holds, and what a light installation of it can do in an environment of its own."""

import json
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tests.building import build, reference

from logitcache.server.demo.local_server import serving
from logitcache.storage import LocalLabelSet

TOP = Path(__file__).parents[2]
PACKAGES = ("labels", "storage", "server", "client")
HEAVY = ("torch", "zarr", "fastapi", "uvicorn", "pydantic", "structlog", "rich", "sklearn", "matplotlib")

FETCH = """
import json, sys
from logitcache.client import RowsMissing, connect
labels = connect(sys.argv[1])
soft = labels.fetch([5000, 3, 3])
try:
    labels.fetch([3, 10**9])
except RowsMissing as error:
    missing = error.ids
found = {"digest": soft.digest, "indices": soft.indices.tolist(), "logits": soft.logits.tolist()}
print(json.dumps(found | {"missing": missing, "modules": sorted(sys.modules)}))
"""


def _run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    done = _run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, TOP)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def light(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with nothing but a bare install of the wheel."""
    place = tmp_path_factory.mktemp("light")
    venv.create(place, with_pip=True)
    done = _run(place / "bin" / "pip", "install", "--quiet", "-c", TOP / "constraints.txt", wheel)
    assert done.returncode == 0, done.stdout + done.stderr
    return place / "bin"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the label set ``digits``."""
    folder = tmp_path_factory.mktemp("light-store")
    build(folder / "digits", reference(shards=2))
    return folder


def test_the_wheel_holds_our_packages_and_nothing_at_the_top_but_the_namespace(wheel: Path) -> None:
    names = [Path(name) for name in zipfile.ZipFile(wheel).namelist()]
    top = {name.parts[0] for name in names if not name.parts[0].endswith(".dist-info")}
    assert top == {"logitcache"}
    assert {name.parts[1] for name in names if name.parts[0] == "logitcache"} == set(PACKAGES)
    assert {str(name) for name in names if name.name == "py.typed"} == {f"logitcache/{it}/py.typed" for it in PACKAGES}
    assert {name.suffix for name in names if name.parts[0] == "logitcache"} <= {".py", ".typed"}


def test_the_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    roots = [TOP / package for package in PACKAGES]
    assert packed == {path.relative_to(root).as_posix() for root in roots for path in root.rglob("*.py")}


def test_the_wheel_asks_for_nothing_heavy_without_an_extra(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    plain = [need for need in fields.get_all("Requires-Dist", []) if "extra ==" not in need]
    names = {Requirement(need).name for need in plain}
    assert "numpy" in names
    assert not names & {*HEAVY, "scikit-learn"}
    assert fields["License-Expression"] == "Apache-2.0"


def test_a_light_install_has_no_torch_zarr_or_fastapi(light: Path) -> None:
    code = f"from importlib.util import find_spec; print([name for name in {HEAVY!r} if find_spec(name)])"
    done = _run(light / "python", "-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_a_light_installs_command_helps(light: Path) -> None:
    done = _run(light / "logitcache", "--help")
    assert done.returncode == 0, done.stderr
    assert {"precompute", "serve", "fetch", "demo"} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["precompute", "digits", "--teacher", "math:sqrt", "--dataset", "math:sqrt", "--top-k", "2"], "teacher"),
        (["serve"], "server"),
        (["demo"], "demo"),
    ],
)
def test_a_light_installs_command_names_the_extra_that_is_missing(
    light: Path, tmp_path: Path, arguments: list[str], extra: str
) -> None:
    done = _run(light / "logitcache", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert f"pip install 'logitcache[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_light_install_reads_a_folder_from_the_command_line(light: Path, store: Path) -> None:
    done = _run(light / "logitcache", "fetch", "digits", "3", "--store", store)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["indices"] == LocalLabelSet(store / "digits").fetch([3]).indices.tolist()


def test_a_light_install_fetches_from_a_real_server(light: Path, store: Path, tmp_path: Path) -> None:
    expected = LocalLabelSet(store / "digits").fetch([5000, 3, 3])
    with serving(store, tmp_path / "log") as url:
        done = _run(light / "python", "-c", FETCH, f"{url}/digits")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["digest"] == expected.digest
    assert found["indices"] == expected.indices.tolist()
    assert found["logits"] == expected.logits.tolist()
    assert found["missing"] == [10**9]
    assert not set(found["modules"]) & set(HEAVY)
