"""Token sequences from a dataset to stored rows: aligned with what was read, equal to a plain forward of each alone.

Bounds: padding and batching change a float32 forward in its last bits (1e-4 is far above, and far below what a shift by
one row does); a logit stored as float16 is off by at most 2^-11 of it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.server.given import VOCABULARY, Recurrent, plain_rows, request_of, run, sequences
from tests.server.test_precompute import Interrupting, Notes

from logitcache.labels.errors import DatasetChanged, DatasetFault, InvalidRequest, LogitcacheError, TeacherFault
from logitcache.labels.fingerprints import token_fingerprint
from logitcache.labels.soft_labels import SoftLabels
from logitcache.server.labelling.items import Kind
from logitcache.server.labelling.plan import plan
from logitcache.server.labelling.precompute import precompute
from logitcache.server.labelling.shard_arrays import bucketed
from logitcache.server.labelling.survey import facts_dtype
from logitcache.storage import LocalLabelSet

FORWARD = 1e-4
FLOAT16 = 2.0**-11
LENGTHS = [7, 1, 30, 30, 2, 5, 64, 3, 11, 1]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def stored(store: Path) -> SoftLabels:
    reader = LocalLabelSet(store / "set")
    soft = reader.fetch(np.arange(reader.layout.examples))
    reader.close()
    return soft


def differs(soft: SoftLabels, rows: slice, logits: torch.Tensor) -> float:
    """The largest difference between stored rows and dense ones, as a multiple of what rounding explains."""
    centred = logits - logits.amax(1, keepdim=True)
    chosen = torch.from_numpy(soft.indices[rows].astype(np.int64))
    expected = centred.gather(1, chosen)
    head = (torch.from_numpy(soft.logits[rows]) - expected).abs() / (expected.abs() * FLOAT16 + 2 * FORWARD)
    # What is stored are the largest, up to ties within the forward's own accuracy.
    order = (centred.topk(chosen.shape[1], 1).values - expected).abs() / (2 * FORWARD)
    maximum = (torch.from_numpy(soft.logit_max[rows]) - logits.amax(1)).abs() / FORWARD
    log_probs = expected / 2 - torch.logsumexp(centred / 2, 1, keepdim=True)
    found = torch.from_numpy(soft.log_probs(2.0)[rows])
    probability = (found - log_probs).abs() / (expected.abs().amax() * FLOAT16 + 4 * FORWARD)
    return max(float(each.max()) for each in (head, order, maximum, probability))


def test_every_row_is_that_of_a_plain_forward_of_its_sequence_alone(store: Path) -> None:
    model, items = Recurrent(), sequences(LENGTHS)
    run(store, [{"input_ids": tokens} for tokens in items], model, batch_size=4)
    soft = stored(store)
    assert soft.row_splits is not None
    assert soft.tokens is not None
    assert np.diff(soft.row_splits).tolist() == LENGTHS
    for number, tokens in enumerate(items):
        rows = soft.rows_of(number)
        assert differs(soft, rows, plain_rows(model, tokens)) < 1
        assert np.array_equal(soft.tokens[rows], tokens)
        assert soft.fingerprint[number] == token_fingerprint(tokens.astype(np.uint32))


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_a_position_off_would_be_noticed(store: Path, shift: int) -> None:
    model, items = Recurrent(), sequences(LENGTHS)
    run(store, [{"input_ids": tokens} for tokens in items], model, batch_size=4)
    soft = stored(store)
    for number, tokens in enumerate(items):
        if len(tokens) > 1:
            moved = torch.roll(plain_rows(model, tokens), shift, 0)
            assert differs(soft, soft.rows_of(number), moved) > 50


def test_a_vocabulary_above_65536_and_lengths_from_1_to_2000_are_stored_row_by_row(store: Path) -> None:
    lengths = [1, 2, 3, 17, 255, 256, 257, 999, 1000, 2000]
    model, items = Recurrent(66_000), sequences(lengths, 66_000)
    items[0][0] = 65_999
    run(store, [{"input_ids": tokens} for tokens in items], model, batch_size=2)
    soft = stored(store)
    assert soft.indices.dtype == np.uint32
    assert soft.indices.max() > 65_536
    for number, tokens in enumerate(items):
        assert differs(soft, soft.rows_of(number), plain_rows(model, tokens)) < 1


@pytest.mark.parametrize(
    "holder", [np.asarray, torch.from_numpy, np.ndarray.tolist, lambda each: each.astype(np.uint16)]
)
def test_padding_on_either_side_is_cut_off_and_leaves_the_same_bytes(store: Path, holder: Any) -> None:
    items = sequences([4, 9, 1])
    labels = [np.where(np.arange(len(tokens)) % 3, tokens, -100) for tokens in items]
    plain = [{"input_ids": one, "labels": other} for one, other in zip(items, labels, strict=True)]
    digest = run(store, plain).digest
    for name, (before, after) in {"right": (0, 3), "left": (5, 0), "both": (2, 1)}.items():
        padded = [
            {
                "input_ids": holder(np.pad(one, (before, after), constant_values=3)),
                "attention_mask": holder(np.pad(np.ones(len(one), np.int64), (before, after))),
                "labels": np.pad(other, (before, after), constant_values=-100),
            }
            for one, other in zip(items, labels, strict=True)
        ]
        assert run(store.parent / name, padded).digest == digest


def test_targets_are_the_labels_of_the_next_token_with_the_teachers_logit(store: Path) -> None:
    model, items = Recurrent(), sequences([6, 1, 3])
    labels = [tokens.copy() for tokens in items]
    labels[0][[2, 4]] = -100, -1
    run(store, [{"input_ids": one, "labels": other} for one, other in zip(items, labels, strict=True)], model)
    soft = stored(store)
    assert soft.target is not None
    assert soft.target_logit is not None
    for number, tokens in enumerate(items):
        rows = soft.rows_of(number)
        expected = [*labels[number][1:].tolist(), -1]
        assert soft.target[rows].tolist() == [-1 if label == -100 else label for label in expected]
        dense = plain_rows(model, tokens)
        for at, target in enumerate(soft.target[rows].tolist()):
            found = float(soft.target_logit[rows][at])
            if target < 0:
                assert np.isnan(found)
            else:
                assert found == pytest.approx(float(dense[at, target] - dense[at].max()), abs=2 * FORWARD)


def test_labels_are_left_out_when_told(store: Path) -> None:
    items = [{"input_ids": tokens, "labels": "no labels"} for tokens in sequences([6, 1, 3])]
    run(store, items, targets=False)
    assert stored(store).target is None


def test_batch_size_and_other_examples_change_no_row_beyond_its_last_bits(store: Path) -> None:
    items = [{"input_ids": tokens} for tokens in sequences(LENGTHS)]
    run(store, items, batch_size=1)
    run(store.parent / "other", items, batch_size=7)
    one, other = stored(store), stored(store.parent / "other")
    assert np.allclose(one.logits.astype(float), other.logits.astype(float), atol=FORWARD, rtol=2 * FLOAT16)
    assert np.allclose(one.logit_max, other.logit_max, atol=FORWARD)


def test_a_shard_is_labelled_by_rising_length_with_little_padding(store: Path) -> None:
    model = Recurrent()
    summary = run(store, [{"input_ids": tokens} for tokens in sequences(LENGTHS)], model, batch_size=4)
    assert (summary.examples, summary.rows, summary.labelled) == (len(LENGTHS), sum(LENGTHS), sum(LENGTHS))
    ordered = sorted(LENGTHS)
    # The first forward counts the classes.
    assert model.shown[1:] == [(4, ordered[3]), (4, ordered[7]), (2, ordered[9])]
    assert f"{len(LENGTHS)} examples with {sum(LENGTHS)} tokens in 1 shard" in str(summary)


def test_sequences_of_one_length_stay_in_order_wherever_they_are_sorted() -> None:
    facts = np.zeros(1000, facts_dtype(Kind("causal", "ordinal", False)))
    facts["length"] = np.arange(1000) % 3 + 1
    batches = bucketed(range(50, 1050), facts, 7)
    assert [at for batch in batches for at in batch] == sorted(range(50, 1050), key=lambda at: (at - 50) % 3)


def test_many_shards_and_workers_give_the_same_rows_as_one_process(store: Path) -> None:
    items = [{"input_ids": tokens} for tokens in sequences([900] * 11 + [5] * 40)]
    one = run(store, items)
    assert one.shards == 3
    assert run(store.parent / "other", items, loader_workers=2).digest == one.digest


class Masked(Recurrent):
    """Needs to be told what is padding."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        assert attention_mask.shape == input_ids.shape
        assert attention_mask.dtype == torch.int64
        lengths = attention_mask.sum(1)
        assert torch.equal(attention_mask, (torch.arange(input_ids.shape[1]) < lengths[:, None]).long())
        assert (input_ids[attention_mask == 0] == 0).all()
        logits = super().forward(input_ids)
        # What a teacher gives for padding does not matter.
        return logits.masked_fill(attention_mask[:, :, None] == 0, torch.nan)


