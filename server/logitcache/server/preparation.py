"""Everything that is settled before the first row is labelled: teacher, dataset, identity, what exists already.

`precompute` and `plan` both begin here, so that a plan refuses what the run would refuse before it writes; room on the
disk, the writer's lock and changes of what is labelled already are the run's own to find.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from logitcache.labels.errors import InvalidRequest, LabelSetNotFound
from logitcache.labels.identity import Dtype, Identity, check_name, declared
from logitcache.labels.soft_labels import SoftLabels
from logitcache.server.datasets import Batch, Examples, load_dataset
from logitcache.server.teachers import Teacher, load_teacher
from logitcache.server.top_k import Rows, select_top_k
from logitcache.storage.layout import Layout, Places, default_rows_per_shard
from logitcache.storage.manifest import read_layout
from logitcache.storage.records import numbered
from logitcache.storage.statistics import read_statistics
from logitcache.storage.terms import check_rows_per_shard, refuse_another

DEFAULT_BATCH_SIZE = 256
"""Examples a forward, unless told or recorded."""

TRIAL_BATCHES = 3
"""Batches that a trial labels; the first one warms up and is not timed."""


@dataclass(frozen=True)
class Request:
    """What ``logitcache precompute`` was asked for; None means the default, or what the label set was begun with.

    ``teacher`` and ``dataset`` are SPECs, ``device`` is torch's word for it, ``dtype`` that of the stored logits.
    """

    name: str
    teacher: str
    dataset: str
    store: Path
    top_k: int
    temperatures: tuple[float, ...] = ()
    batch_size: int | None = None
    device: str | None = None
    dtype: Dtype = "float16"
    rows_per_shard: int | None = None
    loader_workers: int = 0

    def __post_init__(self) -> None:
        # User code may change the working folder: the store stays where it was meant.
        object.__setattr__(self, "store", self.store.absolute())

    @property
    def path(self) -> Path:
        """The label set's folder."""
        return self.store / self.name


@dataclass(frozen=True)
class Trial:
    """A few batches labelled and thrown away: seconds a row of reading and of labelling, and the rows themselves."""

    rows: SoftLabels
    read_s: float
    label_s: float


@dataclass(frozen=True)
class Prepared:
    """A teacher, a dataset and an identity that fit together, and the layout that they give."""

    request: Request
    teacher: Teacher
    examples: Examples
    layout: Layout
    batch_size: int
    recorded_batch_size: int | None
    exists: bool

    def missing(self) -> list[int]:
        """Shards without a commit, ascending."""
        done = set(numbered(Places(self.request.path).commits)) if self.exists else set()
        return [shard for shard in range(self.layout.shards) if shard not in done]

    def batches_of(self, shard: int) -> list[range]:
        """Ordinals of each batch of a shard: batches begin anew at each, so that a resumed run repeats them."""
        span = self.layout.span(shard)
        return [span[start : start + self.batch_size] for start in range(0, len(span), self.batch_size)]

    def label(self, batch: Batch) -> Rows:
        """Rows of one batch, by the teacher."""
        logits = self.teacher.logits(batch.inputs, batch.ids, self.layout.identity.classes)
        with torch.inference_mode():
            return select_top_k(logits, self.layout.row_spec)

    def trial(self) -> Trial:
        """Label a few batches of the first missing shard, and time it."""
        lists = self.batches_of((self.missing() or [0])[0])[:TRIAL_BATCHES]
        began, read_s, label_s, timed, parts = time.perf_counter(), 0.0, 0.0, 0, []
        for number, batch in enumerate(self.examples.batches(lists, 0)):
            read = time.perf_counter()
            rows = self.label(batch)
            done = time.perf_counter()
            if number or len(lists) == 1:
                read_s, label_s, timed = read_s + read - began, label_s + done - read, timed + len(batch.ids)
            began = done
            parts.append((batch, rows))
        batch, rows = parts[-1]
        return Trial(soft_labels(rows, batch.fingerprints, self.layout), read_s / timed, label_s / timed)


def prepare(request: Request) -> Prepared:
    """Load, check, and compare with what the store already has. Writes nothing.

    Raises:
        InvalidRequest, SpecNotFound, TeacherFault, DatasetFault: an argument, or the code behind it, is wrong.
        DatasetChanged: the dataset gives other inputs each time, or has another length than what was labelled.
        IdentityChanged: the label set was begun with another teacher, k, temperatures or dtype.
        NotALabelSet, NewerFormat: the folder cannot be continued.
    """
    _check_arguments(request)
    existing = _existing(request)
    teacher = load_teacher(request.teacher, request.device)
    examples = load_dataset(request.dataset)
    check_rows_per_shard(request.rows_per_shard, len(examples))
    examples.check_stable()
    recorded = _recorded_batch_size(request.path, existing)
    batch_size = request.batch_size or recorded or DEFAULT_BATCH_SIZE
    classes = existing.identity.classes if existing else _count_classes(teacher, examples, batch_size)
    if request.top_k > classes:
        raise InvalidRequest(
            f"--top-k {request.top_k} is more than the teacher's {classes:,} classes: use at most {classes:,}"
        )
    identity = Identity(teacher.id, request.top_k, classes, declared(request.temperatures), request.dtype)
    if existing:
        refuse_another(request.name, existing, identity, len(examples), request.rows_per_shard)
    rows_per_shard = request.rows_per_shard or default_rows_per_shard(len(examples))
    layout = existing or Layout(identity, len(examples), rows_per_shard)
    return Prepared(request, teacher, examples, layout, batch_size, recorded, existing is not None)


def _check_arguments(request: Request) -> None:
    check_name(request.name)
    check_rows_per_shard(request.rows_per_shard, examples=0)
    declared(request.temperatures)
    if request.top_k < 1:
        raise InvalidRequest(f"--top-k {request.top_k}: at least one class must be stored")
    if request.batch_size is not None and request.batch_size < 1:
        raise InvalidRequest(f"--batch-size {request.batch_size} is not positive")
    if request.loader_workers < 0:
        raise InvalidRequest(f"--loader-workers {request.loader_workers} is negative")
    if request.dtype not in ("float16", "float32"):
        raise InvalidRequest(f"--dtype {request.dtype!r} is neither float16 nor float32")


def _existing(request: Request) -> Layout | None:
    if not request.path.is_dir() or not any(request.path.iterdir()):
        return None
    try:
        return read_layout(request.path)
    except LabelSetNotFound:
        return None


def _recorded_batch_size(path: Path, existing: Layout | None) -> int | None:
    """The batch size that committed shards were labelled with: bytes are promised to repeat only with the same."""
    for shard in numbered(Places(path).commits) if existing else ():
        size = read_statistics(Places(path), shard).get("run", {}).get("batch_size")
        if isinstance(size, int) and size > 0:
            return size
    return None


def _count_classes(teacher: Teacher, examples: Examples, batch_size: int) -> int:
    """How many classes the teacher has, from a forward of the first batch, which is labelled again in its turn."""
    batch = next(examples.batches([range(min(batch_size, len(examples)))]))
    return teacher.logits(batch.inputs, batch.ids, None).shape[1]


def soft_labels(rows: Rows, fingerprints: np.ndarray, layout: Layout) -> SoftLabels:
    """Freshly selected rows as soft labels."""
    return SoftLabels(
        indices=rows.indices,
        logits=rows.logits,
        logit_max=rows.scalars[:, 0],
        tail_logsumexp=rows.scalars[:, 1:],
        fingerprint=fingerprints,
        temperatures=layout.identity.temperatures,
    )
