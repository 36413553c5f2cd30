"""What a run records of its own logits: who records, and rows on their way to the log of a label set.

The rows are those of `soft_labels.SoftLabels`; with them go the ids of their examples and the optimizer's step at which
each was given. It knows the wire's bytes and no files.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int64

from logitcache.labels import wire
from logitcache.labels.errors import InvalidIds, InvalidRequest, MalformedMessage, ShapeMismatch, TeacherFault, shown
from logitcache.labels.identity import FORMAT_VERSION, Identity, TeacherId
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.label_set import row_spec
from logitcache.labels.soft_labels import RowSpec, SoftLabels, are_splits, concatenate
from logitcache.labels.views import as_views

Mode = Literal["train", "eval"]
"""How the model ran that gave the rows: as ``module.train()`` or as ``module.eval()`` has it."""

MAX_STEP = 2**63 - 1

MAX_RECORDERS = 65_536
"""Most recorders of one run: its ranks."""

MAX_PLACES = 2**31
"""Most examples times views: a reader holds 8 bytes of each."""


def recorder_id(run: str, steps: range, mode: Mode, weights: str, preprocessing: str) -> TeacherId:
    """The teacher id of what a run records: which run, at which steps, with which weights, in which mode.

    Args:
        run: its name.
        steps: the steps of the optimizer at which it records.
        mode: how the model runs.
        weights: what they are: ``"moving"`` while they are trained, else the digest or name of a checkpoint.
        preprocessing: what was done to inputs before the model saw them, as of any teacher.

    Raises:
        InvalidRequest: a run without a name, a mode that is unknown, steps that are no rising range.
    """
    if not (isinstance(run, str) and run.strip() and isinstance(weights, str) and weights.strip()):
        raise InvalidRequest(f"run={run!r:.60} and weights={weights!r:.60} are texts, and say who recorded")
    if mode not in get_args(Mode):
        raise InvalidRequest(f"mode={mode!r:.40} is not known: the model runs in 'train' or in 'eval' mode")
    if not isinstance(steps, range) or steps.step != 1 or not steps or steps.start < 0 or steps.stop - 1 > MAX_STEP:
        raise InvalidRequest(f"steps={steps!r:.60} is no range of steps: give range(first, last + 1)")
    return TeacherId(run, f"{weights}; steps {steps.start} to {steps.stop - 1}; {mode} mode", preprocessing)


@dataclass(frozen=True)
class RecordingTerms:
    """What a recording is begun with, and must be continued with.

    Attributes:
        identity: of the label set; its teacher is the recorder, see `recorder_id`.
        steps: at which rows may be recorded.
        examples: how many the label set has when all are recorded.
        recorders: how many record together, such as the ranks of one run; it is sealed when all of them have finished.
    """

    identity: Identity
    steps: range
    examples: int
    recorders: int = 1

    def to_json(self) -> dict[str, Any]:
        """The terms as JSON values."""
        return {
            "identity": self.identity.to_json(),
            "steps": [self.steps.start, self.steps.stop],
            "examples": self.examples,
            "recorders": self.recorders,
        }

    @classmethod
    def from_json(cls, value: Any) -> "RecordingTerms":
        """Read what `to_json` gave.

        Raises:
            ValueError: it is something else, or out of bounds; nothing was allocated.
        """
        if not isinstance(value, dict) or set(value) != {"identity", "steps", "examples", "recorders"}:
            raise ValueError("the terms of a recording are identity, steps, examples and recorders")
        if not isinstance(value["steps"], list) or len(value["steps"]) != 2:
            raise ValueError("steps are the first one and the one beyond the last")
        first, beyond = value["steps"]
        numbers = (first, beyond, value["examples"], value["recorders"])
        if any(type(number) is not int for number in numbers):
            raise ValueError("steps, examples and recorders are whole numbers")
        if not 0 <= first < beyond <= MAX_STEP + 1 or value["examples"] < 1:
            raise ValueError(f"steps {first} to {beyond} or {value['examples']} examples are out of bounds")
        if not 1 <= value["recorders"] <= MAX_RECORDERS:
            raise ValueError(f"{value['recorders']} recorders are not 1 to {MAX_RECORDERS}")
        identity = Identity.from_json(value["identity"])
        if identity.format_version != FORMAT_VERSION:
            raise ValueError(f"format_version={identity.format_version!s:.40} is not {FORMAT_VERSION}")
        if value["examples"] * identity.views > MAX_PLACES:
            raise ValueError(
                f"{value['examples']} examples of {identity.views} views are more than {MAX_PLACES:,} rows"
            )
        return cls(identity, range(first, beyond), value["examples"], value["recorders"])

    def differences(self, other: "RecordingTerms") -> dict[str, tuple[Any, Any]]:
        """What is another in other terms, with both values."""
        found = self.identity.differences(other.identity)
        for name in ("steps", "examples", "recorders"):
            if (mine := getattr(self, name)) != (theirs := getattr(other, name)):
                found[name] = (mine, theirs)
        return found


@dataclass(frozen=True)
class Who:
    """One of the recorders of a recording: its number among them, and what tells its sittings apart.

    A recorder that begins anew after it was killed has a larger ``sitting``; the one before is heard no more.
    """

    rank: int
    sitting: int


@dataclass(frozen=True)
class Stand:
    """How a recording stands.

    ``recorded`` are the examples of which every view is, ``missing`` the ids of some of the others once a recorder has
    finished; ``finished`` are the ranks that have. ``digest`` is there when it is sealed, and it is ``sealing`` while
    its shards are written.
    """

    examples: int
    recorded: int
    rows: int
    finished: tuple[int, ...] = ()
    sealing: bool = False
    missing: tuple[int | str, ...] = ()
    digest: str | None = None

    @classmethod
    def from_json(cls, value: Any) -> "Stand":
        """Read what ``dataclasses.asdict`` of one gave, as JSON.

        Raises:
            MalformedMessage: it is something else.
        """
        try:
            counts = {name: value[name] for name in ("examples", "recorded", "rows")}
            finished, missing = tuple(value["finished"]), tuple(value["missing"])
            sealing, digest = value["sealing"], value["digest"]
        except (KeyError, TypeError) as error:
            raise MalformedMessage(f"this is not how a recording stands: {error}") from None
        whole = all(type(number) is int and number >= 0 for number in (*counts.values(), *finished))
        whole = whole and all(type(id) in (int, str) for id in missing)
        if not whole or type(sealing) is not bool or not isinstance(digest, str | None):
            raise MalformedMessage("this is not how a recording stands")
        return cls(**counts, finished=finished, sealing=sealing, missing=missing, digest=digest)


@dataclass(frozen=True)
class RecordedRows:
    """Rows of some examples.

    Attributes:
        ids: (examples,) whose rows they are; an example may stand there several times.
        views: (examples,) which view each is of.
        steps: (examples,) at which step of the optimizer the model gave them.
        soft: the rows. A fingerprint of 0 says that nobody told what the model was shown.
    """

    ids: Ids
    views: Int64[np.ndarray, " examples"]
    steps: Int64[np.ndarray, " examples"]
    soft: SoftLabels

    def __len__(self) -> int:
        return len(self.ids)

    def encode(self, who: Who) -> bytes:
        """The body that carries them."""
        arrays = {"ids": self.ids.keys, "view": self.views, "step": self.steps, **self.soft.arrays()}
        metadata = wire.row_metadata(self.soft.temperatures, None)
        return wire.encode(arrays, metadata | {"rank": str(who.rank), "sitting": str(who.sitting)})

    @classmethod
    def decode(cls, body: bytes | memoryview) -> tuple["RecordedRows", Who]:
        """What `encode` gave; the arrays are views of the body.

        Raises:
            MalformedMessage: it is something else.
            InvalidIds: ids cannot be any.
        """
        arrays, metadata = wire.parse(body)
        try:
            ids, views, steps = (arrays.pop(name) for name in ("ids", "view", "step"))
            who = Who(_whole(metadata["rank"]), _whole(metadata["sitting"]))
        except (KeyError, ValueError) as error:
            raise MalformedMessage(f"the body does not hold recorded rows: {error}") from None
        soft = wire.rows_of(arrays, metadata)
        if any(array.dtype != np.int64 or array.shape != (soft.examples,) for array in (views, steps)):
            raise MalformedMessage("the body does not hold recorded rows: view and step are int64, one an example")
        if ids.dtype == np.uint64 and ids.shape == (soft.examples, 2):
            return cls(Ids(ids), views, steps, soft), who
        if ids.dtype != np.int64 or ids.shape != (soft.examples,):
            raise InvalidIds("ids are int64, or uint64 (examples, 2) for the keys of texts, one an example")
        return cls(as_ids(ids), views, steps, soft), who


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"{text[:40]!r} is no whole number")
    return int(text)


def check_recorded(rows: RecordedRows, terms: RecordingTerms, name: str) -> None:
    """Refuse rows that this recording cannot hold, or that are no distributions.

    Raises:
        ShapeMismatch: they have another shape or dtype than the label set's rows; or rows that are not those of their
            examples.
        TeacherFault: a row of NaN or +inf, or that is not sorted by falling logit from 0; its example is named.
        UnknownView: a view that the label set has not.
        InvalidRequest: a step outside of those recorded, a class beyond the teacher's, one class twice in a row.
    """
    spec, soft, identity = row_spec(terms.identity), rows.soft, terms.identity
    _check_shapes(soft, spec, len(rows.ids), name)
    as_views(rows.views, rows.ids, identity.views, name)
    if rows.steps.dtype != np.int64 or rows.steps.shape != (len(rows.ids),):
        raise ShapeMismatch(
            f"steps are {rows.steps.dtype} {list(rows.steps.shape)} for {len(rows.ids):,} ids: give int64, one an id"
        )
    outside = (rows.steps < terms.steps.start) | (rows.steps >= terms.steps.stop)
    if outside.any():
        raise InvalidRequest(
            f"step {int(rows.steps[outside][0]):,} is none of those that {name!r} records "
            f"({terms.steps.start:,} to {terms.steps.stop - 1:,}): a recording says which steps it is of"
        )
    for problem, wrong in _faults(soft, identity.classes).items():
        if wrong.any():
            at = np.flatnonzero(wrong)
            examples = at if soft.row_splits is None else np.searchsorted(soft.row_splits, at, side="right") - 1
            ids = rows.ids.at(np.unique(examples))
            raise TeacherFault(
                f"rows of {len(ids):,} examples cannot be recorded: {problem} (ids: {shown(ids)}); "
                "nothing of this batch was recorded",
                ids=ids,
            )


def _check_shapes(soft: SoftLabels, spec: RowSpec, examples: int, name: str) -> None:
    expected = spec.fields(len(soft), examples)
    found = {field: (array.dtype.name, array.shape) for field, array in soft.arrays().items()}
    if soft.temperatures != spec.temperatures:
        raise ShapeMismatch(f"{name!r} has temperatures {spec.temperatures}, these rows have {soft.temperatures}")
    if found != expected:
        wrong = sorted(field for field in found.keys() | expected.keys() if found.get(field) != expected.get(field))
        told = "; ".join(
            f"{field} is {_shape(found.get(field))} and should be {_shape(expected.get(field))}" for field in wrong
        )
        raise ShapeMismatch(f"these are not rows of {name!r}: {told}")
    if soft.row_splits is None:
        if len(soft) != examples:
            raise ShapeMismatch(f"{len(soft):,} rows were given for {examples:,} ids: one an id is needed")
        return
    splits = soft.row_splits
    if not are_splits(splits, len(soft)) or (splits[1:] == splits[:-1]).any():
        raise ShapeMismatch(f"row_splits do not split {len(soft):,} rows into those of examples, at least one each")


def _shape(field: tuple[str, tuple[int, ...]] | None) -> str:
    return "absent" if field is None else f"{field[0]} {list(field[1])}"


def _faults(soft: SoftLabels, classes: int) -> dict[str, np.ndarray]:
    """What can be wrong with a row, and of which rows it is."""
    logits = soft.logits.astype(np.float32, copy=False)
    ordered = np.sort(soft.indices, axis=1)
    faults = {
        "they hold NaN or +inf, or nothing but -inf": ~np.isfinite(soft.logit_max),
        "their logits are not centred, the first 0 and the others falling": (
            (logits[:, 0] != 0) | ~(logits[:, 1:] <= logits[:, :-1]).all(axis=1)
        ),
        "their tail_logsumexp is NaN or +inf": ~(soft.tail_logsumexp < np.inf).all(axis=1),
        f"they hold a class beyond the {classes:,} of this label set": (soft.indices >= classes).any(axis=1),
        "they hold a class twice": (ordered[:, 1:] == ordered[:, :-1]).any(axis=1),
    }
    if soft.target is not None and soft.target_logit is not None:
        faults["their target is none of the classes"] = (soft.target < -1) | (soft.target >= classes)
        faults["their target_logit is not that of their target"] = np.where(
            soft.target < 0, ~np.isnan(soft.target_logit), ~(soft.target_logit <= 0)
        )
    return faults


def together(parts: list[RecordedRows]) -> RecordedRows:
    """Rows of several batches of one recording, one after the other."""
    if len(parts) == 1:
        return parts[0]
    ids = Ids(np.concatenate([part.ids.keys for part in parts]))
    views, steps = (np.concatenate([getattr(part, name) for part in parts]) for name in ("views", "steps"))
    return replace(parts[0], ids=ids, views=views, steps=steps, soft=concatenate([part.soft for part in parts]))
