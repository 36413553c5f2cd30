"""Several teachers as one: what is stored is the mean of their distributions, whatever their order."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests.server import specimens
from tests.server.test_precompute import HERE, request, rows

from logitcache.labels.errors import IdentityChanged, InvalidRequest, LogitcacheError, TeacherFault
from logitcache.labels.identity import TeacherId
from logitcache.server.cli import cli
from logitcache.server.labelling.batches import Batch
from logitcache.server.labelling.ensembles import Ensemble
from logitcache.server.labelling.items import Kind, read_item
from logitcache.server.labelling.precompute import Summary, precompute
from logitcache.server.labelling.teachers import Teacher


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def label(store: Path, *teachers: str, **changes: Any) -> Summary:
    named = tuple(f"{HERE}:{teacher}" for teacher in teachers)
    return precompute(dataclasses.replace(request(store, **changes), teacher=named))


def mean_logits(*models: torch.nn.Module) -> np.ndarray:
    """Of every example, in float64."""
    inputs = torch.stack([torch.as_tensor(specimens.data()[at][0]) for at in range(specimens.EXAMPLES)])
    with torch.no_grad():
        probabilities = [model.double().eval()(inputs.double()).softmax(-1).numpy() for model in models]
    return np.asarray(np.log(np.mean(probabilities, axis=0)))


def test_what_is_stored_is_the_mean_of_the_distributions(store: Path) -> None:
    label(store, "good_teacher", "mended_teacher", dtype="float32")
    expected = mean_logits(specimens.good_teacher(), specimens.mended_teacher())
    soft = rows(store / "set")
    order = np.argsort(-expected, 1)[:, :3]
    # Classes that are nearly alike may change places.
    same = (soft.indices == order).all(1)
    assert same.mean() > 0.999
    found = soft.logits.astype(np.float64) + soft.logit_max[:, None]
    assert np.allclose(found, np.take_along_axis(expected, soft.indices.astype(int), 1), atol=1e-5)
    tails = np.exp(expected / 2).sum(1) - np.exp(np.take_along_axis(expected, soft.indices.astype(int), 1) / 2).sum(1)
    assert np.allclose(np.exp(soft.tail_logsumexp[:, 1] + soft.logit_max / 2), tails, rtol=1e-4)


def test_the_order_of_the_teachers_does_not_matter_and_each_of_them_does(store: Path) -> None:
    first = label(store, "mended_teacher", "named_teacher")
    again = label(store, "named_teacher", "mended_teacher")
    assert (again.digest, again.labelled) == (first.digest, 0)
    for others in (("mended_teacher",), ("mended_teacher", "good_teacher")):
        with pytest.raises(IdentityChanged, match=r"teacher\.weights"):
            label(store, *others)


def test_a_teacher_given_twice_is_refused(store: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"good_teacher' is given twice"):
        label(store, "good_teacher", "mended_teacher", "good_teacher")
    assert not (store / "set").exists()


def test_a_member_that_fails_is_named_with_the_example(store: Path) -> None:
    with pytest.raises(TeacherFault, match=r"of the ensemble, '.*raising_teacher'.*own trouble"):
        label(store, "good_teacher", "raising_teacher")
    with pytest.raises(TeacherFault, match=f"NaN for example {specimens.LATE:,}"):
        label(store, "good_teacher", "nan_teacher", name="other")


class Fixed:
    """Gives the logits that it was made with."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits

    def __call__(self, _inputs: torch.Tensor) -> torch.Tensor:
        return self.logits


def teacher(name: str, logits: torch.Tensor) -> Teacher:
    return Teacher(Fixed(logits), TeacherId(name, name), torch.device("cpu"), "unknown")


def batch(items: list[Any], *, causal: bool) -> Batch:
    kind = Kind("causal" if causal else "pointwise", "ordinal", False)
    return Batch.of([read_item(item, ordinal, kind) for ordinal, item in enumerate(items)], kind)


def test_token_sequences_have_a_mean_at_every_token() -> None:
    one, other = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(2, 3, 7).bfloat16()
    sequences = batch([{"input_ids": torch.tensor([1, 2, 3])}, {"input_ids": torch.tensor([4, 5])}], causal=True)
    mean = Ensemble([teacher("a", one), teacher("b", other)]).logits(sequences, None)
    expected = (one.softmax(-1) + other.double().softmax(-1)) / 2
    assert mean.dtype == torch.float32
    assert torch.allclose(mean.double().exp(), expected, atol=1e-6)


def test_classes_that_one_member_excludes_keep_the_others_probability() -> None:
    none = float("-inf")
    one, other = torch.tensor([[0.0, 0.0, none, none]]), torch.tensor([[0.0, none, 0.0, none]])
    mean = Ensemble([teacher("a", one), teacher("b", other)]).logits(batch([torch.ones(2)], causal=False), 4)
    assert mean.exp().tolist() == [[0.5, 0.25, 0.25, 0.0]]


def test_members_with_other_classes_are_refused() -> None:
    ensemble = Ensemble([teacher("a", torch.zeros(1, 4)), teacher("b", torch.zeros(1, 5))])
    with pytest.raises(LogitcacheError, match=r"of the ensemble, 'b': .* 5 classes .* before it was 4"):
        ensemble.logits(batch([torch.ones(2)], causal=False), None)


def test_the_command_takes_several_teachers(store: Path) -> None:
    words = ["precompute", "set", f"--dataset={HERE}:small_data", f"--store={store}", "--top-k=3", "--device=cpu"]
    words += [f"--teacher={HERE}:{name}" for name in ("mended_teacher", "named_teacher")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    told = CliRunner().invoke(cli, ["info", "set", f"--store={store}"]).output
    assert f"mean of {HERE}:mended_teacher, {HERE}:named_teacher" in told
