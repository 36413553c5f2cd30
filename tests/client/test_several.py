"""Several teachers: the same one a step on every rank, all of them for the mean of their losses, or one an example."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.building import build, reference
from tests.client.faulty_server import FaultyServer, busy, with_digest
from tests.client.rows import DIGEST, dense_logits, description, inputs_of, truncated
from tests.client.test_attach import Inputs, loader_of
from torch.utils.data import DataLoader

from logitcache.client import (
    EveryNth,
    FetchedLabels,
    Labels,
    SeveralLabels,
    SoftLabelTensors,
    connect,
    distillation_loss,
    with_ids,
)
from logitcache.client.several import Member
from logitcache.labels.errors import (
    DigestChanged,
    InvalidRequest,
    LabelMismatch,
    LabelSetNotFound,
    RowsMissing,
    ServerBusy,
    ShapeMismatch,
    TeacherMismatch,
)
from logitcache.labels.soft_labels import SoftLabels

OTHER_DIGEST = "sha256:" + "2" * 64


@pytest.fixture
def softs(soft: SoftLabels) -> tuple[SoftLabels, SoftLabels]:
    """Rows of the same 100 examples by two teachers."""
    other = truncated(dense_logits(100, 10, seed=9), 4, temperatures=(1.0, 2.0))
    return soft, with_digest(other, OTHER_DIGEST)


@pytest.fixture
def servers(server: FaultyServer, softs: tuple[SoftLabels, SoftLabels]) -> Iterator[tuple[FaultyServer, FaultyServer]]:
    with FaultyServer(softs[1]) as other:
        yield server, other


Servers = tuple[FaultyServer, FaultyServer]
Softs = tuple[SoftLabels, SoftLabels]


def connected(servers: Servers, combine: Any, **options: Any) -> SeveralLabels:
    """Connected to both, what they were asked on connecting forgotten."""
    labels = connect([server.url for server in servers], combine=combine, retries=0, **options)
    for server in servers:
        server.fetched_ids.clear()
    return labels


def parity(ids: Any) -> np.ndarray:
    """Even examples have teacher 0, odd ones teacher 1."""
    return np.asarray(ids) % 2


def rows_are(found: Any, soft: SoftLabels, ids: Any) -> bool:
    at = np.asarray(ids)
    return bool(
        np.array_equal(found.indices, soft.indices[at])
        and np.array_equal(found.logits, soft.logits[at])
        and np.array_equal(found.tail_logsumexp, soft.tail_logsumexp[at])
    )


def test_each_step_has_the_labels_of_the_teacher_drawn_and_asks_no_other(servers: Servers, softs: Softs) -> None:
    with connected(servers, "random", seed=5) as labels:
        drawn = []
        attached = labels.attach(loader_of(shuffle=True), ids="id", depth=3)
        for _epoch in range(4):
            for step, (batch, found) in enumerate(attached, start=attached.step):
                assert rows_are(found, softs[labels.drawn(step)], batch["id"])
                assert found.digest == softs[labels.drawn(step)].digest
                drawn.append(labels.drawn(step))
    assert [len(server.fetched_ids) for server in servers] == [drawn.count(0), drawn.count(1)]
    assert 0 < sum(drawn) < 20


def test_connections_and_runs_that_resume_draw_the_same_teachers(servers: Servers) -> None:
    with connected(servers, "random", seed=5) as one, connected(servers, "random", seed=5) as two:
        drawn = [found.digest for _, found in one.attach(loader_of(), ids="id")]
        again = [found.digest for _, found in two.attach(loader_of(), ids="id", depth=0)]
        resumed = [found.digest for _, found in two.attach(loader_of(), ids="id", first_step=2)]
        assert again == drawn
        assert resumed[:3] == drawn[2:]
        assert set(drawn) == {DIGEST, OTHER_DIGEST}
        sequence = [one.drawn(step) for step in range(1000)]
    with connected(servers, "random", seed=6) as other:
        assert [other.drawn(step) for step in range(1000)] != sequence
    assert 420 < sum(sequence) < 580
    assert sequence[:8] == [0, 1, 0, 1, 0, 0, 1, 0]  # pinned: a later version must resume an earlier run


def test_batches_that_make_one_step_have_one_teacher_and_schedules_hold(servers: Servers) -> None:
    with connected(servers, "random", seed=1) as labels:
        attached = labels.attach(loader_of(), ids="id", accumulate=2, schedule=EveryNth(2))
        digests = [None if found is None else found.digest for _, found in attached]
        expected = [(DIGEST, OTHER_DIGEST)[labels.drawn(step)] if step % 2 == 0 else None for step in (0, 0, 1, 1, 2)]
        assert digests == expected
        assert labels.stats.steps == 3
        assert labels.fetch([3], step=0).digest == digests[0]  # type: ignore[union-attr]
        with pytest.raises(InvalidRequest, match="step=…"):
            labels.fetch([3])


def test_with_the_mean_each_batch_has_the_labels_of_all_teachers(servers: Servers, softs: Softs) -> None:
    with connected(servers, "mean") as labels:
        for batch, found in labels.attach(loader_of(shuffle=True), ids="id", inputs="x"):
            assert isinstance(found, tuple)
            assert all(rows_are(mine, soft, batch["id"]) for mine, soft in zip(found, softs, strict=True))
        stats = labels.stats
        assert stats.steps == 5
        asked = labels.members[0].stats, labels.members[1].stats
        assert stats.rows == sum(each.rows for each in asked)
        assert stats.requests == sum(each.requests for each in asked)
        assert stats.step_bytes_mean == sum(array.nbytes for soft in found for array in soft.arrays().values())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_of_several_is_the_mean_of_the_losses_and_so_is_its_gradient(softs: Softs, reduction: str) -> None:
    student = torch.randn(100, 10, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {"targets": torch.arange(100) % 10, "temperature": 2.0, "reduction": reduction}
    each = [distillation_loss(student, FetchedLabels.of(soft), **options) for soft in softs]
    expected = (each[0] + each[1]) / 2
    found = distillation_loss(student, softs, **options)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert not torch.allclose(each[0], each[1])


def test_cross_entropy_counts_once_and_a_teacher_that_lacks_an_example_gives_it_alone(softs: Softs) -> None:
    student, targets = torch.randn(100, 10), torch.arange(100) % 10
    ce = torch.nn.functional.cross_entropy(student, targets, reduction="none")
    torch.testing.assert_close(distillation_loss(student, softs, targets=targets, alpha=0.0, reduction="none"), ce)
    present = np.arange(100) != 7
    lacking = replace(softs[1], present=present, logits=np.where(present[:, None], softs[1].logits, np.nan))
    found = distillation_loss(student, [softs[0], lacking], targets=targets, reduction="none")
    alone = distillation_loss(student, softs[0], targets=targets, reduction="none")
    torch.testing.assert_close(found[7], (alone[7] + ce[7]) / 2)
    with pytest.raises(InvalidRequest, match="no teacher"):
        distillation_loss(student, [])


def test_without_targets_the_mean_of_an_example_is_over_the_teachers_that_have_it(softs: Softs) -> None:
    student = torch.randn(100, 10, dtype=torch.float64)
    present = np.arange(100) >= 40, (np.arange(100) < 70) & (np.arange(100) >= 10)
    lacking = [
        replace(soft, present=here, logits=np.where(here[:, None], soft.logits, np.nan))
        for soft, here in zip(softs, present, strict=True)
    ]
    one, other = (distillation_loss(student, soft, reduction="none") for soft in softs)
    expected = torch.cat([torch.zeros(10), other[10:40], (one[40:70] + other[40:70]) / 2, one[70:]])
    found = {name: distillation_loss(student, lacking, reduction=name) for name in ("none", "sum", "mean")}
    torch.testing.assert_close(found["none"], expected)
    torch.testing.assert_close(found["sum"], expected.sum())
    torch.testing.assert_close(found["mean"], expected[10:].mean())
    torch.testing.assert_close(distillation_loss(student, lacking, num_items=7), expected.sum() / 7)


@pytest.mark.parametrize("combine", ["random", "mean", "routed"])
def test_labels_come_as_tensors_of_a_device(servers: Servers, combine: str) -> None:
    with connected(servers, combine, route=parity if combine == "routed" else None) as labels:
        for _, found in labels.attach(loader_of(), ids="id", device="cpu"):
            each = found if isinstance(found, tuple) else (found,)
            assert len(each) == (2 if combine == "mean" else 1)
            assert all(isinstance(soft, SoftLabelTensors) for soft in each)
            assert distillation_loss(torch.zeros(4, 10), found).isfinite()


@pytest.mark.parametrize("combine", ["random", "mean", "routed"])
def test_a_connection_that_was_sent_to_another_process_gives_the_same(servers: Servers, combine: str) -> None:
    with (
        connected(servers, combine, seed=3, route=parity if combine == "routed" else None) as labels,
        pickle.loads(pickle.dumps(labels)) as again,
    ):
        for step in range(4):
            found = labels.fetch([1, 2], step=step), again.fetch([1, 2], step=step)
            one, two = (soft if isinstance(soft, tuple) else (soft,) for soft in found)
            assert [soft.logits.tolist() for soft in one] == [soft.logits.tolist() for soft in two]
        assert repr(again) == repr(labels)


@pytest.mark.parametrize("combine", ["random", "mean", "routed"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of any fork beside threads
def test_datasets_may_fetch_in_the_workers_of_their_loader(servers: Servers, softs: Softs, combine: str) -> None:
    with connected(servers, combine, seed=3, route=parity if combine == "routed" else None) as labels:

        class Fetching(Inputs):
            def __getitem__(self, index: int) -> Any:
                found = labels.fetch([index], step=index)
                return index, (found[-1] if isinstance(found, tuple) else found).logits[0]

        for index, logits in DataLoader(Fetching(8), batch_size=None, num_workers=2):  # type: ignore[arg-type]
            teacher = {"random": labels.drawn(index), "mean": 1, "routed": index % 2}[combine]
            assert np.array_equal(logits, softs[teacher].logits[index])


def test_routed_rows_are_of_each_examples_own_teacher_in_the_order_asked(servers: Servers, softs: Softs) -> None:
    asked = [9, 4, 4, 0, 99, 1, 9, 2]
    with connected(servers, "routed", route=parity) as labels:
        found = labels.fetch(torch.tensor(asked), inputs=inputs_of(asked))
        assert isinstance(found, FetchedLabels)
        for position, id in enumerate(asked):
            assert found.logits[position].tolist() == softs[id % 2].logits[id].tolist()
            assert found.indices[position].tolist() == softs[id % 2].indices[id].tolist()
            assert found.fingerprint[position] == softs[0].fingerprint[id]
        assert (found.digest, found.temperatures) == (None, (1.0, 2.0))
        assert [server.fetched_ids for server in servers] == [[[4, 4, 0, 2]], [[9, 99, 1, 9]]]
        assert [each.digest for each in labels.describe()] == [DIGEST, OTHER_DIGEST]
        labels.fetch([2, 4])
        assert len(servers[1].fetched_ids) == 1
        masked = labels.fetch([1, 100, 2], on_missing="mask")
        assert masked.present.tolist() == [True, False, True]  # type: ignore[union-attr]
        with pytest.raises(LabelMismatch) as error:
            labels.fetch(asked, inputs=list(inputs_of([9, 4, 4, 0, 98, 1, 9, 2])))
        assert error.value.ids == [99]
        for batch, soft in labels.attach(loader_of(), ids="id", inputs="x"):
            assert soft.logits[1].tolist() == softs[1].logits[batch["id"][1]].tolist()


class Viewed(Labels):
    """Labels that note the views that they are asked for, and give the first one's."""

    asked: list[Any]

    def fetch(self, ids: Any, *, view: Any = 0, **options: Any) -> FetchedLabels:
        self.asked.append(view)
        return super().fetch(ids, **options)


