"""A dataset that grows: only what is new is labelled, old bytes stay, and what changed is refused before a write."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.server.given import CLASSES, FEATURES, Linear, Recurrent, request_of, run, sequences
from tests.server.test_precompute import Interrupting, Notes

from logitcache.labels.errors import DatasetChanged, DatasetFault, IdentityChanged
from logitcache.server.labelling.plan import plan
from logitcache.storage import LocalLabelSet


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def images(count: int, ids: str | None = None) -> list[Any]:
    inputs = torch.randn(20_000, FEATURES, generator=torch.Generator().manual_seed(0))
    inputs[:, 0] = torch.arange(len(inputs))
    items: list[Any] = [(inputs[ordinal], ordinal % CLASSES) for ordinal in range(count)]
    if ids is None:
        return items
    return [
        {"input": input, "labels": target, "id": f"image/{at}" if ids == "text" else 10**12 - at}
        for at, (input, target) in enumerate(items)
    ]


def content(path: Path) -> dict[str, str]:
    """Hash of every file that holds labels or says what they are; array metadata and the manifest are to change."""
    files = [file for folder in ("commits", "generations", "texts") for file in path.glob(f"{folder}/*")]
    files += path.glob("*/c.*")
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def all_rows(store: Path, ids: Any) -> Any:
    reader = LocalLabelSet(store / "set")
    soft = reader.fetch(ids)
    reader.close()
    return soft


@pytest.mark.parametrize("ids", [None, "text", "integer"])
def test_only_new_examples_are_shown_to_the_teacher_and_old_bytes_stay(store: Path, ids: str | None) -> None:
    run(store, images(10_000, ids))
    before, model, notes = content(store / "set"), Linear(), Notes()
    summary = run(store, images(10_100, ids), model, notes)
    assert sorted(model.shown) == list(range(10_000, 10_100))
    assert (summary.generation, summary.labelled, summary.appended, summary.repaired) == (2, 100, 100, ())
    assert "appended    100 examples" in str(summary)
    assert "the dataset grew: 100 examples to append to 10,000" in notes.notes
    after = content(store / "set")
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) >= {"commits/3.json", "generations/2.json", "logits/c.3.0"}


def test_grown_rows_are_those_of_a_dataset_labelled_whole(store: Path) -> None:
    run(store, images(5000), Linear(), batch_size=100)
    run(store, images(7000), Linear(), batch_size=100)
    run(store.parent / "whole", images(7000), Linear(), batch_size=100)
    one, other = (all_rows(where, np.arange(7000)) for where in (store, store.parent / "whole"))
    for name in ("indices", "fingerprint", "target"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    assert np.allclose(one.logits, other.logits, atol=1e-2)


def test_a_reader_of_the_older_digest_keeps_its_content(store: Path) -> None:
    first = run(store, images(5000))
    reader = LocalLabelSet(store / "set")
    before = reader.fetch([0, 4999], digest=first.digest)
    second = run(store, images(6000))
    fresh = LocalLabelSet(store / "set")
    assert fresh.fetch([0, 4999], digest=first.digest).logits.tobytes() == before.logits.tobytes()
    assert len(fresh.fetch([5999])) == 1
    assert fresh.describe().digest == second.digest
    reader.close()
    fresh.close()


def test_token_sequences_grow_by_shards_of_their_own(store: Path) -> None:
    items = [{"input_ids": tokens, "id": f"book {at}"} for at, tokens in enumerate(sequences([900] * 9 + [70] * 20))]
    old, model = items[:20], Recurrent()
    first = run(store, old)
    before = content(store / "set")
    planned = plan(request_of(store, items))
    assert (planned.appended, planned.missing, planned.missing_rows) == (9, 1, 9 * 70)
    assert "9 of them appended" in str(planned)
    summary = run(store, items, model)
    assert model.shown == [(9, 70)]
    assert (summary.generation, summary.examples, summary.shards) == (2, 29, first.shards + 1)
    after = content(store / "set")
    assert {name: after[name] for name in before} == before
    soft = all_rows(store, ["book 28", "book 0", "book 19"])
    assert soft.tokens.tolist() == np.concatenate([items[at]["input_ids"] for at in (28, 0, 19)]).tolist()


def test_what_was_begun_is_sealed_before_it_grows(store: Path) -> None:
    whole = run(store.parent / "undisturbed", images(9000))
    with pytest.raises(KeyboardInterrupt):
        run(store, images(9000), None, Interrupting(5000))
    model, notes = Linear(), Notes()
    summary = run(store, images(9100), model, notes)
    assert (summary.generation, summary.appended, summary.labelled) == (2, 100, 9100 - 4096)
    assert sorted(model.shown) == list(range(4096, 9100))
    reader = LocalLabelSet(store / "set")
    assert reader.describe().generations[0].digest == whole.digest
    reader.close()


def test_growing_goes_on_after_an_interruption_and_grows_further(store: Path) -> None:
    run(store, images(4000))
    with pytest.raises(KeyboardInterrupt):
        run(store, images(12_000), None, Interrupting(4000 + 5000))  # of which 4,000 are the check of what is there
    model = Linear()
    summary = run(store, images(12_100), model)
    assert (summary.generation, summary.appended, summary.examples) == (3, 8100, 12_100)
    assert sorted(model.shown) == list(range(4000 + 4096, 12_100))
    assert run(store, images(12_100)).digest == summary.digest


@pytest.mark.parametrize("ids", [None, "text", "integer"])
def test_a_changed_old_example_is_refused_by_its_id_before_anything_is_written(store: Path, ids: str | None) -> None:
    run(store, images(5000, ids))
    before = {file: file.stat().st_mtime_ns for file in (store / "set").rglob("*") if file.is_file()}
    changed = images(6000, ids)
    for at in (17, 4500):
        item = changed[at]
        changed[at] = item | {"input": item["input"] + 1} if ids else (item[0] + 1, item[1])
    name = {None: 17, "text": "image/17", "integer": 10**12 - 17}[ids]
    with pytest.raises(
        DatasetChanged, match=rf"1 of the 4,096 examples 0 to 4,095 .*\({name!r}; other input\)"
    ) as caught:
        run(store, changed)
    assert caught.value.details == {"ids": [name], "ordinals": [17]}
    after = {file: file.stat().st_mtime_ns for file in (store / "set").rglob("*") if file.is_file()}
    assert {file for file in after if before.get(file) != after[file]} <= {store / "set" / "lock"}


@pytest.mark.parametrize("ids", ["text", "integer"])
def test_an_old_example_under_another_id_is_refused(store: Path, ids: str) -> None:
    run(store, images(5000, ids))
    changed = images(6000, ids)
    changed[3], changed[4] = changed[3] | {"id": changed[4]["id"]}, changed[4] | {"id": changed[3]["id"]}
    with pytest.raises(DatasetChanged, match=r"2 of .*other id"):
        run(store, changed)


def test_a_dataset_that_shrank_is_refused(store: Path) -> None:
    digest = run(store, images(5000)).digest
    with pytest.raises(DatasetChanged, match="has 5,000 examples, the dataset shrank to 4,999"):
        run(store, images(4999))
    assert run(store, images(5000)).digest == digest


@pytest.mark.parametrize("ids", ["text", "integer"])
@pytest.mark.parametrize("other", [12, 5001])
def test_a_new_example_with_the_id_of_another_is_refused_before_the_label_set_grows(
    store: Path, ids: str, other: int
) -> None:
    digest = run(store, images(5000, ids)).digest
    grown = images(5010, ids)
    grown[5003] = grown[5003] | {"id": grown[other]["id"]}
    with pytest.raises(DatasetFault, match=rf"examples {other:,} and 5,003 have the same id, {grown[other]['id']!r}"):
        run(store, grown)
    # It has not grown, so the example may be taken out again.
    assert run(store, images(5000, ids)).digest == digest


def test_a_new_example_with_the_id_of_one_still_to_be_labelled_is_refused_before_the_label_set_grows(
    store: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(store, images(5000, "text"), None, Interrupting(4097))
    grown = images(5010, "text")
    grown[5003] = grown[5003] | {"id": "image/4500"}
    with pytest.raises(DatasetFault, match="examples 4,500 and 5,003 have the same id, 'image/4500'"):
        run(store, grown)
    assert run(store, images(5000, "text")).examples == 5000


def test_ids_of_another_kind_are_refused_field_by_field(store: Path) -> None:
    run(store, images(100))
    with pytest.raises(IdentityChanged, match="ids was 'ordinal' and is now 'text'"):
        run(store, images(100, "text"))


def test_targets_are_kept_as_the_label_set_was_begun_unless_told(store: Path) -> None:
    digest = run(store, images(100), targets=False).digest
    assert run(store, images(100)).digest == digest
    with pytest.raises(IdentityChanged, match="targets was False and is now True"):
        run(store, images(100), targets=True)


def test_a_repair_and_an_append_come_in_one_run(store: Path) -> None:
    run(store, images(9000))
    chunk = store / "set" / "logits" / "c.1.0"
    chunk.write_bytes(b"\1" * chunk.stat().st_size)
    summary = run(store, images(9050))
    assert (summary.repaired, summary.reproduced, summary.appended, summary.generation) == ((1,), True, 50, 2)