class Anything(Masked):
    def forward(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:  # type: ignore[override]
        return super().forward(input_ids, **options)


@pytest.mark.parametrize("model", [Masked, Anything])
def test_a_teacher_that_takes_a_mask_gets_it_and_its_padding_rows_may_be_nan(store: Path, model: Any) -> None:
    items = [{"input_ids": tokens} for tokens in sequences(LENGTHS)]
    run(store, items, model(), batch_size=4)
    run(store.parent / "other", items, Recurrent(), batch_size=4)
    one, other = stored(store), stored(store.parent / "other")
    assert one.logits.tobytes() == other.logits.tobytes()
    assert one.tail_logsumexp.tobytes() == other.tail_logsumexp.tobytes()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("model", [Masked, Recurrent])
def test_a_compiled_teacher_gets_a_mask_if_the_one_inside_takes_it(store: Path, model: Any) -> None:
    # What compiling wraps around it takes any argument. Nothing is compiled here: that takes seconds.
    with torch.compiler.set_stance("force_eager"):
        summary = run(store, [{"input_ids": tokens} for tokens in sequences([4, 2])], torch.compile(model()))
    assert summary.rows == 6


class Changed(Recurrent):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.change(super().forward(input_ids))


def _poisoned(value: float) -> Any:
    def change(logits: torch.Tensor) -> torch.Tensor:
        if logits.shape[1] > 20:
            logits[-1, 20] = value  # the longest of a batch is its last
        return logits

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits[:, -1], r"shape \(10, 50\) .*not \(batch, length, classes\), a row a token = \(10, 64"),
        (lambda logits: logits[:, :-1], r"returned shape \(10, 63, 50\)"),
        (lambda logits: logits.transpose(0, 1), r"returned shape \(64, 10, 50\)"),
        (lambda logits: {"logits": logits}, r"returned dict .* \(of an output object, its .logits\)"),
        (lambda logits: logits.long(), "returned torch.int64"),
        (_poisoned(np.nan), r"gave NaN for example 6 at position 20; 1 of the 10 examples of this batch .*\(6\)"),
        (_poisoned(np.inf), r"gave \+inf for example 6 at position 20"),
        (_poisoned(-np.inf), r"gave -inf for every class for example 6 at position 20"),
    ],
)
def test_a_teacher_that_gives_no_row_a_token_is_told_so(store: Path, change: Any, message: str) -> None:
    items = [{"input_ids": tokens} for tokens in sequences([*[9] * 6, 64, 9, 9, 9])]
    with pytest.raises(TeacherFault, match=message):
        run(store, items, Changed(change))


