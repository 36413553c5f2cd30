"""The plan: what a precompute would cost, before anything is written."""

from dataclasses import dataclass

from logitcache.labels.identity import Identity
from logitcache.labels.soft_labels import temperature_name
from logitcache.server.preparation import Request, prepare
from logitcache.server.space import free_bytes, needed_bytes
from logitcache.server.wording import counted, duration, retained_lines, size
from logitcache.storage.statistics import retained_mass, summed


@dataclass(frozen=True)
class Plan:
    """What a precompute would do; ``str`` of it is what ``--plan`` prints. Nothing was written."""

    name: str
    identity: Identity
    examples: int
    shards: int
    missing: int
    rows_per_shard: int
    missing_rows: int
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
        lines = [
            f"{self.name}: {self.missing_rows:,} of {self.examples:,} rows to label, "
            f"in {self.missing:,} of {counted(self.shards, 'shard')} of up to {self.rows_per_shard:,}",
            f"teacher     {identity.teacher.name}, {identity.classes:,} classes, on {self.device}",
            f"stored      top {identity.k} as {identity.dtype}, temperatures {temperatures}",
            f"disk        {size(self.needed_bytes)} needed, {size(self.free_bytes)} free",
            f"time        about {duration(self.seconds)} at batches of {self.batch_size} "
            f"({1 / max(self.read_s_per_row + self.label_s_per_row, 1e-12):,.0f} rows/s: "
            f"reading {self.read_s_per_row * 1e3:.3g} ms, labelling {self.label_s_per_row * 1e3:.3g} ms a row)",
            *retained_lines(self.retained_mass),
        ]
        return "\n".join(lines)


def plan(request: Request) -> Plan:
    """Size and time of a precompute, from a trial of a few batches; refuses what `prepare` refuses.

    Raises:
        LogitcacheError: as `preparation.prepare`.
    """
    prepared = prepare(request)
    layout, missing = prepared.layout, prepared.missing()
    trial = prepared.trial()
    return Plan(
        name=request.name,
        identity=layout.identity,
        examples=layout.examples,
        shards=layout.shards,
        missing=len(missing),
        rows_per_shard=layout.rows_per_shard,
        missing_rows=sum(len(layout.span(shard)) for shard in missing),
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
