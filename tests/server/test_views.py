"""Views end to end: the student's inputs are bit by bit those that the teacher was shown, whoever makes them."""

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tests.server import augmented
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from logitcache.client import Labels, connect, with_ids, with_views
from logitcache.client.viewed import check_given
from logitcache.labels.errors import (
    DatasetChanged,
    DatasetFault,
    IdentityChanged,
    InvalidRequest,
    LabelMismatch,
    UnknownView,
)
from logitcache.labels.fingerprints import fingerprint
from logitcache.labels.ids import Ids
from logitcache.server.cli import cli
from logitcache.server.labelling.precompute import Summary, precompute
from logitcache.server.labelling.preparation import Request

HERE, VIEWS = "tests.server.augmented", 3


def label(store: Path, dataset: str, **changes: Any) -> Summary:
    options: dict[str, Any] = {"batch_size": 64, "device": "cpu", "views": VIEWS} | changes
    teacher = options.pop("teacher", f"{HERE}:one")
    return precompute(Request("set", teacher, f"{HERE}:{dataset}", store, 3, **options))


@contextmanager
def settled(target: Any, **options: Any) -> Iterator[Any]:
    """Connected, and no thread verifies any more: the check of annotations, in tests, draws from Python's generator in
    whatever thread. For the same reason these tests fetch with depth 0 where they make items in this process.
    """
    with connect(target, **options) as labels:
        while any(thread.name == "logitcache-verify" for thread in threading.enumerate()):
            time.sleep(0.01)
        yield labels


