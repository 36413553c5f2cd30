"""The repository's shape: what an import root may hold, what the public surface is, and files that tools read."""

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import logitcache.client
import logitcache.labels
import logitcache.server
import logitcache.storage

TOP = Path(__file__).parents[2]
IMPORT_ROOTS = ("labels", "storage", "server", "client")


def _pins() -> dict[str, str]:
    lines = (TOP / "constraints.txt").read_text().splitlines()
    pins = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def test_the_namespace_has_no_init_of_its_own_that_would_hide_its_other_parts() -> None:
    assert [str(path) for root in IMPORT_ROOTS for path in (TOP / root / "logitcache").glob("__init__.py*")] == []


@pytest.mark.parametrize("root", IMPORT_ROOTS)
def test_an_import_root_holds_its_package_and_nothing_else_that_could_be_imported(root: str) -> None:
    allowed = {"logitcache", "Dockerfile", "README.md", "__pycache__"}
    assert {path.name for path in (TOP / root).iterdir()} <= allowed
    assert [path.name for path in (TOP / root / "logitcache").iterdir() if path.name != "__pycache__"] == [root]
    assert (TOP / root / "logitcache" / root / "py.typed").is_file()


def test_torchvision_and_torchaudio_are_not_installed() -> None:
    # They bring builds of torch of their own, which break what else is installed beside them.
    installed = {canonicalize_name(found.name) for found in distributions()}
    assert not installed & {"torchvision", "torchaudio"}


def test_the_published_names_of_the_client_are_these() -> None:
    assert sorted(logitcache.client.__all__) == [
        "AttachedLoader",
        "DeadlineExceeded",
        "Decay",
        "Description",
        "DigestChanged",
        "EveryNth",
        "FetchedLabels",
        "FirstSteps",
        "HttpLabelSet",
        "InvalidRequest",
        "LabelMismatch",
        "LabelSetNotFound",
        "Labels",
        "LogitcacheError",
        "MissingExtra",
        "Mixing",
        "NotFound",
        "RangeOutside",
        "Recorder",
        "RecorderReplaced",
        "RowsMissing",
        "Schedule",
        "ServerUnreachable",
        "SeveralLabels",
        "ShapeMismatch",
        "SoftLabelTensors",
        "SoftLabels",
        "Stats",
        "TeacherId",
        "TeacherMismatch",
        "Unavailable",
        "UndeclaredTemperature",
        "WithProbability",
        "WrongLabels",
        "connect",
        "distillation_loss",
        "kl_divergence",
        "mixing",
        "record",
        "replay",
        "seed_for",
        "seeded",
        "view_of",
        "with_ids",
        "with_views",
    ]


@pytest.mark.parametrize("package", [logitcache.client, logitcache.storage, logitcache.labels, logitcache.server])
def test_every_published_name_exists(package: Any) -> None:
    assert [name for name in getattr(package, "__all__", []) if not hasattr(package, name)] == []


def test_every_direct_dependency_is_pinned_within_its_published_range() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    requirements = [Requirement(text) for text in texts if not text.startswith("logitcache")]
    pins = _pins()
    assert len(requirements) > 20
    for requirement in requirements:
        assert Version(pins[canonicalize_name(requirement.name)]) in requirement.specifier


def test_the_constraints_leave_the_build_of_torch_to_the_machine() -> None:
    assert _pins()["torch"] == "2.13.0"
    assert not any("+" in version for version in _pins().values())


@pytest.mark.parametrize("target", ["demo", "test", "smoke", "check", "bench", "proof", "lock", "clean"])
def test_the_makefile_knows_how_to_make(target: str) -> None:
    make = shutil.which("make")
    assert make, "make is not installed"
    done = subprocess.run([make, "-n", target], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_ci_runs_the_checks_and_the_tests() -> None:
    script = TOP / ".ci" / "run"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert re.findall(r"^make (\w+)", script.read_text(), re.MULTILINE) == ["check", "test", "smoke"]


def test_a_commit_passes_the_same_commands_as_make_check() -> None:
    recipe = (TOP / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()[1:]]
    (local,) = yaml.safe_load((TOP / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in local["hooks"]] == commands


def test_compose_publishes_to_this_machine_alone_and_serves_after_labelling() -> None:
    services = yaml.safe_load((TOP / "docker-compose.yml").read_text())["services"]
    assert set(services) == {"precompute", "server"}
    assert all(port.startswith("127.0.0.1:") for port in services["server"]["ports"])
    assert services["server"]["depends_on"]["precompute"]["condition"] == "service_completed_successfully"
    assert services["server"]["image"] == services["precompute"]["image"]
    for service in services.values():
        assert (TOP / service["build"]["dockerfile"]).is_file()
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["volumes"] == ["label-sets:/var/lib/logitcache"]
