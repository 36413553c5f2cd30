"""Everything that is settled before the first row is labelled: teacher, dataset, identity, what exists already.

`precompute` and `plan` both begin here, so that a plan refuses what the run would refuse before it writes; room on the
disk, the writer's lock and changes of what is labelled already are the run's own to find.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from logitcache.labels.errors import InvalidRequest, LabelSetNotFound
from logitcache.labels.identity import MAX_VIEWS, Dtype, Identity, check_name, declared
from logitcache.server.labelling.datasets import Examples, load_dataset
from logitcache.server.labelling.ensembles import load_teachers
from logitcache.server.labelling.shard_arrays import bucketed
from logitcache.server.labelling.survey import Facts, refuse_beyond, refuse_repeated
from logitcache.server.labelling.teachers import Teacher
from logitcache.server.progress import Reporter, Silent
from logitcache.storage.layout import Layout
from logitcache.storage.manifest import read_layout
from logitcache.storage.packing import check_rows_per_shard, default_rows_per_shard
from logitcache.storage.places import Places
from logitcache.storage.records import numbered
from logitcache.storage.statistics import read_statistics
from logitcache.storage.terms import refuse_another, refuse_fewer

DEFAULT_BATCH_SIZE = 256
"""Examples a forward, unless told or recorded."""

DEFAULT_SEED = 1
"""Seed of the views, unless told."""

DEFAULT_CAUSAL_BATCH_SIZE = 16
"""Token sequences a forward, unless told or recorded: each may be thousands of rows."""


@dataclass(frozen=True)
class Request:
    """What ``logitcache precompute`` was asked for; None means the default, or what the label set was begun with.

    ``teacher`` and ``dataset`` are SPECs; several teachers are one whose distribution is the mean of theirs. ``device``
    is torch's word for it, ``dtype`` that of the stored logits;
    ``targets`` says whether the dataset's targets are stored, by default where its first item has one. With ``views``
    each item is made so many times, from seeds that are derived from ``seed``.
    """

    name: str
    teacher: str | tuple[str, ...]
    dataset: str
    store: Path
    top_k: int
    temperatures: tuple[float, ...] = ()
    batch_size: int | None = None
    device: str | None = None
    dtype: Dtype = "float16"
    rows_per_shard: int | None = None
    loader_workers: int = 0
    targets: bool | None = None
    views: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        # User code may change the working folder: the store stays where it was meant.
        object.__setattr__(self, "store", self.store.absolute())

    @property
    def path(self) -> Path:
        """The label set's folder."""
        return self.store / self.name


@dataclass(frozen=True)
class Prepared:
    """A teacher, a dataset and an identity that fit together, and the layout that they give.

    Attributes:
        survey: facts of every example, where examples have many rows.
        layout: of all examples; where the label set exists and the dataset grew, that of the label set and more shards.
        recorded_batch_size: what committed shards were labelled with.
        labelled: examples that the label set was begun over, or grew to, before this run.
    """

    request: Request
    teacher: Teacher
    examples: Examples
    survey: Facts | None
    layout: Layout
    batch_size: int
    recorded_batch_size: int | None
    labelled: int

    def over(self, stored: Layout) -> "Prepared":
        """The same over a label set as it stands: its layout, and new shards for what it has not."""
        layout = _covering(stored, len(self.examples), self.survey)
        return replace(self, layout=layout, labelled=stored.examples)

    def missing(self) -> list[int]:
        """Shards without a commit, ascending."""
        done = set(numbered(Places(self.request.path).commits)) if self.labelled else set()
        return [shard for shard in range(self.layout.shards) if shard not in done]

    def facts(self, shard: int) -> Facts | None:
        """What was read of a shard's examples before, if anything."""
        span = self.layout.span(shard)
        return None if self.survey is None else self.survey[span.start : span.stop]

    def batches_of(self, shard: int) -> Sequence[Sequence[int]]:
        """Places of each batch of a shard, as `Examples` has them."""
        span, views = self.layout.span(shard), self.layout.identity.views
        return bucketed(range(span.start * views, span.stop * views), self.facts(shard), self.batch_size)

    def batches(self, shards: Sequence[int]) -> Iterator[Sequence[int]]:
        """Places of each batch of these shards, one shard after the other."""
        for shard in shards:
            yield from self.batches_of(shard)


def prepare(request: Request, reporter: Reporter | None = None) -> Prepared:
    """Load, check, and compare with what the store already has. Writes nothing.

    A dataset of token sequences is read once, as ``reporter`` is told.

    Raises:
        InvalidRequest, SpecNotFound, TeacherFault, DatasetFault: an argument, or the code behind it, is wrong.
        DatasetChanged: the dataset gives other inputs each time, or fewer than were labelled.
        IdentityChanged: the label set was begun with another teacher, k, temperatures, dtype, kind of ids or targets.
        NotALabelSet, NewerFormat: the folder cannot be continued.
    """
    _check_arguments(request)
    existing = _existing(request)
    specs = (request.teacher,) if isinstance(request.teacher, str) else request.teacher
    teacher = load_teachers(specs, request.device)
    targets = existing.identity.targets if existing and request.targets is None else request.targets
    examples = load_dataset(request.dataset, targets, request.views or 1, _seed(request))
    if existing:
        identity = _identity(request, teacher, examples, existing.identity.classes)
        refuse_another(request.name, existing, identity, request.rows_per_shard)
        refuse_fewer(request.name, existing, len(examples))
    probed = examples.check_stable()
    survey = _survey(request, examples, reporter or Silent()) if examples.kind.causal else None
    recorded = _recorded_batch_size(request.path, existing)
    default = DEFAULT_CAUSAL_BATCH_SIZE if examples.kind.causal else DEFAULT_BATCH_SIZE
    batch_size = request.batch_size or recorded or default
    classes = existing.identity.classes if existing else _count_classes(teacher, examples, survey, batch_size)
    ordinals, facts = probed if survey is None else (range(len(examples)), survey)
    refuse_beyond(facts, ordinals, examples.kind, classes, examples.example)
    layout = existing or _begun(request, _identity(request, teacher, examples, classes), survey, len(examples))
    labelled = existing.examples if existing else 0
    layout = _covering(layout, len(examples), survey)
    return Prepared(request, teacher, examples, survey, layout, batch_size, recorded, labelled)


