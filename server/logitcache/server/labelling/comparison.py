"""Comparing what is labelled with the dataset as it is now: the same examples, or a refusal that names the others.

Token sequences were read before, so their facts are at hand; other datasets are read once more. Nothing is written.
"""

from collections.abc import Sequence

import numpy as np

from logitcache.server.labelling.items import Kind
from logitcache.server.labelling.preparation import Prepared
from logitcache.server.labelling.survey import Facts, facts_dtype, refuse_changed, refuse_repeated, targets_hash
from logitcache.server.progress import Reporter
from logitcache.storage.terms import refuse_other_lengths
from logitcache.storage.writer import LabelSetWriter


def check_labelled(prepared: Prepared, writer: LabelSetWriter, reporter: Reporter) -> None:
    """Compare every labelled example with the dataset, and the shards that the label set was planned with.

    Raises:
        DatasetChanged: an example has another input, id or target than it was labelled with, or a shard that is not
            labelled yet would have other rows; the examples are named.
    """
    kind, examples = prepared.examples.kind, prepared.examples
    spans = {shard: writer.layout.span(shard) for shard in writer.committed}
    if spans and prepared.survey is None:
        reporter.begin("checking what is labelled", sum(map(len, spans.values())), "examples")
    for shard, span in spans.items():
        if prepared.survey is None:
            found = examples.facts(span, prepared.request.loader_workers, reporter.advance)
        else:
            found = prepared.survey[span.start : span.stop]
        refuse_changed(_stored_facts(writer, shard, kind), found, _stored_ids(writer, shard, kind), span, kind)
    if prepared.survey is not None:
        lengths = prepared.survey["length"].astype(np.int64)
        refuse_other_lengths(prepared.request.name, writer.layout, lengths)


def check_appended(prepared: Prepared, writer: LabelSetWriter, reporter: Reporter) -> None:
    """Compare the ids of all examples with each other before the label set grows.

    It grows for good: were a repeated id found later, taking the example out again would be a dataset that shrank. Ids
    of token sequences were compared when their lengths were read; others that are not labelled yet are read for it
    once more.

    Raises:
        DatasetFault: two examples have the same id, or one that is not labelled cannot be read.
    """
    examples, layout = prepared.examples, writer.layout
    new = range(layout.examples, len(examples))
    if not new or prepared.survey is not None or examples.kind.ids == "ordinal":
        return
    unread = [*map(layout.span, writer.missing), new]
    reporter.begin("checking new ids", sum(map(len, unread)), "examples")
    found = [examples.facts(span, prepared.request.loader_workers, reporter.advance)["key"] for span in unread]
    keys = np.concatenate([*(writer.stored(shard, "ids") for shard in writer.committed), *found])
    spans = [*map(layout.span, writer.committed), *unread]
    ordinals = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    refuse_repeated(keys, ordinals, examples.example)


def _stored_facts(writer: LabelSetWriter, shard: int, kind: Kind) -> Facts:
    """What a committed shard was labelled with, as far as it is stored."""
    stored = np.zeros(len(writer.layout.span(shard)), facts_dtype(kind))
    stored["fingerprint"] = writer.stored(shard, "fingerprint")[:, 0]
    if kind.ids != "ordinal":
        stored["key"] = writer.stored(shard, "ids")
    if kind.targets:
        targets = writer.stored(shard, "target")
        views = writer.layout.identity.views
        starts = writer.stored(shard, "row_start") if kind.causal else np.arange(0, len(targets), views)
        of_examples = np.split(targets, starts[1:])
        # Facts are those of the first view, as its fingerprint is.
        first = [one if kind.causal else one[:1] for one in of_examples]
        stored["targets"] = np.array([targets_hash(one) for one in first], np.uint64)
    return stored


def _stored_ids(writer: LabelSetWriter, shard: int, kind: Kind) -> Sequence[int | str]:
    """Ids of a committed shard's examples."""
    if kind.ids == "text":
        return writer.stored_texts(shard)
    ids: list[int | str] = writer.stored(shard, "ids").tolist()
    return ids
