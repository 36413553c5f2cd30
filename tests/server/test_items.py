"""What an item may be: read as it was meant, or refused with the example, what is wrong, and what to do."""

import enum
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.server.given import FEATURES, Linear, run, sequences

from logitcache.labels.errors import DatasetChanged, DatasetFault
from logitcache.labels.fingerprints import fingerprint, token_fingerprint
from logitcache.server.labelling.batches import Batch
from logitcache.server.labelling.items import Kind, read_item, settle, whole_number
from logitcache.storage import LocalLabelSet

INPUT = torch.arange(3.0)


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        (INPUT, Kind("pointwise", "ordinal", False)),
        (INPUT.numpy(), Kind("pointwise", "ordinal", False)),
        ((INPUT, 3), Kind("pointwise", "ordinal", True)),
        ((INPUT, torch.tensor(3)), Kind("pointwise", "ordinal", True)),
        ((INPUT, np.int16(3)), Kind("pointwise", "ordinal", True)),
        ((INPUT, -100), Kind("pointwise", "ordinal", True)),
        ((INPUT, None), Kind("pointwise", "ordinal", False)),
        ((INPUT, 0.5), Kind("pointwise", "ordinal", False)),
        ((INPUT, True), Kind("pointwise", "ordinal", False)),
        ((INPUT, {"boxes": [1, 2]}), Kind("pointwise", "ordinal", False)),
        ((INPUT, torch.tensor([1])), Kind("pointwise", "ordinal", False)),
        ({"input": INPUT, "labels": 3}, Kind("pointwise", "ordinal", True)),
        ({"input": INPUT, "id": 7}, Kind("pointwise", "integer", False)),
        ({"input": INPUT, "id": torch.tensor(7)}, Kind("pointwise", "integer", False)),
        ({"input": INPUT, "id": "a/b"}, Kind("pointwise", "text", False)),
        ({"input": INPUT, "id": np.str_("a")}, Kind("pointwise", "text", False)),
        ({"input_ids": [1, 2]}, Kind("causal", "ordinal", False)),
        ({"input_ids": [1, 2], "labels": [1, 2]}, Kind("causal", "ordinal", True)),
        ({"input_ids": [1, 2], "labels": torch.tensor([-100, 2])}, Kind("causal", "ordinal", True)),
        ({"input_ids": [1, 2], "labels": 1}, Kind("causal", "ordinal", False)),
        ({"input_ids": [1, 2], "labels": None, "id": None}, Kind("causal", "ordinal", False)),
    ],
    ids=str,
)
def test_the_first_item_settles_the_kind(item: Any, kind: Kind) -> None:
    assert settle(item, None) == kind
    assert settle(item, not kind.targets).targets is not kind.targets


@pytest.mark.parametrize(
    "input",
    [
        INPUT,
        INPUT.numpy(),
        INPUT.bfloat16(),
        INPUT.reshape(3, 1).T,
        np.arange(4, dtype=np.int16).reshape(2, 2).T,
        np.array([True, False]),
        np.float32(0.5),
        torch.tensor(3),
        2,
        0.5,
    ],
    ids=repr,
)
def test_a_batch_has_the_fingerprints_of_its_inputs_as_they_were_given(input: Any) -> None:
    kind = Kind("pointwise", "ordinal", False)
    examples = [read_item(input, 0, kind), read_item(input + input, 1, kind)]
    assert Batch.of(examples, kind).fingerprints.tolist() == [fingerprint(input), fingerprint(input + input)]


def test_an_image_is_read_as_it_is_with_its_target() -> None:
    example = read_item({"input": INPUT, "labels": torch.tensor(4), "id": "x"}, 9, Kind("pointwise", "text", True))
    assert example.input is INPUT
    assert (example.ordinal, example.id, example.fingerprint) == (9, "x", fingerprint(INPUT))
    assert example.targets is not None
    assert example.targets.dtype == np.dtype(np.int32)
    assert example.targets.tolist() == [4]


@pytest.mark.parametrize("none", [-1, -100, torch.tensor(-100)])
def test_minus_one_and_minus_a_hundred_mean_no_target(none: Any) -> None:
    example = read_item((INPUT, none), 0, Kind("pointwise", "ordinal", True))
    assert example.targets is not None
    assert example.targets.tolist() == [-1]


@pytest.mark.parametrize("give", [list, torch.tensor, lambda values: np.array(values, np.uint8)])
@pytest.mark.parametrize("mask", [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 1, 0]])
def test_a_mask_cuts_padding_off_and_labels_keep_their_places(give: Callable[..., Any], mask: list[int]) -> None:
    kind = Kind("causal", "ordinal", True)
    item = {"input_ids": give([5, 6, 7, 8, 9]), "attention_mask": give(mask), "labels": give([15, 16, 17, 18, 19])}
    example = read_item(item, 0, kind)
    kept = np.flatnonzero(mask)
    assert example.input.dtype == np.uint32
    assert example.input.tolist() == (kept + 5).tolist()
    assert example.targets is not None
    assert example.targets.tolist() == [*(kept[1:] + 15).tolist(), -1]
    assert example.fingerprint == token_fingerprint((kept + 5).astype(np.uint32))


