"""Cached KD is live KD: the same loss and the same gradients, on the same weights and batch, at every step.

Bounds, declared before the run. At k = classes a cached row differs from the live one by the rounding of its logits.
With float32 labels that is at most one unit in the last place of a centred logit: the loss, and the gradient of the
student's logits (a difference of two softmaxes), agree to a few float32 roundings, 1e-5 relative to the largest.
With float16 labels a centred logit l is off by at most |l| 2^-11, and so is, by a weighted mean of the same errors, the
normaliser. `float16_bound` carries that through T² KL and its gradient to first order.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.server import specimens
from torch.utils.data import DataLoader

from logitcache.client import connect, distillation_loss, with_ids
from logitcache.labels.identity import Dtype
from logitcache.server.http.app import create_app
from logitcache.server.http.catalog import Catalog
from logitcache.server.http.serve import running
from logitcache.server.labelling.precompute import precompute
from logitcache.server.labelling.preparation import Request

STEPS = 60
TEMPERATURE, ALPHA = 2.0, 0.9
FLOAT32_RELATIVE = 1e-5


def student() -> torch.nn.Module:
    torch.manual_seed(11)
    # The first feature is the ordinal: a mark, not a feature.
    return torch.nn.Sequential(
        torch.nn.Linear(specimens.FEATURES - 1, 8), torch.nn.ReLU(), torch.nn.Linear(8, specimens.CLASSES)
    )


def live_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Dense KD in plain PyTorch, the independent reference."""
    kl = F.kl_div(
        F.log_softmax(student_logits / TEMPERATURE, 1),
        F.log_softmax(teacher_logits / TEMPERATURE, 1),
        log_target=True,
        reduction="batchmean",
    )
    return ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * F.cross_entropy(student_logits, targets)


def float16_bound(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> tuple[float, float]:
    """Most that rounding centred logits to float16 can change the loss, and a gradient of a logit, by first order."""
    centred = teacher_logits - teacher_logits.amax(1, keepdim=True)
    log_t = F.log_softmax(teacher_logits / TEMPERATURE, 1)
    log_p = F.log_softmax(student_logits / TEMPERATURE, 1)
    # Each log-probability moves by the rounding of its own logit and of the normaliser.
    moved = (centred.abs() + centred.abs().amax(1, keepdim=True)) * 2.0**-11 / TEMPERATURE
    t = log_t.exp()
    loss = ALPHA * TEMPERATURE**2 * (t * moved * ((log_t - log_p).abs() + 1)).sum(1).mean()
    gradient = ALPHA * TEMPERATURE * (t * moved).max() / len(t)
    return 1.1 * float(loss) + 1e-6, 1.1 * float(gradient) + 1e-8


@pytest.fixture(scope="module", params=["float32", "float16"])
def dtype(request: pytest.FixtureRequest) -> Dtype:
    chosen: Dtype = request.param
    return chosen


@pytest.fixture(scope="module")
def url(dtype: Dtype, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store: Path = tmp_path_factory.mktemp("store")
    spec = "tests.server.specimens"
    precompute(
        Request("kd", f"{spec}:good_teacher", f"{spec}:data", store, specimens.CLASSES, (TEMPERATURE,), dtype=dtype)
    )
    with running(create_app(Catalog(store))) as base:
        yield f"{base}/kd"


def test_at_every_step_cached_loss_and_gradients_are_the_live_ones(url: str, dtype: Dtype) -> None:
    teacher, net = specimens.good_teacher().eval(), student()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = DataLoader(
        with_ids(specimens.data()), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(2)
    )
    worst = {"loss": 0.0, "gradient": 0.0}
    steps = 0
    with connect(url) as labels:
        for (inputs, targets, ids), soft in labels.attach(loader, ids=-1, inputs=0):
            assert len(ids) == len(soft)
            with torch.inference_mode():
                teacher_logits = teacher(inputs)
            teacher_logits = teacher_logits.clone()
            results = []
            for cached in (True, False):
                student_logits = net(inputs[:, 1:])
                student_logits.retain_grad()
                if cached:
                    loss = distillation_loss(
                        student_logits, soft, targets=targets, temperature=TEMPERATURE, alpha=ALPHA
                    )
                else:
                    loss = live_loss(student_logits, teacher_logits, targets)
                optimizer.zero_grad()
                loss.backward()
                weights = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
                assert student_logits.grad is not None
                results.append((loss.item(), student_logits.grad.clone(), weights))
            (loss_c, grad_c, weights_c), (loss_l, grad_l, weights_l) = results
            difference = abs(loss_c - loss_l)
            gradient = float((grad_c - grad_l).abs().max())
            if dtype == "float32":
                assert difference <= FLOAT32_RELATIVE * max(1.0, abs(loss_l))
                assert gradient <= FLOAT32_RELATIVE * float(grad_l.abs().max())
                assert torch.allclose(weights_c, weights_l, rtol=1e-4, atol=1e-7)
            else:
                loss_bound, gradient_bound = float16_bound(student_logits.detach(), teacher_logits)
                assert difference <= loss_bound
                assert gradient <= gradient_bound
            worst = {"loss": max(worst["loss"], difference), "gradient": max(worst["gradient"], gradient)}
            optimizer.step()
            steps += 1
            if steps == STEPS:
                break
    assert steps == STEPS
    # The bounds are not so wide that anything would pass: float16 labels differ, and by little.
    assert worst["loss"] < 2e-3
    print(f"\n{dtype}: largest difference of loss {worst['loss']:.2e}, of a logit's gradient {worst['gradient']:.2e}")


def test_a_student_trained_from_cached_labels_is_the_student_trained_live(url: str, dtype: Dtype) -> None:
    """The same seeds and order: after an epoch the weights agree as far as rounding lets them."""
    teacher = specimens.good_teacher().eval()
    trained = []
    for cached in (True, False):
        net = student()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        loader = DataLoader(
            with_ids(specimens.data()), batch_size=128, shuffle=True, generator=torch.Generator().manual_seed(3)
        )
        with connect(url) as labels:
            for (inputs, targets, _), soft in labels.attach(loader, ids=2):
                logits = net(inputs[:, 1:])
                if cached:
                    loss = distillation_loss(logits, soft, targets=targets, temperature=TEMPERATURE, alpha=ALPHA)
                else:
                    with torch.no_grad():
                        teacher_logits = teacher(inputs)
                    loss = live_loss(logits, teacher_logits, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        trained.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    tolerance = 1e-4 if dtype == "float32" else 5e-3
    assert float((trained[0] - trained[1]).abs().max()) < tolerance
    assert not np.array_equal(trained[0].numpy(), torch.cat([p.flatten() for p in student().parameters()]).detach())
