"""A poisoned example is named: whatever the teacher or the dataset makes of it, and whichever batch it stands in."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.server import given
from tests.server.given import CLASSES, FEATURES, Recurrent, run, sequences

from logitcache.labels.errors import DatasetFault, LogitcacheError, TeacherFault
from logitcache.server.labelling import teachers

EXAMPLES, BATCH, POISON = 50, 16, 37
"""The poisoned example is the sixth of the third batch."""


class Told:
    """A reporter that keeps what was under way."""

    def __init__(self) -> None:
        self.under: list[str] = []

    def begin(self, activity: str, rows: int, unit: str = "rows") -> None:
        """Nothing."""

    def advance(self, rows: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def under_way(self, told: Callable[[], str]) -> None:
        self.under.append(told())


class Poisonable(given.Linear):
    """Does something else than it should with the poisoned example, or with whatever it is told."""

    def __init__(self, act: Callable[[torch.Tensor], Any], when: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.act, self.when, self.calls = act, when, 0

    def forward(self, inputs: torch.Tensor) -> Any:
        self.calls += 1
        return self.act(inputs) if bool(self.when(inputs)) else super().forward(inputs)


def has_poison(inputs: torch.Tensor) -> Any:
    return (inputs[:, 0] == POISON).any()


def many(inputs: torch.Tensor) -> Any:
    return len(inputs) > 8


def late(inputs: torch.Tensor) -> Any:
    return inputs[:, 0].max() >= 2 * BATCH


def raise_this(error: Exception, _inputs: torch.Tensor) -> Any:
    raise error


def one_less(inputs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(inputs) - 1, CLASSES)


def nan_there(inputs: torch.Tensor) -> torch.Tensor:
    logits = torch.zeros(len(inputs), CLASSES)
    logits[inputs[:, 0] == POISON] = torch.nan
    return logits


OWN = partial(raise_this, ValueError("of its own"))
MEMORY = partial(raise_this, MemoryError("too much"))
GPU = partial(raise_this, RuntimeError("CUDA error: device-side assert triggered"))
FULL = partial(raise_this, torch.OutOfMemoryError("CUDA out of memory"))


def items(ids: str) -> list[Any]:
    """Examples whose first feature is their ordinal, with ids of some kind."""
    inputs = [torch.tensor([float(number)] + [1.0] * (FEATURES - 1)) for number in range(EXAMPLES)]
    if ids == "ordinals":
        return inputs
    return [
        {"input": input, "id": f"item-{number}" if ids == "texts" else 1000 + number}
        for number, input in enumerate(inputs)
    ]


def failed(tmp_path: Path, dataset: Any, teacher: Any = None, **options: Any) -> LogitcacheError:
    with pytest.raises(LogitcacheError) as caught:
        run(tmp_path / "store", dataset, teacher, **{"batch_size": BATCH} | options)
    return caught.value


@pytest.mark.parametrize(
    ("ids", "named", "id"),
    [
        ("ordinals", "example 37", 37),
        ("numbers", "example 37 (id 1037)", 1037),
        ("texts", "example 37 (id 'item-37')", "item-37"),
    ],
)
@pytest.mark.parametrize("act", [OWN, MEMORY, one_less])
def test_an_example_on_which_the_teacher_fails_is_named(
    tmp_path: Path, act: Any, ids: str, named: str, id: Any
) -> None:
    fault = failed(tmp_path, items(ids), Poisonable(act, has_poison))
    assert isinstance(fault, TeacherFault)
    assert "examples 32 to 47" in fault.message
    assert fault.message.endswith(f"; tried alone, 1 of the 16 cannot be labelled, first {named}")
    assert fault.details == {"ids": [id]}


def test_an_example_for_which_the_teacher_gives_no_number_is_named(tmp_path: Path) -> None:
    fault = failed(tmp_path, items("texts"), Poisonable(nan_there, has_poison))
    assert "NaN for example 37 (id 'item-37'); 1 of the 16" in fault.message
    assert fault.details == {"ids": ["item-37"]}


def test_where_no_example_fails_alone_that_is_said_with_the_ids_of_the_batch(tmp_path: Path) -> None:
    together = Poisonable(OWN, lambda inputs: many(inputs) and late(inputs))
    fault = failed(tmp_path, items("texts"), together)
    told = "; tried alone, none of the 16 fails (ids 'item-32' to 'item-47'): another --batch-size may do"
    assert fault.message.endswith(told)
    assert fault.details == {"ids": []}


def test_where_every_example_fails_alone_none_is_blamed(tmp_path: Path) -> None:
    fault = failed(tmp_path, items("texts"), Poisonable(OWN, late))
    assert fault.message.endswith("; tried alone, each of the 16 fails (ids 'item-32' to 'item-47')")


@pytest.mark.parametrize("act", [GPU, FULL])
def test_no_example_is_tried_where_it_would_fail_whatever_it_is(tmp_path: Path, act: Any) -> None:
    teacher = Poisonable(act, has_poison)
    fault = failed(tmp_path, items("texts"), teacher)
    assert fault.message.endswith("(ids 'item-32' to 'item-47')")
    # The batch that counts classes, and three.
    assert teacher.calls == 4


def test_the_search_is_bounded_and_says_how_far_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "ALONE_S", 0.0)
    fault = failed(tmp_path, items("ordinals"), Poisonable(OWN, has_poison))
    assert "tried alone, none of the first 1, for lack of time, fails" in fault.message


def test_a_batch_of_one_example_is_not_tried_twice(tmp_path: Path) -> None:
    teacher = Poisonable(OWN, has_poison)
    fault = failed(tmp_path, items("texts"), teacher, batch_size=1)
    assert fault.message == "the teacher raised ValueError on example 37: of its own (id 'item-37')"
    assert teacher.calls == 1 + POISON + 1


class Refusing(Recurrent):
    """Cannot read one token."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if bool((input_ids == 49).any()):
            raise ValueError("this token")
        return super().forward(input_ids)


