"""What every reader of a label set must do. A reader's tests subclass `LabelSetConformance` beside three fixtures,
and `ShapesConformance` beside the same fixtures over label sets of any shape.

``source`` is the dense reference, ``complete`` a reader of the finished label set made from it (with at least three
shards), ``partial`` a reader of one of which only shard 0 is committed.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.building import ROWS_PER_SHARD, Reference

from logitcache.labels.errors import (
    DigestChanged,
    InvalidIds,
    InvalidRequest,
    LogitcacheError,
    RangeOutside,
    RowsMissing,
    TooManyRows,
    UnknownView,
)
from logitcache.labels.label_set import LABELLED, UNKNOWN, UNLABELLED, LabelSet
from logitcache.labels.soft_labels import SoftLabels

ORDERS = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
FLOAT16_RELATIVE = 2.0**-11
"""Half a unit in the last place of a float16, relative."""


def assert_rows_equal(soft: SoftLabels, source: Reference, ordinals: Any, ranges: Any = None) -> None:
    """Every field of these examples' rows is what the dense reference says."""
    rows = source.rows(ordinals, ranges)
    assert np.array_equal(soft.indices, source.order[rows])
    assert np.array_equal(soft.fingerprint, source.fingerprints[np.asarray(ordinals)])
    assert np.array_equal(soft.logit_max, source.logits[rows].max(1).astype(np.float32))
    for temperature in source.identity.temperatures:
        dense = source.probs(temperature, rows)
        head = np.take_along_axis(dense, soft.indices.astype(int), 1)
        error = np.abs(soft.log_probs(temperature) - np.log(head))
        centred = np.abs(np.take_along_axis(source.centred[rows], soft.indices.astype(int), 1))
        # Each centred logit is rounded, and so is, by a weighted mean of the same errors, the normaliser.
        bound = (centred + centred.max(1, keepdims=True)) * FLOAT16_RELATIVE / temperature + 1e-6
        assert (error <= bound).all()
        residual = 1.0 - head.sum(1)
        large = residual > 1e-8
        assert np.abs(soft.residual_mass(temperature) / residual - 1)[large].max(initial=0) < 5e-3
    if source.identity.alignment == "causal":
        assert soft.row_splits is not None
        assert soft.tokens is not None
        counts = source.row_counts[np.asarray(ordinals)] if ranges is None else np.diff(np.atleast_2d(ranges))[:, 0]
        assert np.array_equal(np.diff(soft.row_splits), np.broadcast_to(counts, len(ordinals)))
        assert np.array_equal(soft.tokens, source.tokens[rows])
    else:
        assert soft.row_splits is None
        assert soft.tokens is None
    if source.identity.targets:
        assert soft.target is not None
        assert soft.target_logit is not None
        assert np.array_equal(soft.target, source.targets[rows])
        assert np.array_equal(soft.target_logit, source.target_logits[rows], equal_nan=True)
    else:
        assert soft.target is None
        assert soft.target_logit is None


