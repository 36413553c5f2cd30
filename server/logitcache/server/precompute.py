"""Precompute: every example of a dataset labelled once by a teacher, shard by shard, and sealed.

The same call again continues: committed shards are checked against the dataset and not labelled a second time. Whatever
goes wrong, what was committed stays. It knows no HTTP.
"""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from logitcache.labels.errors import DatasetChanged, shown
from logitcache.server.datasets import Batch, worker_death
from logitcache.server.preparation import Prepared, Request, prepare, soft_labels
from logitcache.server.progress import Reporter, Silent
from logitcache.server.space import check_space
from logitcache.server.top_k import Rows
from logitcache.server.wording import counted, retained_lines, size
from logitcache.storage.files import Files
from logitcache.storage.layout import Places
from logitcache.storage.statistics import read_retained, retained_mass, summed
from logitcache.storage.writer import LabelSetWriter


@dataclass(frozen=True)
class Summary:
    """What a finished precompute has to say; ``str`` of it is what the command prints.

    ``retained_mass`` gives mean and minimum by temperature over the whole label set, ``repaired`` the shards of a
    sealed label set that had to be labelled again, ``reproduced`` whether that gave the very bytes that were sealed
    before.
    """

    name: str
    digest: str
    generation: int
    rows: int
    labelled: int
    shards: int
    label_bytes: int
    seconds: float
    retained_mass: dict[str, dict[str, float]]
    repaired: tuple[int, ...] = ()
    reproduced: bool = True

    def __str__(self) -> str:
        rate = f"{self.labelled:,} labelled now in {self.seconds:.1f} s" if self.labelled else "nothing left to label"
        lines = [
            f"{self.name}: {self.rows:,} rows in {counted(self.shards, 'shard')}, {size(self.label_bytes)}; {rate}",
            f"digest      {self.digest} (generation {self.generation})",
        ]
        if self.repaired:
            outcome = "the same bytes again" if self.reproduced else "other bytes, so this is a new generation"
            lines.append(f"repaired    shards {shown(self.repaired)}: {outcome}")
        lines += retained_lines(self.retained_mass)
        return "\n".join(lines)


def precompute(request: Request, reporter: Reporter | None = None, *, files: Files | None = None) -> Summary:
    """Label what is not labelled yet, and seal the label set. ``files`` is for tests that inject faults.

    Raises:
        LogitcacheError: as `preparation.prepare` and `storage.writer.LabelSetWriter` do, before any work.
        DatasetChanged: an example that is labelled already is another one now; it is named.
        TeacherFault, DatasetFault: user code failed on the way.
        DiskFull: too little space for what is missing, or none left on the way.
    """
    reporter = reporter or Silent()
    prepared = prepare(request)
    layout, path = prepared.layout, request.path
    # Before anything is made: a refused run leaves nothing behind.
    check_space(path, layout, prepared.missing())
    with LabelSetWriter(
        path, layout.identity, layout.examples, rows_per_shard=layout.rows_per_shard, files=files
    ) as writer:
        for problem in writer.quarantined.values():
            reporter.note(f"damaged: {problem}; moved to {path / 'quarantine'}, it will be labelled again")
        sealed, missing = writer.generation, writer.missing
        _check_labelled(prepared, writer, reporter)
        check_space(path, layout, missing)
        if missing:
            _note_settings(prepared, reporter)
        labelled, seconds = _label_missing(prepared, writer, reporter)
        generation = writer.seal()
    return Summary(
        name=request.name,
        digest=generation.digest,
        generation=generation.number,
        rows=layout.examples,
        labelled=labelled,
        shards=layout.shards,
        label_bytes=layout.shards * layout.shard_bytes,
        seconds=seconds,
        retained_mass=summed([read_retained(Places(path), shard) for shard in range(layout.shards)]),
        repaired=tuple(missing) if sealed else tuple(writer.quarantined),
        reproduced=sealed is None or sealed == generation,
    )


