"""Precompute: every example of a dataset labelled once by a teacher, shard by shard, and sealed.

While a batch is computed the one before it is checked and put in its place, and while a shard is labelled the one
before it is committed. The dataset is read between two forwards, by the thread that does them: user code is never in
two threads at once, and what it draws from one generator is drawn in the same order each time.

The same call again continues: committed shards are checked against the dataset and not labelled a second time, and what
the dataset has more than the label set is appended. Whatever goes wrong, what was committed stays. It knows no HTTP.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from logitcache.labels.bill import TeacherTime
from logitcache.labels.errors import shown
from logitcache.server.labelling.batches import Batch, told_ordinals
from logitcache.server.labelling.commits import Commits
from logitcache.server.labelling.comparison import check_appended, check_labelled
from logitcache.server.labelling.datasets import worker_deaths_told
from logitcache.server.labelling.preparation import Prepared, Request, prepare
from logitcache.server.labelling.shard_arrays import Labelled, ShardArrays, label
from logitcache.server.labelling.space import check_space
from logitcache.server.progress import Reporter, Silent
from logitcache.server.wording import counted, extent, retained_lines, size
from logitcache.storage.files import Files
from logitcache.storage.layout import Layout
from logitcache.storage.places import Places
from logitcache.storage.records import Generation
from logitcache.storage.statistics import read_statistics, retained_in, summed
from logitcache.storage.writer import LabelSetWriter


@dataclass(frozen=True)
class Summary:
    """What a finished precompute has to say; ``str`` of it is what the command prints.

    ``retained_mass`` gives mean and minimum by temperature over the whole label set, ``labelled`` is in rows, each of
    them a ``unit``; ``appended`` in examples: those that the newest sealed generation had not. ``repaired`` are the
    shards of a sealed label set that had to be labelled again, ``reproduced`` whether that gave the very bytes that
    were sealed before.
    """

    name: str
    digest: str
    generation: int
    examples: int
    rows: int
    labelled: int
    shards: int
    label_bytes: int
    seconds: float
    retained_mass: dict[str, dict[str, float]]
    unit: str = "row"
    appended: int = 0
    repaired: tuple[int, ...] = ()
    reproduced: bool = True

    def __str__(self) -> str:
        rate = f"{self.labelled:,} labelled now in {self.seconds:.1f} s" if self.labelled else "nothing left to label"
        lines = [
            f"{self.name}: {extent(self.examples, self.rows, self.unit)} in {counted(self.shards, 'shard')}, "
            f"{size(self.label_bytes)}; {rate}",
            f"digest      {self.digest} (generation {self.generation})",
        ]
        if self.appended:
            lines.append(f"appended    {counted(self.appended, 'example')}; those before are as they were")
        if self.repaired:
            outcome = "the same bytes again" if self.reproduced else "other bytes, so this is a new generation"
            lines.append(f"repaired    shards {shown(self.repaired)}: {outcome}")
        lines += retained_lines(self.retained_mass)
        return "\n".join(lines)


def precompute(request: Request, reporter: Reporter | None = None, *, files: Files | None = None) -> Summary:
    """Label what is not labelled yet, and seal the label set. ``files`` is for tests that inject faults.

    What the label set was begun over, or grew to before, is finished and sealed first; then it grows to what the
    dataset has now, which is labelled and sealed as the next generation.

    Raises:
        LogitcacheError: as `preparation.prepare` and `storage.writer.LabelSetWriter` do, before any work.
        DatasetChanged: an example that is labelled already is another one now; it is named.
        TeacherFault, DatasetFault: user code failed on the way.
        DiskFull: too little space for what is missing, or none left on the way.
    """
    reporter = reporter or Silent()
    prepared, path = prepare(request, reporter), request.path
    # Before anything is made: a refused run leaves nothing behind.
    check_space(path, prepared.layout, prepared.missing())
    with LabelSetWriter(path, prepared.layout, files=files) as writer:
        for problem in writer.quarantined.values():
            reporter.note(f"damaged: {problem}; moved to {path / 'quarantine'}, it will be labelled again")
        prepared = prepared.over(writer.layout)
        layout, sealed = prepared.layout, writer.generation
        check_labelled(prepared, writer, reporter)
        check_appended(prepared, writer, reporter)
        missing = [*writer.missing, *range(writer.layout.shards, layout.shards)]
        check_space(path, layout, missing)
        began = time.perf_counter()
        if missing:
            _note_settings(prepared, reporter)
        generation = _label_all(prepared, writer, reporter, missing)
        seconds = time.perf_counter() - began
    return _summary(prepared, generation, sealed, missing, seconds)


def _note_settings(prepared: Prepared, reporter: Reporter) -> None:
    recorded = prepared.recorded_batch_size
    if recorded is not None and recorded != prepared.batch_size:
        reporter.note(
            f"batch size {prepared.batch_size} is not the {recorded} of the shards already labelled: "
            "rows may differ from theirs in the last bits"
        )
    if appended := len(prepared.examples) - prepared.labelled:
        reporter.note(f"the dataset grew: {counted(appended, 'example')} to append to {prepared.labelled:,}")


def _label_all(prepared: Prepared, writer: LabelSetWriter, reporter: Reporter, missing: list[int]) -> Generation:
    """Label and commit the missing shards in order, and seal: before the label set grows, and at the end.

    What is committed when it is stopped is told when that is certain: a commit that is under way then is finished.
    """
    if missing:
        rows = sum(prepared.layout.shard_rows[shard] for shard in missing)
        reporter.begin(f"labelling {prepared.request.name}", rows)
    batches = prepared.examples.batches(prepared.batches(missing), prepared.request.loader_workers)
    try:
        with worker_deaths_told(), Commits(writer) as commits, contextlib.closing(batches):
            for shard in missing:
                if shard == writer.layout.shards:
                    commits.wait()
                    _grow(writer, prepared.layout)
                _label_shard(prepared, commits, shard, batches, reporter)
            commits.wait()
            return writer.seal()
    except BaseException:
        reporter.note(
            f"stopped: {len(writer.committed):,} of {prepared.layout.shards:,} shards are committed and kept; "
            "the same command goes on from there"
        )
        raise


def _grow(writer: LabelSetWriter, layout: Layout) -> None:
    writer.seal()
    writer.grow(layout)


def _label_shard(
    prepared: Prepared, commits: Commits, shard: int, batches: Iterator[Batch], reporter: Reporter
) -> None:
    """Label a shard's batches, and begin to commit it. Each batch is put in its place when the next was begun."""
    began = time.perf_counter()
    filled = ShardArrays(prepared.layout, shard, prepared.facts(shard))
    under_way: Labelled | None = None
    teacher_s = 0.0
    for places in prepared.batches_of(shard):
        reporter.under_way(partial(_reading, places, prepared))
        batch = next(batches)
        filled.check(batch)
        reporter.under_way(partial(_labelling, batch))
        following = label(prepared.teacher, batch, prepared.layout)
        if under_way is not None:
            teacher_s += _put(under_way, filled, commits, reporter)
        under_way = following
    if under_way is not None:
        teacher_s += _put(under_way, filled, commits, reporter)
    reporter.under_way(lambda: f"committing shard {shard}")
    teacher_time = TeacherTime(teacher_s, prepared.layout.shard_rows[shard], prepared.teacher.device_name)
    commits.begin(
        shard,
        filled,
        {
            "seconds": time.perf_counter() - began,
            "teacher_time": asdict(teacher_time),
            "run": _run_settings(prepared),
        },
    )