def test_a_token_sequence_on_which_the_teacher_fails_is_named(tmp_path: Path) -> None:
    tokens = sequences([9, 30, 5, 12, 7, 3, 8, 40], vocabulary=49)
    tokens[4][2] = 49
    dataset = [{"input_ids": one, "id": f"text-{number}"} for number, one in enumerate(tokens)]
    fault = failed(tmp_path, dataset, Refusing(), batch_size=4)
    assert fault.message.endswith("; tried alone, 1 of the 4 cannot be labelled, first example 4 (id 'text-4')")


class Broken(torch.utils.data.Dataset[Any]):
    """One item cannot be had, or is something else."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> Any:
        if index == POISON and isinstance(self.item, Exception):
            raise self.item
        return self.item if index == POISON else items("texts")[index] | {"labels": 0}


BAD_TARGET = {"input": torch.ones(FEATURES), "id": "item-37", "labels": "seven"}
BAD_SHAPE = {"input": torch.ones(FEATURES + 1), "id": "item-37", "labels": 0}
BAD_INPUT = {"input": torch.ones(FEATURES).to_sparse(), "id": "item-37", "labels": 0}


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (OSError("a torn file"), "raised OSError for example 37: a torn file"),
        (BAD_TARGET, "example 37 has a target that is no whole number"),
        (BAD_TARGET, r"\(id 'item-37'\)$"),
        (BAD_SHAPE, r"the input of example 37 \(id 'item-37'\) is torch.float32 of shape"),
        (BAD_INPUT, r"the input of example 37 \(id 'item-37'\) is no tensor of numbers"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_that_cannot_be_read_is_named(tmp_path: Path, item: Any, told: str, workers: int) -> None:
    with pytest.raises(DatasetFault, match=told) as caught:
        run(tmp_path / "store", Broken(item), batch_size=BATCH, loader_workers=workers)
    assert caught.value.details == {"example": POISON}


def test_what_is_under_way_is_told_before_it_begins_twice_a_batch(tmp_path: Path) -> None:
    told = Told()
    run(tmp_path / "store", items("texts"), reporter=told, batch_size=20)
    assert told.under == [
        "reading examples 0 to 19",
        "labelling examples 0 to 19 (ids 'item-0' to 'item-19')",
        "reading examples 20 to 39",
        "labelling examples 20 to 39 (ids 'item-20' to 'item-39')",
        "reading examples 40 to 49",
        "labelling examples 40 to 49 (ids 'item-40' to 'item-49')",
        "committing shard 0",
    ]
