"""Token labels from a dataset through precompute, a server and `attach` into a loss: what live distillation gives.

The vocabulary is above 65,536 and lengths are 1 to 2,000. The reference is plain PyTorch in float64 on each sequence
alone, with the teacher's own forward; it shares no code with the selection, the store or the loss. Bounds, set before:
float16 logits move the loss by less than 2e-3 of itself; a shift by one row in either direction moves it by a tenth.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.server.given import Recurrent, request_of, sequences
from torch import Tensor
from torch.utils.data import DataLoader

from logitcache.client import FetchedLabels, LabelMismatch, Labels, connect, distillation_loss
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.server.labelling.precompute import precompute

CLASSES, K, TEMPERATURE, ALPHA = 66_000, 64, 2.0, 0.7
LENGTHS = [1, 2, 3, 17, 255, 256, 2000]
RELATIVE = 2e-3


@pytest.fixture(scope="module")
def teacher() -> Recurrent:
    return Recurrent(CLASSES)


@pytest.fixture(scope="module")
def items() -> list[dict[str, Any]]:
    return [
        {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(tokens), "id": f"book/{number}"}
        for number, tokens in enumerate(sequences(LENGTHS, CLASSES))
    ]


@pytest.fixture(scope="module")
def store(teacher: Recurrent, items: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("e2e") / "store"
    precompute(request_of(store, items, teacher, top_k=K, temperatures=(TEMPERATURE,), batch_size=3))
    return store


@pytest.fixture(scope="module")
def labels(store: Path) -> Iterator[Labels]:
    with running(create_app(Catalog(store))) as url, connect(f"{url}/set") as labels:
        yield labels


@pytest.fixture(scope="module")
def students() -> list[Tensor]:
    """A student's logits for each sequence, drawn; kept in float32 to be differentiated."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, CLASSES, generator=generator) for length in LENGTHS[:-1]]