class LabelSetConformance:
    """Behaviour that does not depend on where the label set is."""

    def test_rows_come_back_in_the_order_asked_for_with_duplicates_across_shards(
        self, complete: LabelSet, source: Reference
    ) -> None:
        edge = ROWS_PER_SHARD
        ids = np.array([edge, edge - 1, 0, 2 * edge, edge - 1, source.layout.examples - 1, 0, 2 * edge - 1])
        assert_rows_equal(complete.fetch(ids), source, ids)

    def test_every_row_equals_the_reference(self, complete: LabelSet, source: Reference) -> None:
        ids = np.random.default_rng(5).permutation(source.layout.examples)
        assert_rows_equal(complete.fetch(ids), source, ids)

    @ORDERS
    @given(data=st.data())
    def test_any_selection_is_that_selection_of_the_whole(
        self, complete: LabelSet, source: Reference, data: st.DataObject
    ) -> None:
        last = source.layout.examples - 1
        near_edges = st.sampled_from([0, ROWS_PER_SHARD - 1, ROWS_PER_SHARD, 2 * ROWS_PER_SHARD, last])
        ids = np.array(data.draw(st.lists(near_edges | st.integers(0, last), min_size=1, max_size=40)))
        assert_rows_equal(complete.fetch(ids), source, ids)

    @pytest.mark.parametrize("kind", [list, tuple, np.array, lambda ids: np.array(ids, np.uint16)])
    def test_ids_may_be_any_sequence_of_whole_numbers(self, complete: LabelSet, kind: Any) -> None:
        assert np.array_equal(complete.fetch(kind([5, 3])).indices, complete.fetch([5, 3]).indices)

    def test_the_description_names_identity_digest_and_size(self, complete: LabelSet, source: Reference) -> None:
        description = complete.describe()
        assert description.identity == source.identity
        assert (description.examples, description.labelled) == (source.layout.examples, source.layout.examples)
        assert description.digest is not None
        assert description.digest.startswith("sha256:")
        assert description.generation == 1
        assert description.shards.committed == description.shards.total == source.layout.shards
        residual = 1 - np.take_along_axis(source.probs(1.0), source.order, 1).sum(1)
        assert description.retained_mass["1"]["mean"] == pytest.approx(1 - residual.mean(), abs=1e-3)
        assert description.retained_mass["1"]["min"] == pytest.approx(1 - residual.max(), abs=1e-2)

    def test_rows_carry_the_digest_of_their_content(self, complete: LabelSet) -> None:
        assert complete.fetch([0]).digest == complete.describe().digest

    def test_the_pinned_digest_is_served_and_another_is_refused(self, complete: LabelSet) -> None:
        digest = complete.describe().digest
        assert len(complete.fetch([0], digest=digest)) == 1
        with pytest.raises(DigestChanged, match="mixed"):
            complete.fetch([0], digest="sha256:" + "0" * 64)

    def test_unknown_ids_are_named_and_nothing_is_returned(self, complete: LabelSet, source: Reference) -> None:
        beyond = source.layout.examples
        with pytest.raises(RowsMissing) as caught:
            complete.fetch([0, beyond, -1, beyond, 2**62])
        assert caught.value.unknown == [beyond, -1, 2**62]
        assert caught.value.unlabelled == []
        assert "3 of 4 examples" in str(caught.value)

    def test_ids_that_are_not_labelled_yet_are_told_apart_from_unknown_ones(
        self, partial: LabelSet, source: Reference
    ) -> None:
        with pytest.raises(RowsMissing) as caught:
            partial.fetch([0, ROWS_PER_SHARD, source.layout.examples])
        assert (caught.value.unknown, caught.value.unlabelled) == ([source.layout.examples], [ROWS_PER_SHARD])
        assert caught.value.ids == [source.layout.examples, ROWS_PER_SHARD]

    def test_committed_shards_are_served_while_the_rest_is_missing(self, partial: LabelSet, source: Reference) -> None:
        ids = np.arange(100, 200)
        assert_rows_equal(partial.fetch(ids), source, ids)
        description = partial.describe()
        assert (description.digest, description.generation, description.labelled) == (None, None, ROWS_PER_SHARD)

    def test_masked_rows_are_marked_and_hold_no_number_that_could_be_trained_on(
        self, partial: LabelSet, source: Reference
    ) -> None:
        ids = np.array([ROWS_PER_SHARD, 7, -1, 7, source.layout.examples])
        soft = partial.fetch(ids, on_missing="mask")
        assert soft.present is not None
        assert soft.present.tolist() == [False, True, False, True, False]
        assert_rows_equal(partial.fetch([7]), source, np.array([7]))
        assert np.array_equal(soft.indices[1], soft.indices[3])
        missing = ~soft.present
        assert np.isnan(soft.logits[missing]).all()
        assert np.isnan(soft.logit_max[missing]).all()
        assert np.isnan(soft.tail_logsumexp[missing]).all()

    def test_nothing_is_masked_where_all_is_present(self, complete: LabelSet) -> None:
        soft = complete.fetch([1, 2], on_missing="mask")
        assert soft.present is not None
        assert soft.present.all()

    @pytest.mark.parametrize(
        "ids",
        [
            [],
            [0.5],
            ["0"],
            [True],
            [None],
            [2**63],
            [-(2**63) - 1],
            [[1, 2]],
            "12",
            {"a": 1},
            5,
            np.array([0.0]),
            [1, "a"],
        ],
        ids=str,
    )
    def test_ids_that_cannot_be_right_are_refused(self, complete: LabelSet, ids: Any) -> None:
        with pytest.raises(InvalidIds, match=r"id"):
            complete.fetch(ids)

    @pytest.mark.parametrize("view", [1, -1])
    def test_views_that_do_not_exist_are_refused(self, complete: LabelSet, view: int) -> None:
        with pytest.raises(UnknownView, match=str(view)):
            complete.fetch([0], view=view)

    @pytest.mark.usefixtures("unchecked_annotations")
    def test_an_unknown_policy_for_missing_rows_is_refused(self, complete: LabelSet) -> None:
        with pytest.raises(InvalidRequest, match="on_missing"):
            complete.fetch([0], on_missing="skip")  # type: ignore[arg-type]

    def test_errors_are_of_one_tree(self, complete: LabelSet) -> None:
        with pytest.raises(LogitcacheError) as caught:
            complete.fetch([-5])
        assert caught.value.code == "rows-missing"


