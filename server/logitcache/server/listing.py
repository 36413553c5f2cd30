"""Label sets as text for a terminal: the table of ``logitcache ls`` and the page of ``logitcache info``.

Pure functions of descriptions; knows nothing of stores or of click.
"""

import time
from collections.abc import Iterable, Sequence

from logitcache.labels.identity import Identity
from logitcache.labels.label_set import Description, Sealed
from logitcache.server.wording import counted, size

HEADINGS = (
    "NAME",
    "EXAMPLES",
    "LABELLED",
    "ROWS",
    "ALIGNMENT",
    "IDS",
    "TOP-K",
    "CLASSES",
    "SIZE",
    "TEACHER",
    "DIGEST",
)
_LEFT = frozenset({"NAME", "SCOPE", "MADE", "ALIGNMENT", "IDS", "TEACHER", "DIGEST"})

_ALIGNMENTS = {"pointwise": "pointwise: a row an example", "causal": "causal: a row a token"}
_IDS = {"ordinal": "the examples' ordinals", "integer": "whole numbers of the dataset", "text": "texts"}


def _views(identity: Identity) -> str:
    if not identity.seed:
        return "none: inputs as the dataset gives them"
    return f"{identity.views:,} of each example, a row each, from seed {identity.seed}"


def table(descriptions: Iterable[Description]) -> str:
    """One aligned line a label set, under headings."""
    return _aligned([HEADINGS, *(_cells(description) for description in descriptions)])


def keys_table(keys: Iterable[tuple[str, str, float]]) -> str:
    """One aligned line a key: its name, scope, and when it was made, in seconds since the epoch."""
    told = [(name, scope, time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(made))) for name, scope, made in keys]
    return _aligned([("NAME", "SCOPE", "MADE"), *told])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    headings = rows[0]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths, headings) for row in rows)


def _cells(description: Description) -> tuple[str, ...]:
    identity = description.identity
    return (
        description.name,
        f"{description.examples:,}",
        labelled(description),
        f"{description.rows:,}",
        identity.alignment,
        identity.ids,
        str(identity.k),
        f"{identity.classes:,}",
        size(description.label_bytes),
        identity.teacher.name,
        short_digest(description.digest),
    )


def _line(row: Sequence[str], widths: Sequence[int], headings: Sequence[str]) -> str:
    cells = (
        text.ljust(width) if heading in _LEFT else text.rjust(width)
        for text, width, heading in zip(row, widths, headings, strict=True)
    )
    return "  ".join(cells).rstrip()


def page(description: Description) -> str:
    """Everything about one label set, a line a fact."""
    identity, shards = description.identity, description.shards
    facts = {
        "name": description.name,
        "digest": description.digest or _unfinished(description),
        "generation": "none yet" if description.generation is None else str(description.generation),
        **{f"generation {each.number}": _generation(each) for each in description.generations[:-1]},
        "teacher": identity.teacher.name,
        "weights": identity.teacher.weights,
        "preprocessing": identity.teacher.preprocessing or "not told",
        "examples": f"{description.examples:,}",
        "labelled": f"{description.labelled:,} ({labelled(description)})",
        "ids": _IDS[identity.ids],
        "rows": f"{description.rows:,} labelled; {_ALIGNMENTS[identity.alignment]}",
        "views": _views(identity),
        "targets": "stored, with their logits" if identity.targets else "not stored",
        "stored": f"top {identity.k} of {identity.classes:,} classes as {identity.dtype}",
        "temperatures": ", ".join(f"{value:g}" for value in identity.temperatures),
        "shards": f"{shards.committed:,} of {shards.total:,} committed, {shards.damaged:,} damaged",
        "size": size(description.label_bytes),
        "a fetch": _limits(description),
        "teacher time": _teacher_time(description),
    }
    if (bill := description.bill) is not None:
        facts["bill"] = str(bill) if bill.served else f"{bill}; no rows were served yet"
    for temperature, mass in description.retained_mass.items():
        facts[f"retained at T={temperature}"] = f"{mass['mean']:.4%} on average, {mass['min']:.4%} at least"
    width = max(map(len, facts))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in facts.items())


def _generation(sealed: Sealed) -> str:
    return f"{sealed.digest}, {counted(sealed.examples, 'example')}"


def _unfinished(description: Description) -> str:
    if not description.shards.total:
        return "none yet: it is being recorded"
    return "none yet: run its precompute again to finish it"


def _teacher_time(description: Description) -> str:
    spent = description.teacher_time
    if spent is None:
        return "not recorded"
    return str(spent) if spent.rows == description.rows else f"{spent}; not recorded of the other rows"


def _limits(description: Description) -> str:
    limits, spec = description.limits, description.row_spec
    most = f"at most {limits.examples_a_fetch(spec):,} examples"
    return f"{most}, and {limits.response_bytes // spec.row_bytes:,} rows" if spec.ragged else most


def labelled(description: Description) -> str:
    """How much of a label set is labelled, as a percentage that says 100 % only when all is."""
    if description.labelled == description.examples:
        return "100%"
    return f"{int(1000 * description.labelled / description.examples) / 10:.1f}%"


def short_digest(digest: str | None) -> str:
    """Enough of a digest to tell two apart at a glance."""
    return "unfinished" if digest is None else digest[:19]