def test_a_mask_may_hold_booleans_or_floats() -> None:
    for mask in (np.array([True, True, False]), torch.tensor([1.0, 1.0, 0.0])):
        example = read_item({"input_ids": [1, 2, 3], "attention_mask": mask}, 0, Kind("causal", "ordinal", False))
        assert example.input.tolist() == [1, 2]


TOKENS = {"input_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (TOKENS | {"input_ids": []}, "has no tokens"),
        (TOKENS | {"input_ids": torch.zeros(0, dtype=torch.int64)}, "has no tokens"),
        (TOKENS | {"attention_mask": [0, 0, 0]}, "attention_mask without a single 1, so it has no tokens"),
        (TOKENS | {"attention_mask": [1, 0, 1]}, "attention_mask with a hole at position 1"),
        (TOKENS | {"attention_mask": [0, 1, 1, 0]}, "attention_mask of 4 for 3 tokens"),
        (TOKENS | {"attention_mask": [1, 1, 2]}, "not one sequence of zeros and ones"),
        (TOKENS | {"attention_mask": [1.0, 0.5, 0.0]}, "not one sequence of zeros and ones"),
        (TOKENS | {"attention_mask": [[1, 1, 1]]}, "not one sequence of zeros and ones"),
        (TOKENS | {"attention_mask": "111"}, "not one sequence of zeros and ones"),
        (
            TOKENS | {"input_ids": torch.zeros(1, 3, dtype=torch.int64)},
            r"input_ids of shape \(1, 3\): give one sequence",
        ),
        (TOKENS | {"input_ids": 3}, r"input_ids of shape \(\)"),
        (TOKENS | {"input_ids": [[1, 2], [3]]}, "no sequence of whole numbers"),
        (TOKENS | {"input_ids": torch.ones(3)}, "input_ids of float32, not whole numbers"),
        (TOKENS | {"input_ids": [True, False]}, "input_ids of bool"),
        (TOKENS | {"input_ids": "abc"}, r"input_ids of shape \(\)"),
        (TOKENS | {"input_ids": [1, -100, 3]}, r"token id -100 at position 1: .*\(labels may hold -100"),
        (TOKENS | {"input_ids": [1, 2, 2**32]}, "token id 4294967296 at position 2: token ids are 0 to 4,294,967,295"),
        (TOKENS | {"input_ids": np.array([2**63], np.uint64)}, "token id 9223372036854775808 at position 0"),
        (TOKENS | {"input_ids": [2**70]}, "input_ids of object, not whole numbers of up to 32 bits"),
        (TOKENS | {"labels": [1, 2]}, "has 2 labels for 3 tokens: give one a token, in its place"),
        (TOKENS | {"labels": None}, "has no 'labels': give -100"),
        (TOKENS | {"labels": [1.0, 2.0, 3.0]}, "labels of float64"),
        (TOKENS | {"labels": [1, 2, -5]}, "the label -5 at position 2, which is no class"),
        (TOKENS | {"labels": [1, 2**31, 5]}, "the label 2147483648 at position 1"),
        (TOKENS | {"id": "late"}, "has the id 'late', example 0 has none"),
        ({"input": INPUT}, "has no 'input_ids', example 0 has some: all examples must be of one kind"),
        (INPUT, "has no 'input_ids', example 0 has some"),
    ],
    ids=str,
)
def test_a_token_item_that_cannot_be_labelled_is_refused_with_its_example(item: Any, message: str) -> None:
    with pytest.raises(DatasetFault, match=f"^example 1,234 .*{message}") as caught:
        read_item(
            {"labels": [1, 2, 3]} | item if isinstance(item, dict) else item, 1234, Kind("causal", "ordinal", True)
        )
    assert caught.value.details == {"example": 1234}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [9, 9, 1, -2, 3]}, "the token id -2 at position 3"),
        ({"labels": [9, 9, 1, -2, 3]}, "the label -2 at position 3"),
        ({"attention_mask": [0, 1, 1, 0, 1]}, "a hole at position 3"),
    ],
)
def test_positions_are_told_as_the_dataset_counts_them(change: dict[str, Any], message: str) -> None:
    item = {"input_ids": [9, 9, 1, 2, 3], "attention_mask": [0, 0, 1, 1, 1], "labels": [9, 9, 1, 2, 3]} | change
    with pytest.raises(DatasetFault, match=message):
        read_item(item, 0, Kind("causal", "ordinal", True))