class ShapesConformance:
    """What every reader does for label sets of any alignment, ids and targets. The fixtures are the same three."""

    def test_every_row_of_every_example_equals_the_reference(self, complete: LabelSet, source: Reference) -> None:
        ordinals = np.random.default_rng(5).permutation(source.layout.examples)
        assert_rows_equal(complete.fetch(source.at(ordinals)), source, ordinals)

    @ORDERS
    @given(data=st.data())
    def test_any_examples_and_ranges_are_those_of_the_whole(
        self, complete: LabelSet, source: Reference, data: st.DataObject
    ) -> None:
        last = source.layout.examples - 1
        edges = [edge for shard in range(source.layout.shards) for edge in (source.layout.span(shard)[0], last)]
        ordinals = data.draw(st.lists(st.sampled_from(edges) | st.integers(0, last), min_size=1, max_size=40))
        ranges = None
        if source.identity.alignment == "causal" and data.draw(st.booleans()):
            pairs = [st.tuples(*[st.integers(0, int(source.row_counts[at]))] * 2).map(sorted) for at in ordinals]
            ranges = np.array(data.draw(st.tuples(*pairs)))
        assert_rows_equal(complete.fetch(source.at(ordinals), rows=ranges), source, ordinals, ranges)

    def test_one_range_is_taken_of_every_example_that_can_have_many_rows(
        self, complete: LabelSet, source: Reference
    ) -> None:
        if source.identity.alignment != "causal":
            with pytest.raises(InvalidRequest, match="has one row"):
                complete.fetch(source.at([4, 0, 4]), rows=(0, 1))
            return
        assert_rows_equal(complete.fetch(source.at([4, 0, 4]), rows=(0, 1)), source, [4, 0, 4], (0, 1))

    def test_a_range_outside_its_example_is_named(self, complete: LabelSet, source: Reference) -> None:
        count = int(source.row_counts[2])
        if source.identity.alignment != "causal":
            with pytest.raises(InvalidRequest, match="has one row"):
                complete.fetch(source.at([2]), rows=(0, count + 1))
            return
        with pytest.raises(RangeOutside, match=f"it has {count:,}") as caught:
            complete.fetch(source.at([2]), rows=(0, count + 1))
        assert caught.value.ids == source.at([2])

    def test_the_description_tells_the_shape(self, complete: LabelSet, source: Reference) -> None:
        description = complete.describe()
        assert description.identity == source.identity
        assert (description.examples, description.labelled) == (source.layout.examples, source.layout.examples)
        assert description.rows == len(source.logits)

    def test_unknown_ids_are_named(self, complete: LabelSet, source: Reference) -> None:
        unknown: list[Any] = ["no/such", "😀"] if source.identity.ids == "text" else [-3, 2**62 + 1]
        with pytest.raises(RowsMissing) as caught:
            complete.fetch([*source.at([1]), *unknown, unknown[0]])
        assert (caught.value.unknown, caught.value.unlabelled) == (unknown, [])
        states = complete.states([*source.at([1]), *unknown])
        assert states.tolist() == [LABELLED, UNKNOWN, UNKNOWN]

    def test_ids_of_the_other_kind_are_refused(self, complete: LabelSet, source: Reference) -> None:
        with pytest.raises(InvalidIds, match="are texts" if source.identity.ids == "text" else "are whole numbers"):
            complete.fetch([5] if source.identity.ids == "text" else ["five"])

    def test_what_is_labelled_so_far_is_served_and_the_rest_is_named(
        self, partial: LabelSet, source: Reference
    ) -> None:
        later = source.layout.span(1)[0]
        assert_rows_equal(partial.fetch(source.at([3, 1])), source, [3, 1])
        with pytest.raises(RowsMissing) as caught:
            partial.fetch(source.at([3, later]))
        assert (caught.value.unknown, caught.value.unlabelled) == ([], source.at([later]))
        assert partial.states(source.at([later, 3])).tolist() == [UNLABELLED, LABELLED]

    def test_masked_examples_are_marked_and_cannot_be_trained_on(self, partial: LabelSet, source: Reference) -> None:
        later = source.layout.span(1)[0]
        soft = partial.fetch(source.at([3, later, 1]), on_missing="mask")
        assert soft.present is not None
        assert soft.present.tolist() == [True, False, True]
        if soft.row_splits is not None:
            assert soft.rows_of(1) == slice(int(source.row_counts[3]), int(source.row_counts[3]))
            assert np.array_equal(soft.indices, source.order[source.rows([3, 1])])
        else:
            assert np.isnan(soft.logits[1]).all()
            assert np.array_equal(soft.indices[[0, 2]], source.order[[3, 1]])
            assert soft.target is None or soft.target[1] == -1


def fetch_beyond_the_limit(reader: LabelSet) -> None:
    """A single request above the limits is refused; for readers that do not split by themselves."""
    most = reader.describe().limits.ids
    with pytest.raises(TooManyRows, match="split"):
        reader.fetch(np.zeros(most + 1, np.int64))