def test_a_teacher_that_pads_its_vocabulary_is_stored_with_targets_of_minus_infinity(store: Path) -> None:
    model = Recurrent()
    with torch.no_grad():
        model.head.bias[-2:] = -torch.inf
    tokens = np.array([1, 2, VOCABULARY - 1, 4])
    run(store, [{"input_ids": tokens, "labels": tokens}], model, top_k=VOCABULARY)
    soft = stored(store)
    assert soft.target_logit is not None
    assert np.isneginf(soft.logits[:, -2:]).all()
    assert np.isfinite(soft.logits[:, :-2]).all()
    assert np.isneginf(soft.target_logit).tolist() == [False, True, False, False]


def test_tokens_beyond_the_vocabulary_are_named_before_anything_is_written(store: Path) -> None:
    items = [{"input_ids": tokens} for tokens in sequences([5, 6, 7])]
    items[1]["input_ids"][4] = VOCABULARY
    model = Recurrent()
    message = r"example 1 has the token 50 at position 4, the teacher has 50 classes \(0 to 49\): .*tokenizer"
    with pytest.raises(DatasetFault, match=message) as caught:
        run(store, items, model, batch_size=2)
    assert caught.value.details == {"example": 1}
    assert not store.exists()
    # Only the batch that counts classes was shown, and not that example.
    assert model.shown == [(2, 7)]


def test_a_teacher_that_knows_none_of_the_tokens_is_told_with_the_largest(store: Path) -> None:
    with pytest.raises(TeacherFault, match=r"IndexError on examples 1, 0: .*largest of these token ids is 1,009"):
        run(store, [{"input_ids": np.arange(1000, 1010)}, {"input_ids": np.arange(1000, 1003)}])


