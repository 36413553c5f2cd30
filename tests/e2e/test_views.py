"""Label sets with several rows an example, one a view: each fetch gives the rows of the views that were asked for."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from logitcache.client import InvalidRequest, Labels, RowsMissing, ShapeMismatch, connect
from logitcache.labels.errors import NotALabelSet, UnknownView
from logitcache.labels.identity import Identity, TeacherId
from logitcache.labels.ids import IdKind, text_keys
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.storage.layout import Layout
from logitcache.storage.writer import LabelSetWriter

VIEWS, EXAMPLES, PER_SHARD = 3, 9000, 4096
IDENTITY = Identity(TeacherId("t", "w"), 2, 10, (1.0,), "float16", targets=True, views=VIEWS, seed=1)


class Source:
    """Rows whose target logit tells example and view."""

    def __init__(self, ids: IdKind) -> None:
        self.layout = Layout.pointwise(replace(IDENTITY, ids=ids), EXAMPLES, PER_SHARD * VIEWS)
        self.kind, rng = ids, np.random.default_rng(4)
        self.fingerprints = rng.integers(2**64, size=(EXAMPLES, VIEWS), dtype=np.uint64)

    def id(self, ordinal: int) -> int | str:
        if self.kind == "text":
            return f"train/{ordinal}.jpg"
        return ordinal if self.kind == "ordinal" else 10**12 - 7 * ordinal

    def commit(self, writer: LabelSetWriter, shard: int) -> None:
        span = self.layout.span(shard)
        ordinals = np.arange(span.start, span.stop)
        texts = [str(self.id(ordinal)) for ordinal in span] if self.kind == "text" else None
        keys = np.array([self.id(ordinal) for ordinal in span]) if texts is None else text_keys(texts)
        rows = (ordinals[:, None] * VIEWS + np.arange(VIEWS)).reshape(-1)
        arrays = {
            "ids": keys,
            "fingerprint": self.fingerprints[span.start : span.stop],
            "indices": np.stack([rows % 10, (rows + 1) % 10], 1).astype(np.uint16),
            "logits": np.tile(np.array([0, -1], np.float16), (len(rows), 1)),
            "scalars": np.stack([rows % 97, np.full(len(rows), -2.0), rows], 1).astype(np.float32),
            "target": (rows % 10).astype(np.int32),
        }
        writer.commit(shard, arrays, {}, texts)

    def check(self, soft: Any, ordinals: Any, views: Any) -> None:
        """Every field is that of these views of these examples."""
        ordinals, views = np.asarray(ordinals), np.broadcast_to(views, np.shape(ordinals))
        rows = ordinals * VIEWS + views
        assert soft.target_logit.tolist() == rows.tolist()
        assert soft.indices[:, 0].tolist() == (rows % 10).tolist()
        assert soft.target.tolist() == (rows % 10).tolist()
        assert soft.logit_max.tolist() == (rows % 97).tolist()
        assert soft.fingerprint.tolist() == self.fingerprints[ordinals, views].tolist()


@pytest.fixture(params=["ordinal", "integer", "text"], scope="module")
def source(request: pytest.FixtureRequest) -> Source:
    return Source(request.param)


@pytest.fixture(scope="module")
def store(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``, and ``begun``, of which the first shard is labelled."""
    store = tmp_path_factory.mktemp("store")
    for name, shards in (("whole", 3), ("begun", 1)):
        with LabelSetWriter(store / name, source.layout) as writer:
            for shard in range(shards):
                source.commit(writer, shard)
            if not writer.missing:
                writer.seal()
    return store


@pytest.fixture(params=["folder", "server"], scope="module")
def opened(request: pytest.FixtureRequest, store: Path) -> Iterator[Callable[[str], Labels]]:
    """Connects to a label set of the store."""
    with ExitStack() as stack:
        place = str(store)
        if request.param == "server":
            place = stack.enter_context(running(create_app(Catalog(store))))
        yield lambda name: stack.enter_context(connect(f"{place}/{name}"))


def test_one_view_for_all_ids_is_that_view(opened: Callable[[str], Labels], source: Source) -> None:
    ordinals = [8999, 0, 4096, 4095, 0]
    for view in range(VIEWS):
        source.check(opened("whole").fetch([source.id(at) for at in ordinals], view=view), ordinals, view)
    source.check(opened("whole").fetch([source.id(3)]), [3], 0)


@pytest.mark.parametrize("seed", range(10))
def test_a_view_for_each_id_is_that_view_of_it(opened: Callable[[str], Labels], source: Source, seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 300))
    ordinals, views = rng.integers(EXAMPLES, size=size).tolist(), rng.integers(VIEWS, size=size).tolist()
    ids = [source.id(at) for at in ordinals]
    for given_as in (views, tuple(views), np.array(views, np.uint8), torch.tensor(views)):
        source.check(opened("whole").fetch(ids, view=given_as), ordinals, views)


