"""The reader of a label set in a local folder.

Fetching is: ids to rows, are those rows served, one ``np.take`` an array straight into where they are wanted, and a
look whether a shard was withdrawn meanwhile. It imports neither the Zarr library nor torch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from logitcache.labels import wire
from logitcache.labels.errors import (
    DigestChanged,
    InvalidName,
    InvalidRequest,
    LabelSetNotFound,
    NotALabelSet,
    RowsMissing,
    StorageFault,
    StoreNotFound,
    TooManyRows,
    UnknownView,
    shown,
)
from logitcache.labels.identity import check_name
from logitcache.labels.ids import as_ids
from logitcache.labels.label_set import Description, Limits, OnMissing
from logitcache.labels.label_set import Shards as ShardCounts
from logitcache.labels.soft_labels import Shape, SoftLabels
from logitcache.storage.layout import Places
from logitcache.storage.manifest import read_layout
from logitcache.storage.shards import ShardReport, Shards, State, Verify
from logitcache.storage.statistics import RetainedMass, read_retained, summed

ADMISSIONS = 3
"""Tries to have shards admitted that another process withdraws and repairs at the same moment."""

Fields = Mapping[str, tuple[str, Shape]]


class LocalLabelSet:
    """A label set in a folder of this machine, read through memory mappings. Implements `labels.label_set.LabelSet`.

    Commits and generations that another process makes are noticed within half a second. With ``verify="strict"`` no
    row of a shard is given out before its files hash to what its commit says; ``"background"`` gives rows out at once
    and withdraws a damaged shard when it is found. With ``scrub_s`` everything is hashed again whenever so many seconds
    have gone by. Safe to use from several threads; after a fork, open it anew.

    When the folder is removed or replaced by another label set, every call raises DigestChanged.

    Raises:
        StoreNotFound, LabelSetNotFound: no such folder, or nothing in it yet.
        NotALabelSet, NewerFormat: the folder holds something that this version cannot read.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        verify: Verify = "strict",
        scrub_s: float | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.path = Path(path).absolute()
        self.name = self.path.name
        if not _is_folder(self.path.parent):
            raise StoreNotFound(f"there is no store {self.path.parent}: no such folder")
        if not self.path.is_dir():
            raise LabelSetNotFound(
                f"there is no label set {self.name!r} in {self.path.parent}", available=_names(self.path.parent)
            )
        if not (self.path / "zarr.json").exists() and (inside := _names(self.path)):
            raise NotALabelSet(f"{self.path} is a store and not a label set: name one in it ({shown(inside)})")
        self.layout = read_layout(self.path)
        self._limits = limits or Limits()
        self._spec = self.layout.row_spec
        self._shards = Shards(Places(self.path), self.layout, verify, scrub_s)
        self._retained: dict[str, RetainedMass] = {}

    def describe(self) -> Description:
        """What the label set is and how far it is, as of now."""
        state = self._current()
        labelled = sum(len(self.layout.span(shard)) for shard in state.commits)
        return Description(
            name=self.name,
            identity=self.layout.identity,
            examples=self.layout.examples,
            labelled=labelled,
            digest=state.generation.digest if state.generation else None,
            generation=state.generation.number if state.generation else None,
            shards=ShardCounts(
                total=self.layout.shards,
                committed=len(state.commits),
                verified=self._shards.verified(),
                damaged=len(self._shards.damaged()),
            ),
            label_bytes=len(state.commits) * self.layout.shard_bytes,
            limits=self._limits,
            retained_mass=self._retained_mass(state),
        )

    def fetch(
        self, ids: Any, *, view: int = 0, digest: str | None = None, on_missing: OnMissing = "error"
    ) -> SoftLabels:
        """Soft labels of these examples; see `labels.label_set.LabelSet.fetch`."""
        arrays, found = self._fetch(ids, view, digest, on_missing, _empty)
        return SoftLabels(**arrays, temperatures=self._spec.temperatures, digest=found)

    def fetch_body(
        self, ids: Any, *, view: int = 0, digest: str | None = None, on_missing: OnMissing = "error"
    ) -> tuple[UInt8[np.ndarray, " bytes"], str | None]:
        """The same as one safetensors body, gathered straight into it, and the digest; `wire.decode_rows` reads it."""
        body: list[np.ndarray] = []

        def allocate(fields: Fields, found: str | None) -> dict[str, np.ndarray]:
            buffer, views = wire.allocate(fields, wire.row_metadata(self._spec.temperatures, found))
            body[:] = [buffer]
            return views

        _, served = self._fetch(ids, view, digest, on_missing, allocate)
        return body[0], served

    def _fetch(
        self,
        ids: Any,
        view: int,
        digest: str | None,
        on_missing: OnMissing,
        allocate: Callable[[Fields, str | None], dict[str, np.ndarray]],
    ) -> tuple[dict[str, np.ndarray], str | None]:
        wanted = as_ids(ids)
        self._check(wanted, view, on_missing)
        known = (wanted >= 0) & (wanted < self.layout.examples)
        rows = np.where(known, wanted, 0)
        shards = rows // self.layout.rows_per_shard
        while True:
            state = self._served(shards[known], digest)
            served = known if state.all_served else known & (state.version[shards] > 0)
            if on_missing == "error" and not served.all():
                raise self._missing(wanted, known, served)
            found = state.generation.digest if state.generation else None
            arrays = allocate(self._spec.fields(len(rows), present=on_missing == "mask"), found)
            self._gather(rows, view, arrays)
            if on_missing == "mask":
                _mark(arrays, served)
            # Whatever was withdrawn or replaced while rows were copied is asked for again.
            now = self._shards.state
            if now is state or np.array_equal(now.version[shards[served]], state.version[shards[served]]):
                return arrays, found

    def _check(self, ids: Int64[np.ndarray, " examples"], view: int, on_missing: str) -> None:
        most = self._limits.rows_a_fetch(self._spec.row_bytes)
        if len(ids) > most:
            raise TooManyRows(
                f"{len(ids):,} ids in one fetch, {most:,} are allowed: split it", ids=len(ids), limit=most
            )
        if isinstance(view, bool) or not isinstance(view, int) or not 0 <= view < self.layout.identity.views:
            raise UnknownView(f"view {view!r} of {self.name!r} does not exist: it has one view, 0")
        if on_missing not in ("error", "mask"):
            raise InvalidRequest(f"on_missing is {on_missing!r}; it can be 'error' or 'mask'")

    def _served(self, shards: Int64[np.ndarray, " examples"], digest: str | None) -> State:
        """The state after every one of these shards that can be admitted is; checked against the digest asked for."""
        state = self._current()
        for _ in range(ADMISSIONS):
            waiting = () if state.all_served else np.unique(shards[state.version[shards] == 0]).tolist()
            waiting = [shard for shard in waiting if shard in state.commits]
            if not waiting:
                break
            self._shards.admit(waiting)
            state = self._shards.state
        served = state.generation.digest if state.generation else None
        if digest is not None and digest != served:
            raise DigestChanged(
                f"{self.name!r} is at {served or 'no digest yet: it is being built'}, not at {digest}: "
                "labels from both would be mixed; pin the new digest to go on with it",
                expected=digest,
                served=served,
            )
        return state

    def _current(self) -> State:
        state = self._shards.current()
        if state.replaced:
            raise DigestChanged(f"the label set {self.name!r} was removed or replaced while it was open: open it again")
        return state

    def _gather(self, rows: Int64[np.ndarray, " rows"], view: int, arrays: dict[str, np.ndarray]) -> None:
        stored = self._shards.rows
        # Bounds are checked already; with mode="raise" NumPy would gather into a buffer first.
        for name in ("indices", "logits"):
            np.take(stored[name], rows, 0, arrays[name], mode="clip")
        np.take(stored["fingerprint"][:, view], rows, 0, arrays["fingerprint"], mode="clip")
        scalars = np.take(stored["scalars"], rows, 0, mode="clip")
        arrays["logit_max"][:] = scalars[:, 0]
        arrays["tail_logsumexp"][:] = scalars[:, 1:]

    def _missing(
        self, ids: Int64[np.ndarray, " n"], known: Bool[np.ndarray, " n"], served: Bool[np.ndarray, " n"]
    ) -> RowsMissing:
        unknown, unlabelled = ids[~known].tolist(), ids[known & ~served].tolist()
        asked = len(set(ids.tolist()))
        parts = []
        if unknown:
            parts.append(f"unknown: {shown(dict.fromkeys(unknown))}; its ids are 0 to {self.layout.examples - 1:,}")
        if unlabelled:
            shards = {id // self.layout.rows_per_shard for id in unlabelled}
            damaged = sorted(shards & self._shards.damaged().keys())
            reason = f"shards withdrawn as damaged: {shown(damaged)}" if damaged else "not labelled yet"
            parts.append(f"without labels: {shown(dict.fromkeys(unlabelled))} ({reason}; run its precompute again)")
        missing = len(set(unknown) | set(unlabelled))
        return RowsMissing(
            f"{missing:,} of {asked:,} examples have no labels in {self.name!r}: {'; '.join(parts)}",
            unknown=list(dict.fromkeys(unknown)),
            unlabelled=list(dict.fromkeys(unlabelled)),
        )

    def _retained_mass(self, state: State) -> dict[str, dict[str, float]]:
        for shard, commit in state.commits.items():
            if commit.sha256 not in self._retained:
                self._retained[commit.sha256] = read_retained(Places(self.path), shard)
        return summed([self._retained[commit.sha256] for commit in state.commits.values()])

    def damaged(self) -> dict[int, str]:
        """Shards that were committed and are withdrawn, with what was wrong."""
        return self._shards.damaged()

    def verify_all(self, progress: Callable[[int, int], None] | None = None) -> list[ShardReport]:
        """Hash every committed shard now; ``progress`` gets shards done and shards in all."""
        return self._shards.verify_all(progress)

    def close(self) -> None:
        """Stop verifying; arrays that were fetched are copies and stay valid."""
        self._shards.close()


def _empty(fields: Fields, _digest: str | None) -> dict[str, np.ndarray]:
    return {name: np.empty(shape, dtype) for name, (dtype, shape) in fields.items()}


def _mark(arrays: dict[str, np.ndarray], served: Bool[np.ndarray, " rows"]) -> None:
    arrays["present"][:] = served
    for name in ("logits", "logit_max", "tail_logsumexp"):
        arrays[name][~served] = np.nan
    for name in ("indices", "fingerprint"):
        arrays[name][~served] = 0


def label_set_names(store: Path) -> list[str]:
    """Names of the label sets of a store, sorted; folders without a zarr.json, or of another name, are passed over.

    Raises:
        StoreNotFound: there is no such folder.
    """
    if not _is_folder(store):
        raise StoreNotFound(
            f"there is no store {store}: no such folder; name another with --store or LOGITCACHE_STORE, "
            "or make it with `logitcache precompute`"
        )
    if (store / "zarr.json").is_file():
        raise StoreNotFound(f"{store} is a label set and not a store: name the folder above it, {store.parent}")
    return _names(store)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise StorageFault(f"{path} cannot be looked at: {error.strerror}", path=str(path)) from error


def _names(store: Path) -> list[str]:
    try:
        return sorted(path.name for path in store.iterdir() if _legal(path.name) and _holds_a_group(path))
    except OSError as error:
        raise StorageFault(f"the store {store} cannot be listed: {error.strerror}") from error


def _holds_a_group(path: Path) -> bool:
    try:
        return (path / "zarr.json").is_file()
    except OSError:
        # Not ours to enter: the lost+found of a file system, say.
        return False


def _legal(name: str) -> bool:
    try:
        return bool(check_name(name))
    except InvalidName:
        return False
