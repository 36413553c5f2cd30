"""The demo's first part from end to end, quick: what it writes, and what it claims about cached and live labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from logitcache.client import connect
from logitcache.server.cli import cli
from logitcache.server.demo import digits, digits_agreement
from logitcache.server.demo.digits_task import dense_distillation_loss
from logitcache.server.demo.main import run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a quick demo that ran with a teacher of its own, trained for a shorter time than a user's."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITCACHE_DEMO_FOLDER", str(folder / "teacher"))
        patch.setattr(digits, "TEACHER_EPOCHS", 3)
        run(folder / "out", seeds=1, quick=True, only="digits")
        patch.setattr(digits, "_trained", None)  # a second call must not train
        digits.teacher()
    return folder / "out"


@pytest.fixture(scope="module")
def figures(out: Path) -> dict[str, Any]:
    """What the demo wrote as JSON."""
    content: dict[str, Any] = json.loads((out / "digits.json").read_text())
    return content


def test_the_demo_reports_every_method_with_accuracy_loss_and_the_parts_of_a_step(figures: dict[str, Any]) -> None:
    methods = {method["method"]: method for method in figures["methods"]}
    assert list(methods) == ["hard labels", "live teacher", "cached labels"]
    for method in methods.values():
        assert 0.5 < method["accuracy"] <= 1
        assert 0 < method["test_loss"] < 1.5
        assert method["step_ms"] >= max(method["teacher_ms"], method["waiting_ms"])
    assert [method["teacher_ms"] > 0 for method in methods.values()] == [False, True, False]
    assert figures["precompute_s"] > 0
    assert len(figures["runs"]) == 3


def test_cached_and_live_loss_agree_at_every_step_of_a_run(figures: dict[str, Any]) -> None:
    found = figures["agreement"]
    assert found["steps"] == figures["settings"]["epochs"] * figures["settings"]["steps_an_epoch"]
    assert found["holds"] is True
    # float16 labels are not the teacher's float32 logits: no difference at all would mean that nothing was compared.
    assert 0 < found["largest_difference"] <= found["allowed_there"] < 0.01


def test_the_demos_plot_is_a_png(out: Path) -> None:
    assert (out / "digits.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_demo_leaves_a_label_set_that_holds_the_teachers_own_ranking(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_DEMO_FOLDER", str(out.parent / "teacher"))
    ids = list(range(digits.BATCH))
    with torch.inference_mode():
        top = digits.teacher()(digits.train_set().images[: digits.BATCH]).argmax(dim=1)
    labels = connect(out / "demo-label-sets" / "digits")
    np.testing.assert_array_equal(labels.fetch(ids).indices[:, 0], top.numpy())
    labels.close()


def test_labels_of_another_temperature_exceed_the_allowed_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(64, 10, generator=generator) * scale for scale in (1, 4))
    targets = torch.zeros(64, dtype=torch.int64)
    right = dense_distillation_loss(student, teacher_logits=teacher, targets=targets)
    wrong = dense_distillation_loss(student, teacher_logits=teacher * 1.01, targets=targets)
    rounded = (teacher - teacher.amax(dim=1, keepdim=True)).half().float()
    close = dense_distillation_loss(student, teacher_logits=rounded, targets=targets)
    allowed = digits_agreement.allowed_difference(student, teacher)
    assert abs(close - right) <= allowed < abs(wrong - right)


def test_a_damaged_weights_file_is_replaced_by_the_same_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGITCACHE_DEMO_FOLDER", str(tmp_path))
    monkeypatch.setattr(digits, "TEACHER_EPOCHS", 1)
    first = digits.teacher().state_dict()
    (weights,) = tmp_path.iterdir()
    weights.write_bytes(weights.read_bytes()[:1000])
    again = digits.teacher().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_demo_told_to_write_into_a_file_names_it(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    result = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path / "taken"), "--quick"])
    assert result.exit_code == 1
    assert str(tmp_path / "taken") in result.stderr
    assert "--out" in result.stderr