def test_views_that_are_given_for_each_example_go_with_it_to_its_teacher(server: FaultyServer) -> None:
    even, odd = both = [Viewed(server.url, retries=0), Viewed(server.url, retries=0)]
    for each in both:
        each.asked = []
    members = [Member(str(number), labels) for number, labels in enumerate(both)]
    with SeveralLabels(members, combine="routed", route=parity).open() as labels:
        for views in ([5, 6, 7], np.array([5, 6, 7]), torch.tensor([5, 6, 7])):
            labels.fetch([1, 2, 3], view=views)
            assert (list(even.asked[-1]), list(odd.asked[-1])) == ([6], [5, 7])
        for view in (7, np.int64(7), np.array(7), torch.tensor(7)):
            labels.fetch([1, 2, 3], view=view)
            assert even.asked[-1] == odd.asked[-1] == 7
        with pytest.raises(ShapeMismatch, match="2 views were given for 3 ids"):
            labels.fetch([1, 2, 3], view=[5, 6])


@pytest.mark.parametrize("view", [True, np.True_, [True, False, True], torch.tensor(True), "0", 1.0, None])
def test_views_that_are_no_numbers_are_refused_by_several_as_by_one(tmp_path: Path, view: Any) -> None:
    targets = [build(tmp_path / name, reference(1, short_by=4000)) for name in ("one", "other")]
    with connect(targets, combine="routed", route=parity) as labels:
        for each in (labels, labels.members[0]):
            with pytest.raises(InvalidRequest, match="give a whole number, or one for each id"):
                each.fetch([1, 2, 3], view=view)