def _reading(places: Sequence[int], prepared: Prepared) -> str:
    return f"reading {told_ordinals(np.unique(np.asarray(places) // prepared.layout.identity.views))}"


def _labelling(batch: Batch) -> str:
    return f"labelling {batch}{batch.ids_told()}"


def _put(labelled: Labelled, filled: ShardArrays, commits: Commits, reporter: Reporter) -> float:
    """Put a batch in its place; seconds that its rows took the teacher."""
    filled.put(labelled)
    commits.check()
    reporter.advance(labelled.batch.rows)
    return labelled.seconds


def _run_settings(prepared: Prepared) -> dict[str, Any]:
    """What rows depend on in their last bits; byte equality is promised only with all of these equal."""
    return {
        "batch_size": prepared.batch_size,
        "device": str(prepared.teacher.device),
        "teacher_dtype": prepared.teacher.dtype,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def _summary(
    prepared: Prepared, generation: Generation, sealed: Generation | None, labelled: Sequence[int], seconds: float
) -> Summary:
    layout, places = prepared.layout, Places(prepared.request.path)
    known = 0 if sealed is None else len(sealed.commits)
    return Summary(
        name=prepared.request.name,
        digest=generation.digest,
        generation=generation.number,
        examples=layout.examples,
        rows=layout.rows,
        labelled=sum(layout.shard_rows[shard] for shard in labelled),
        shards=layout.shards,
        label_bytes=layout.used_bytes(layout.examples, layout.rows),
        unit="token" if layout.ragged else "row",
        seconds=seconds,
        retained_mass=summed([retained_in(read_statistics(places, shard)) for shard in range(layout.shards)]),
        appended=layout.examples - (prepared.labelled if sealed is None else sealed.examples),
        repaired=tuple(shard for shard in labelled if shard < known),
        reproduced=sealed is None or generation.commits[:known] == sealed.commits,
    )
