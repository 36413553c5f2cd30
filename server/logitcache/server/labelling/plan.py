"""The plan: what a precompute would cost, before anything is written."""

import time
from dataclasses import dataclass

import numpy as np

from logitcache.labels.identity import Identity
from logitcache.labels.soft_labels import SoftLabels, temperature_name
from logitcache.server.labelling.preparation import Prepared, Request, prepare
from logitcache.server.labelling.shard_arrays import label, soft_labels
from logitcache.server.labelling.space import free_bytes, needed_bytes
from logitcache.server.progress import Reporter
from logitcache.server.wording import counted, duration, extent, retained_lines, size
from logitcache.storage.statistics import retained_mass, summed

TRIAL_BATCHES = 3
"""Batches that a trial labels; the first one warms up and is not timed."""


@dataclass(frozen=True)
class Plan:
    """What a precompute would do; ``str`` of it is what ``--plan`` prints. Nothing was written.

    ``appended`` are the examples that the dataset has more than the label set was begun over.
    """

    name: str
    identity: Identity
    examples: int
    rows: int
    shards: int
    missing: int
    rows_per_shard: int
    missing_rows: int
    appended: int
    needed_bytes: int
    free_bytes: int
    device: str
    batch_size: int
    read_s_per_row: float
    label_s_per_row: float
    retained_mass: dict[str, dict[str, float]]

    @property
    def seconds(self) -> float:
        """Estimated time for what is missing."""
        return self.missing_rows * (self.read_s_per_row + self.label_s_per_row)

    def __str__(self) -> str:
        identity = self.identity
        temperatures = ", ".join(map(temperature_name, identity.temperatures))
        causal = identity.alignment == "causal"
        unit, units = ("token", "tokens") if causal else ("row", "rows")
        targets = ", and targets" if identity.targets else ""
        lines = [
            f"{self.name}: {self.missing_rows:,} of {self.rows:,} {units} to label, "
            f"in {self.missing:,} of {counted(self.shards, 'shard')} of up to {self.rows_per_shard:,}",
            f"dataset     {extent(self.examples, self.rows, unit)}, "
            + (f"{self.appended:,} of them appended, " if self.appended else "")
            + f"with {_ID_WORDS[identity.ids]}",
            f"teacher     {identity.teacher.name}, {identity.classes:,} classes, on {self.device}",
            f"stored      top {identity.k} as {identity.dtype}, temperatures {temperatures}{targets}",
            f"disk        {size(self.needed_bytes)} needed, {size(self.free_bytes)} free",
            f"time        about {duration(self.seconds)} at batches of {self.batch_size} "
            f"({1 / max(self.read_s_per_row + self.label_s_per_row, 1e-12):,.0f} {units}/s: "
            f"reading {self.read_s_per_row * 1e3:.3g} ms, labelling {self.label_s_per_row * 1e3:.3g} ms a {unit})",
            *retained_lines(self.retained_mass),
        ]
        return "\n".join(lines)


_ID_WORDS = {"ordinal": "its order as ids", "integer": "whole numbers of its own as ids", "text": "texts as ids"}


def plan(request: Request, reporter: Reporter | None = None) -> Plan:
    """Size and time of a precompute, from a trial of a few batches; refuses what `prepare` refuses.

    Raises:
        LogitcacheError: as `preparation.prepare`.
    """
    prepared = prepare(request, reporter)
    layout, missing = prepared.layout, prepared.missing()
    trial = try_out(prepared)
    return Plan(
        name=request.name,
        identity=layout.identity,
        examples=layout.examples,
        rows=layout.rows,
        shards=layout.shards,
        missing=len(missing),
        rows_per_shard=layout.rows_per_shard,
        missing_rows=sum(layout.shard_rows[shard] for shard in missing),
        appended=layout.examples - prepared.labelled if prepared.labelled else 0,
        needed_bytes=needed_bytes(layout, missing),
        free_bytes=free_bytes(request.store),
        device=str(prepared.teacher.device),
        batch_size=prepared.batch_size,
        read_s_per_row=trial.read_s,
        label_s_per_row=trial.label_s,
        retained_mass=summed([{name: _triple(entry) for name, entry in retained_mass(trial.rows).items()}]),
    )


def _triple(entry: dict[str, float]) -> tuple[int, float, float]:
    return int(entry["rows"]), entry["sum"], entry["min"]


@dataclass(frozen=True)
class Trial:
    """A few batches labelled and thrown away: seconds a row of reading and of labelling, and the last batch's rows."""

    rows: SoftLabels
    read_s: float
    label_s: float


def try_out(prepared: Prepared) -> Trial:
    """Label a few batches of the first missing shard, and time it; of token sequences, short and long ones."""
    whole = prepared.batches_of((prepared.missing() or [0])[0])
    chosen = np.unique(np.linspace(0, len(whole) - 1, TRIAL_BATCHES).astype(int)).tolist()
    lists = [whole[at] for at in chosen]
    began, read_s, label_s, timed = time.perf_counter(), 0.0, 0.0, 0
    for number, batch in enumerate(prepared.examples.batches(lists)):
        read = time.perf_counter()
        rows = label(prepared.teacher, batch, prepared.layout).rows()
        done = time.perf_counter()
        if number or len(lists) == 1:
            read_s, label_s, timed = read_s + read - began, label_s + done - read, timed + batch.rows
        began = done
    return Trial(soft_labels(rows, batch.fingerprints, prepared.layout, batch.lengths), read_s / timed, label_s / timed)
