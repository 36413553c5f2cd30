"""What a dataset is known by without its inputs: ids, fingerprints, lengths, a hash of targets; an entry an example.

A dataset of token sequences is read once for it before anything is labelled, since shards are cut by length; of any
dataset it is what tells whether examples that are labelled already are the same ones. It knows no teacher and no files.
"""

from collections.abc import Callable, Sequence

import numpy as np
import xxhash

from logitcache.labels.errors import DatasetChanged, DatasetFault, shown
from logitcache.labels.ids import text_keys
from logitcache.server.labelling.items import Example, Kind
from logitcache.storage.id_index import repeated

Facts = np.ndarray
"""(examples,) entries of `facts_dtype`: 8 bytes an example, up to 44 with text ids, targets and token sequences."""


def facts_dtype(kind: Kind) -> np.dtype[np.void]:
    """Fields of an entry: ``fingerprint``, and where they apply ``key``, ``length`` and ``token`` (the largest),
    ``target`` (the largest) and ``targets`` (a hash of all).
    """
    fields: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]] = [("fingerprint", "u8")]
    if kind.ids != "ordinal":
        fields.append(("key", "u8", (2,)) if kind.ids == "text" else ("key", "i8"))
    if kind.targets:
        fields += [("targets", "u8"), ("target", "i4")]
    if kind.causal:
        fields += [("length", "u4"), ("token", "u4")]
    return np.dtype(fields)


def names(facts: Facts) -> tuple[str, ...]:
    """Fields that these entries have."""
    return facts.dtype.names or ()


def facts_of(examples: Sequence[Example], kind: Kind) -> Facts:
    """The entries of these examples."""
    facts = np.empty(len(examples), facts_dtype(kind))
    facts["fingerprint"] = np.array([example.fingerprint for example in examples], np.uint64)
    if kind.ids != "ordinal":
        facts["key"] = keys_of(examples, kind)
    for entry, example in zip(facts, examples, strict=True):
        if example.targets is not None:
            entry["targets"], entry["target"] = targets_hash(example.targets), example.targets.max()
        if kind.causal:
            entry["length"], entry["token"] = len(example.input), example.input.max()
    return facts


def keys_of(examples: Sequence[Example], kind: Kind) -> np.ndarray:
    """Keys of the ids of these examples, as `labels.ids.Ids` has them."""
    if kind.ids == "text":
        return text_keys(str(example.id) for example in examples)
    return np.array([example.id for example in examples], np.int64)


def targets_hash(targets: np.ndarray) -> int:
    """Hash of the targets of an example's rows, int32; to compare, and never stored."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(targets, np.int32).tobytes())


def alike(facts: Facts, others: Facts) -> np.ndarray:
    """(examples,) bool: which entries are the same in all fields."""
    one, other = (np.ascontiguousarray(each).view(np.uint8).reshape(len(each), -1) for each in (facts, others))
    same: np.ndarray = (one == other).all(1)
    return same


def differing(facts: Facts, others: Facts) -> list[str]:
    """In words, what differs in some of these entries."""
    words = {"fingerprint": "inputs", "key": "ids", "targets": "targets"}
    return [word for field, word in words.items() if field in names(facts) and (facts[field] != others[field]).any()]


def refuse_repeated(
    keys: np.ndarray, ordinals: Sequence[int] | np.ndarray, read: Callable[[int], Example | DatasetFault]
) -> None:
    """Refuse a dataset in which an id is that of two examples.

    Args:
        keys: of some examples.
        ordinals: which examples they are of.
        read: reads an example once more, to tell its id.

    Raises:
        DatasetFault: one is; both examples are named.
    """
    pairs = repeated(np.ascontiguousarray(keys))
    if pairs:
        one, other = sorted(int(ordinals[at]) for at in pairs[0])
        example = read(other)
        if isinstance(example, DatasetFault):
            raise example
        raise DatasetFault(
            f"examples {one:,} and {other:,} have the same id, {example.id!r:.80}: ids must be different, or labels "
            "would belong to two examples; nothing was changed",
            examples=[one, other],
        )


def refuse_beyond(
    facts: Facts, ordinals: Sequence[int], kind: Kind, classes: int, read: Callable[[int], Example | DatasetFault]
) -> None:
    """Refuse tokens and targets that are none of the teacher's classes.

    Args:
        facts: entries of some examples.
        ordinals: which examples they are of.
        kind: the dataset's.
        classes: how many the teacher has.
        read: reads an example once more, to say where in it.

    Raises:
        DatasetFault: an example has one.
    """
    for field in [name for name in ("token", "target") if name in names(facts)]:
        beyond = np.flatnonzero(facts[field] >= classes)
        if len(beyond):
            example = read(ordinals[int(beyond[0])])
            if isinstance(example, DatasetFault):
                raise example
            values = example.input if field == "token" else np.asarray(example.targets)
            row = int((values >= classes).argmax())
            raise beyond_fault(field, int(values[row]), row if kind.causal else None, example.ordinal, classes)


_ADVICE = {"token": "does the tokenizer belong to this teacher?", "target": "--no-targets leaves targets out"}


def beyond_fault(what: str, number: int, row: int | None, ordinal: int, classes: int) -> DatasetFault:
    """What to say of a ``"token"`` or ``"target"`` that is none of the teacher's classes.

    ``row`` is where in a token sequence it is; None where an example has one row.
    """
    # The target of a row is the label of the token after it.
    position = "" if row is None else f" at position {row + (what == 'target'):,}"
    return DatasetFault(
        f"example {ordinal:,} has the {what} {number:,}{position}, the teacher has {classes:,} classes "
        f"(0 to {classes - 1:,}): {_ADVICE[what]}",
        example=ordinal,
    )


def refuse_changed(stored: Facts, found: Facts, ids: Sequence[int | str], span: range, kind: Kind) -> None:
    """Refuse to go on where examples are not those that were labelled.

    Args:
        stored: what a shard was labelled with; only fields that are stored are compared.
        found: the same of the dataset now.
        ids: ids of the stored examples.
        span: their ordinals.
        kind: the dataset's.

    Raises:
        DatasetChanged: some differ; they are named, and stand in ``details`` as ``ids`` and ``ordinals``.
    """
    differs = np.zeros(len(span), bool)
    words = {"fingerprint": "input", "key": "id", "targets": "targets"}
    what = []
    for field, word in words.items():
        if field in names(stored):
            other = stored[field] != found[field]
            other = other.any(1) if other.ndim == 2 else other
            what += [word] if other.any() else []
            differs |= other
    if differs.any():
        at = np.flatnonzero(differs).tolist()
        tokenizer = ", or its tokenizer changed" if kind.causal else ""
        raise DatasetChanged(
            f"{len(at):,} of the {len(span):,} examples {span.start:,} to {span.stop - 1:,} are not those that were "
            f"labelled ({shown([ids[i] for i in at])}; other {' and '.join(what)}): the dataset was re-ordered or "
            f"changed{tokenizer}. Nothing was changed: restore it, or label it under another name",
            ids=[ids[i] for i in at],
            ordinals=[span[i] for i in at],
        )
