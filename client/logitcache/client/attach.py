"""A loader with the labels of each batch beside it, fetched while the steps before are computed.

The main thread pulls batches ahead from the loader, in its order, so its workers and random draws behave as without
labels; with a given depth the same batch is pulled at the same step in each run. One background thread fetches their
labels and makes tensors of them. It knows loaders by their shape alone, without torch, and labels as a function that
fetches them, which `Attachable` asks for.
"""

import copy
import os
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from logitcache.client.background import BackgroundThread
from logitcache.client.extras import import_with_torch
from logitcache.client.fetched import FetchedLabels
from logitcache.client.lookahead import BUFFER_BYTES, Lookahead
from logitcache.client.schedule import Schedule
from logitcache.client.stats import Tally
from logitcache.client.viewed import as_seen, given_inputs
from logitcache.labels.errors import InvalidRequest
from logitcache.labels.label_set import OnMissing

if TYPE_CHECKING:
    import logitcache.client.tensors

Batch = TypeVar("Batch")

Part: TypeAlias = str | int | Callable[[Any], Any]
"""Where a part of a batch is: under a key, at a position, or what a function makes of the batch."""

Fetch: TypeAlias = Callable[..., FetchedLabels | tuple[FetchedLabels, ...]]
"""Labels of ids, or those of several teachers; parts of the batch besides the ids are its keywords."""

Stage: TypeAlias = Callable[[FetchedLabels], Any]
"""Prepares labels for a device: gives `logitcache.client.tensors.StagedLabels`."""

PULLS_A_STEP = 2
"""Batches that are pulled at one step until as many are held as the depth says, so that no step waits for all of them:
the first labels are delivered when two batches are there, and a depth that grew costs a step one batch more."""


class Auto(Enum):
    """The type of `AUTO`."""

    AUTO = "token ids where a batch has them"


AUTO = Auto.AUTO
"""Of a mapping, the token ids and their mask under the names that tokenizers give them, if it has them."""

INPUT_IDS, ATTENTION_MASK = "input_ids", "attention_mask"
"""Keys of a batch that `AUTO` looks under."""


def _token_parts(inputs: "Part | Auto | None", attention_mask: "Part | Auto | None") -> dict[str, Part]:
    """Where a batch has its token ids and their mask, as `Labels.attach` was told for a causal label set.

    Raises:
        InvalidRequest: a mask without inputs.
    """
    if inputs is None:
        if attention_mask not in (None, AUTO):
            raise InvalidRequest("attention_mask says which of the inputs are tokens: name inputs as well")
        return {}
    parts: dict[str, Part] = {"inputs": _input_ids if isinstance(inputs, Auto) else inputs}
    if attention_mask is not None:
        look = _mask_of_input_ids if isinstance(inputs, Auto) else _attention_mask
        parts["attention_mask"] = look if isinstance(attention_mask, Auto) else attention_mask
    return parts


def _given_parts(inputs: "Part | Auto | None", attention_mask: "Part | Auto | None") -> dict[str, Part]:
    """The parts of a batch that were named; where inputs were not, those that `as_seen` looks at a few of."""
    named = {"inputs": inputs, "attention_mask": attention_mask}
    parts = {name: part for name, part in named.items() if part is not None and not isinstance(part, Auto)}
    return parts | {"given": given_inputs} if isinstance(inputs, Auto) else parts


def _input_ids(batch: Any) -> Any:
    return batch.get(INPUT_IDS) if isinstance(batch, Mapping) else None


def _attention_mask(batch: Any) -> Any:
    return batch.get(ATTENTION_MASK) if isinstance(batch, Mapping) else None


def _mask_of_input_ids(batch: Any) -> Any:
    return None if _input_ids(batch) is None else _attention_mask(batch)


