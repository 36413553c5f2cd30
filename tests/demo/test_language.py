"""The demo's second part from end to end, smaller than quick: what it writes, and what it claims about its labels."""

import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from logitcache.client import LabelMismatch, connect
from logitcache.server.cli import cli
from logitcache.server.demo import language
from logitcache.server.demo.corpus import LONGEST, SHORTEST, VOCABULARY, Corpus, read_corpus
from logitcache.server.demo.language_agreement import compare_rows, padded_left
from logitcache.server.demo.language_task import LanguageTask, dense_distillation_loss, student
from logitcache.storage import LocalLabelSet

SMALL = language.Size(text_bytes=200_000, trained=4_000, labelled=3_000, held_out=2_000)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A quick size that is smaller than a user's, and a folder for its teacher's weights."""
    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOGITCACHE_DEMO_FOLDER", str(folder / "teacher"))
        patch.setattr(language, "QUICK", SMALL)
        # One thread: those of torch spin where they find no core of their own, as when tests run side by side.
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        yield folder


@pytest.fixture(scope="module")
def out(small: Path) -> Path:
    """Folder of a demo that was run from the command line."""
    arguments = ["demo", "language", "--quick", "--seeds", "1", "--out", str(small / "out")]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert "perplexity" in result.stdout
    return small / "out"


@pytest.fixture(scope="module")
def figures(out: Path) -> dict[str, Any]:
    """What the demo wrote as JSON."""
    content: dict[str, Any] = json.loads((out / "language.json").read_text())
    return content


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """The text that the demo read."""
    return read_corpus(SMALL.text_bytes)


def batch_of(size: language.Size = SMALL) -> dict[str, Any]:
    """A batch whose examples are of several lengths."""
    found: dict[str, Any] = language.collate([language.train_set(size)[index] for index in (3, 0, 7, 5)])
    lengths = found["attention_mask"].sum(dim=1)
    assert lengths.min() < lengths.max()
    return found


def test_the_demo_reports_every_method_with_loss_perplexity_bytes_and_the_parts_of_a_step(
    figures: dict[str, Any],
) -> None:
    methods = {method["method"]: method for method in figures["methods"]}
    assert list(methods) == ["hard labels", "live teacher", "cached labels"]
    for method in methods.values():
        assert 0 < method["accuracy"] < 1
        assert 1 < method["test_loss"] < 7.6  # that of a student that knows nothing: log(2048)
        assert method["perplexity"] == pytest.approx(np.exp(method["test_loss"]))
        assert method["step_ms"] >= max(method["teacher_ms"], method["waiting_ms"])
    assert [method["teacher_ms"] > 0 for method in methods.values()] == [False, True, False]
    assert [method["fetched_bytes"] > 0 for method in methods.values()] == [False, False, True]
    assert figures["settings"]["top_k"] == 64
    assert len(figures["runs"]) == 3


def test_the_demo_writes_the_table_the_plot_and_nothing_of_the_other_part(out: Path) -> None:
    told = (out / "language.md").read_text()
    assert all(f"| {method} |" in told for method in ("hard labels", "live teacher", "cached labels"))
    assert "far too small" in told
    assert (out / "language.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert not list(out.glob("digits*"))


@pytest.mark.parametrize("temperature", [1, 2])
def test_cached_rows_are_the_live_teachers_at_every_declared_temperature(
    figures: dict[str, Any], temperature: int
) -> None:
    found = figures[f"agreement_at_{temperature}"]
    assert found["holds"] is True
    assert found["steps"] == 4
    assert found["rows"] > 4 * language.BATCH * SHORTEST
    # float16 labels are not the teacher's float32 logits: no difference at all would mean that nothing was compared.
    assert 0 < found["largest_difference"] <= found["allowed_there"] < 0.05
    assert 0 < found["left_out"] < 1
    assert found["same_first"] > 0.99
    assert 0 < found["probability_difference"] < 0.001


def test_the_demo_leaves_a_label_set_that_is_read_by_text_ids_and_row_ranges(out: Path) -> None:
    data = language.train_set(SMALL)
    ids = [data[index]["id"] for index in (5, 2, 5)]
    label_set = LocalLabelSet(out / "demo-label-sets" / "language")
    soft = label_set.fetch(ids, rows=(0, SHORTEST))
    identity = label_set.describe().identity
    label_set.close()
    assert (identity.alignment, identity.ids, identity.k, identity.targets) == ("causal", "text", 64, True)
    assert identity.temperatures == (1.0, 2.0)
    tokens = [data[index]["input_ids"] for index in (5, 2, 5)]
    np.testing.assert_array_equal(soft.tokens, torch.cat([one[:SHORTEST] for one in tokens]).numpy())
    np.testing.assert_array_equal(soft.target, torch.cat([one[1 : SHORTEST + 1] for one in tokens]).numpy())


def test_the_label_set_refuses_the_tokens_of_another_example(out: Path) -> None:
    data = language.train_set(SMALL)
    labels = connect(out / "demo-label-sets" / "language")
    with pytest.raises(LabelMismatch) as raised:
        labels.fetch([data[0]["id"]], inputs=[data[1]["input_ids"][:SHORTEST]])
    labels.close()
    assert raised.value.ids == [data[0]["id"]]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_rows_one_place_off_or_half_a_percent_sharper_do_not_agree(out: Path, padding: str) -> None:
    batch = batch_of() if padding == "right" else padded_left(batch_of())
    labels = connect(out / "demo-label-sets" / "language")
    soft = labels.fetch(batch["id"]).to("cpu")
    labels.close()
    task, teacher = LanguageTask(SMALL), language.quick_teacher()
    model, _, _ = task.beginning(0)

    def worst(teacher_logits: Tensor) -> float:
        with torch.no_grad():
            found = compare_rows(task.forward(model, batch), teacher_logits, batch["attention_mask"], soft, 1.0)
        return float((found.difference / found.allowed).max())

    with torch.no_grad():
        logits = task.forward(teacher, batch)
    assert worst(logits) <= 1
    assert worst(logits.roll(1, dims=1)) > 10
    assert worst(logits.roll(-1, dims=1)) > 10
    assert worst(logits * 1.005) > 1  # the bound is no wider than it must be


def test_the_same_text_gives_the_same_tokenizer_and_the_same_examples(corpus: Corpus) -> None:
    again = read_corpus.__wrapped__(SMALL.text_bytes)
    assert again is not corpus
    assert again.tokenizer.to_str() == corpus.tokenizer.to_str()
    assert again.train.examples == corpus.train.examples
    assert again.held_out.examples == corpus.held_out.examples


def test_examples_are_whole_lines_of_the_files_that_their_ids_name(corpus: Corpus) -> None:
    assert corpus.tokenizer.get_vocab_size() == VOCABULARY
    for example in corpus.train.examples[::40]:
        path, _, line = example.id.rpartition(":")
        text = (Path(sysconfig.get_path("stdlib")) / path).read_text(encoding="utf-8")
        rest = "".join(text.splitlines(keepends=True)[int(line) - 1 :])
        assert rest.startswith(corpus.tokenizer.decode(example.tokens))


def test_examples_are_of_many_lengths_and_their_ids_distinct(corpus: Corpus) -> None:
    lengths = {len(example.tokens) for example in corpus.train.examples}
    assert len(lengths) > 50
    assert min(lengths) >= SHORTEST
    assert max(lengths) <= LONGEST
    ids = [example.id for part in (corpus.train, corpus.held_out) for example in part.examples]
    assert len(set(ids)) == len(ids)


def test_no_file_is_both_trained_on_and_held_out(corpus: Corpus) -> None:
    files = [{example.id.rpartition(":")[0] for example in part.examples} for part in (corpus.train, corpus.held_out)]
    assert files[0]
    assert files[1]
    assert not files[0] & files[1]


def test_an_epoch_meets_every_example_once_in_the_order_of_its_seed() -> None:
    data = language.train_set(SMALL)
    epochs = [[batch["id"] for batch in language.loader(data, seed)] for seed in (0, 0, 1)]
    assert epochs[0] == epochs[1] != epochs[2]
    assert sorted(id for ids in epochs[0] for id in ids) == sorted(example.id for example in data.examples)


def test_the_side_of_the_padding_changes_no_logit_of_a_token() -> None:
    batch = batch_of()
    left = padded_left(batch)
    assert not torch.equal(left["input_ids"], batch["input_ids"])
    torch.manual_seed(0)
    model = student()
    with torch.no_grad():
        right_logits, left_logits = (
            language.forward(model, one)[one["attention_mask"].bool()] for one in (batch, left)
        )
    torch.testing.assert_close(left_logits, right_logits, rtol=0, atol=1e-5)


def test_a_token_does_not_see_those_after_it() -> None:
    batch = batch_of()
    changed = replace_last(batch)
    torch.manual_seed(0)
    model = student()
    with torch.no_grad():
        before, after = (language.forward(model, one)[0] for one in (batch, changed))
    last = int(batch["attention_mask"][0].sum()) - 1
    torch.testing.assert_close(after[:last], before[:last], rtol=0, atol=1e-5)
    assert (after[last] - before[last]).abs().max() > 1e-3


def replace_last(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with another last token of its first example."""
    tokens = batch["input_ids"].clone()
    last = int(batch["attention_mask"][0].sum()) - 1
    tokens[0, last] = (tokens[0, last] + 1) % VOCABULARY
    return {**batch, "input_ids": tokens}