@pytest.mark.parametrize(
    ("kind", "id", "message"),
    [
        ("integer", None, "has no id, example 0 has one"),
        ("integer", "a", r"id 'a' is not a whole number, but str"),
        ("integer", 1.0, "id 1.0 is not a whole number"),
        ("integer", True, "id True is not a whole number"),
        ("integer", 2**63, "is beyond 64 signed bits"),
        ("text", 7, "id 7 is not a text, but int"),
        ("text", "", "an id is empty"),
        ("text", "a\0b", "NUL"),
        ("text", "\ud800", "half a surrogate pair"),
        ("text", "\N{PILE OF POO}" * 1025, "has 4,100 bytes of UTF-8, an id may have 4,096"),
        ("text", None, "has no id, example 0 has one"),
        ("ordinal", 5, "has the id 5, example 0 has none"),
    ],
)
def test_an_id_of_another_kind_or_that_cannot_be_one_is_refused_with_its_example(
    kind: Any, id: Any, message: str
) -> None:
    with pytest.raises(DatasetFault, match=f"^example 1,234.* {message}") as caught:
        read_item({"input": INPUT, "id": id}, 1234, Kind("pointwise", kind, False))
    assert caught.value.details == {"example": 1234}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, r"no whole number \(none\): give -100 where there is none, or leave all targets out with --no-targets"),
        (0.5, r"no whole number \(float\)"),
        (torch.tensor([1]), r"no whole number \(Tensor\)"),
        (-2, "has the target -2, which is no class"),
        (2**31, "has the target 2,147,483,648, which is no class"),
    ],
)
def test_a_target_of_another_kind_is_refused_with_its_example(target: Any, message: str) -> None:
    with pytest.raises(DatasetFault, match=f"^example 7 .*{message}"):
        read_item((INPUT, target), 7, Kind("pointwise", "ordinal", True))


@pytest.mark.parametrize("id", [1.5, b"bytes", (1, 2), torch.tensor([1, 2])])
def test_an_id_of_no_kind_is_refused_with_the_first_item(id: Any) -> None:
    with pytest.raises(DatasetFault, match=r"example 0 has an id of type .*: give a whole number or a text"):
        settle({"input": INPUT, "id": id}, None)


def test_whole_numbers_are_told_from_what_looks_like_them() -> None:
    assert [whole_number(value) for value in (3, np.int8(3), torch.tensor(3), np.array(3))] == [3, 3, 3, 3]
    others = (True, np.True_, torch.tensor(True), 3.0, torch.tensor(3.0), torch.tensor([3]), "3", None)
    assert [whole_number(value) for value in others] == [None] * len(others)


@pytest.mark.parametrize("ids", [["a/b", "c d", "\N{PILE OF POO}" * 1024], [2**63 - 1, -5, 0]])
def test_ids_of_the_datasets_own_find_their_examples(tmp_path: Path, ids: list[Any]) -> None:
    items = sequences([4, 2, 9])
    run(tmp_path, [{"input_ids": tokens, "id": id} for tokens, id in zip(items, ids, strict=True)])
    reader = LocalLabelSet(tmp_path / "set")
    soft = reader.fetch([ids[2], ids[0]])
    assert soft.tokens is not None
    assert soft.tokens.tolist() == [*items[2].tolist(), *items[0].tolist()]
    reader.close()


class Split(str, enum.Enum):  # noqa: UP042 - the `str` of a StrEnum is what it is equal to
    """An id that is equal to a text, and whose `str` is another one."""

    TRAIN, TEST = "train", "test"


def test_an_enumerations_texts_are_the_ids_that_they_are_equal_to(tmp_path: Path) -> None:
    items = [{"input_ids": tokens, "id": id} for tokens, id in zip(sequences([4, 2]), Split, strict=True)]
    run(tmp_path, items)
    reader = LocalLabelSet(tmp_path / "set")
    soft = reader.fetch(["test", Split.TRAIN])
    assert soft.row_splits is not None
    assert soft.row_splits.tolist() == [0, 2, 6]
    reader.close()


class Renamed(list[Any]):
    """Gives every example another id each time."""

    def __getitem__(self, index: Any) -> Any:
        return {"input": super().__getitem__(index), "id": str(uuid.uuid4())}


def test_ids_that_change_from_read_to_read_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetChanged, match=r"other ids each time .*5 of 5 examples tried: 0, 1, 2 and 2 more"):
        run(tmp_path / "store", Renamed([torch.zeros(FEATURES)] * 5), Linear())
    assert not (tmp_path / "store").exists()


def test_ids_that_collide_are_refused_before_anything_is_written_and_both_examples_are_named(tmp_path: Path) -> None:
    items = [{"input_ids": tokens, "id": f"id {number % 3}"} for number, tokens in enumerate(sequences([4, 2, 9, 5]))]
    with pytest.raises(DatasetFault, match="examples 0 and 3 have the same id, 'id 0'"):
        run(tmp_path / "store", items)
    assert not (tmp_path / "store").exists()


def test_labels_that_are_shifted_already_are_refused_and_a_repeated_token_is_not() -> None:
    kind = Kind("causal", "ordinal", targets=True)
    tokens = np.arange(40, 60)
    shifted = np.append(tokens[1:], -100)
    with pytest.raises(DatasetFault, match="example 3 has labels that are its tokens shifted by one"):
        read_item({"input_ids": tokens, "labels": shifted}, 3, kind)
    same = np.full(20, 7)
    example = read_item({"input_ids": same, "labels": same}, 3, kind)
    assert example.targets is not None
    assert example.targets.tolist() == [7] * 19 + [-1]