@pytest.fixture(scope="module")
def expected(teacher: Recurrent, items: list[dict[str, Any]], students: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Loss and gradient of live distillation from the top k and the rest, the mean over all rows but the longest's."""
    rows, values, grads = sum(LENGTHS[:-1]), [], []
    for item, logits in zip(items[:-1], students, strict=True):
        student = logits.double().requires_grad_()
        with torch.no_grad():
            live = torch.log_softmax(teacher(item["input_ids"][None])[0].double() / TEMPERATURE, 1)
        value = live_loss(live, student, item["labels"]).sum() / rows
        value.backward()
        assert student.grad is not None
        values.append(float(value.detach()))
        grads.append(student.grad.float())
    return sum(values), grads


def live_loss(live: Tensor, student: Tensor, tokens: Tensor) -> Tensor:
    """Of each row: alpha · T² · KL over the k likeliest classes and the rest, (1 - alpha) · CE of the next token."""
    top, chosen = live.topk(K, dim=1)
    soft = torch.log_softmax(student / TEMPERATURE, 1)
    rest = torch.log1p(-top.exp().sum(1))
    others = soft.scatter(1, chosen, -torch.inf).logsumexp(1)
    kl = (top.exp() * (top - soft.gather(1, chosen))).sum(1) + rest.exp() * (rest - others)
    ce = torch.zeros_like(kl)
    ce[:-1] = F.cross_entropy(student[:-1], tokens[1:], reduction="none") if len(tokens) > 1 else 0.0
    has_target = torch.arange(len(tokens)) < len(tokens) - 1
    return torch.where(has_target, ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * ce, TEMPERATURE**2 * kl)


def padded(parts: list[Tensor], side: str, value: float) -> Tensor:
    """Sequences of any row shape as one batch, with this value in the padding."""
    longest = max(map(len, parts))
    lines = []
    for part in parts:
        filling = part.new_full((longest - len(part), *part.shape[1:]), value)
        lines.append(torch.cat([filling, part] if side == "left" else [part, filling]))
    return torch.stack(lines)


def relative(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of all gradients, as a part of the largest gradient."""
    largest = max(float(grad.abs().max()) for grad in wanted)
    return max(float((one - other).abs().max()) for one, other in zip(found, wanted, strict=True)) / largest


def loss_of(layout: str, soft: FetchedLabels, leaves: Any, tokens: list[Tensor], chosen: list[int]) -> Tensor:
    """The loss of some sequences, their logits put together in this layout; padding is full of NaN."""
    options: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": ALPHA, "reduction": "sum"}
    logits, labels = [leaves[at] for at in chosen], [tokens[at] for at in chosen]
    if layout == "packed":
        return distillation_loss(torch.cat(logits), soft, targets=torch.cat(labels), **options)
    side, _, by = layout.partition(" ")
    mask = padded([torch.ones_like(each) for each in labels], side, 0)
    told = {"attention_mask": mask} if by else {"padding": side}
    targets = padded(labels, side, 5)  # a padding token that is a class: it must never be a target
    return distillation_loss(padded(logits, side, torch.nan), soft, targets=targets, **told, **options)


@pytest.mark.parametrize("layout", ["right", "left", "right mask", "left mask", "packed"])
def test_cached_distillation_is_live_distillation_in_every_layout(
    labels: Labels,
    items: list[dict[str, Any]],
    students: list[Tensor],
    expected: tuple[float, list[Tensor]],
    layout: str,
) -> None:
    leaves = [logits.clone().requires_grad_() for logits in students]
    tokens = [item["input_ids"] for item in items]
    total = 0.0
    for chosen in ([0, 3, 1, 2, 4], [5]):
        ids, inputs = [items[at]["id"] for at in chosen], [tokens[at] for at in chosen]
        loss = loss_of(layout, labels.fetch(ids, inputs=inputs), leaves, tokens, chosen) / sum(LENGTHS[:-1])
        loss.backward()
        total += float(loss.detach())
    value, grads = expected
    assert total == pytest.approx(value, rel=RELATIVE)
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert relative(found, grads) < RELATIVE


@pytest.mark.parametrize("layout", ["left mask"])
def test_the_longest_sequence_beside_a_short_one_gives_the_live_loss(
    labels: Labels, items: list[dict[str, Any]], teacher: Recurrent, layout: str
) -> None:
    tokens = [item["input_ids"] for item in items]
    chosen, draw = [2, len(items) - 1], torch.Generator().manual_seed(4)
    with torch.no_grad():
        live = {at: teacher(tokens[at][None])[0] for at in chosen}
        leaves = {at: live[at] + torch.randn(live[at].shape, generator=draw) for at in chosen}
        wanted = sum(
            float(
                live_loss(torch.log_softmax(live[at].double() / TEMPERATURE, 1), leaves[at].double(), tokens[at]).sum()
            )
            for at in chosen
        )
        soft = labels.fetch([items[at]["id"] for at in chosen], inputs=[tokens[at] for at in chosen])
        found = loss_of(layout, soft, leaves, tokens, chosen)
    assert float(found) == pytest.approx(wanted, rel=RELATIVE)


@pytest.mark.parametrize("shift", [-1, 1])
def test_rows_that_are_off_by_one_give_another_loss(
    labels: Labels, items: list[dict[str, Any]], students: list[Tensor], shift: int
) -> None:
    ids, tokens = [items[at]["id"] for at in (3, 4)], [items[at]["labels"] for at in (3, 4)]
    soft = labels.fetch(ids)
    with torch.no_grad():
        live = Recurrent(CLASSES)
        student = [live(each[None])[0] for each in tokens]  # the teacher itself: its loss is all but zero
        options: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": 1.0}
        right = float(distillation_loss(torch.cat(student), soft, **options))
        moved = torch.cat([each.roll(shift, 0) for each in student])
        wrong = float(distillation_loss(moved, soft, **options))
    assert right < 1e-4
    assert wrong > 1e3 * max(right, 1e-6)


def test_an_epoch_through_attach_is_checked_against_the_tokens_of_every_batch(
    labels: Labels, items: list[dict[str, Any]]
) -> None:
    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = [item["input_ids"][:300] for item in batch]  # truncated, as training does
        return {
            "id": [item["id"] for item in batch],
            "input_ids": padded(tokens, "left", 0),
            "attention_mask": padded([torch.ones_like(each) for each in tokens], "left", 0),
        }

    seen = 0
    for batch, soft in labels.attach(DataLoader(items, batch_size=4, collate_fn=collate), ids="id"):  # type: ignore[arg-type]
        assert soft.row_splits is not None
        assert np.array_equal(np.diff(soft.row_splits), batch["attention_mask"].sum(1).numpy())
        assert isinstance(soft.tokens, np.ndarray)
        assert np.array_equal(soft.tokens, batch["input_ids"][batch["attention_mask"].bool()].numpy())
        seen += soft.examples
    assert seen == len(items)

    wrong = [item | {"id": items[at - 1]["id"]} for at, item in enumerate(items)]
    with pytest.raises(LabelMismatch) as caught:
        list(labels.attach(DataLoader(wrong, batch_size=4, collate_fn=collate), ids="id"))  # type: ignore[arg-type]
    assert set(caught.value.ids) <= {item["id"] for item in items}


@pytest.mark.parametrize("shift", [-1, 1])
def test_tokens_that_are_off_by_one_are_refused(labels: Labels, items: list[dict[str, Any]], shift: int) -> None:
    with pytest.raises(LabelMismatch, match="book/4"):
        labels.fetch(["book/4"], inputs=[items[4]["input_ids"].roll(shift)])