def test_text_ids_are_routed_as_texts(tmp_path: Path) -> None:
    sources = [reference(1, ids="text", targets=True, short_by=4000, seed=seed) for seed in (0, 1)]
    sources[1] = replace(sources[1], ids=sources[0].ids)
    targets = [build(tmp_path / str(n), source) for n, source in enumerate(sources)]
    asked = [str(id) for id in sources[0].ids[:6]]

    def route(ids: list[str]) -> list[int]:
        return [int(id in asked[::2]) for id in ids]

    with connect(targets, combine="routed", route=route) as labels:
        found = labels.fetch(asked)
        assert isinstance(found, FetchedLabels)
        for position, id in enumerate(asked):
            (own,) = labels.members[position % 2 == 0].fetch([id]).logits.tolist()
            assert found.logits[position].tolist() == own
        assert found.target is not None
        assert labels.missing([*asked, "no such id"]) == ["no such id"]


@pytest.mark.parametrize(
    ("route", "named"),
    [
        (lambda ids: ids[:-1] * 0, r"shape \(2,\) for 3 ids"),
        (lambda ids: ids / 1.0, "float64"),
        (lambda ids: np.where(ids == 5, 2, 0), "teacher 2 for 5: 2 teachers"),
        (lambda ids: np.where(ids == 4, -1, 0), "teacher -1 for 4"),
    ],
)
def test_a_route_that_names_no_teacher_is_refused(servers: Servers, route: Any, named: str) -> None:
    with connected(servers, "routed", route=route) as labels, pytest.raises(InvalidRequest, match=named):
        labels.fetch([3, 4, 5])
    assert servers[0].fetched_ids == servers[1].fetched_ids == []


