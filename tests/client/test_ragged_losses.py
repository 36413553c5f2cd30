"""The loss on causal rows against plain PyTorch distillation of each example alone, in every shape of a batch.

The reference knows no padding, packing, rows or positions: it sees an example's own logits, tokens and teacher.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.client.ragged import CLASSES, IGNORED, LAYOUTS, Batch, Corpus, gradient

from logitcache.client import distillation_loss, kl_divergence
from logitcache.client.alignment import places_of

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@given(lengths, st.sampled_from(LAYOUTS), st.sampled_from((1.0, 2.0)), st.integers(0, 1000))
@settings(deadline=None, max_examples=80)
def test_every_layout_equals_plain_distillation_of_each_example_alone(
    lengths: list[int], layout: str, temperature: float, seed: int
) -> None:
    corpus = Corpus.of(lengths, seed=seed)
    batch = Batch.of(corpus, layout)
    students = corpus.students()
    expected = corpus.expected(students, alpha=0.7, temperature=temperature)
    options: dict[str, Any] = {"temperature": temperature, "alpha": 0.7}
    found = batch.loss(corpus.labels(), reduction="none", **options)
    torch.testing.assert_close(found, batch.at_positions(expected), rtol=1e-5, atol=1e-5)
    mean = torch.cat(expected).mean()
    torch.testing.assert_close(batch.loss(corpus.labels(), **options), mean, rtol=1e-5, atol=1e-5)
    found_gradient = gradient(batch.loss(corpus.labels(), **options), batch.student)
    assert found_gradient[~batch.held].abs().sum() == 0
    torch.testing.assert_close(
        found_gradient[batch.held], torch.cat(torch.autograd.grad(mean, students)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("lengths", "classes"), [((300, 1, 2, 77), CLASSES), ((9, 1, 2, 6), 70_000)])
def test_long_examples_and_wide_vocabularies_line_up(layout: str, lengths: tuple[int, ...], classes: int) -> None:
    corpus = Corpus.of(list(lengths), classes=classes)
    batch, soft = Batch.of(corpus, layout), corpus.labels(classes)
    assert soft.indices.dtype == (np.uint32 if classes > 65_536 else np.uint16)
    expected = batch.at_positions(corpus.expected())
    torch.testing.assert_close(batch.loss(soft, reduction="none"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by", [1, -1])
def test_rows_or_targets_that_are_off_by_one_are_another_loss(layout: str, by: int) -> None:
    corpus = Corpus.of([4, 3, 6])
    batch, soft = Batch.of(corpus, layout, junk=0.0), corpus.labels()
    right = batch.loss(soft, reduction="none")
    rows: dict[str, Any] = {
        name: np.roll(soft.arrays()[name], by, 0) for name in ("indices", "logits", "tail_logsumexp")
    }
    moved = batch.loss(replace(soft, **rows), reduction="none")
    assert bool(((moved - right).abs()[batch.held] > 1e-3).all())
    moved = batch.loss(soft, targets=torch.roll(batch.targets, by, -1), alpha=0.0, reduction="none")
    right = batch.loss(soft, alpha=0.0, reduction="none")
    assert not torch.allclose(moved, right, atol=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_places_hold_the_tokens_that_the_teacher_read(layout: str) -> None:
    corpus = Corpus.of([4, 3, 6])
    tensors, labels = corpus.labels().to("cpu"), Batch.of(corpus, layout, junk=0.0).targets
    held = Batch.of(corpus, layout).held
    lines = held.reshape(-1, held.shape[-1])
    assert tensors.tokens is not None
    assert tensors.row_counts is not None
    assert tensors.missing is not None
    side: dict[str, Any] = {"padding": layout} if layout in ("right", "left") else {"attention_mask": lines.numpy()}
    places = places_of((lines.shape[0], lines.shape[1]), tensors.row_counts, tensors.missing, **side)
    assert labels.reshape(-1)[torch.tensor(places.positions)].tolist() == tensors.tokens.tolist()
    assert places.rows is None
    assert (places.following == -1).nonzero()[0].tolist() == [3, 6, 12]


def test_the_last_token_of_an_example_has_no_target_whatever_follows_it() -> None:
    corpus = Corpus.of([3, 1, 2])
    for layout in LAYOUTS:
        batch = Batch.of(corpus, layout, junk=0.0)
        found = batch.loss(corpus.labels(), alpha=0.0, reduction="none")
        kl = kl_divergence(batch.student, corpus.labels(), **batch.say)
        torch.testing.assert_close(found[batch.held][[2, 3, 5]], kl[batch.held][[2, 3, 5]])


def test_stored_targets_are_those_of_the_next_label() -> None:
    corpus = Corpus.of([4, 1, 6])
    for layout in LAYOUTS:
        batch = Batch.of(corpus, layout)
        stored = batch.loss(corpus.labels(), targets="stored")
        assert stored.item() == batch.loss(corpus.labels()).item()


def test_stored_targets_know_the_token_after_a_range_of_rows() -> None:
    corpus = Corpus.of([6, 5])
    whole, students = corpus.labels(), torch.stack([torch.tensor(logits[1:4]) for logits in corpus.student])
    cut = np.r_[1:4, 7:10]
    rows: dict[str, Any] = {name: array[cut] for name, array in whole.arrays().items() if len(array) == len(whole)}
    soft = replace(whole, **rows, row_splits=np.array([0, 3, 6]))
    found = distillation_loss(students, soft, targets="stored", reduction="none")
    expected = torch.stack([values[1:4] for values in corpus.expected()])
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_an_example_without_labels_leaves_out_the_first_target_where_left_padding_may_be_before_it() -> None:
    corpus = Corpus.of([4, 4])
    soft, batch = corpus.labels(present=[True, False]), Batch.of(corpus, "left", junk=0.0)
    targets = batch.targets.masked_fill(~batch.held, IGNORED)
    targets[1, :-2] = IGNORED  # a completion of two tokens: the first is predicted at a token that nothing tells apart
    guarded = batch.loss(soft, targets=targets, reduction="none")
    assert (guarded[1] != 0).tolist() == [False, False, False, False, True, False]
    told = batch.loss(soft, targets=targets, reduction="none", padding=None, attention_mask=batch.held)
    assert (told[1] != 0).tolist() == [False, False, False, True, True, False]


def test_a_pack_without_its_missing_examples_is_the_loss_of_the_others() -> None:
    corpus, others = Corpus.of([4, 3, 6]), Corpus.of([4, 3, 6])
    others = Corpus(*([of[0], of[2]] for of in (others.tokens, others.teacher, others.student)))
    batch = Batch.of(others, "rows")
    assert batch.loss(corpus.labels(present=[True, False, True])).item() == batch.loss(others.labels()).item()


def test_a_full_batch_needs_no_word_about_padding() -> None:
    corpus = Corpus.of([4, 4, 4])
    student = torch.tensor(np.stack(corpus.student))
    found = distillation_loss(student, corpus.labels(), targets=torch.tensor(np.stack(corpus.tokens)))
    torch.testing.assert_close(found, torch.cat(corpus.expected()).detach().mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_positions_in_the_mask_count_in_both_terms(layout: str) -> None:
    corpus = Corpus.of([4, 3, 6])
    batch = Batch.of(corpus, layout)
    every = batch.loss(corpus.labels(), reduction="none")
    chosen = torch.rand(batch.held.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    broken = replace(batch, student=batch.student.detach().masked_fill(~chosen[..., None], math.nan).requires_grad_())
    found = broken.loss(corpus.labels(), reduction="none", mask=chosen)
    torch.testing.assert_close(found, torch.where(chosen, every, 0.0))
    counted = int((chosen & batch.held).sum())
    torch.testing.assert_close(broken.loss(corpus.labels(), mask=chosen), found.sum() / counted)
    assert bool(torch.isfinite(gradient(broken.loss(corpus.labels(), mask=chosen), broken.student)).all())


def test_reductions_and_num_items_are_those_of_the_values() -> None:
    corpus = Corpus.of([4, 3, 6])
    batch, soft = Batch.of(corpus, "right"), corpus.labels(4)
    values = batch.loss(soft, reduction="none")
    assert values.shape == batch.held.shape
    torch.testing.assert_close(batch.loss(soft, reduction="sum"), values.sum())
    torch.testing.assert_close(batch.loss(soft), values.sum() / 13)
    torch.testing.assert_close(batch.loss(soft, num_items=10), values.sum() / 10)
    torch.testing.assert_close(batch.loss(soft, num_items=torch.tensor(10)), values.sum() / 10)


@pytest.mark.parametrize("layout", ["right", "left", "right mask", "left mask"])
@pytest.mark.parametrize("present", [[True, False, True], [False, False, False]])
def test_examples_without_labels_take_the_targets_alone(layout: str, present: list[bool]) -> None:
    corpus = Corpus.of([4, 3, 6])
    soft, batch = corpus.labels(present=present), Batch.of(corpus, layout, junk=0.0)
    batch = replace(batch, targets=batch.targets.masked_fill(~batch.held, IGNORED))
    expected = corpus.expected(present=present)
    found = batch.loss(soft, reduction="none")
    torch.testing.assert_close(found, batch.at_positions(expected), rtol=1e-5, atol=1e-5)
    labelled = sum(n if held else n - 1 for n, held in zip(corpus.lengths, present, strict=True))
    torch.testing.assert_close(batch.loss(soft), torch.cat(expected).detach().sum() / labelled, rtol=1e-5, atol=1e-5)
    assert bool(torch.isfinite(gradient(batch.loss(soft), batch.student)).all())
    without = kl_divergence(batch.student, soft, **batch.say)
    assert [bool((line == 0).all()) for line in without] == [not held for held in present]
    assert batch.loss(soft, targets=None).item() == pytest.approx(
        without.sum().item() / max(1, sum(n for n, held in zip(corpus.lengths, present, strict=True) if held))
    )
