"""What a run records: its terms, its bytes on the way, and rows that are none."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.runs import RUNS, STEPS, Run, small_run

from logitcache.labels import wire
from logitcache.labels.errors import (
    InvalidIds,
    InvalidRequest,
    LogitcacheError,
    MalformedMessage,
    ShapeMismatch,
    TeacherFault,
    UnknownView,
)
from logitcache.labels.ids import Ids
from logitcache.labels.recorded import (
    MAX_STEP,
    RecordedRows,
    RecordingTerms,
    Stand,
    Who,
    check_recorded,
    recorder_id,
    together,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)

Change = Callable[[RecordedRows], RecordedRows]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Run:
    return small_run(**RUNS[request.param])


def assert_same(one: RecordedRows, other: RecordedRows) -> None:
    for mine, theirs in ((one.ids.keys, other.ids.keys), (one.views, other.views), (one.steps, other.steps)):
        assert np.array_equal(mine, theirs)
    assert one.soft.temperatures == other.soft.temperatures
    arrays = other.soft.arrays()
    assert one.soft.arrays().keys() == arrays.keys()
    for name, array in one.soft.arrays().items():
        assert (array.dtype, array.shape, array.tobytes()) == (
            arrays[name].dtype,
            arrays[name].shape,
            arrays[name].tobytes(),
        ), name


class TestTerms:
    """What a recording is begun with."""

    def test_terms_are_what_their_json_says(self, run: Run) -> None:
        read = RecordingTerms.from_json(json.loads(json.dumps(run.terms.to_json())))
        assert read == run.terms
        assert read.differences(run.terms) == {}

    def test_what_differs_is_told_with_both_values(self, run: Run) -> None:
        other = replace(run.terms, identity=replace(run.identity, k=2), steps=range(5, 9), recorders=3)
        assert run.terms.differences(other) == {"k": (4, 2), "steps": (STEPS, range(5, 9)), "recorders": (1, 3)}

    @pytest.mark.parametrize(
        "change",
        [
            {"steps": [5, 5]},
            {"steps": [-1, 5]},
            {"steps": [0, MAX_STEP + 2]},
            {"steps": [0.0, 5]},
            {"steps": [0]},
            {"steps": None},
            {"steps": {"0": 1, "1": 2}},
            {"examples": 0},
            {"examples": True},
            {"examples": 2**46},
            {"recorders": 0},
            {"recorders": 65_537},
            {"identity": {}},
            {"more": 1},
        ],
        ids=str,
    )
    def test_terms_that_cannot_be_are_refused(self, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError):
            RecordingTerms.from_json(small_run().terms.to_json() | change)

    @given(value=JSON, field=st.sampled_from(["", "steps", "examples", "recorders", "k", "views", "teacher", "ids"]))
    def test_any_json_is_terms_or_refused(self, value: Any, field: str) -> None:
        if field:
            given = small_run().terms.to_json()
            (given if field in given else given["identity"])[field] = value
            value = given
        try:
            terms = RecordingTerms.from_json(value)
        except ValueError:
            return
        assert RecordingTerms.from_json(terms.to_json()) == terms

    def test_the_recorder_is_the_run_its_steps_its_weights_and_its_mode(self) -> None:
        teacher = recorder_id("run-7", range(100, 200), "eval", "moving", "crop 224")
        assert teacher.name == "run-7"
        assert teacher.preprocessing == "crop 224"
        assert teacher.weights == "moving; steps 100 to 199; eval mode"
        other = [
            recorder_id("run-7", range(100, 201), "eval", "moving", "crop 224"),
            recorder_id("run-7", range(100, 200), "train", "moving", "crop 224"),
            recorder_id("run-7", range(100, 200), "eval", "sha256:12", "crop 224"),
        ]
        assert len({teacher, *other}) == 4

    @pytest.mark.usefixtures("unchecked_annotations")
    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"run": " "}, "run="),
            ({"run": 7}, "run="),
            ({"weights": ""}, "weights="),
            ({"mode": "test"}, "'train' or in 'eval'"),
            ({"steps": range(5, 5)}, "range"),
            ({"steps": range(0, 10, 2)}, "range"),
            ({"steps": range(-1, 3)}, "range"),
            ({"steps": range(MAX_STEP + 2)}, "range"),
            ({"steps": (0, 10)}, "range"),
        ],
        ids=str,
    )
    def test_a_recorder_that_cannot_be_is_refused(self, change: dict[str, Any], told: str) -> None:
        given: dict[str, Any] = {"run": "r", "steps": range(9), "mode": "eval", "weights": "w", "preprocessing": ""}
        with pytest.raises(InvalidRequest, match=told):
            recorder_id(**given | change)


class TestOnTheWay:
    """Recorded rows as bytes."""

    def test_rows_and_who_recorded_them_arrive_bit_for_bit(self, run: Run) -> None:
        rows, who = run.batch([3, 1, 3], step=MAX_STEP), Who(3, 2**63 - 1)
        found, sender = RecordedRows.decode(rows.encode(who))
        assert_same(found, rows)
        assert sender == who
        assert len(found) == 3

    def test_batches_put_together_are_one_batch(self, run: Run) -> None:
        parts = [run.batch([0, 4]), run.batch([1]), run.batch([4, 5])]
        assert_same(together(parts), run.batch([0, 4, 1, 4, 5]))
        assert together(parts[:1]) is parts[0]

    @pytest.mark.parametrize("kind", RUNS)
    @given(data=st.data())
    def test_any_changed_bytes_are_rows_or_refused(self, kind: str, data: st.DataObject) -> None:
        body = bytearray(small_run(3, **RUNS[kind]).batch([0, 2]).encode(Who(0, 1)))
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(0, min(len(body) - 1, 700)))] = data.draw(st.integers(0, 255))
        decoded(bytes(body[: data.draw(st.integers(0, len(body)))]) if data.draw(st.booleans()) else bytes(body))

    @given(body=st.binary(max_size=200))
    def test_any_bytes_are_rows_or_refused(self, body: bytes) -> None:
        decoded(body)

    @pytest.mark.parametrize(
        ("arrays", "metadata"),
        [
            ({"view": np.zeros(3, np.int64)}, {}),
            ({"view": np.zeros(2, np.int32)}, {}),
            ({"step": np.zeros((2, 1), np.int64)}, {}),
            ({"step": None}, {}),
            ({"view": None}, {}),
            ({"ids": None}, {}),
            ({}, {"rank": "-1"}),
            ({}, {"rank": "x"}),
            ({}, {"rank": "٣"}),
            ({}, {"sitting": "9" * 20}),
            ({}, {"sitting": None}),
        ],
        ids=str,
    )
    def test_a_body_without_its_parts_is_refused(self, arrays: dict[str, Any], metadata: dict[str, Any]) -> None:
        with pytest.raises(MalformedMessage, match="does not hold recorded rows"):
            RecordedRows.decode(altered(arrays, metadata))

    @pytest.mark.parametrize(
        "ids", [np.zeros(3, np.int64), np.zeros((2, 3), np.uint64), np.zeros(2, np.uint32), np.zeros((2, 2), np.int64)]
    )
    def test_ids_that_cannot_be_any_are_refused(self, ids: np.ndarray) -> None:
        with pytest.raises(InvalidIds):
            RecordedRows.decode(altered({"ids": ids}, {}))

    def test_how_it_stands_is_what_its_json_says(self) -> None:
        for stand in (Stand(6, 2, 9, (0, 3), True, (1, "a")), Stand(6, 6, 6, digest="sha256:12")):
            assert Stand.from_json(json.loads(json.dumps(asdict(stand)))) == stand

    @given(value=JSON, field=st.sampled_from(["", "examples", "recorded", "finished", "missing", "sealing", "digest"]))
    def test_any_json_is_how_it_stands_or_refused(self, value: Any, field: str) -> None:
        try:
            stand = Stand.from_json(asdict(Stand(6, 2, 9)) | {field: value} if field else value)
        except MalformedMessage:
            return
        assert Stand.from_json(asdict(stand)) == stand


def altered(arrays: dict[str, Any], metadata: dict[str, Any]) -> bytes:
    """A body of two rows with other arrays and metadata; None takes one out."""
    found, told = wire.parse(small_run(3).batch([0, 2]).encode(Who(0, 1)))
    kept = {name: array for name, array in (found | arrays).items() if array is not None}
    return wire.encode(kept, {name: text for name, text in (told | metadata).items() if text is not None})


def decoded(body: bytes) -> None:
    try:
        rows, _ = RecordedRows.decode(body)
    except LogitcacheError:
        return
    try:
        check_recorded(rows, small_run(3).terms, "run")
    except LogitcacheError:
        return


def changed(name: str, value: Any, at: Any = (1, 1)) -> Change:
    """Give one element of an array of the rows this value."""

    def change(rows: RecordedRows) -> RecordedRows:
        array = getattr(rows.soft, name).copy()
        array[at] = value
        return replace(rows, soft=dataclasses.replace(rows.soft, **{name: array}))

    return change


def with_soft(**arrays: Callable[[Any], Any]) -> Change:
    """Put other fields in the place of some."""
    return lambda rows: replace(
        rows, soft=replace(rows.soft, **{name: make(getattr(rows.soft, name)) for name, make in arrays.items()})
    )


BAD_ROWS: dict[str, Change] = {
    "NaN": changed("logits", np.nan),
    "NaN first": changed("logits", np.nan, (1, 0)),
    "+inf": changed("logits", np.inf),
    "largest logit is NaN": changed("logit_max", np.nan, 1),
    "largest logit is +inf": changed("logit_max", np.inf, 1),
    "nothing but -inf": changed("logit_max", -np.inf, 1),
    "not centred": changed("logits", -0.5, (1, 0)),
    "not sorted": changed("logits", -60_000, (1, 1)),
    "above the first": changed("logits", 0.5),
    "tail of NaN": changed("tail_logsumexp", np.nan),
    "tail of +inf": changed("tail_logsumexp", np.inf),
    "class beyond": changed("indices", 20),
    "class twice": lambda rows: changed("indices", rows.soft.indices[1, 0])(rows),
}

BAD_TARGETS: dict[str, Change] = {
    "target beyond": changed("target", 20, 1),
    "target below -1": changed("target", -2, 1),
    "logit of a target above the largest": lambda rows: changed("target_logit", 0.5, 1)(changed("target", 3, 1)(rows)),
    "target without a logit": lambda rows: changed("target_logit", np.nan, 1)(changed("target", 3, 1)(rows)),
    "logit without a target": lambda rows: changed("target_logit", -1.0, 1)(changed("target", -1, 1)(rows)),
}

MISSHAPEN: dict[str, Change] = {
    "fewer logits": with_soft(indices=lambda array: array[:, :3], logits=lambda array: array[:, :3]),
    "float32": with_soft(logits=lambda array: array.astype(np.float32)),
    "uint32": with_soft(indices=lambda array: array.astype(np.uint32)),
    "fewer rows": with_soft(logits=lambda array: array[:-1]),
    "fewer fingerprints": with_soft(fingerprint=lambda array: array[:-1]),
    "one tail": with_soft(tail_logsumexp=lambda array: array[:, :1]),
    "other temperatures": with_soft(temperatures=lambda _: (1.0, 3.0)),
    "a mask": with_soft(present=lambda _: np.ones(2, bool)),
    "more ids": lambda rows: replace(rows, ids=Ids(np.concatenate([rows.ids.keys, rows.ids.keys]))),
}

MISSHAPEN_CAUSAL: dict[str, Change] = {
    "no splits": with_soft(row_splits=lambda _: None, tokens=lambda _: None),
    "an example without rows": with_soft(row_splits=lambda splits: splits[[0, 0, 2]]),
    "not from 0": with_soft(row_splits=lambda splits: splits + np.array([1, 0, 0])),
    "not to the end": with_soft(row_splits=lambda splits: splits - np.array([0, 0, 1])),
    "backwards": with_soft(row_splits=lambda splits: np.array([0, splits[-1] + 1, splits[-1]])),
    "too many": with_soft(row_splits=lambda splits: np.append(splits, splits[-1])),
}


@pytest.mark.usefixtures("unchecked_annotations")
class TestRefused:
    """Rows that a recording cannot hold."""

    def test_rows_that_are_right_are_not_refused(self, run: Run) -> None:
        check_recorded(run.batch(run.places), run.terms, "run")
        check_recorded(run.batch([0, 0, 1], step=STEPS.stop - 1), run.terms, "run")

    def test_classes_of_no_probability_are_right(self, run: Run) -> None:
        rows = changed("tail_logsumexp", -np.inf)(changed("logits", -np.inf, (1, slice(1, None)))(run.batch([0, 4])))
        check_recorded(rows, run.terms, "run")

    @pytest.mark.parametrize("problem", BAD_ROWS)
    def test_rows_that_are_no_distributions_are_refused_and_their_example_is_named(
        self, run: Run, problem: str
    ) -> None:
        rows = run.batch([4, 0])
        # Of a causal batch the second row is the first example's, unless that has one row alone.
        named = 0 if rows.soft.row_splits is None or rows.soft.row_splits[1] == 1 else 1
        expected = run.ids_of([[0, 4][named] // run.identity.views])
        with pytest.raises(TeacherFault, match="nothing of this batch was recorded") as caught:
            check_recorded(BAD_ROWS[problem](rows), run.terms, "run")
        assert caught.value.details["ids"] == expected

    def test_splits_whose_differences_wrap_are_refused(self) -> None:
        run = small_run(alignment="causal")
        wraps = with_soft(row_splits=lambda splits: np.array([0, 2**63 - 1, -2, splits[-1]]))
        with pytest.raises(ShapeMismatch, match="do not split"):
            check_recorded(wraps(run.batch([0, 1, 2])), run.terms, "run")

    @pytest.mark.parametrize("problem", BAD_TARGETS)
    @pytest.mark.parametrize("kind", [kind for kind, options in RUNS.items() if options.get("targets")])
    def test_targets_that_cannot_be_are_refused(self, kind: str, problem: str) -> None:
        run = small_run(**RUNS[kind])
        with pytest.raises(TeacherFault, match="target"):
            check_recorded(BAD_TARGETS[problem](run.batch([4, 0])), run.terms, "run")

    @pytest.mark.parametrize("problem", MISSHAPEN)
    def test_rows_of_another_shape_are_refused(self, run: Run, problem: str) -> None:
        with pytest.raises(ShapeMismatch):
            check_recorded(MISSHAPEN[problem](run.batch([4, 0])), run.terms, "run")

    @pytest.mark.parametrize("problem", MISSHAPEN_CAUSAL)
    def test_rows_that_are_not_split_into_examples_are_refused(self, problem: str) -> None:
        run = small_run(alignment="causal")
        with pytest.raises(ShapeMismatch):
            check_recorded(MISSHAPEN_CAUSAL[problem](run.batch([4, 0])), run.terms, "run")

    @pytest.mark.parametrize(
        ("told", "other"), [("row_splits", "pointwise"), ("target", "pointwise, integers, targets")]
    )
    def test_fields_that_the_label_set_has_not_are_refused(self, told: str, other: str) -> None:
        run = small_run(alignment="causal", targets=told == "row_splits")
        with pytest.raises(ShapeMismatch, match=told):
            check_recorded(small_run(**RUNS[other]).batch([4, 0]), run.terms, "run")

    def test_views_that_do_not_exist_are_refused(self, run: Run) -> None:
        for view in (-1, run.identity.views):
            with pytest.raises(UnknownView):
                check_recorded(replace(run.batch([4, 0]), views=np.array([0, view])), run.terms, "run")
        with pytest.raises(ShapeMismatch):
            check_recorded(replace(run.batch([4, 0]), views=np.array([0])), run.terms, "run")

    @pytest.mark.parametrize("step", [STEPS.start - 1, STEPS.stop, -(2**63), MAX_STEP])
    def test_steps_outside_of_those_recorded_are_refused(self, run: Run, step: int) -> None:
        with pytest.raises(InvalidRequest, match="5 to 104"):
            check_recorded(replace(run.batch([4, 0]), steps=np.array([STEPS.start, step])), run.terms, "run")

    @pytest.mark.parametrize("steps", [np.array([5]), np.array([[5, 5]]), np.array([5.0, 5.0])], ids=str)
    def test_steps_that_are_not_one_an_example_are_refused(self, run: Run, steps: np.ndarray) -> None:
        with pytest.raises(ShapeMismatch, match="step"):
            check_recorded(replace(run.batch([4, 0]), steps=steps), run.terms, "run")