class Told(Labels):
    """Labels that are described as others."""

    changed: dict[str, Any]

    def describe(self) -> Any:
        found = super().describe()
        identity = {name: value for name, value in self.changed.items() if name != "examples"}
        examples = self.changed.get("examples", found.examples)
        return replace(found, identity=replace(found.identity, **identity), examples=examples)


def opened(server: FaultyServer, combine: Any, **changed: Any) -> SeveralLabels:
    """The same label set twice, the second one described otherwise."""
    told = Told(server.url, retries=0)
    told.changed = changed
    members = [Member("here", Labels(server.url, retries=0)), Member("there", told)]
    return SeveralLabels(members, combine=combine, route=parity if combine == "routed" else None).open()


@pytest.mark.parametrize("combine", ["random", "mean", "routed"])
@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("ids", "text", "ids is ordinal in here and text in there"),
        ("classes", 11, "classes is 10 in here and 11 in there"),
        ("views", 2, "views is 1 in here and 2 in there"),
        ("seed", 2, "seed is 0 in here and 2 in there"),
        ("alignment", "causal", "alignment is pointwise in here and causal in there"),
        ("examples", 99, "examples is 100 in here and 99 in there"),
    ],
)
def test_sets_of_other_examples_or_classes_are_refused(
    server: FaultyServer, combine: str, field: str, value: Any, named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named) as error:
        opened(server, combine, **{field: value})
    assert error.value.details["field"] == field
    assert error.value.details["targets"] == ["here", "there"]