def test_the_tokenizer_is_named_in_the_teachers_preprocessing(small: Path, corpus: Corpus) -> None:
    assert corpus.tokenizer_digest in language.quick_teacher().preprocessing


def test_another_size_is_another_teacher(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[language.Size] = []

    def untrained(size: language.Size) -> language.Teacher:
        trained.append(size)
        return language.Teacher()

    language.quick_teacher()
    monkeypatch.setattr(language, "_trained", untrained)
    language.quick_teacher()
    language.teacher(replace(SMALL, trained=2_000))
    assert trained == [replace(SMALL, trained=2_000)]


def test_the_plain_loss_is_that_of_rows_one_by_one() -> None:
    batch = batch_of()
    generator = torch.Generator().manual_seed(0)
    shape = (*batch["input_ids"].shape, VOCABULARY)
    of_student, of_teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    values = []
    for line, tokens in enumerate(batch["input_ids"]):
        length = int(batch["attention_mask"][line].sum())
        for place in range(length):
            p, t = (logits[line, place].softmax(dim=0) for logits in (of_student, of_teacher))
            soft = float((t * (t / p).log()).sum())
            if place < length - 1:
                soft = 0.9 * soft - 0.1 * float(p[tokens[place + 1]].log())
            values.append(soft)
    assert float(dense_distillation_loss(of_student, batch, of_teacher)) == pytest.approx(np.mean(values), rel=1e-9)