def test_many_views_travel_in_parts(opened: Callable[[str], Labels], source: Source) -> None:
    rng = np.random.default_rng(8)
    ordinals, views = rng.integers(EXAMPLES, size=70_000), rng.integers(VIEWS, size=70_000)
    reader = opened("whole")
    if reader.describe().limits.ids < len(ordinals) and "http" not in repr(reader):
        ordinals, views = ordinals[:60_000], views[:60_000]  # a folder has no parts
    ids = [source.id(at) for at in ordinals.tolist()]
    source.check(reader.fetch(ids, view=views), ordinals, views)


def test_what_is_missing_is_masked_whatever_its_view(opened: Callable[[str], Labels], source: Source) -> None:
    ids = [source.id(at) for at in (5, 5000, 7)]
    with pytest.raises(RowsMissing) as caught:
        opened("begun").fetch(ids, view=[2, 1, 0])
    assert caught.value.unlabelled == [ids[1]]
    soft = opened("begun").fetch(ids, view=[2, 1, 0], on_missing="mask")
    assert soft.present is not None
    assert soft.present.tolist() == [True, False, True]
    assert np.isnan(soft.logits[1]).all()
    assert soft.target_logit is not None
    assert soft.target_logit[[0, 2]].tolist() == [5 * VIEWS + 2, 7 * VIEWS]


@pytest.mark.parametrize(
    ("view", "error", "told"),
    [
        (3, UnknownView, "view 3 of 'whole' does not exist: it has 3 views, 0 to 2"),
        (-1, UnknownView, "view -1 .* 0 to 2"),
        ([0, 7], UnknownView, "view 7 "),
        ([0, 1, 2], ShapeMismatch, r"\(3,\) for 2 ids"),
        ([[0], [1]], ShapeMismatch, r"\(2, 1\) for 2 ids"),
        ([0.0, 1.0], InvalidRequest, "whole number"),
        ([True, False], InvalidRequest, "whole number"),
        ("first", InvalidRequest, "whole number"),
    ],
)
def test_views_that_cannot_be_are_refused(
    opened: Callable[[str], Labels], source: Source, view: Any, error: type[Exception], told: str
) -> None:
    ids = [source.id(11), source.id(12)]
    with pytest.raises(error, match=told) as caught:
        opened("whole").fetch(ids, view=view)
    if view == [0, 7]:
        assert caught.value.details["ids"] == [ids[1]]  # type: ignore[attr-defined]


def test_attached_batches_say_which_view_they_are_of(opened: Callable[[str], Labels], source: Source) -> None:
    batches = [{"id": [source.id(9), source.id(4)], "view": [1, 2]}, {"id": [source.id(9)], "view": [0]}]
    whole = opened("whole")
    for view in ("view", lambda batch: batch["view"]):
        for (batch, soft), ordinals in zip(whole.attach(batches, ids="id", view=view), ([9, 4], [9]), strict=True):
            source.check(soft, ordinals, batch["view"])
    for (_, soft), ordinals in zip(whole.attach(batches, ids="id", view=2), ([9, 4], [9]), strict=True):
        source.check(soft, ordinals, 2)


def test_json_takes_one_view_or_one_for_each(source: Source, store: Path) -> None:
    ids = [source.id(8), source.id(8), source.id(1)]
    with running(create_app(Catalog(store))) as url, httpx.Client(base_url=f"{url}/v1/label-sets/whole") as client:
        for view, views in ((2, [2, 2, 2]), ([0, 1, 2], [0, 1, 2])):
            told = client.post("/fetch", json={"ids": ids, "view": view}).json()
            assert told["target_logit"] == [8 * VIEWS + views[0], 8 * VIEWS + views[1], VIEWS + views[2]]
        refusals: list[tuple[Any, str]] = [
            ([0, 1], "shape-mismatch"),
            ([0, 1, 3], "unknown-view"),
            (["0", "1", "2"], "invalid-request"),
            ("0", "invalid-request"),
            (None, "invalid-request"),
        ]
        for wrong, code in refusals:
            refused = client.post("/fetch", json={"ids": ids, "view": wrong})
            assert (refused.status_code // 100, refused.json()["code"]) == (4, code)
        assert client.get(f"/examples/{ids[0]}", params={"view": 1}).json()["target_logit"] == 8 * VIEWS + 1


def test_shards_that_hold_no_whole_pages_of_every_view_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"multiple of 12,288 .* for 3 views: try 12288"):
        Layout.pointwise(IDENTITY, 100, 4096)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["identity"].update(views=2),
        lambda manifest: manifest["identity"].update(views=0),
        lambda manifest: manifest["identity"].update(views=4097),
        lambda manifest: manifest["identity"].update(views=10**30),
        lambda manifest: manifest.update(examples_per_shard=4096 * 3),
        lambda manifest: manifest["shards"]["rows"].__setitem__(0, 4096 * 3 - 1),
    ],
)
def test_a_manifest_whose_views_and_rows_disagree_is_refused(store: Path, tmp_path: Path, change: Any) -> None:
    folder = tmp_path / "store" / "whole"
    folder.mkdir(parents=True)
    group = json.loads((store / "whole" / "zarr.json").read_bytes())
    change(group["attributes"]["logitcache"])
    (folder / "zarr.json").write_text(json.dumps(group))
    with pytest.raises(NotALabelSet, match="manifest is damaged"):
        connect(folder)