@pytest.mark.parametrize(
    ("field", "value"), [("k", 3), ("dtype", "float16"), ("temperatures", (1.0, 4.0)), ("targets", True)]
)
def test_rows_of_another_form_can_be_drawn_and_averaged_but_not_routed(
    server: FaultyServer, field: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest, match=f"to be routed have rows of one form: {field}"):
        opened(server, "routed", **{field: value})
    for combine in ("random", "mean"):
        opened(server, combine, **{field: value}).close()


def test_a_list_of_targets_that_cannot_be_is_refused(servers: Servers, tmp_path: Path) -> None:
    urls = [server.url for server in servers]
    refused: list[tuple[Any, dict[str, Any], str]] = [
        (urls, {}, "combine=None is not known.*'random'.*'mean'.*'routed'"),
        (urls, {"combine": "best"}, "combine='best'"),
        (urls[:1], {"combine": "mean"}, "1 targets in a list: give at least two"),
        (urls, {"combine": "routed"}, "route is a function"),
        (urls, {"combine": "mean", "route": parity}, "route is a function"),
        (urls, {"combine": "mean", "digest": DIGEST}, "digest=.*is not a list of 2"),
        (urls, {"combine": "mean", "teacher": ["a"]}, "teacher=.*is not a list of 2"),
        (urls[0], {"combine": "mean"}, "give a list of their targets"),
    ]
    for target, options, named in refused:
        with pytest.raises(InvalidRequest, match=named):
            connect(target, **options)
    causal = build(tmp_path / "causal", reference(1, alignment="causal", short_by=3900, longest=12))
    with pytest.raises(InvalidRequest, match="causal label sets cannot be routed"):
        connect([causal, causal], combine="routed", route=parity)


def test_each_target_has_its_own_digest_and_teacher_to_be_held_to(servers: Servers) -> None:
    connected(servers, "mean", digest=[DIGEST, OTHER_DIGEST], teacher=[None, "resnet-tiny"]).close()
    with pytest.raises(DigestChanged) as changed:
        connected(servers, "mean", digest=[None, DIGEST])
    assert changed.value.details["target"] == servers[1].url
    with pytest.raises(TeacherMismatch, match=servers[0].url):
        connected(servers, "mean", teacher=["another", None])


def test_what_is_compared_on_connecting_is_no_row_served(servers: Servers) -> None:
    with connected(servers, "mean") as labels:
        assert (labels.stats.rows, labels.stats.bytes, labels.stats.fetch_ms) == (0, 0, 0.0)
        labels.fetch([1, 2])
        assert [each.stats.rows for each in labels.members] == [2, 2]


def test_a_data_set_in_another_order_is_refused_on_connecting(server: FaultyServer, softs: Softs) -> None:
    rolled = replace(softs[1], fingerprint=np.roll(softs[1].fingerprint, 1))
    with FaultyServer(rolled) as other:
        for combine in ("random", "mean"):
            with pytest.raises(LabelMismatch, match=r"shown other inputs.*in another order") as error:
                connected((server, other), combine)
            assert 0 in error.value.ids