class Steps:
    """Which step of the optimizer each batch belongs to: ``accumulate`` batches make one, and an epoch ends one.

    Raises:
        InvalidRequest: ``accumulate`` is below 1, or the first step below 0.
    """

    def __init__(self, first: int, accumulate: int) -> None:
        if accumulate < 1:
            raise InvalidRequest(f"accumulate={accumulate}: at least 1 batch makes a step of the optimizer")
        if first < 0:
            raise InvalidRequest(f"first_step={first} is below 0: steps of the optimizer are counted from 0")
        self._accumulate = accumulate
        self._first = first  # step of the first batch that is counted
        self._delivered = 0  # batches since then

    @property
    def next(self) -> int:
        """Step of the batch that is delivered next."""
        return self.of(0)

    def of(self, ahead: int) -> int:
        """Step of the batch that many batches after the one that is delivered next."""
        return self._first + (self._delivered + ahead) // self._accumulate

    def delivered(self) -> None:
        """A batch was."""
        self._delivered += 1

    def begin(self, step: int | None = None) -> None:
        """The next batch begins this step, or if none is given, one that no batch belongs to yet."""
        if step is None:
            step = self._first - (-self._delivered // self._accumulate)
        self._first, self._delivered = step, 0


@dataclass
class _Answer:
    """The labels of one batch, their bytes as received, and how long they took.

    ``take`` gives them; it is to be called in the thread that trains.
    """

    take: Callable[[], Any]
    label_bytes: int
    took_ms: float


@dataclass
class _Step(Generic[Batch]):
    """A batch that was pulled, its labels under way unless its step has none, and the loader's state right after it."""

    batch: Batch
    answer: "Future[_Answer] | None"
    state: Any


class AttachedLoader(Generic[Batch]):
    """What `Labels.attach` returns: iterating gives ``(batch, soft)``, each `iter` is a new epoch of the loader.

    With a schedule, batches of steps that do not distil come as ``(batch, None)``; nothing was fetched for them.
    An error of a fetch is raised at the step it belongs to, and one of the loader after the batches before it. Leaving
    an epoch early ends its thread. An epoch is of the process that began it. ``set_epoch`` is there if the loader, its
    sampler or its dataset has it, ``state_dict`` and ``load_state_dict`` if the loader has them; other attributes are
    the loader's.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        fetch: Fetch,
        tally: Callable[[], Tally],
        *,
        ids: Part,
        parts: Mapping[str, Part] | None = None,
        depth: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        device: Any = None,
        schedule: Callable[[int], float] | None = None,
        first_step: int = 0,
        accumulate: int = 1,
        by_step: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._loader, self._fetch, self._tally, self._clock = loader, fetch, tally, clock
        self._ids, self._parts, self._device = ids, parts or {}, device
        self._lookahead = Lookahead(depth, buffer_bytes)
        self._schedule, self._steps = schedule, Steps(first_step, accumulate)
        self._by_step = by_step  # labels depend on the optimizer's step, too: the fetch is told it as ``step``
        self._pulled: deque[_Step[Batch]] = deque()  # and not delivered yet, of the epoch that began last
        self._delivered: list[Any] = []  # the loader's state after the batch that was delivered last, or nothing

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    @property
    def step(self) -> int:
        """The optimizer's step that the next batch belongs to, counted from 0 over all epochs.

        Set it between epochs, to resume.

        Raises:
            InvalidRequest: batches of an epoch that is not over were pulled ahead, for the steps that they had.
        """
        return self._steps.next

    @step.setter
    def step(self, step: int) -> None:
        if self._pulled:
            raise InvalidRequest(
                f"step={step}: {len(self._pulled)} batches of an epoch were pulled already, and labels fetched for the "
                "steps that these had: set it between epochs, and end one that you left (close its iterator)"
            )
        self._steps.begin(step)

    def __iter__(self) -> Iterator[tuple[Batch, Any]]:
        """Batches with `FetchedLabels`, or with `SoftLabelTensors` where there is a device; None where none are due.

        Where several teachers answer for each example, a tuple of them.
        """
        batches = iter(self._loader)  # before the thread begins: this forks the loader's workers
        self._delivered = self._state()
        self._steps.begin()
        stage = None
        if self._device is not None:
            stage = import_with_torch("logitcache.client.tensors").staging(self._device)
        return self._epoch(batches, stage)

    def _epoch(self, batches: Iterator[Batch], stage: Stage | None) -> Iterator[Any]:
        lookahead, process = self._lookahead, os.getpid()
        steps = self._pulled = deque[_Step[Batch]]()
        failure: Exception | None = None
        ended = False
        background: BackgroundThread[_Answer] = BackgroundThread("logitcache-fetch")
        try:
            while True:
                if os.getpid() != process:
                    raise InvalidRequest("this epoch was begun in another process: iterate anew in this one")
                if lookahead.adapts:  # before the loader is waited for: what is late then is not its fault
                    all_there = bool(steps) and all(step.answer is None or step.answer.done() for step in steps)
                    lookahead.step_begins(len(steps), all_there=all_there)
                for _ in range(PULLS_A_STEP):
                    if ended or len(steps) > lookahead.depth:
                        break
                    try:
                        batch = next(batches)
                    except StopIteration:
                        ended = True
                    except Exception as error:  # noqa: BLE001 - raised below, after the batches that came before it
                        ended, failure = True, error
                    else:
                        step = self._steps.of(len(steps))
                        answer = self._begin(background, batch, step, stage) if self._distils(step) else None
                        steps.append(_Step(batch, answer, self._state()))
                if not steps:
                    break
                yield self._deliver(steps.popleft())
            if failure is not None:
                raise failure
            self._delivered = []  # the epoch is over: the loader's own state says so
        finally:
            steps.clear()
            background.close()

    def _distils(self, step: int) -> bool:
        return self._schedule is None or self._schedule(step) > 0

    def _begin(
        self, background: BackgroundThread[_Answer], batch: Batch, step: int, stage: Stage | None
    ) -> "Future[_Answer]":
        try:
            # Here and not in the thread: what a user's function draws or moves must not depend on when a thread runs.
            ids = _part(batch, self._ids, "ids")
            others = {name: _part(batch, part, name) for name, part in self._parts.items()}
        except Exception as error:  # noqa: BLE001 - raised at the step it belongs to
            failed: Future[_Answer] = Future()
            failed.set_exception(error)
            return failed
        if self._by_step:
            others["step"] = step
        return background.submit(partial(self._answer, stage, ids, others))

    def _answer(self, stage: Stage | None, ids: Any, others: dict[str, Any]) -> _Answer:
        """In the background: labels, turned into tensors as far as that may be done there."""
        started_s = self._clock()
        fetched = self._fetch(ids, **others)
        each = fetched if isinstance(fetched, tuple) else (fetched,)
        label_bytes = held_bytes = sum(array.nbytes for soft in each for array in soft.arrays().values())
        take: Callable[[], Any] = partial(_itself, fetched)
        if stage is not None:
            staged = [stage(soft) for soft in each]
            held_bytes = sum(labels.held_bytes for labels in staged)
            take = partial(_taken, staged) if isinstance(fetched, tuple) else staged[0].take
        self._lookahead.arrived(held_bytes)
        return _Answer(take, label_bytes, 1000 * (self._clock() - started_s))

    def _deliver(self, step: _Step[Batch]) -> tuple[Batch, Any]:
        self._steps.delivered()
        if step.answer is None:
            self._delivered = step.state
            return step.batch, None
        clock = self._clock
        started_s = clock()
        answer = step.answer.result()
        self._lookahead.step_waited(1000 * (clock() - started_s))
        soft = answer.take()
        self._tally().step(
            waited_ms=1000 * (clock() - started_s),
            fetched_ms=answer.took_ms,
            label_bytes=answer.label_bytes,
            depth=self._lookahead.depth,
        )
        self._delivered = step.state
        return step.batch, soft

    def _state(self) -> list[Any]:
        """The loader's state now, in a list, or nothing. Copied, because loaders update it in place."""
        state_dict = getattr(self._loader, "state_dict", None)
        return [] if state_dict is None else [copy.deepcopy(state_dict())]

    def __getattr__(self, name: str) -> Any:
        """What this class lacks: the loader's, but for epoch and state, which stand for what was delivered."""
        if name.startswith("__") or "_loader" not in self.__dict__:
            raise AttributeError(name)
        if name == "set_epoch" and (setters := self._epoch_setters()):
            return partial(_set_epoch, setters)
        value = getattr(self._loader, name)
        return {"state_dict": self._state_dict, "load_state_dict": self._load_state_dict}.get(name, value)

    def _epoch_setters(self) -> list[Callable[[int], Any]]:
        """The loader's ``set_epoch``, else those of its samplers and its dataset.

        A batch sampler hides the one that shuffles; a dataset of `with_views` makes another view.
        """
        if hasattr(self._loader, "set_epoch"):
            return [self._loader.set_epoch]
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        owners = (
            getattr(self._loader, "dataset", None),
            getattr(self._loader, "sampler", None),
            batch_sampler,
            getattr(batch_sampler, "sampler", None),
        )
        distinct = {id(owner): owner for owner in owners if hasattr(owner, "set_epoch")}
        return [owner.set_epoch for owner in distinct.values() if owner is not None]

    def _state_dict(self) -> Any:
        if self._delivered:
            return self._delivered[0]
        return self._loader.state_dict()  # type: ignore[attr-defined]

    def _load_state_dict(self, state: Any) -> None:
        self._loader.load_state_dict(state)  # type: ignore[attr-defined]
        self._delivered = []


class ToAttach(NamedTuple):
    """What `Attachable.attach` needs to know of the labels."""

    fetch: Fetch
    tally: Callable[[], Tally]
    is_causal: bool
    is_augmented: bool  # its inputs are views that were made from a seed
    by_step: bool = False  # they depend on the optimizer's step, too


class Attachable(ABC):
    """Labels that can be attached to a loader: those of one label set, or of several."""

    @abstractmethod
    def _to_attach(self) -> ToAttach:
        """Asked first, once for each loader: it opens and checks the labels, and its errors are those."""

    def attach(
        self,
        loader: Iterable[Batch],
        *,
        ids: Part,
        rows: Part | tuple[int, int] | None = None,
        view: Any = None,
        inputs: Part | Auto | None = AUTO,
        attention_mask: Part | Auto | None = AUTO,
        on_missing: OnMissing | Literal["wait"] = "error",
        depth: int | None = None,
        buffer_bytes: int = BUFFER_BYTES,
        device: Any = None,
        schedule: Schedule | None = None,
        first_step: int = 0,
        accumulate: int = 1,
    ) -> AttachedLoader[Batch]:
        """The loader, with the labels of each batch beside it: iterating gives ``(batch, soft)``.

        Labels of the next batches are fetched while a step computes, in the loader's order, by one thread. Otherwise it
        is the loader: its length, its ``set_epoch``, its state (at the batch that was delivered), its other attributes.
        Batches are held until their step: a loader that refills one buffer must be copied from, or attached with
        ``depth=0``.

        With a causal label set, the token ids of every batch that is a mapping with ``"input_ids"`` are checked, and
        the labels come cut to the tokens that the batch has.

        Args:
            loader: a DataLoader, or any iterable of batches.
            ids: where a batch has its ids: a key, a position, or a function of the batch. See `with_ids`. Where it has
                what `with_views` adds, ids, views and hashes of the inputs are taken from that, and compared.
            rows: which rows of each example, for batches that begin in the middle of their examples: ``(start, stop)``
                for all, or where a batch has an array or tensor (examples, 2) of them.
            view: one view for all, or where a batch has the view of each example: a key or a function. It is 0 unless
                given; of a label set that was made with ``--views`` it must be, unless ``ids`` are what `with_views`
                adds, which tells it, or ``inputs`` are named.
            inputs: where a batch has the inputs, to check every one of them as `fetch` does; None checks nothing.
                Unless given, ``"input_ids"`` of batches that have it, with a causal label set; and where ``ids``
                are what `with_views` adds, four inputs of each batch, under ``"input"`` or in the first place; nothing
                otherwise.
            attention_mask: where a batch has the mask of these inputs; unless given, ``"attention_mask"`` of batches
                that have it, with a causal label set. None takes all inputs for tokens.
            on_missing: as in `fetch`; `distillation_loss` takes the CE alone for examples that are masked.
            depth: batches ahead that labels are fetched for, each held in memory; 0 fetches at the step itself. None
                begins with 2 and asks for one more, up to 16, where a step waited and asking earlier can help; `stats`
                tells how many. The depth changes neither order nor labels, but with it the step at which a batch is
                pulled; so where loader and step draw from one generator, in one process, a number makes runs
                repeatable.
            buffer_bytes: with depth None, bytes of labels that are held or under way: no more batches are asked for
                than fit if their labels are as large as the largest of the last 32 answers, but always one ahead.
            device: yield `SoftLabelTensors` there in place of NumPy arrays. The thread that fetches makes them; for a
                CUDA device it copies into pinned memory, and the step issues non-blocking copies on its own stream.
            schedule: at which of the optimizer's steps to distil. Batches of steps of weight 0 come as
                ``(batch, None)``, and nothing is fetched for them.
            first_step: the optimizer's step that the first batch belongs to, for a run that resumes. Later epochs go on
                from the last; ``step`` of what is returned tells the next one and can be set between epochs.
            accumulate: batches that make one step of the optimizer; the end of an epoch ends a step, too.

        Raises:
            InvalidRequest: ``depth`` or ``first_step`` is below 0, ``buffer_bytes`` or ``accumulate`` is below 1,
                ``attention_mask`` is given without ``inputs``; or, at the first batch, nothing says which view it
                holds, or ``view`` and what `with_views` adds both do.
        """
        source = self._to_attach()
        needs_views = source.is_augmented and (inputs is None or isinstance(inputs, Auto))
        fetch = as_seen(partial(source.fetch, rows=rows, on_missing=on_missing), needs_views=needs_views)
        parts = (_token_parts if source.is_causal else _given_parts)(inputs, attention_mask)
        if rows is not None and not isinstance(rows, tuple):
            parts["rows"] = rows
        if isinstance(view, str) or callable(view):
            parts["view"] = view
        return AttachedLoader(
            loader,
            partial(fetch, view=view),
            source.tally,
            ids=ids,
            parts=parts,
            depth=depth,
            buffer_bytes=buffer_bytes,
            device=device,
            schedule=schedule,
            first_step=first_step,
            accumulate=accumulate,
            by_step=source.by_step,
        )


def _itself(fetched: Any) -> Any:
    return fetched


def _taken(staged: "list[logitcache.client.tensors.StagedLabels]") -> tuple[Any, ...]:
    return tuple(labels.take() for labels in staged)


def _set_epoch(setters: list[Callable[[int], Any]], epoch: int) -> None:
    for setter in setters:
        setter(epoch)


def _part(batch: Any, part: Part, argument: str) -> Any:
    """A part of a batch: its ids, or what goes to `Labels.fetch` as this argument.

    Raises:
        InvalidRequest: the batch has no such key or position.
    """
    if callable(part):
        return part(batch)
    try:
        return batch[part]
    except (KeyError, IndexError, TypeError) as error:
        holds = (
            f"the keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else f"type {type(batch).__name__}"
        )
        more = ", or wrap the dataset in with_ids" if argument == "ids" else ""
        raise InvalidRequest(
            f"{argument}={part!r} is not in a batch, which has {holds}; "
            f"name a key or a position that is, or give a function of the batch{more}"
        ) from error
