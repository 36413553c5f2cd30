"""`SeveralLabels`: labels of the same examples by several teachers. What `connect` returns for a list of targets.

It checks that the label sets belong together, and decides whom to ask: one teacher a step, all of them, or one an
example. How one label set is read is `label_source`'s to know, how labels come beside batches `attach`'s.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Int64

from logitcache.client.attach import Attachable, ToAttach
from logitcache.client.fetched import FetchedLabels
from logitcache.client.held_inputs import check_one_an_id, on_cpu
from logitcache.client.in_process import InProcess
from logitcache.client.label_source import Labels
from logitcache.client.stats import Stats
from logitcache.labels.derived import derived
from logitcache.labels.errors import Id, InvalidRequest, LabelMismatch, LogitcacheError, shown
from logitcache.labels.ids import Ids, as_ids
from logitcache.labels.label_set import Description
from logitcache.labels.soft_labels import SoftLabels, concatenate

Combine: TypeAlias = Literal["random", "mean", "routed"]
"""``"random"``: one teacher a step of the optimizer, drawn from the seed and the step. ``"mean"``: all of them, for the
mean of their losses. ``"routed"``: one teacher an example."""

Route: TypeAlias = Callable[[Any], Any]
"""From ids, an int64 array or a list of texts, to (ids,) numbers of teachers, counted from 0 in the order of the
targets. It depends on the ids alone."""

COMPARED = 64
"""Examples with ordinals that are compared on connecting: a data set in another order has the same ordinals."""

_ALIKE = ("ids", "classes", "views", "seed", "alignment")
_ALIKE_ROWS = ("k", "dtype", "temperatures", "targets")


class Member(NamedTuple):
    """The labels of one teacher, and where they are, as messages say it."""

    target: str
    labels: Labels


class SeveralLabels(Attachable):
    """The soft labels of several label sets of the same examples. Thread-safe, fork-safe and picklable; made by
    `connect`, which has its arguments.

    `attach` gives with each batch what `fetch` gives. With ``"random"`` all batches of a step are of one teacher, which
    `drawn` tells of the step. A run that resumes at ``first_step`` draws as if it had never stopped. With ``"mean"``
    each batch comes with a tuple, which `distillation_loss` takes as it is.
    """

    def __init__(
        self, members: Sequence[Member], *, combine: Combine, seed: int = 0, route: Route | None = None
    ) -> None:
        self._members, self._combine, self._seed, self._route = tuple(members), combine, seed, route
        self._are_alike = self._is_causal = self._is_augmented = False  # until the descriptions are read
        self._process = InProcess()

    def open(self) -> "SeveralLabels":
        """Read and check the descriptions now, and not at the first use; returns itself."""
        try:
            self._check()
        except BaseException:
            self.close()
            raise
        return self

    @property
    def members(self) -> tuple[Labels, ...]:
        """The labels of each teacher, in the order of the targets."""
        return tuple(member.labels for member in self._members)

    def describe(self) -> tuple[Description, ...]:
        """The label sets as of now, in the order of the targets; their digests are told here."""
        described = []
        for member in self._members:
            with _named(member):
                described.append(member.labels.describe())
        return tuple(described)

    def drawn(self, step: int) -> int:
        """With ``combine="random"``, which teacher is asked at this step of the optimizer: the same on every rank."""
        return derived(self._seed, step) % len(self._members)

    def fetch(
        self,
        ids: Any,
        *,
        step: int | None = None,
        view: Any = 0,
        inputs: Any = None,
        **options: Any,
    ) -> FetchedLabels | tuple[FetchedLabels, ...]:
        """Soft labels of these examples, in the order asked for; duplicates are allowed.

        Args:
            ids: as `Labels.fetch` takes them.
            step: the optimizer's, from which ``"random"`` draws the teacher; the others need none.
            view: as `Labels.fetch` takes it.
            inputs: as `Labels.fetch` takes them. They are checked against what each teacher that is asked was shown.
            options: others of `Labels.fetch`: ``rows``, ``attention_mask``, ``on_missing``.

        Returns:
            With ``"random"`` the labels of the teacher drawn, with ``"mean"`` a tuple with those of each teacher, which
            are asked one after the other. With ``"routed"`` one `FetchedLabels`, its rows each of the example's own
            teacher; it has no digest, because it is of several.

        Raises:
            InvalidRequest: ``"random"`` without a step, or a route that does not name one teacher an example.
            LabelMismatch: also where two teachers were shown other inputs, or have other targets, for the same
                examples; ``error.ids`` names them.
            Others: those of `Labels.fetch`; they say which label set it was, ``error.details["target"]``, too.
        """
        self._check()
        wanted = as_ids(on_cpu(ids))
        if self._combine == "routed":
            return self._routed(wanted, inputs, view, options)
        if self._combine == "mean":
            fetched = tuple(_fetch(member, wanted, view=view, inputs=inputs, **options) for member in self._members)
            self._check_agree(wanted, fetched)
            return fetched
        if step is None:
            raise InvalidRequest("one teacher a step is drawn from the optimizer's step: fetch(ids, step=…)")
        return _fetch(self._members[self.drawn(step)], wanted, view=view, inputs=inputs, **options)

    def missing(self, ids: Any) -> list[Id]:
        """Those of these ids that have no labels of a teacher that would be asked for them, once each, in the order
        given.

        Errors are those of `fetch`.
        """
        if hasattr(ids, "__len__") and len(ids) == 0:
            return []
        self._check()
        wanted = as_ids(on_cpu(ids))
        asked = [(member, wanted) for member in self._members]
        if self._combine == "routed":
            asked = [(member, _at(wanted, at)) for member, at in self._parts(wanted)]
        lacking: set[Id] = set()
        for member, part in asked:
            with _named(member):
                lacking.update(member.labels.missing(part))
        return [id for id in wanted.at(slice(None)) if id in lacking]

    @property
    def stats(self) -> Stats:
        """What fetching has cost in this process so far, from all label sets; `members` have their own, and bills."""
        each = [member.labels.stats for member in self._members]
        counted = ("rows", "bytes", "requests", "retries", "fetch_ms")
        counts = {name: sum(getattr(stats, name) for stats in each) for name in counted}
        return replace(self._here().tally.snapshot(), **counts)

    def close(self) -> None:
        """Give back connections or mappings; arrays that were fetched stay valid."""
        for member in self._members:
            member.labels.close()

    def __enter__(self) -> "SeveralLabels":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"SeveralLabels({', '.join(repr(member.target) for member in self._members)}, combine={self._combine!r})"

    def __reduce__(self) -> Any:
        return _rebuild, (self._members, self._combine, self._seed, self._route)

    def _to_attach(self) -> ToAttach:
        self._check()
        return ToAttach(self.fetch, lambda: self._here().tally, self._is_causal, self._is_augmented, by_step=True)

    def _here(self) -> InProcess:
        if self._process.pid != os.getpid():
            self._process = InProcess(inherited=self._process)
        return self._process

    def _check(self) -> None:
        """Refuse members that do not belong together, before the first use."""
        if self._are_alike:
            return
        first, *others = described = self.describe()
        needs = "be of the same examples and classes"
        if self._combine == "routed":
            needs += ", and to be routed have rows of one form"
        for member, other in zip(self._members[1:], others, strict=True):
            for field, mine, theirs in _differences(first, other, rows=self._combine == "routed"):
                raise InvalidRequest(
                    f"label sets of several teachers must {needs}: {field} is {mine} in "
                    f"{self._members[0].target} and {theirs} in {member.target}",
                    field=field,
                    targets=[self._members[0].target, member.target],
                    values=[mine, theirs],
                )
        if self._combine == "routed" and first.row_spec.ragged:
            raise InvalidRequest(
                "examples of causal label sets cannot be routed, only those of pointwise ones: use combine='random' or "
                "'mean', or connect to each label set"
            )
        if first.identity.ids == "ordinal" and all(each.labelled for each in described):
            ordinals = np.unique(np.linspace(0, first.examples - 1, COMPARED).astype(np.int64))
            self._check_agree(as_ids(ordinals), [_look(member, ordinals) for member in self._members])
        self._is_causal, self._is_augmented = first.row_spec.ragged, first.identity.seed != 0
        self._are_alike = True

    def _check_agree(self, ids: Ids, fetched: Sequence[SoftLabels]) -> None:
        """Refuse labels of other inputs or targets than the first teacher's.

        Examples that one lacks are passed over. The targets of causal rows are tokens, which the fingerprint holds.
        """
        first = fetched[0]
        for member, soft in zip(self._members[1:], fetched[1:], strict=True):
            both = _present(first) & _present(soft)
            for what, name in (("shown other inputs", "fingerprint"), ("given other targets", "target")):
                mine, theirs = getattr(first, name), getattr(soft, name)
                if mine is None or theirs is None or (name == "target" and first.row_splits is not None):
                    continue
                if (differs := (mine != theirs) & both).any():
                    wrong = ids.at(differs)
                    raise LabelMismatch(
                        f"the teachers of {self._members[0].target} and {member.target} were {what} for "
                        f"{len(wrong):,} examples of the same ids (ids: {shown(wrong)}): their data sets are not the "
                        "same, or in another order",
                        ids=wrong,
                    )

    def _parts(self, ids: Ids) -> Iterator[tuple[Member, Int64[np.ndarray, " part"]]]:
        """Each teacher that the route names, and the positions of its examples.

        Raises:
            InvalidRequest: the route does not give a teacher's number for each id.
        """
        assert self._route is not None
        numbers = np.asarray(on_cpu(self._route(list(ids.texts) if ids.texts is not None else ids.keys)))
        if numbers.shape != (len(ids),) or numbers.dtype.kind not in "iu":
            raise InvalidRequest(
                f"route gave {numbers.dtype} of shape {numbers.shape} for {len(ids):,} ids: give one whole number an "
                "id, that of its teacher"
            )
        outside = (numbers < 0) | (numbers >= len(self._members))
        if outside.any():
            at = int(np.argmax(outside))
            raise InvalidRequest(
                f"route gave teacher {numbers[at]} for {ids.at([at])[0]!r}: {len(self._members)} teachers are counted "
                "from 0"
            )
        return ((self._members[n], np.flatnonzero(numbers == n)) for n in np.unique(numbers).tolist())

    def _routed(self, ids: Ids, inputs: Any, view: Any, options: dict[str, Any]) -> FetchedLabels:
        parts: list[SoftLabels] = []
        positions = []
        for member, at in self._parts(ids):
            own = {name: _own(value, len(ids), at, name) for name, value in (("inputs", inputs), ("view", view))}
            # They are of several label sets, whose rows have one form, as was checked on connecting.
            parts.append(replace(_fetch(member, _at(ids, at), **own, **options), digest=None))
            positions.append(at)
        joined = concatenate(parts)
        order = np.argsort(np.concatenate(positions))
        arrays: dict[str, Any] = {name: array[order] for name, array in joined.arrays().items()}
        return FetchedLabels.of(replace(joined, **arrays))


def _differences(first: Description, other: Description, *, rows: bool) -> Iterator[tuple[str, Any, Any]]:
    """What must be alike and is not, with both values; of the rows, too, where rows of both are put together."""
    names = (*_ALIKE, *(_ALIKE_ROWS if rows else ()))
    pairs = [(name, getattr(first.identity, name), getattr(other.identity, name)) for name in names]
    pairs.append(("examples", first.examples, other.examples))
    return (pair for pair in pairs if pair[1] != pair[2])


def _fetch(member: Member, ids: Any, **options: Any) -> FetchedLabels:
    with _named(member):
        return member.labels.fetch(ids, **options)


def _look(member: Member, ids: Any) -> SoftLabels:
    with _named(member):
        return member.labels.look(ids)


@contextmanager
def _named(member: Member) -> Iterator[None]:
    """An error says of which label set it is."""
    try:
        yield
    except LogitcacheError as error:
        error.details.setdefault("target", member.target)
        if member.target not in error.message:
            error.message = f"{member.target}: {error.message}"
            error.args = (error.message,)
        raise


def _present(soft: SoftLabels) -> np.ndarray:
    return np.ones(soft.examples, np.bool_) if soft.present is None else soft.present


def _own(values: Any, ids: int, at: Int64[np.ndarray, " part"], name: str) -> Any:
    """Of what is given for each id, the entries at these positions; what is given for all ids as it is."""
    if not isinstance(values, list | tuple) and not np.ndim(values):
        return values
    check_one_an_id(values, ids, "views" if name == "view" else name)
    return _at(values, at)


def _at(values: Any, at: Int64[np.ndarray, " part"]) -> Any:
    """The entries at these positions, duplicates kept."""
    if isinstance(values, Ids):
        return Ids(values.keys[at], None if values.texts is None else _at(list(values.texts), at))
    return [values[position] for position in at.tolist()] if isinstance(values, list | tuple) else values[at]


def _rebuild(members: tuple[Member, ...], combine: Combine, seed: int, route: Route | None) -> SeveralLabels:
    return SeveralLabels(members, combine=combine, seed=seed, route=route)
