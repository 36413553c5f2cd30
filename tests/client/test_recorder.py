"""A recorder into a folder: what it refuses, what it records, and how it ends."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.client.recordings import (
    CLASSES,
    EXAMPLES,
    LOGITS,
    MASK,
    OF_TOKENS,
    TOKENS,
    K,
    add,
    causal,
    recording,
    rows_of,
)
from tests.client.rows import inputs_of, truncated

from logitcache.client import Recorder, connect
from logitcache.labels.errors import (
    IdentityChanged,
    InvalidIds,
    InvalidRequest,
    LabelMismatch,
    LabelSetLocked,
    LogitcacheError,
    RowsMissing,
    ShapeMismatch,
    TeacherFault,
    UnknownView,
)

# What is refused, and where.


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    """A recorder into a folder, that nothing was added to."""
    recorder = recording(tmp_path / "run-1")
    yield recorder
    recorder.close()


@pytest.mark.parametrize(
    ("ids", "logits", "options", "kind", "says"),
    [
        ([0, 1], LOGITS[:2, :9], {}, ShapeMismatch, r"9 classes.*has 10"),
        ([0, 1], LOGITS[:3], {}, ShapeMismatch, r"\(3, 10\) for 2 ids"),
        ([0, 1], LOGITS[None, :2], {}, ShapeMismatch, r"\(1, 2, 10\)"),
        ([0, 1], LOGITS[:2].long(), {}, InvalidRequest, "int64"),
        ([], LOGITS[:0], {}, InvalidIds, "empty"),
        ([0.0, 1.0], LOGITS[:2], {}, InvalidIds, "float"),
        (["a", "b"], LOGITS[:2], {}, InvalidIds, "whole numbers"),
        ([0, 1], LOGITS[:2], {"step": 100}, InvalidRequest, "0 to 99"),
        ([0, 1], LOGITS[:2], {"step": -1}, InvalidRequest, "0 to 99"),
        ([0, 1], LOGITS[:2], {"step": True}, InvalidRequest, "0 to 99"),
        ([0, 1], LOGITS[:2], {"view": 1}, UnknownView, "view 1"),
        ([0, 1], LOGITS[:2], {"targets": [1, 2]}, InvalidRequest, "stores no targets"),
        ([0, 1], LOGITS[:2], {"inputs": LOGITS[:3]}, ShapeMismatch, "3 inputs"),
        ([0, 1], LOGITS[:2], {"attention_mask": LOGITS[:2] > 0}, InvalidRequest, "attention_mask"),
    ],
)
def test_what_cannot_be_recorded_is_refused_where_it_is_added(
    recorder: Recorder, ids: Any, logits: torch.Tensor, options: Any, kind: type[LogitcacheError], says: str
) -> None:
    with pytest.raises(kind, match=says):
        recorder.add(ids, logits, **options)
    recorder.flush()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_none_name_their_examples_and_the_others_are_recorded(tmp_path: Path, wrong: float) -> None:
    logits = LOGITS[:4].clone()
    logits[2, 5] = wrong
    recorder = recording(tmp_path / "run-1")
    recorder.add([7], LOGITS[[7]])
    recorder.add([0, 1, 2, 3], logits)
    with pytest.raises(TeacherFault, match="nothing of this batch was recorded") as caught:
        recorder.flush()
    assert caught.value.details["ids"] == [2]
    recorder.flush()
    with connect(tmp_path / "run-1") as labels:
        assert labels.missing(range(8)) == [0, 1, 2, 3, 4, 5, 6]
    recorder.add([0], LOGITS[[0]])
    recorder.close()


def test_unknown_ids_are_named(recorder: Recorder) -> None:
    recorder.add([19, 20, -1], LOGITS[:3])
    with pytest.raises(RowsMissing, match="20 examples") as caught:
        recorder.flush()
    assert caught.value.unknown == [20, -1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"examples": None}, "examples=N"),
        ({"examples": 0}, "examples"),
        ({"examples": 3, "ids": [1, 2, 3]}, "examples=N"),
        ({"ids": [1, 2, 1]}, "same id, 1"),
        ({"steps": range(0)}, "range"),
        ({"steps": range(0, 9, 2)}, "range"),
        ({"steps": range(-1, 9)}, "range"),
        ({"mode": "testing"}, "'eval'"),
        ({"run": " "}, "run="),
        ({"weights": ""}, "weights="),
        ({"top_k": 11}, "no label set"),
        ({"top_k": 0}, "no label set"),
        ({"temperatures": [0.0]}, "emperature"),
        ({"rank": 1}, "rank 1"),
        ({"rank": 2, "recorders": 2}, "rank 2"),
        ({"recorders": 0}, "recorders"),
    ],
)
@pytest.mark.usefixtures("unchecked_annotations")
def test_what_cannot_be_begun_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        recording(tmp_path / "run-1", **changes)
    recording(tmp_path / "run-2").close()


def test_going_on_with_something_else_names_it(tmp_path: Path) -> None:
    recording(tmp_path / "run-1").close()
    for changes, named in (
        ({"top_k": 5}, "k was 4 and is now 5"),
        ({"steps": range(50)}, "steps"),
        ({"examples": 21}, "examples was 20"),
        ({"mode": "eval"}, "eval mode"),
        ({"recorders": 2}, "recorders was 1"),
        ({"ids": list(range(EXAMPLES))}, "ids"),
    ):
        with pytest.raises(IdentityChanged, match=named):
            recording(tmp_path / "run-1", **changes)
    recording(tmp_path / "run-1").close()


def test_a_folder_takes_one_recorder_at_a_time(tmp_path: Path, recorder: Recorder) -> None:
    with pytest.raises(LabelSetLocked):
        recording(tmp_path / "run-1")
    add(recorder, 1)
    recorder.flush()


# What is recorded.


def record_all(recorder: Recorder, ids: Any = None, order: Any = range(EXAMPLES), **options: Any) -> None:
    for begin in range(0, EXAMPLES, 6):
        batch = list(order)[begin : begin + 6]
        given = batch if ids is None else [ids[ordinal] for ordinal in batch]
        recorder.add(given, LOGITS[batch], **options)


@pytest.mark.parametrize("ids", [None, [5 * number - 7 for number in range(EXAMPLES)], [*"abcdefghijklmnopqrst"]])
def test_rows_are_those_of_their_examples_while_it_is_recorded_and_when_it_is_sealed(tmp_path: Path, ids: Any) -> None:
    options: dict[str, Any] = {} if ids is None else {"ids": ids}
    order, asked = np.random.default_rng(0).permutation(EXAMPLES), [3, 0, 19, 3]
    named = asked if ids is None else [ids[ordinal] for ordinal in asked]
    with recording(tmp_path / "run-1", **options) as recorder:
        record_all(recorder, ids, order)
        recorder.flush()
        with connect(tmp_path / "run-1") as labels:
            assert labels.describe().digest is None
            before = labels.fetch(named)
    assert recorder.digest is not None
    with connect(tmp_path / "run-1", digest=recorder.digest) as labels:
        after = labels.fetch(named)
        assert labels.describe().identity.teacher.name == "run-1"
    expected = truncated(LOGITS[asked], K, temperatures=(1.0, 2.0), dtype="float16")
    for found in (before, after):
        assert np.array_equal(found.indices, expected.indices)
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-3)
        np.testing.assert_allclose(found.tail_logsumexp, expected.tail_logsumexp, rtol=1e-4, atol=1e-5)
        assert np.array_equal(found.logit_max, expected.logit_max)


@pytest.mark.parametrize(
    "given", [LOGITS.numpy(), LOGITS.double(), LOGITS.t().contiguous().t(), LOGITS.clone().requires_grad_()]
)
def test_logits_of_any_form_are_the_same_rows(tmp_path: Path, given: Any) -> None:
    with recording(tmp_path / "run-1") as recorder:
        recorder.add(torch.arange(EXAMPLES), given)
    with recording(tmp_path / "run-2") as other:
        other.add(range(EXAMPLES), LOGITS)
    with connect(tmp_path / "run-1") as labels, connect(tmp_path / "run-2") as others:
        found, expected = labels.fetch(range(EXAMPLES)), others.fetch(range(EXAMPLES))
    assert np.array_equal(found.indices, expected.indices)
    assert np.array_equal(found.logits, expected.logits)


def test_the_latest_step_counts_in_whatever_order_it_came(tmp_path: Path) -> None:
    early, late = LOGITS.flip(1), LOGITS
    digests = []
    for name, steps in (("run-1", (3, 7)), ("run-2", (7, 3))):
        with recording(tmp_path / name) as recorder:
            for step in steps:
                recorder.add(range(EXAMPLES), late if step == 7 else early, step=step)
        digests.append(recorder.digest)
    assert digests[0] == digests[1]
    with connect(tmp_path / "run-2") as labels:
        assert np.array_equal(labels.fetch([4]).indices, late[[4]].topk(K).indices)


def test_rows_that_are_chosen_already_are_taken_and_wrong_ones_are_not(tmp_path: Path) -> None:
    with recording(tmp_path / "run-1") as recorder:
        recorder.add_rows(range(EXAMPLES), rows_of(range(EXAMPLES)))
        wrong = rows_of([0, 1])
        wrong.logits[1, 0] = -1
        with pytest.raises(TeacherFault, match="not centred"):
            recorder.add_rows([0, 1], wrong)
        for soft in (rows_of([0]), truncated(LOGITS[:2], 3, temperatures=(1.0, 2.0), dtype="float16")):
            with pytest.raises(ShapeMismatch):
                recorder.add_rows([0, 1], soft)
    with connect(tmp_path / "run-1") as labels:
        assert np.array_equal(labels.fetch([7, 2]).logits, rows_of([7, 2]).logits)


def test_inputs_that_were_given_are_held_against_and_without_them_nothing_can_be(tmp_path: Path) -> None:
    with recording(tmp_path / "run-1") as recorder:
        recorder.add(range(10), LOGITS[:10], inputs=inputs_of(range(10)))
        recorder.add(range(10, 20), LOGITS[10:])
        recorder.flush()
        with connect(tmp_path / "run-1") as labels:
            check_inputs(labels)
    with connect(tmp_path / "run-1") as labels:
        check_inputs(labels)


def check_inputs(labels: Any) -> None:
    labels.fetch([3, 9], inputs=inputs_of([3, 9]))
    with pytest.raises(LabelMismatch, match="not what the teacher was shown") as caught:
        labels.fetch([3, 9], inputs=inputs_of([3, 8]))
    assert caught.value.details["ids"] == [9]
    with pytest.raises(LabelMismatch, match=r"cannot be compared.*inputs=") as caught:
        labels.fetch([3, 12], inputs=inputs_of([3, 12]))
    assert caught.value.details["ids"] == [12]


# How it ends.


def test_leaving_early_tells_what_is_missing_and_another_recorder_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "logitcache.client"), recording(tmp_path / "run-1") as recorder:
        recorder.add(range(18), LOGITS[:18])
    assert recorder.digest is None
    assert recorder.missing() == [18, 19]
    assert "2 of 20 examples were not recorded (18, 19)" in caplog.text
    assert "last batch" in caplog.text
    with recording(tmp_path / "run-1") as recorder:
        recorder.add([18, 19], LOGITS[18:])
    assert recorder.digest is not None
    with recording(tmp_path / "run-2") as whole:
        record_all(whole)
    assert recorder.digest == whole.digest


def test_a_part_is_sealed_when_it_is_said(tmp_path: Path) -> None:
    with recording(tmp_path / "run-1") as recorder:
        recorder.add([3, 17], LOGITS[[3, 17]])
        digest = recorder.finish(part=True)
        assert recorder.finish() == digest
    with connect(tmp_path / "run-1", digest=digest) as labels:
        assert (labels.describe().examples, labels.describe().identity.ids) == (2, "integer")
        assert np.array_equal(labels.fetch([17]).indices, LOGITS[[17]].topk(K).indices)
        with pytest.raises(RowsMissing):
            labels.fetch([4])


def test_an_error_in_the_block_keeps_what_was_added_and_seals_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), recording(tmp_path / "run-1") as recorder:
        recorder.add(range(EXAMPLES), LOGITS)
        raise ZeroDivisionError
    assert recorder.digest is None
    with connect(tmp_path / "run-1") as labels:
        assert labels.missing(range(EXAMPLES)) == []
    with recording(tmp_path / "run-1") as again:
        pass
    assert again.digest is not None


def test_a_sealed_label_set_is_not_recorded_again(tmp_path: Path) -> None:
    with recording(tmp_path / "run-1") as recorder:
        record_all(recorder)
    with pytest.raises(IdentityChanged, match="another name"):
        recording(tmp_path / "run-1")


# Tokens and targets.


def test_causal_rows_are_those_of_the_tokens_with_the_next_label_as_target(tmp_path: Path) -> None:
    labels = torch.tensor([[5, -100, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]])
    with causal(tmp_path / "run-1", targets=True) as recorder:
        recorder.add([0, 1, 2], OF_TOKENS, inputs=TOKENS, attention_mask=MASK, targets=labels)
    with connect(tmp_path / "run-1") as opened:
        soft = opened.fetch([2, 0, 1])
        opened.fetch([2, 0], inputs=TOKENS[[2, 0]], attention_mask=MASK[[2, 0]])
    assert soft.row_splits is not None
    assert soft.row_splits.tolist() == [0, 4, 7, 8]
    assert soft.tokens is not None
    assert soft.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert soft.target is not None
    assert soft.target.tolist() == [2, 3, 4, -1, -1, 7, -1, -1]
    kept = torch.cat([OF_TOKENS[2], OF_TOKENS[0, :3], OF_TOKENS[1, :1]])
    assert np.array_equal(soft.indices, kept.topk(K).indices)
    centred = kept - kept.amax(1, keepdim=True)
    assert soft.target_logit is not None
    expected = [centred[0, 2], centred[1, 3], centred[2, 4], centred[5, 7]]
    np.testing.assert_allclose(soft.target_logit[[0, 1, 2, 5]], torch.stack(expected), rtol=1e-5)
    assert np.isnan(soft.target_logit[[3, 4, 6, 7]]).all()


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({}, InvalidRequest, "give inputs"),
        ({"inputs": TOKENS.float()}, InvalidRequest, "whole numbers"),
        ({"inputs": TOKENS, "attention_mask": MASK.flip(1)}, InvalidRequest, "pad on the right"),
        ({"inputs": TOKENS, "attention_mask": MASK * 0}, InvalidRequest, "token"),
        ({"inputs": TOKENS - 9}, InvalidRequest, "tokens are 0"),
        ({"inputs": TOKENS[:2]}, ShapeMismatch, "2 inputs"),
        ({"inputs": torch.cat([TOKENS, TOKENS], 1)}, ShapeMismatch, "8 tokens"),
    ],
)
def test_tokens_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, Any], kind: type[LogitcacheError], says: str
) -> None:
    recorder = causal(tmp_path / "run-1")
    with pytest.raises(kind, match=says):
        recorder.add([0, 1, 2], OF_TOKENS, **options)
    recorder.close()


def test_targets_of_single_rows_are_stored_with_their_logits(tmp_path: Path) -> None:
    targets = np.arange(EXAMPLES) % CLASSES
    targets[3] = -100
    with recording(tmp_path / "run-1", targets=True) as recorder:
        with pytest.raises(InvalidRequest, match="give them"):
            recorder.add([0], LOGITS[:1])
        with pytest.raises(InvalidRequest, match="float"):
            recorder.add([0], LOGITS[:1], targets=[0.5])
        with pytest.raises(ShapeMismatch, match="targets"):
            recorder.add([0], LOGITS[:1], targets=[1, 2])
        for beyond in (CLASSES, 2**32 + 1):
            with pytest.raises(InvalidRequest, match=r"none of the classes, 0 to 9 \(ids: 4\)"):
                recorder.add([2, 4], LOGITS[[2, 4]], targets=np.array([1, beyond]))
        recorder.add(range(EXAMPLES), LOGITS, targets=targets)
    with connect(tmp_path / "run-1") as labels:
        soft = labels.fetch([12, 3])
    assert soft.target is not None
    assert soft.target.tolist() == [2, -1]
    assert soft.target_logit is not None
    assert soft.target_logit[0] == pytest.approx(float(LOGITS[12, 2] - LOGITS[12].max()), rel=1e-5)


def test_every_view_is_recorded_and_needed(tmp_path: Path) -> None:
    with recording(tmp_path / "run-1", views=2, seed=5) as recorder:
        recorder.add(range(EXAMPLES), LOGITS, view=0, step=0)
        assert recorder.finish() is None
        assert len(recorder.missing()) == EXAMPLES
    with recording(tmp_path / "run-1", views=2, seed=5) as recorder:
        views = np.ones(EXAMPLES, np.int64)
        recorder.add(range(EXAMPLES), LOGITS.flip(1), view=views, step=1)
    assert recorder.digest is not None
    with connect(tmp_path / "run-1") as labels:
        soft = labels.fetch([4, 4], view=[1, 0])
    assert np.array_equal(soft.indices[0], LOGITS.flip(1)[4].topk(K).indices)
    assert np.array_equal(soft.indices[1], LOGITS[4].topk(K).indices)


def test_a_run_goes_on_though_its_clock_is_behind_that_of_the_recorder_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with recording(tmp_path / "run-1") as recorder:
        recorder.add(range(18), LOGITS[:18])
    monkeypatch.setattr("logitcache.client.recorder.time.time_ns", lambda: 1)
    with recording(tmp_path / "run-1") as recorder:
        recorder.add([18, 19], LOGITS[18:])
    assert recorder.digest is not None
