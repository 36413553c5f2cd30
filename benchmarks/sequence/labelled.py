"""Label sets of models that were just trained, made by precompute and served by a server process of their own.

Precompute takes SPECs, so what is labelled now stands in this module: `teacher` and `dataset` are what it names.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from logitcache.client import Labels, LabelSetNotFound, connect
from logitcache.server.demo.local_server import serving
from logitcache.server.labelling.precompute import Summary, precompute
from logitcache.server.labelling.preparation import Request

SEEN_S = 5.0

_now: dict[str, Any] = {}


def teacher() -> nn.Module:
    """The model that labels now."""
    model: nn.Module = _now["teacher"]
    return model


def dataset() -> Dataset[Any]:
    """What it labels now."""
    data: Dataset[Any] = _now["dataset"]
    return data


@dataclass
class Shop:
    """A store that is served over HTTP.

    ``precompute_s`` are the seconds that the last `label` took, from nothing to sealed.
    """

    store: Path
    url: str
    precompute_s: float = field(default=0.0)

    def label(self, name: str, model: nn.Module, data: Dataset[Any], **options: Any) -> Labels:
        """Label data with a model under a name, or append to what is labelled under it; and connect over HTTP.

        ``options`` are those of `Request`; ``top_k`` is needed.
        """
        _now.update(teacher=model.eval(), dataset=data)
        began = time.perf_counter()
        self.summary(name, **options)
        self.precompute_s = time.perf_counter() - began
        return self.connect(name)

    def summary(self, name: str, **options: Any) -> Summary:
        """The precompute alone, of what stands in this module."""
        spec = f"{__name__}:"
        request = Request(
            name=name, teacher=f"{spec}teacher", dataset=f"{spec}dataset", store=self.store, device="cpu", **options
        )
        return precompute(request)

    def connect(self, name: str) -> Labels:
        """The label set over HTTP, as soon as the server has seen it: it looks at its store twice a second."""
        until = time.monotonic() + SEEN_S
        while True:
            try:
                return connect(f"{self.url}/{name}")
            except LabelSetNotFound:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)


@contextmanager
def shop(folder: Path) -> Iterator[Shop]:
    """A store in this folder and a server process for it, as long as the context lasts."""
    store = folder / "label-sets"
    store.mkdir(parents=True, exist_ok=True)
    with serving(store, folder / "server.log") as url:
        yield Shop(store, url)


class Permuted(Dataset[Any]):
    """Each example under the id of another: the control, whose labels are as soft and belong to nobody."""

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self._data = data
        self.order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self._data[self.order[index]]


def live_logits(task: Any, model: nn.Module, batch: Any) -> Tensor:
    """A teacher's logits of a batch, as live distillation computes them."""
    with torch.inference_mode():
        logits: Tensor = task.forward(model, batch)
    return logits.clone()  # a tensor made in inference mode cannot be saved for a backward pass