@pytest.fixture(params=[*augmented.STYLES])
def style(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def labels(tmp_path: Path, style: str) -> Iterator[Labels]:
    label(tmp_path, f"of_{style}")
    with settled(tmp_path / "set") as connected:
        yield connected


def input_of(item: Any) -> torch.Tensor:
    found = item["input"] if isinstance(item, dict) else item[0]
    assert isinstance(found, torch.Tensor)
    return found


def seen_of(item: Any) -> Any:
    return item["seen"] if isinstance(item, dict) else item[-1]


def test_every_view_of_every_example_is_what_the_teacher_was_shown(labels: Labels, style: str) -> None:
    data = with_views(augmented.STYLES[style](), labels.describe().identity)
    pairs = [(ordinal, view) for ordinal in range(augmented.EXAMPLES) for view in range(VIEWS)]
    random.shuffle(pairs)
    items = [data[pair] for pair in pairs]
    ids, views = zip(*((seen_of(item)["id"], seen_of(item)["view"]) for item in items), strict=True)
    soft = labels.fetch(list(ids), view=list(views))
    assert [fingerprint(input_of(item)) for item in items] == soft.fingerprint.tolist()
    with torch.no_grad():
        top = augmented.one().eval()(torch.stack([input_of(item) for item in items])).topk(3)
    assert np.array_equal(soft.indices, top.indices.numpy())
    assert np.allclose(soft.logits + soft.logit_max[:, None], top.values.numpy(), atol=0.02)
    assert len({found.tobytes() for found in (input_of(item).numpy() for item in items)}) == len(items)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_train_on_one_view_after_the_other_with_labels_of_these(
    labels: Labels, style: str, workers: int
) -> None:
    data = with_views(augmented.STYLES[style](), labels.describe().identity)
    loader: Any = DataLoader(data, batch_size=32, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    where: Any = "seen" if style in ("torch", "own_generators", "told") else -1
    for epoch in range(VIEWS + 1):
        data.set_epoch(epoch)
        ids: list[Any] = []
        for batch, soft in labels.attach(loader, ids=where, depth=None if workers else 0):
            seen = batch[where]
            assert set(seen["view"].tolist()) == {epoch % VIEWS}
            assert soft.fingerprint.view(np.int64).tolist() == seen["fingerprint"].tolist()
            ids += seen["id"] if isinstance(seen["id"], list) else seen["id"].tolist()
        assert len(set(ids)) == augmented.EXAMPLES


def test_workers_threads_and_batch_sizes_change_no_byte(tmp_path: Path, style: str) -> None:
    one = label(tmp_path / "one", f"of_{style}")
    two = label(tmp_path / "two", f"of_{style}", loader_workers=2)
    assert one.digest == two.digest
    label(tmp_path / "three", f"of_{style}", batch_size=7)
    found = [connect(tmp_path / name / "set").describe() for name in ("one", "three")]
    ids = [seen_of(with_views(augmented.STYLES[style](), found[0].identity)[at])["id"] for at in range(0, 300, 7)]
    fetched = [connect(tmp_path / name / "set").fetch(ids, view=2).fingerprint for name in ("one", "three")]
    assert np.array_equal(fetched[0], fetched[1])
    code = (
        "import json, sys, torch; torch.set_num_threads(1)\n"
        "from tests.server import augmented; from logitcache.client import connect, with_views\n"
        f"data = with_views(augmented.STYLES[{style!r}](), connect(sys.argv[1]).describe().identity)\n"
        "items = [data[(at, 2)] for at in range(0, 300, 7)]\n"
        "print(json.dumps([(i['seen'] if isinstance(i, dict) else i[-1])['fingerprint'] for i in items]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "one" / "set"], cwd=root, capture_output=True, check=True, text=True
    )
    assert json.loads(done.stdout) == fetched[0].view(np.int64).tolist()


def test_a_transform_that_changed_is_found_at_the_first_batch_with_example_and_view(tmp_path: Path) -> None:
    label(tmp_path, "of_plain")
    with settled(tmp_path / "set") as labels:
        data = with_views(augmented.changed(), labels.describe().identity)
        data.set_epoch(1)
        with pytest.raises(LabelMismatch, match=r"32 of 32 inputs .* '0 \(view 1\)', '1 \(view 1\)'") as caught:
            next(iter(labels.attach(DataLoader(data, batch_size=32), ids=-1)))
    assert caught.value.details["views"] == [1] * 32


def mixed(images: torch.Tensor) -> torch.Tensor:
    """As torchvision's MixUp does with a whole batch."""
    return 0.7 * images + 0.3 * images.roll(1, 0)


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images - 0.5) / 0.25


def changed_at_5(images: torch.Tensor) -> torch.Tensor:
    images[5:6] += 1
    return images


def collated(change: Any) -> Any:
    """Batches whose inputs are changed after they were put together."""

    def collate(items: list[Any]) -> Any:
        batch = default_collate(items)
        if isinstance(batch, dict):
            return batch | {"input": change(batch["input"])}
        return [change(batch[0]), *batch[1:]]

    return collate


@pytest.mark.parametrize("dataset", ["of_plain", "of_torch", "of_mixing"])
def test_batches_that_change_after_the_dataset_gave_them_are_found(tmp_path: Path, dataset: str) -> None:
    label(tmp_path, dataset)
    where: Any = "seen" if dataset == "of_torch" else -1
    changes: list[Any] = [mixed, normalised, torch.Tensor.half, torch.Tensor.double, changed_at_5]
    with settled(tmp_path / "set") as labels:
        data = with_views(getattr(augmented, dataset)(), labels.describe().identity)
        data.set_epoch(1)
        for change in changes:
            loader: Any = DataLoader(data, batch_size=10, collate_fn=collated(change))
            told = "1 of 4" if change is changed_at_5 else "4 of 4"
            with pytest.raises(
                LabelMismatch, match=rf"{told} inputs .* what the dataset gave: .*mixed as a w"
            ) as caught:
                list(labels.attach(loader, ids=where, depth=0))
            assert set(caught.value.details["views"]) == {1}
            assert f"'{caught.value.ids[0]} (view 1)'" in str(caught.value)
            assert len(list(labels.attach(loader, ids=where, depth=0, inputs=None))) == 30


def as_list(items: list[Any]) -> Any:
    images, classes, seen = zip(*items, strict=True)
    return list(images), torch.tensor(classes), default_collate(list(seen))


def elsewhere(items: list[Any]) -> Any:
    images, classes, seen = default_collate(items)
    return classes, images, seen


@pytest.mark.parametrize(
    ("collate", "options"),
    [
        (default_collate, {}),
        (collated(lambda images: images.contiguous(memory_format=torch.channels_last)), {}),
        (as_list, {}),
        (collated(lambda images: "not shown"), {}),
        (collated(lambda images: images[:7]), {}),
        (collated(lambda images: images.sum()), {}),
        (collated(lambda images: np.array(["a.png"] * len(images))), {}),
        (elsewhere, {"inputs": 1}),
        (elsewhere, {"inputs": lambda batch: batch[1]}),
    ],
)
def test_batches_that_keep_what_the_dataset_gave_or_do_not_show_it_get_their_labels(
    tmp_path: Path, collate: Any, options: dict[str, Any]
) -> None:
    label(tmp_path, "of_plain")
    with settled(tmp_path / "set") as labels:
        data = with_views(augmented.of_plain(), labels.describe().identity)
        loader: Any = DataLoader(data, batch_size=10, collate_fn=collate)
        for batch, soft in labels.attach(loader, ids=-1, depth=0, **options):
            assert soft.fingerprint.view(np.int64).tolist() == batch[-1]["fingerprint"].tolist()


@pytest.mark.parametrize("examples", [1, 3, 4, 100])
def test_a_few_inputs_of_a_batch_are_looked_at_however_many_there_are(examples: int) -> None:
    looked: list[int] = []

    class Looked(list[Any]):
        def __getitem__(self, at: Any) -> Any:
            looked.append(at)
            return super().__getitem__(at)

    inputs = [torch.full((2,), float(at)) for at in range(examples)]
    ever = set()
    for epoch in range(60):
        looked.clear()
        order = np.random.default_rng(epoch).permutation(examples).tolist()
        hashes = [int(np.uint64(fingerprint(inputs[at])).astype(np.int64)) for at in order]
        seen = {"id": order, "view": [0] * examples, "fingerprint": hashes}
        check_given(seen, Looked(inputs[at] for at in order), Ids(np.array(order)))
        assert len(looked) == len(set(looked)) == min(examples, 4)
        ever |= set(looked)
    assert len(ever) > 0.8 * examples  # others from batch to batch


@pytest.mark.parametrize("combine", ["random", "mean", "routed"])
def test_several_teachers_of_the_same_views_are_asked_for_what_is_seen(tmp_path: Path, combine: Any) -> None:
    for name in ("one", "other"):
        label(tmp_path / name, "of_plain", teacher=f"{HERE}:{name}")
    options: dict[str, Any] = {"route": lambda ids: np.asarray(ids) % 2} if combine == "routed" else {}
    with settled([tmp_path / name / "set" for name in ("one", "other")], combine=combine, **options) as labels:
        data = with_views(augmented.of_plain(), labels.describe()[0].identity)
        data.set_epoch(2)
        loader: Any = DataLoader(data, batch_size=50)
        for batch, soft in labels.attach(loader, ids=-1, depth=0):
            for each in soft if combine == "mean" else [soft]:
                assert each.fingerprint.view(np.int64).tolist() == batch[-1]["fingerprint"].tolist()
        changed = with_views(augmented.changed(), labels.describe()[0].identity)
        with pytest.raises(LabelMismatch, match=r"10 of 10 inputs .*\(view 0\)"):
            next(iter(labels.attach(DataLoader(changed, batch_size=10), ids=-1, depth=0)))
        whole: Any = DataLoader(data, batch_size=10, collate_fn=collated(mixed))
        with pytest.raises(LabelMismatch, match=r"4 of 4 inputs looked at .*\(view 2\)"):
            next(iter(labels.attach(whole, ids=-1, depth=0)))


def test_resuming_and_appending_label_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = label(tmp_path, "of_plain")
    assert (first.examples, first.rows, first.labelled) == (300, 900, 900)
    assert label(tmp_path, "of_plain").labelled == 0
    monkeypatch.setattr(augmented, "EXAMPLES", 310)
    grown = label(tmp_path, "of_plain")
    # The generator of the images draws the first ones alike.
    assert (grown.examples, grown.appended, grown.labelled, grown.generation) == (310, 10, 30, 2)


def test_items_that_tell_their_ids_beforehand_are_made_once_a_view(tmp_path: Path) -> None:
    augmented.Told.reads = 0
    label(tmp_path, "of_told")
    made = augmented.Told.reads
    assert made < VIEWS * augmented.EXAMPLES * 1.5  # besides probes and what is read to count classes


def test_items_without_ids_are_made_once_a_view_by_the_student_too(tmp_path: Path) -> None:
    made: list[int] = []

    class Counting(augmented.Images):
        def __getitem__(self, index: int) -> Any:
            made.append(index)
            return super().__getitem__(index)

    label(tmp_path, "of_plain")
    with settled(tmp_path / "set") as labels:
        data = with_views(Counting(augmented.plain), labels.describe().identity)
    for at in range(20):
        data[(at, 1)]
    assert made == [0, *range(20)]  # the first one was made once more, to see that it has no id


def test_an_example_that_is_at_fault_is_named_whatever_its_view(tmp_path: Path) -> None:
    with pytest.raises(DatasetFault, match=r"example 250 has the target 9, the teacher has 7 classes"):
        label(tmp_path, "beyond")
    with pytest.raises(DatasetFault, match="examples 7 and 250 have the same id, 7"):
        label(tmp_path / "another", "repeated")


@pytest.mark.parametrize(
    ("dataset", "changes", "error", "told"),
    [
        ("unseeded", {}, DatasetChanged, r"even from the same seed: .*logitcache\.client\.seeded"),
        ("constant", {}, DatasetFault, r"the same for every view .* leave --views out"),
        ("drawn_ids", {}, DatasetFault, r"example 0 .* the id '0-0\.\d+', .* from '0-0\.\d+': .*not depend on what"),
        ("told_others", {}, DatasetFault, r"example 0 .* the id 0, .* from 5: "),
        ("raising", {}, DatasetFault, r"raised ValueError for example [\d,]+: a corrupt crop"),
        ("tokens", {}, InvalidRequest, r"token sequences have one view"),
        ("of_plain", {"views": 0}, InvalidRequest, r"--views 0: .* 1 to 4,096"),
        ("of_plain", {"views": 5000}, InvalidRequest, r"--views 5000"),
        ("of_plain", {"seed": 0}, InvalidRequest, r"--seed 0"),
        ("of_plain", {"views": None, "seed": 3}, InvalidRequest, r"give --views, too"),
        ("of_plain", {"views": None}, DatasetChanged, r"label it with --views"),
        ("of_plain", {"rows_per_shard": 4096}, InvalidRequest, r"for 3 views: try 12288"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_anything_is_labelled(
    tmp_path: Path, dataset: str, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        label(tmp_path, dataset, **changes)
    assert not (tmp_path / "set" / "generations" / "1.json").exists()


@pytest.mark.parametrize("seed", range(1, 9))
def test_few_examples_are_compared_in_many_views_before_all_are_called_the_same(tmp_path: Path, seed: int) -> None:
    assert label(tmp_path, "coins", views=30, seed=seed).rows == 60


@pytest.mark.parametrize("dataset", ["drawn_ids", "told_others"])
def test_a_student_whose_items_have_other_ids_than_their_seeds_is_told(tmp_path: Path, dataset: str) -> None:
    label(tmp_path, "of_plain")
    with settled(tmp_path / "set") as labels:
        data = with_views(getattr(augmented, dataset)(), labels.describe().identity)
    with pytest.raises(DatasetFault, match=r"example 7 .* the id "):
        data[7]


@pytest.mark.parametrize("where", ["of_plain", "of_torch"])
def test_ids_alone_do_not_say_which_view_a_batch_holds(tmp_path: Path, where: str) -> None:
    label(tmp_path, where)
    own: Any = "id" if where == "of_torch" else -1
    with settled(tmp_path / "set") as labels:
        identity = labels.describe().identity
        plain = getattr(augmented, where)()
        data = with_views(plain, identity)
        wrapped: Any = [plain, data] if own == "id" else [with_ids(plain), with_ids(data)]
        for each in wrapped:
            loader: Any = DataLoader(each, batch_size=10)
            with pytest.raises(InvalidRequest, match=r"with_views .*ids=\"seen\".*view=.*inputs="):
                next(iter(labels.attach(loader, ids=own, depth=0)))
            batch, soft = next(iter(labels.attach(loader, ids=own, depth=0, view=1)))
            ids = batch[own].tolist()
            assert np.array_equal(soft.fingerprint, labels.fetch(ids, view=1).fingerprint)
        seen: Any = "seen" if own == "id" else -1
        _, soft = next(iter(labels.attach(DataLoader(data, batch_size=10), ids=seen, depth=0)))
        held = DataLoader(wrapped[1], batch_size=10)
        found = next(iter(labels.attach(held, ids=own, depth=0, inputs="input" if own == "id" else 0)))[1]
        assert np.array_equal(found.fingerprint, soft.fingerprint)
        for view in (0, 2, lambda batch: batch[seen]["view"]):
            with pytest.raises(InvalidRequest, match=r"leave view=.* out"):
                next(iter(labels.attach(DataLoader(data, batch_size=10), ids=seen, depth=0, view=view)))


def test_several_teachers_of_views_need_them_named_too(tmp_path: Path) -> None:
    for name in ("one", "other"):
        label(tmp_path / name, "of_plain", teacher=f"{HERE}:{name}")
    with settled([tmp_path / name / "set" for name in ("one", "other")], combine="mean") as labels:
        loader: Any = DataLoader(with_ids(augmented.of_plain()), batch_size=10)
        with pytest.raises(InvalidRequest, match="with_views"):
            next(iter(labels.attach(loader, ids=-1, depth=0)))


def test_an_attached_loader_tells_the_dataset_which_epoch_it_is(tmp_path: Path) -> None:
    label(tmp_path, "of_plain")
    with settled(tmp_path / "set") as labels:
        data = with_views(augmented.of_plain(), labels.describe().identity)
        sampler: Any = DistributedSampler(data, num_replicas=1, rank=0)
        for loader in (DataLoader(data, batch_size=10, sampler=sampler), DataLoader(data, batch_size=10, shuffle=True)):
            attached = labels.attach(loader, ids=-1, depth=0)
            for epoch in (1, 2, 0):
                attached.set_epoch(epoch)
                assert set(next(iter(attached))[0][-1]["view"].tolist()) == {epoch}
        assert sampler.epoch == 0


def test_views_and_ordinals_may_be_numbers_of_numpy_and_torch(tmp_path: Path) -> None:
    label(tmp_path, "of_plain")
    with settled(tmp_path / "set") as labels:
        data = with_views(augmented.of_plain(), labels.describe().identity)
    expected = data[(7, 1)]
    for pair in ((np.int64(7), np.uint8(1)), (torch.tensor(7), torch.tensor(1)), (7, True)):
        found = data[pair]
        assert found[-1] == expected[-1]
        assert [type(value) for value in found[-1].values()] == [int] * 3
    with pytest.raises(TypeError):
        data[(7, 1.0)]


def test_a_default_device_does_not_hold_the_epoch(tmp_path: Path) -> None:
    label(tmp_path, "of_plain")
    with settled(tmp_path / "set") as labels:
        identity = labels.describe().identity
    with torch.device("meta"):
        data = with_views(augmented.of_plain(), identity)
        data.set_epoch(2)
    data.dataset.images = augmented.of_plain().images
    assert data[5][-1]["view"] == 2


def test_another_number_of_views_or_another_seed_is_another_label_set(tmp_path: Path) -> None:
    label(tmp_path, "of_plain")
    for changes in ({"views": 2}, {"seed": 2}, {"views": 1}):
        with pytest.raises(IdentityChanged, match=r"views was 3|seed was 1"):
            label(tmp_path, "of_plain", **changes)


def test_one_view_may_be_augmented_too(tmp_path: Path) -> None:
    label(tmp_path, "of_plain", views=1, seed=9)
    with settled(tmp_path / "set") as labels:
        assert (labels.describe().identity.views, labels.describe().identity.seed) == (1, 9)
        data = with_views(augmented.of_plain(), labels.describe().identity)
        for _, soft in labels.attach(DataLoader(data, batch_size=100), ids=-1, depth=0):
            assert len(soft) == 100
        with pytest.raises(UnknownView, match="view 1 does not exist"):
            data[(0, 1)]


def test_a_label_set_without_views_is_not_replayed(tmp_path: Path) -> None:
    label(tmp_path, "constant", views=None)
    with settled(tmp_path / "set") as labels, pytest.raises(InvalidRequest, match="label it with --views"):
        with_views(augmented.constant(), labels.describe().identity)


def test_the_command_line_labels_views_and_info_tells_them(tmp_path: Path) -> None:
    words = ["precompute", "set", f"--teacher={HERE}:one", f"--dataset={HERE}:of_plain", "--top-k=3"]
    words += [f"--store={tmp_path}", "--views=2", "--seed=5", "--device=cpu"]
    planned = CliRunner().invoke(cli, [*words, "--plan"])
    assert "300 examples with 600 rows" in planned.output
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "300 examples with 600 rows in 1 shard" in done.output
    assert (
        "2 of each example, a row each, from seed 5"
        in CliRunner().invoke(cli, ["info", "set", f"--store={tmp_path}"]).output
    )
