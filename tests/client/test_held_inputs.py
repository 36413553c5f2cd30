"""Token ids in the forms that loops hold them, and what they are compared with."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logitcache.client.held_inputs import HeldTokens, check_counts, check_one_an_id, check_tokens, held_tokens
from logitcache.labels.errors import InvalidRequest, LabelMismatch, ShapeMismatch
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.soft_labels import SoftLabels, splits_of

IDS = as_ids(["a/b", "c", "d"])
LINES = [[5, 6, 7], [8], [9, 10]]


def lines_of(held: HeldTokens) -> list[list[int]]:
    ends = np.cumsum(held.counts)
    return [held.tokens[end - count : end].tolist() for end, count in zip(ends, held.counts, strict=True)]


def padded(lines: list[list[int]], *, left: bool = False, pad: int = 0, width: int = 4) -> tuple[Any, Any]:
    inputs, mask = np.full((len(lines), width), pad), np.zeros((len(lines), width), int)
    for place, line in enumerate(lines):
        where = slice(width - len(line), width) if left else slice(len(line))
        inputs[place, where], mask[place, where] = line, 1
    return inputs, mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("pad", [0, 6, -100])
@pytest.mark.parametrize(
    ("dtype", "mask_dtype"), [(np.int32, bool), (np.int64, np.int64), (np.uint32, np.uint8), (np.int64, np.float32)]
)
def test_padding_is_cut_off_as_the_mask_says_whatever_the_padding_is(
    left: bool, pad: int, dtype: Any, mask_dtype: Any
) -> None:
    inputs, mask = padded(LINES, left=left, pad=pad)
    assert lines_of(held_tokens(inputs.astype(dtype), mask.astype(mask_dtype), IDS)) == LINES


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tensors_are_taken(dtype: torch.dtype) -> None:
    inputs, mask = map(torch.tensor, padded(LINES, left=True))
    assert lines_of(held_tokens(inputs.to(dtype), mask, IDS)) == LINES


@pytest.mark.parametrize("form", [list, np.array, lambda line: torch.tensor(line, dtype=torch.int32)])
def test_a_sequence_for_each_example_needs_no_mask(form: Any) -> None:
    assert lines_of(held_tokens([form(line) for line in LINES], None, IDS)) == LINES


def test_padded_lists_take_a_mask_of_lists() -> None:
    inputs, mask = padded(LINES)
    assert lines_of(held_tokens(inputs.tolist(), mask.tolist(), IDS)) == LINES


def test_without_a_mask_every_entry_is_a_token() -> None:
    inputs, _ = padded(LINES)
    assert lines_of(held_tokens(inputs, None, IDS)) == inputs.tolist()


def test_a_line_of_padding_alone_holds_no_tokens() -> None:
    inputs, mask = padded([[5, 6], [], [7]])
    assert lines_of(held_tokens(inputs, mask, IDS)) == [[5, 6], [], [7]]
    assert lines_of(held_tokens([[5, 6], [], [7]], None, IDS)) == [[5, 6], [], [7]]


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.lists(st.integers(0, 2**32 - 1), max_size=7), st.integers(0, 5)), min_size=1
    )
)
def test_any_mask_of_one_run_a_line_keeps_that_run(lines: list[tuple[int, list[int], int]]) -> None:
    inputs = [[1] * before + tokens + [2] * after for before, tokens, after in lines]
    mask = [[0] * before + [1] * len(tokens) + [0] * after for before, tokens, after in lines]
    held = held_tokens(inputs, mask, Ids(np.arange(len(lines))))
    assert lines_of(held) == [tokens for _, tokens, _ in lines]


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 0, 1]])
@pytest.mark.parametrize("before", [[1, 1, 1, 0], [1, 1, 1, 1]])
def test_padding_between_tokens_is_refused_and_named(before: list[int], mask: list[int]) -> None:
    with pytest.raises(InvalidRequest, match=r"padding between tokens \(ids: 'c'\)"):
        held_tokens(np.ones((3, 4), int), np.array([before, mask, [0, 0, 1, 1]]), IDS)


@pytest.mark.parametrize(
    ("inputs", "mask", "kind", "says"),
    [
        (np.ones((2, 4), int), None, ShapeMismatch, "2 inputs were given for 3 ids"),
        (5, None, ShapeMismatch, "inputs are no array, tensor or list with one entry an id"),
        (torch.tensor(5), None, ShapeMismatch, "inputs are no array, tensor or list"),
        (np.ones((3, 4), int), 1, ShapeMismatch, "attention_mask are no array, tensor or list"),
        (np.ones((3, 4), int), np.ones((3, 5), int), ShapeMismatch, "another shape"),
        (np.ones((3, 4), int), np.ones((2, 4), int), ShapeMismatch, "2 attention_mask"),
        (LINES, [[1, 1, 1], [1], [1]], ShapeMismatch, "another shape"),
        (np.ones((3, 4), int), np.full((3, 4), 2), InvalidRequest, "besides 0"),
        (np.ones((3, 4), int), np.full((3, 4), np.nan), InvalidRequest, "besides 0"),
        (np.ones((3, 4)), None, InvalidRequest, "float64"),
        (np.ones((3, 4), bool), None, InvalidRequest, "bool"),
        (torch.ones(3, 4, dtype=torch.bfloat16), None, InvalidRequest, "whole numbers|not token ids"),
        (np.ones(3, int), None, ShapeMismatch, r"of shape \(3,\)"),
        (np.ones((3, 4, 1), int), None, ShapeMismatch, r"of shape \(3, 4, 1\)"),
        (["five", "six", "seven"], None, InvalidRequest, "str|<U"),
        ([[5], [[6]], [7]], None, ShapeMismatch, r"of shape \(1, 1\)"),
    ],
)
def test_what_cannot_be_token_ids_is_refused(inputs: Any, mask: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        held_tokens(inputs, mask, IDS)


def rows_of_tokens(lines: list[list[int]], present: list[bool] | None = None) -> SoftLabels:
    tokens = np.array([token for line in lines for token in line], np.uint32)
    rows, examples = len(tokens), len(lines)
    return SoftLabels(
        np.zeros((rows, 1), np.uint16),
        np.zeros((rows, 1), np.float16),
        np.zeros(rows, np.float32),
        np.zeros((rows, 1), np.float32),
        np.zeros(examples, np.uint64),
        (1.0,),
        present=None if present is None else np.array(present),
        row_splits=splits_of(np.array([len(line) for line in lines])),
        tokens=tokens,
    )


def compare(held: list[list[int]], read: list[list[int]], present: list[bool] | None = None) -> None:
    check_tokens(held_tokens(held, None, IDS), rows_of_tokens(read, present), IDS, "labels")


def test_tokens_that_the_teacher_read_pass() -> None:
    compare(LINES, LINES)
    compare([[2**32 - 1], [], [0]], [[2**32 - 1], [], [0]])


def test_the_examples_that_differ_and_the_first_difference_are_named() -> None:
    with pytest.raises(
        LabelMismatch, match=r"of 2 examples .*\(ids: 'a/b', 'd'\): row 1 .*'a/b' is of token 66"
    ) as told:
        compare(LINES, [[5, 66, 77], [8], [99, 10]])
    assert told.value.ids == ["a/b", "d"]
    assert (told.value.details["position"], told.value.details["held"], told.value.details["read"]) == (1, 6, 66)


@pytest.mark.parametrize("token", [-100, 2**32 + 7, 2**62])
def test_a_token_that_no_teacher_reads_is_a_difference(token: int) -> None:
    with pytest.raises(LabelMismatch, match=str(token)):
        compare([[5], [6], [token]], [[5], [6], [7]])


def test_tokens_of_examples_without_labels_are_passed_over() -> None:
    compare([[5, 6, 7], [1, 2], [9, 10]], [[5, 6, 7], [], [9, 10]], [True, False, True])
    with pytest.raises(LabelMismatch) as told:
        compare([[5, 6, 7], [1, 2], [9, 11]], [[5, 6, 7], [], [9, 10]], [True, False, True])
    assert told.value.ids == ["d"]


def test_inputs_without_a_number_are_refused() -> None:
    check_one_an_id(torch.zeros(3, 2), 3)
    for inputs in (5, torch.tensor(5), iter([1, 2, 3])):
        with pytest.raises(ShapeMismatch, match="inputs are no array, tensor or list"):
            check_one_an_id(inputs, 3)


def test_another_number_of_tokens_than_rows_asked_for_is_refused() -> None:
    held = held_tokens(LINES, None, IDS)
    check_counts(held, np.array([[4, 7], [0, 1], [2, 4]]), IDS)
    with pytest.raises(ShapeMismatch, match=r"1 tokens of 'c' and rows 0 to 2 were asked for \(ids: 'c', 'd'\)"):
        check_counts(held, np.array([[4, 7], [0, 2], [2, 3]]), IDS)