def test_inputs_on_which_two_teachers_disagree_are_named(
    server: FaultyServer, softs: Softs, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = softs[1].fingerprint.copy()
    fingerprint[[3, 17]] += np.uint64(1)
    with FaultyServer(replace(softs[1], fingerprint=fingerprint)) as other:
        for each in (server, other):  # ids that are not ordinals are known only when they are asked for
            told = description(each.soft)
            told = replace(told, identity=replace(told.identity, ids="integer"))
            monkeypatch.setattr(each, "describe", lambda told=told: told)
        with connected((server, other), "mean") as labels:
            labels.fetch([1, 2, 4])
            with pytest.raises(LabelMismatch, match=f"{server.url} and {other.url} were shown other inputs") as error:
                labels.fetch([17, 2, 3, 17])
            assert error.value.ids == [17, 3]
            with pytest.raises(LabelMismatch):
                list(labels.attach(loader_of(), ids="id"))


def test_stored_targets_on_which_two_label_sets_disagree_are_refused(tmp_path: Path) -> None:
    sources = [reference(1, targets=True, short_by=4000, seed=seed) for seed in (0, 1)]
    assert not np.array_equal(sources[0].targets, sources[1].targets)
    folders = [build(tmp_path / str(n), source) for n, source in enumerate(sources)]
    with pytest.raises(LabelMismatch, match="given other targets"):
        connect(folders, combine="mean")


@pytest.mark.parametrize("combine", ["random", "mean"])
def test_tokens_of_causal_label_sets_are_checked_and_labels_cut_to_them(tmp_path: Path, combine: Any) -> None:
    sources = [reference(1, alignment="causal", short_by=3900, k=k, longest=12) for k in (4, 7)]
    folders = [build(tmp_path / str(n), source) for n, source in enumerate(sources)]
    source = sources[0]
    tokens = [source.tokens[start:stop].astype(int).tolist() for start, stop in
              zip(source.first_rows[:-1], source.first_rows[1:], strict=True)]  # fmt: skip
    batches = [{"id": [n, n + 1], "input_ids": [tokens[n], tokens[n + 1][:1]]} for n in range(4)]
    with connect(folders, combine=combine) as labels:
        for step, (batch, found) in enumerate(labels.attach(batches, ids="id")):
            each = found if combine == "mean" else (found,)
            teachers = (0, 1) if combine == "mean" else (labels.drawn(step),)
            assert [soft.indices.shape[1] for soft in each] == [(4, 7)[teacher] for teacher in teachers]
            assert all(np.diff(soft.row_splits).tolist() == [len(tokens[batch["id"][0]]), 1] for soft in each)
        for _, found in labels.attach(batches, ids="id", rows=(0, 1), inputs=None):
            assert {len(soft) for soft in (found if combine == "mean" else (found,))} == {2}
        wrong = [{"id": [0], "input_ids": [[tokens[0][0] + 1]]}]
        with pytest.raises(LabelMismatch):
            list(labels.attach(wrong, ids="id"))


def test_errors_say_of_which_label_set_they_are(servers: Servers) -> None:
    with pytest.raises(LabelSetNotFound) as absent:
        connect([servers[0].url, f"{servers[1].base_url}/digit"], combine="mean")
    assert absent.value.details["target"] == f"{servers[1].base_url}/digit"
    with connected(servers, "mean") as labels:
        servers[1].faults.append(busy())
        with pytest.raises(ServerBusy, match=servers[1].url) as error:
            labels.fetch([1])
        assert error.value.details["target"] == servers[1].url
        with pytest.raises(RowsMissing, match=servers[0].url) as missing:
            labels.fetch([1, 100])
        assert missing.value.ids == [100]
        labels.fetch([1])


def test_what_any_teacher_that_would_be_asked_lacks_is_missing(tmp_path: Path) -> None:
    source = reference(2)
    whole, half = build(tmp_path / "whole", source), build(tmp_path / "half", source, [0])
    asked = [5000, 3, 5001, 5000, 10**6]
    with connect([whole, half], combine="mean") as labels:
        assert labels.missing(asked) == [5000, 5001, 10**6]
        assert labels.missing([]) == []
        with pytest.raises(RowsMissing, match="half"):
            labels.fetch(asked[:-1])
        found = labels.fetch([3, 5000], on_missing="mask")
        assert isinstance(found, tuple)
        masks = [soft.present.tolist() for soft in found if soft.present is not None]
        assert masks == [[True, True], [True, False]]
    with connect([whole, half], combine="routed", route=parity) as labels:
        assert labels.missing(asked) == [5001, 10**6]


def test_a_closed_connection_says_so(servers: Servers) -> None:
    with connected(servers, "mean") as labels:
        assert repr(labels) == f"SeveralLabels({servers[0].url!r}, {servers[1].url!r}, combine='mean')"
    with pytest.raises(InvalidRequest, match="is closed: connect again"):
        labels.fetch([1])


def test_with_ids_on_a_plain_loader_is_enough(servers: Servers) -> None:
    loader = DataLoader(with_ids(Inputs(8)), batch_size=4)
    with connected(servers, "mean") as labels:
        assert len(list(labels.attach(loader, ids="id"))) == len(loader) == 2
