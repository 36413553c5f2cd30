"""The SDK: soft labels for a training loop, from a server or from a folder.

    labels = connect("http://localhost:8000/digits")
    soft = labels.fetch([3, 1, 4])
    for batch, soft in labels.attach(loader, ids="id"):
        loss = distillation_loss(student(batch["x"]), soft.to(device), targets=batch["y"], temperature=2.0, alpha=0.9)

Importing it loads neither torch nor zarr nor a web framework; the names that need torch import it when they are first
used.
"""

from typing import TYPE_CHECKING, Any

from logitcache.client.attach import AttachedLoader
from logitcache.client.connect import connect
from logitcache.client.dataset import with_ids
from logitcache.client.extras import import_with_torch
from logitcache.client.fetched import FetchedLabels
from logitcache.client.http import HttpLabelSet
from logitcache.client.label_source import Labels
from logitcache.client.record import record
from logitcache.client.recorder import Recorder
from logitcache.client.schedule import Decay, EveryNth, FirstSteps, Schedule, WithProbability
from logitcache.client.several import SeveralLabels
from logitcache.client.stats import Stats
from logitcache.client.viewed import with_views
from logitcache.labels.errors import (
    DeadlineExceeded,
    DigestChanged,
    InvalidRequest,
    LabelMismatch,
    LabelSetNotFound,
    LogitcacheError,
    MissingExtra,
    NotFound,
    RangeOutside,
    RecorderReplaced,
    RowsMissing,
    ServerUnreachable,
    ShapeMismatch,
    TeacherMismatch,
    Unavailable,
    UndeclaredTemperature,
    WrongLabels,
)
from logitcache.labels.identity import TeacherId
from logitcache.labels.label_set import Description
from logitcache.labels.mixing import Mixing, mixing
from logitcache.labels.replaying import replay, seeded
from logitcache.labels.soft_labels import SoftLabels
from logitcache.labels.views import seed_for, view_of

if TYPE_CHECKING:
    from logitcache.client.losses import distillation_loss, kl_divergence
    from logitcache.client.tensors import SoftLabelTensors

__all__ = [
    "AttachedLoader",
    "DeadlineExceeded",
    "Decay",
    "Description",
    "DigestChanged",
    "EveryNth",
    "FetchedLabels",
    "FirstSteps",
    "HttpLabelSet",
    "InvalidRequest",
    "LabelMismatch",
    "LabelSetNotFound",
    "Labels",
    "LogitcacheError",
    "MissingExtra",
    "Mixing",
    "NotFound",
    "RangeOutside",
    "Recorder",
    "RecorderReplaced",
    "RowsMissing",
    "Schedule",
    "ServerUnreachable",
    "SeveralLabels",
    "ShapeMismatch",
    "SoftLabelTensors",
    "SoftLabels",
    "Stats",
    "TeacherId",
    "TeacherMismatch",
    "Unavailable",
    "UndeclaredTemperature",
    "WithProbability",
    "WrongLabels",
    "connect",
    "distillation_loss",
    "kl_divergence",
    "mixing",
    "record",
    "replay",
    "seed_for",
    "seeded",
    "view_of",
    "with_ids",
    "with_views",
]

_NEED_TORCH = {
    "SoftLabelTensors": "logitcache.client.tensors",
    "distillation_loss": "logitcache.client.losses",
    "kl_divergence": "logitcache.client.losses",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_with_torch(_NEED_TORCH[name]), name)


def __dir__() -> list[str]:
    return __all__
