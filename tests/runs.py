"""Runs to record, made from the dense reference: their rows batch by batch, and their label set written directly."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tests.building import Reference, reference, statistics_of

from logitcache.labels.identity import Identity
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.recorded import RecordedRows, RecordingTerms, Who
from logitcache.labels.soft_labels import SoftLabels, splits_of
from logitcache.storage.layout import Layout
from logitcache.storage.packing import default_rows_per_shard
from logitcache.storage.recording import Recording
from logitcache.storage.writer import LabelSetWriter

STEPS = range(5, 105)

RANK_0 = Who(0, 1)


@dataclass(frozen=True)
class Run:
    """What a run records. A place is one view of an example; ``source`` has an example for each place.

    Attributes:
        terms: of the recording.
        ids: of the examples, where they are not their ordinals.
        source: the rows.
    """

    terms: RecordingTerms
    ids: Ids | None
    source: Reference

    @property
    def identity(self) -> Identity:
        return self.terms.identity

    @property
    def places(self) -> np.ndarray:
        """All places, in their order."""
        return np.arange(self.terms.examples * self.identity.views)

    @cached_property
    def keys(self) -> Ids:
        """The id of each example."""
        return Ids(np.arange(self.terms.examples)) if self.ids is None else self.ids

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """What is stored of all places."""
        return self.source.arrays(range(len(self.places)))

    def ids_of(self, examples: Any) -> list[Any]:
        """Ids of these examples."""
        return [self.keys.at([example])[0] for example in np.asarray(examples).tolist()]

    def batch(self, places: Iterable[int], *, step: int = STEPS.start, other: int = 0) -> RecordedRows:
        """Rows of these places, given at one step; another ``other`` gives other rows of them."""
        chosen = np.array(list(places), np.int64)
        examples, views = np.divmod(chosen, self.identity.views)
        rows, arrays, tails = self.source.rows(chosen), self.arrays, len(self.identity.temperatures)
        scalars = arrays["scalars"][rows]
        causal: dict[str, Any] = {}
        if self.identity.alignment == "causal":
            causal = {"row_splits": splits_of(self.source.row_counts[chosen]), "tokens": arrays["tokens"][rows]}
        targets: dict[str, Any] = {}
        if self.identity.targets:
            targets = {"target": arrays["target"][rows], "target_logit": np.ascontiguousarray(scalars[:, -1])}
        soft = SoftLabels(
            indices=arrays["indices"][rows],
            logits=arrays["logits"][rows],
            logit_max=scalars[:, 0] + np.float32(other),
            tail_logsumexp=np.ascontiguousarray(scalars[:, 1 : 1 + tails]),
            fingerprint=arrays["fingerprint"][chosen, 0],
            temperatures=self.identity.temperatures,
            **causal,
            **targets,
        )
        texts = None if self.keys.texts is None else [self.keys.texts[example] for example in examples.tolist()]
        return RecordedRows(Ids(self.keys.keys[examples], texts), views, np.full(len(chosen), step), soft)

    def begun(self, path: Path, **options: Any) -> Recording:
        """A recording of it, which its first recorder has begun."""
        recording = Recording(path, self.terms, self.ids, **options)
        recording.begin(Who(0, recording._recorded.sitting(0) + 1))
        return recording

    def record(self, path: Path, *, size: int = 4) -> Path:
        """Record all of it in batches of so many places."""
        with Recording(path, self.terms, self.ids) as recording:
            recording.begin(RANK_0)
            for first in range(0, len(self.places), size):
                recording.append(self.batch(self.places[first : first + size]), RANK_0)
        return path

    def written(self, path: Path, examples: range | None = None, **changes: Any) -> Path:
        """Its label set as `LabelSetWriter` writes it: of some first examples, or of all of them."""
        views, count = self.identity.views, self.terms.examples if examples is None else len(examples)
        identity = replace(self.identity, **changes)
        if identity.alignment == "causal":
            counts = self.source.row_counts[:count]
            layout = Layout.causal(identity, counts, default_rows_per_shard(int(counts.sum()), int(counts.max())))
        else:
            layout = Layout.pointwise(identity, count, default_rows_per_shard(count * views, views=views))
        with LabelSetWriter(path, layout) as writer:
            for shard in writer.missing:
                span = layout.span(shard)
                arrays = self.source.arrays(range(span.start * views, span.stop * views))
                arrays["ids"] = self.keys.keys[span.start : span.stop]
                statistics = statistics_of(arrays, identity)
                arrays["fingerprint"] = arrays["fingerprint"].reshape(-1, views)
                texts = None if self.keys.texts is None else list(self.keys.texts[span.start : span.stop])
                writer.commit(shard, arrays, statistics, texts)
            writer.seal()
        return path


def run_of(source: Reference, *, views: int = 1, recorders: int = 1) -> Run:
    """A run that records this reference; with several views, so many rows of it are those of one example."""
    examples = len(source.row_counts) // views
    identity = replace(source.identity, views=views, seed=7 if views > 1 else 0)
    ids = None if identity.ids == "ordinal" else as_ids(list(source.ids[:examples]))
    return Run(RecordingTerms(identity, STEPS, examples, recorders), ids, source)


def small_run(examples: int = 6, *, views: int = 1, recorders: int = 1, **options: Any) -> Run:
    """A run over a few examples; causal ones have at most 5 rows."""
    if options.get("alignment") == "causal":
        whole = reference(1, short_by=4096 - 5 * examples - 5, longest=5, **options)
        rows = int(whole.first_rows[examples])
        source = replace(
            whole,
            logits=whole.logits[:rows],
            row_counts=whole.row_counts[:examples],
            ids=whole.ids[:examples],
            targets=whole.targets[:rows],
        )
    else:
        source = reference(1, short_by=4096 - examples * views, **options)
    return run_of(source, views=views, recorders=recorders)


RUNS: dict[str, dict[str, Any]] = {
    "pointwise": {},
    "pointwise, integers, targets": {"ids": "integer", "targets": True},
    "three views, texts": {"ids": "text", "views": 3},
    "causal": {"alignment": "causal"},
    "causal, texts, targets": {"alignment": "causal", "ids": "text", "targets": True},
}
"""Options of `small_run` for one of each kind."""