def _check_labelled(prepared: Prepared, writer: LabelSetWriter, reporter: Reporter) -> None:
    """Compare every labelled example with the dataset as it is now."""
    if not writer.committed:
        return
    spans = {shard: prepared.layout.span(shard) for shard in writer.committed}
    reporter.begin("checking what is labelled", sum(map(len, spans.values())))
    for shard, span in spans.items():
        stored = writer.stored(shard, "fingerprint")[:, 0]
        found = prepared.examples.fingerprints(span, prepared.request.loader_workers)
        changed = (np.flatnonzero(stored != found) + span.start).tolist()
        if changed:
            raise DatasetChanged(
                f"{len(changed):,} of the {len(span):,} examples of shard {shard} are not those that were labelled "
                f"({shown(changed)}): the dataset was re-ordered or changed. "
                "Nothing was changed: restore its order, or label it "
                "under another name",
                ids=changed,
            )
        reporter.advance(len(span))


def _note_settings(prepared: Prepared, reporter: Reporter) -> None:
    recorded = prepared.recorded_batch_size
    if recorded is not None and recorded != prepared.batch_size:
        reporter.note(
            f"batch size {prepared.batch_size} is not the {recorded} of the shards already labelled: "
            "rows may differ from theirs in the last bits"
        )


def _label_missing(prepared: Prepared, writer: LabelSetWriter, reporter: Reporter) -> tuple[int, float]:
    """Label and commit the missing shards in order; rows labelled, and seconds."""
    missing = writer.missing
    rows = sum(len(prepared.layout.span(shard)) for shard in missing)
    began = time.perf_counter()
    if missing:
        reporter.begin(f"labelling {prepared.request.name}", rows)
    batches = _batches(prepared, missing)
    try:
        for shard in missing:
            _label_shard(prepared, writer, shard, batches, reporter)
        return rows, time.perf_counter() - began
    except BaseException as error:
        done, total = len(writer.committed), prepared.layout.shards
        reporter.note(f"stopped: {done:,} of {total:,} shards are committed and kept; the same command continues")
        if death := worker_death(error):
            raise death from error
        raise
    finally:
        batches.close()


def _batches(prepared: Prepared, shards: list[int]) -> Generator[Batch, None, None]:
    lists = list(chain.from_iterable(prepared.batches_of(shard) for shard in shards))
    return prepared.examples.batches(lists, prepared.request.loader_workers)


def _label_shard(
    prepared: Prepared, writer: LabelSetWriter, shard: int, batches: Iterator[Batch], reporter: Reporter
) -> None:
    began = time.perf_counter()
    ids: list[np.ndarray] = []
    hashes: list[np.ndarray] = []
    selected: list[Rows] = []
    for _ in prepared.batches_of(shard):
        batch = next(batches)
        selected.append(prepared.label(batch))
        # The inputs must go: a shard of them may be gigabytes.
        ids.append(batch.ids)
        hashes.append(batch.fingerprints)
        reporter.advance(len(batch.ids))
    rows = Rows(
        *(np.concatenate([getattr(part, name) for part in selected]) for name in ("indices", "logits", "scalars"))
    )
    fingerprints = np.concatenate(hashes)
    arrays = {
        "ids": np.concatenate(ids),
        "fingerprint": fingerprints[:, None],
        "indices": rows.indices,
        "logits": rows.logits,
        "scalars": rows.scalars,
    }
    statistics = {
        "retained_mass": retained_mass(soft_labels(rows, fingerprints, prepared.layout)),
        "seconds": time.perf_counter() - began,
        "run": _run_settings(prepared),
    }
    writer.commit(shard, arrays, statistics)


def _run_settings(prepared: Prepared) -> dict[str, Any]:
    """What rows depend on in their last bits; byte equality is promised only with all of these equal."""
    return {
        "batch_size": prepared.batch_size,
        "device": str(prepared.teacher.device),
        "teacher_dtype": prepared.teacher.dtype,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