def _check_arguments(request: Request) -> None:
    check_name(request.name)
    if request.views is None and request.seed is not None:
        raise InvalidRequest("--seed is that of the views: give --views, too")
    if request.views is not None and not 1 <= request.views <= MAX_VIEWS:
        raise InvalidRequest(f"--views {request.views}: an example may have 1 to {MAX_VIEWS:,} views")
    if request.seed is not None and not 1 <= request.seed < 2**63:
        raise InvalidRequest(f"--seed {request.seed}: a number from 1 up to 2^63 is wanted")
    check_rows_per_shard(request.rows_per_shard, request.views or 1)
    declared(request.temperatures)
    if request.top_k < 1:
        raise InvalidRequest(f"--top-k {request.top_k}: at least one class must be stored")
    if request.batch_size is not None and request.batch_size < 1:
        raise InvalidRequest(f"--batch-size {request.batch_size} is not positive")
    if request.loader_workers < 0:
        raise InvalidRequest(f"--loader-workers {request.loader_workers} is negative")
    if request.dtype not in ("float16", "float32"):
        raise InvalidRequest(f"--dtype {request.dtype!r} is neither float16 nor float32")


def _seed(request: Request) -> int:
    """0 where items are taken as they are."""
    return 0 if request.views is None else request.seed or DEFAULT_SEED


def _existing(request: Request) -> Layout | None:
    if not request.path.is_dir() or not any(request.path.iterdir()):
        return None
    try:
        return read_layout(request.path)
    except LabelSetNotFound:
        return None


def _identity(request: Request, teacher: Teacher, examples: Examples, classes: int) -> Identity:
    if request.top_k > classes:
        raise InvalidRequest(
            f"--top-k {request.top_k} is more than the teacher's {classes:,} classes: use at most {classes:,}"
        )
    kind = examples.kind
    return Identity(
        teacher=teacher.id,
        k=request.top_k,
        classes=classes,
        temperatures=declared(request.temperatures),
        dtype=request.dtype,
        alignment=kind.alignment,
        targets=kind.targets,
        ids=kind.ids,
        views=request.views or 1,
        seed=_seed(request),
    )


def _survey(request: Request, examples: Examples, reporter: Reporter) -> Facts:
    """Facts of every example: lengths decide which of them make a shard."""
    reporter.begin("reading lengths", len(examples), "examples")
    survey = examples.facts(range(len(examples)), request.loader_workers, reporter.advance)
    if examples.kind.ids != "ordinal":
        refuse_repeated(survey["key"], range(len(examples)), examples.example)
    return survey


def _begun(request: Request, identity: Identity, survey: Facts | None, examples: int) -> Layout:
    """The layout of a label set that is begun now."""
    if survey is None:
        default = default_rows_per_shard(examples * identity.views, views=identity.views)
        return Layout.pointwise(identity, examples, request.rows_per_shard or default)
    lengths = survey["length"].astype(np.int64)
    default = default_rows_per_shard(int(lengths.sum()), int(lengths.max()))
    return Layout.causal(identity, lengths, request.rows_per_shard or default)


def _covering(layout: Layout, examples: int, survey: Facts | None) -> Layout:
    """A layout, and new shards for the examples that it has not."""
    if examples <= layout.examples:
        return layout
    if survey is None:
        return layout.grown(examples - layout.examples)
    return layout.grown(survey["length"][layout.examples :].astype(np.int64))


def _recorded_batch_size(path: Path, existing: Layout | None) -> int | None:
    """The batch size that committed shards were labelled with: bytes are promised to repeat only with the same."""
    for shard in numbered(Places(path).commits) if existing else ():
        size = read_statistics(Places(path), shard).get("run", {}).get("batch_size")
        if isinstance(size, int) and size > 0:
            return size
    return None


def _count_classes(teacher: Teacher, examples: Examples, survey: Facts | None, batch_size: int) -> int:
    """How many classes the teacher has, from the forward of one batch, which is labelled again in its turn.

    Of token sequences those with the smallest token ids are tried: a tokenizer of another vocabulary is then found by
    the number of classes, before a teacher is shown a token that it does not know.
    """
    ordinals: Sequence[int] = range(min(batch_size, len(examples)))
    if survey is not None:
        ordinals = np.argsort(survey["token"], kind="stable")[:batch_size].tolist()
    return teacher.logits(next(examples.batches([ordinals])), None).shape[-1]