def test_a_target_beyond_the_classes_is_named_before_anything_is_written(store: Path) -> None:
    items = [{"input_ids": tokens, "labels": tokens + 1} for tokens in sequences([5, 6, 7])]
    items[2]["labels"][3] = VOCABULARY
    with pytest.raises(DatasetFault, match=r"example 2 has the target 50 at position 3, .*--no-targets"):
        run(store, items)
    assert not store.exists()


@pytest.mark.parametrize(
    ("lengths", "options", "kind", "message"),
    [
        ([5, 4097], {}, DatasetFault, r"example 1 has 4,097 rows, .*--rows-per-shard 8192 or more"),
        ([5, 10], {"rows_per_shard": 5000}, InvalidRequest, "multiple of 4,096"),
    ],
)
def test_what_cannot_lie_in_a_shard_is_refused_before_anything_is_written(
    store: Path, lengths: list[int], options: Any, kind: type[LogitcacheError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run(store, [{"input_ids": tokens} for tokens in sequences(lengths)], **options)
    assert not store.exists()


def test_without_a_shard_size_the_default_holds_the_longest_example(store: Path) -> None:
    run(store, [{"input_ids": tokens} for tokens in sequences([5, 34_000])], rows_per_shard=None)
    reader = LocalLabelSet(store / "set")
    assert reader.layout.rows_per_shard == 36_864
    reader.close()


def test_an_interrupted_run_gives_the_bytes_of_an_undisturbed_one(store: Path) -> None:
    items = [{"input_ids": tokens, "labels": tokens} for tokens in sequences([700, 3, 900, 800, 1] * 6)]
    whole = run(store, items)
    assert whole.shards == 4
    with pytest.raises(KeyboardInterrupt):
        run(store.parent / "other", items, None, Interrupting(8000))
    notes, model = Notes(), Recurrent()
    assert run(store.parent / "other", items, model, notes).digest == whole.digest
    assert notes.activities[0] == ("reading lengths", 30)
    assert 0 < sum(batch for batch, _ in model.shown) < 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: items[::-1], "examples 0 to .* have .* tokens.*its tokenizer changed|re-ordered"),
        (lambda items: [items[0][::-1], *items[1:]], r"\(0; other input\).*re-ordered or changed, or its tokenizer"),
        (lambda items: [items[0], items[1] + 1, *items[2:]], r"\(1; other input\)"),
        (lambda items: [items[0][:-1], *items[1:]], r"\(0; other input\)"),
        (lambda items: items[:-1], "shrank to 3"),
    ],
)
def test_another_dataset_is_refused_by_name_and_nothing_is_lost(store: Path, change: Any, message: str) -> None:
    items = sequences([9, 8, 7, 6])
    whole = run(store, [{"input_ids": tokens} for tokens in items])
    with pytest.raises(DatasetChanged, match=message):
        run(store, [{"input_ids": tokens % VOCABULARY} for tokens in change(items)])
    assert run(store, [{"input_ids": tokens} for tokens in items]).digest == whole.digest


class Drifting(list[Any]):
    """Gives other tokens from some read on."""

    reads, after = 0, 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        item = super().__getitem__(index)
        return {"input_ids": item["input_ids"][::-1]} if self.reads > self.after else item


def test_a_dataset_that_changes_after_its_lengths_were_read_is_refused(store: Path) -> None:
    items = Drifting({"input_ids": np.arange(start, start + 5)} for start in range(20))
    # Its first item, twice all of them to see that they stay, once for lengths, once to count classes.
    items.after = 1 + 40 + 20 + 16 + 3
    with pytest.raises(
        DatasetChanged, match=r"other tokens .*\(3, 4, 5 and 10 more\) than when their lengths were read"
    ):
        run(store, items, Recurrent())


def test_the_plan_tells_examples_tokens_and_size_and_writes_nothing(store: Path) -> None:
    request = request_of(
        store, [{"input_ids": tokens, "id": f"a/{len(tokens)}"} for tokens in sequences([900, 901, 3])]
    )
    notes = Notes()
    planned = plan(request, notes)
    assert not store.exists()
    assert notes.activities == [("reading lengths", 3)]
    text = str(planned)
    assert "1,804 of 1,804 tokens to label, in 1 of 1 shard of up to 4,096" in text
    assert "3 examples with 1,804 tokens, with texts as ids" in text
    assert "tokens/s" in text
    precompute(request)
    used = sum(file.stat().st_blocks * 512 for file in (store / "set").rglob("*") if file.is_file())
    assert used <= planned.needed_bytes
    # Slots that no row uses take no room.
    assert planned.needed_bytes < 1_300_000
