"""Token ids held against what the teacher read, and labels cut to them, from a folder and over a real socket."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.building import Reference, build, reference
from tests.conformance import assert_rows_equal
from torch.utils.data import DataLoader

from logitcache.client import Labels, SoftLabelTensors, connect
from logitcache.labels.errors import InvalidRequest, LabelMismatch, RangeOutside, RowsMissing, ShapeMismatch
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running

SOME = [7, 2, 30, 2]
"""Examples of a batch, one of them twice."""


@pytest.fixture(scope="module")
def source() -> Reference:
    return reference(3, alignment="causal", ids="text", targets=True)


@pytest.fixture(scope="module")
def store(source: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    build(store / "complete", source)
    build(store / "partial", source, [0])
    build(store / "vision", reference(1))
    return store


@pytest.fixture(scope="module", params=["folder", "http"])
def where(store: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "folder":
        yield str(store)
        return
    with running(create_app(Catalog(store))) as base:
        yield base


@pytest.fixture
def labels(where: str) -> Iterator[Labels]:
    with connect(f"{where}/complete") as connected:
        yield connected


@pytest.fixture
def partial(where: str) -> Iterator[Labels]:
    with connect(f"{where}/partial") as connected:
        yield connected


def tokens_of(source: Reference, ordinals: Any, *, most: int = 10_000, skip: int = 0) -> list[np.ndarray]:
    """The tokens of these examples, cut short."""
    return [source.tokens[source.rows([ordinal])].astype(np.int64)[skip:most] for ordinal in ordinals]


def batch_of(lines: list[np.ndarray], *, left: bool = False, dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    """A batch as a tokenizer pads it."""
    width = max(map(len, lines)) + 3
    inputs, mask = torch.full((len(lines), width), 1, dtype=dtype), torch.zeros(len(lines), width, dtype=dtype)
    for place, line in enumerate(lines):
        where = slice(width - len(line), width) if left else slice(len(line))
        inputs[place, where], mask[place, where] = torch.tensor(line, dtype=dtype), 1
    return {"inputs": inputs, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("left", [False, True])
def test_whole_sequences_pass_and_get_every_row(
    labels: Labels, source: Reference, left: bool, dtype: torch.dtype
) -> None:
    batch = batch_of(tokens_of(source, SOME), left=left, dtype=dtype)
    assert_rows_equal(labels.fetch(source.at(SOME), **batch), source, SOME)


@pytest.mark.parametrize("left", [False, True])
def test_sequences_cut_short_get_the_rows_of_what_is_left(labels: Labels, source: Reference, left: bool) -> None:
    lines = tokens_of(source, SOME, most=20)
    ranges = [(0, len(line)) for line in lines]
    assert_rows_equal(labels.fetch(source.at(SOME), **batch_of(lines, left=left)), source, SOME, ranges)
    assert_rows_equal(labels.fetch(source.at(SOME), inputs=lines), source, SOME, ranges)


def test_a_batch_of_one_length_needs_no_mask(labels: Labels, source: Reference) -> None:
    long = np.flatnonzero(source.row_counts >= 16)[:5]
    inputs = np.stack(tokens_of(source, long, most=16))
    assert_rows_equal(labels.fetch(source.at(long), inputs=inputs), source, long, (0, 16))


@pytest.mark.parametrize("skip", [1, 0])
def test_sequences_shifted_by_one_are_refused_either_way(labels: Labels, source: Reference, skip: int) -> None:
    later = [np.roll(line, 1) for line in tokens_of(source, SOME)] if skip == 0 else tokens_of(source, SOME, skip=1)
    with pytest.raises(LabelMismatch, match="row 0 of those fetched for") as caught:
        labels.fetch(source.at(SOME), inputs=later)
    assert caught.value.ids == source.at([ordinal for ordinal in dict.fromkeys(SOME) if source.row_counts[ordinal] > 1])


def test_rows_from_the_middle_are_compared_with_the_tokens_of_those_rows(labels: Labels, source: Reference) -> None:
    long = np.flatnonzero(source.row_counts >= 60)[:4]
    lines = tokens_of(source, long, skip=40, most=60)
    assert_rows_equal(labels.fetch(source.at(long), rows=(40, 60), inputs=lines), source, long, (40, 60))
    with pytest.raises(LabelMismatch):
        labels.fetch(source.at(long), rows=(39, 59), inputs=lines)
    with pytest.raises(ShapeMismatch, match=r"20 tokens of .* rows 40 to 61 were asked for"):
        labels.fetch(source.at(long), rows=(40, 61), inputs=lines)


def test_one_other_token_names_its_example_and_place(labels: Labels, source: Reference) -> None:
    lines = tokens_of(source, SOME)
    lines[2][-1] += 1
    with pytest.raises(LabelMismatch) as caught:
        labels.fetch(source.at(SOME), **batch_of(lines, left=True))
    assert caught.value.ids == source.at([30])
    assert caught.value.details["position"] == len(lines[2]) - 1


def test_more_tokens_than_the_teacher_read_are_refused_with_the_examples(labels: Labels, source: Reference) -> None:
    lines = tokens_of(source, SOME)
    lines[0] = np.append(lines[0], 5)
    with pytest.raises(LabelMismatch, match="more tokens than the teacher read") as caught:
        labels.fetch(source.at(SOME), **batch_of(lines))
    assert caught.value.ids == source.at([7])
    assert "attention_mask" not in str(caught.value)


def test_padding_without_a_mask_is_never_guessed(labels: Labels, source: Reference) -> None:
    with pytest.raises(LabelMismatch, match="give attention_mask"):
        labels.fetch(source.at(SOME), inputs=batch_of(tokens_of(source, SOME))["inputs"])
    # Cut short first, so that no line is longer than its example, and only what stands there tells.
    long = np.flatnonzero(source.row_counts >= 24)[:2]
    lines = tokens_of(source, long, most=12)
    lines[0] = lines[0][:5]
    with pytest.raises(LabelMismatch, match=r"row 5 of those fetched .*give attention_mask") as caught:
        labels.fetch(source.at(long), inputs=batch_of(lines)["inputs"])
    assert caught.value.ids == source.at(long)


def test_a_range_outside_is_no_mismatch_of_inputs(labels: Labels, source: Reference) -> None:
    with pytest.raises(RangeOutside):
        labels.fetch(source.at([7]), rows=(0, 301))
    assert labels.fetch(source.at([7, 2]), rows=(0, 0)).row_splits.tolist() == [0, 0, 0]  # type: ignore[union-attr]


def test_a_mask_without_token_ids_is_refused(labels: Labels, where: str, source: Reference) -> None:
    with pytest.raises(InvalidRequest, match="attention_mask"):
        labels.fetch(source.at([7]), attention_mask=np.ones((1, 5)))
    with connect(f"{where}/vision") as vision, pytest.raises(InvalidRequest, match="attention_mask"):
        vision.fetch([7], inputs=np.ones((1, 5)), attention_mask=np.ones((1, 5)))


def test_examples_without_labels_are_not_compared(partial: Labels, source: Reference) -> None:
    later = source.layout.span(1)[0]
    lines = [*tokens_of(source, [7]), np.array([1, 2, 3])]
    soft = partial.fetch(source.at([7, later]), inputs=lines, on_missing="mask")
    assert soft.present is not None
    assert soft.present.tolist() == [True, False]
    assert soft.rows_of(1) == slice(len(lines[0]), len(lines[0]))
    with pytest.raises(RowsMissing):
        partial.fetch(source.at([7, later]), inputs=lines)


def test_missing_names_ids_without_labels_once_each_in_order(
    labels: Labels, partial: Labels, where: str, source: Reference
) -> None:
    later = source.at(source.layout.span(1)[:2])
    assert labels.missing([*later, *source.at([1])]) == []
    assert labels.missing(["nö/1", *later, "nö/1", "b"]) == ["nö/1", "b"]
    assert partial.missing([later[1], *source.at([1]), later[0], later[1]]) == [later[1], later[0]]
    with connect(f"{where}/vision") as vision:
        assert vision.missing(torch.tensor([5, 10**9, -1, 5])) == [10**9, -1]


def test_the_bytes_of_all_arrays_are_counted(labels: Labels, source: Reference) -> None:
    soft = labels.fetch(source.at(SOME))
    assert soft.target is not None
    # All but the one entry that row_splits has more than there are examples.
    assert labels.stats.bytes == sum(array.nbytes for array in soft.arrays().values()) - 8
    assert labels.stats.rows == source.row_counts[SOME].sum()


def items(source: Reference, count: int = 24) -> list[dict[str, Any]]:
    return [{"id": source.ids[at], "input_ids": tokens_of(source, [at], most=50)[0]} for at in range(count)]


def collated(batch: list[dict[str, Any]]) -> dict[str, Any]:
    padded = batch_of([item["input_ids"] for item in batch])
    return {
        "id": [item["id"] for item in batch],
        "input_ids": padded["inputs"],
        "attention_mask": padded["attention_mask"],
    }


def attached(labels: Labels, loader: Any, **options: Any) -> list[Any]:
    return list(labels.attach(loader, **options))


def test_attach_checks_input_ids_and_cuts_labels_to_them(labels: Labels, source: Reference) -> None:
    loader: DataLoader[Any] = DataLoader(items(source), batch_size=5, collate_fn=collated)  # type: ignore[arg-type]
    seen = 0
    for batch, soft in attached(labels, loader, ids="id"):
        counts = batch["attention_mask"].sum(1)
        ordinals = range(seen, seen + len(counts))
        assert_rows_equal(soft, source, ordinals, [(0, int(count)) for count in counts])
        seen += len(counts)
    assert seen == 24


def test_attach_finds_tokens_under_the_wrong_ids_at_their_step(labels: Labels, source: Reference) -> None:
    batches = [collated(items(source, 4)), collated(items(source, 4))]
    batches[1]["id"] = batches[1]["id"][::-1]
    steps = iter(labels.attach(batches, ids="id"))
    next(steps)
    with pytest.raises(LabelMismatch):
        next(steps)


def test_attach_compares_nothing_and_gives_every_row_when_told_so(labels: Labels, source: Reference) -> None:
    batch = collated(items(source, 4))
    batch["id"] = batch["id"][::-1]
    [(_, soft)] = attached(labels, [batch], ids="id", inputs=None)
    assert_rows_equal(soft, source, [3, 2, 1, 0])
    with pytest.raises(InvalidRequest, match="name inputs"):
        labels.attach([batch], ids="id", inputs=None, attention_mask="attention_mask")


def test_attach_takes_tokens_and_mask_from_where_it_is_told(labels: Labels, source: Reference) -> None:
    batch = collated(items(source, 4))
    renamed = (batch["id"], {"tokens": batch["input_ids"]}, batch["attention_mask"])
    ranges = [(0, int(count)) for count in batch["attention_mask"].sum(1)]
    [(_, soft)] = attached(labels, [renamed], ids=0, inputs=lambda batch: batch[1]["tokens"], attention_mask=2)
    assert_rows_equal(soft, source, range(4), ranges)
    mixed = {"id": batch["id"], "tokens": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    [(_, soft)] = attached(labels, [mixed], ids="id", inputs="tokens")
    assert_rows_equal(soft, source, range(4), ranges)


def test_attach_gives_every_row_to_batches_without_token_ids(labels: Labels, source: Reference) -> None:
    for batch in ({"id": source.at([1, 2]), "attention_mask": 5}, (tuple(source.at([1, 2])), "x")):
        [(_, soft)] = attached(labels, [batch], ids="id" if isinstance(batch, dict) else 0)
        assert_rows_equal(soft, source, [1, 2])


def test_attach_takes_ranges_for_all_batches_or_out_of_each(labels: Labels, source: Reference) -> None:
    long = np.flatnonzero(source.row_counts >= 9)[:2]
    batch = {"id": source.at(long), "rows": [(2, 9), (0, 4)]}
    [(_, soft)] = attached(labels, [batch], ids="id", rows="rows")
    assert_rows_equal(soft, source, long, [(2, 9), (0, 4)])
    [(_, soft)] = attached(labels, [batch], ids="id", rows=(1, 3))
    assert_rows_equal(soft, source, long, (1, 3))


def test_attach_gives_tensors_of_ragged_rows(labels: Labels, source: Reference) -> None:
    [(_, soft)] = attached(labels, [collated(items(source, 4))], ids="id", device="cpu")
    assert isinstance(soft, SoftLabelTensors)
    assert soft.row_splits is not None
    assert soft.examples == 4


def test_attach_leaves_input_ids_alone_where_an_example_has_one_row(where: str) -> None:
    with connect(f"{where}/vision") as vision:
        [(_, soft)] = attached(vision, [{"id": [1, 2], "input_ids": "anything", "attention_mask": 7}], ids="id")
        assert len(soft) == 2


def test_attach_takes_texts_as_a_loader_collates_them(labels: Labels, source: Reference) -> None:
    loader: DataLoader[Any] = DataLoader(
        [{"id": str(id), "rows": torch.tensor([0, 1])} for id in source.ids[:10]],  # type: ignore[arg-type]
        batch_size=5,
    )
    found = attached(labels, loader, ids="id", rows="rows")
    for number, (batch, soft) in enumerate(found):
        assert batch["id"] == source.at(range(5 * number, 5 * number + 5))
        assert_rows_equal(soft, source, range(5 * number, 5 * number + 5), (0, 1))
