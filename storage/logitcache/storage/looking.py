"""Looking into a label set's folder: what other processes committed, sealed, withdrew, grew or replaced meanwhile.

Reads small files and changes nothing; what follows from what it finds is `shards`' to decide.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from logitcache.labels.errors import LabelSetNotFound, NewerFormat, NotALabelSet, ShardDamaged
from logitcache.storage.layout import Layout
from logitcache.storage.manifest import read_layout
from logitcache.storage.places import Places
from logitcache.storage.reading import status
from logitcache.storage.records import Commit, Generation, numbered, read_generations, refuse_another_manifest
from logitcache.storage.state import FileKey, State

_SETTLED_NS = 2_000_000_000
"""A folder changed more recently than this may change again within one tick of its clock: look inside even so."""


@dataclass(frozen=True)
class Signature:
    """What changes when a label set does: its manifest, and the times of the folders of its records.

    ``settled`` folders have not changed lately, so the same signature means the same content.
    """

    group: FileKey
    commits_ns: int
    generations_ns: int
    settled: bool


@dataclass(frozen=True)
class Found:
    """What stands in the folder: ``keys`` of all commits, those that are trusted, what is wrong with ``unreadable``
    ones.
    """

    generations: tuple[Generation, ...]
    keys: dict[int, FileKey]
    commits: dict[int, Commit]
    unreadable: dict[int, str]


def signature(places: Places) -> Signature:
    """The signature of a label set's folder now."""
    commits_ns, generations_ns = _changed_ns(places.commits), _changed_ns(places.generations)
    settled = time.time_ns() - max(commits_ns, generations_ns) > _SETTLED_NS
    return Signature(group_key(places), commits_ns, generations_ns, settled)


def _changed_ns(folder: Path) -> int:
    found = status(folder)
    return 0 if found is None else found.st_mtime_ns


def group_key(places: Places) -> FileKey:
    """Key of the manifest; (0, 0) when there is none."""
    found = status(places.group)
    return (0, 0) if found is None else (found.st_ino, found.st_mtime_ns)


def commit_key(places: Places, shard: int) -> FileKey | None:
    """Key of a shard's commit, or None when there is none."""
    found = status(places.commit(shard))
    return None if found is None else (found.st_ino, found.st_ctime_ns)


def grown_layout(places: Places, state: State, keys: dict[int, FileKey]) -> Layout | None:
    """The label set's new layout, if what stands in the folder is this label set with more examples.

    It is when its layout extends ours, and what we served of it still stands: the newest generation that we know, or
    while there is none, each commit. None means that another label set was put in its place.

    Raises:
        StorageFault: it cannot be looked at.
    """
    try:
        layout = read_layout(places.root)
    except (LabelSetNotFound, NotALabelSet, NewerFormat):
        return None
    if not layout.extends(state.layout):
        return None
    if state.newest is not None:
        stands = _stands(places, layout, state.newest)
    else:
        stands = all(commit_key(places, shard) == keys.get(shard) for shard in state.commits)
    return layout if stands else None


def _stands(places: Places, layout: Layout, generation: Generation) -> bool:
    try:
        return Generation.read(places.generations / f"{generation.number}.json", layout) == generation
    except (FileNotFoundError, ShardDamaged):
        return False


def look(
    places: Places, layout: Layout, state: State, keys: dict[int, FileKey], condemned: dict[int, FileKey]
) -> Found:
    """Read the generations and commits that are not known from ``state``, whose commits had these ``keys``.

    Commits that were condemned, and still are the same files, are passed over.
    """
    generations = state.generations
    # None is ever changed once it is there.
    if [generation.number for generation in generations] != numbered(places.generations):
        generations = tuple(read_generations(places.generations, layout, known=generations))
        if not generations:
            refuse_another_manifest(places.generations, places.commits, layout)
    sealed = generations[-1].commits if generations else ()
    found = Found(generations, {}, {}, {})
    for shard in numbered(places.commits):
        key = commit_key(places, shard) if shard < layout.shards else None
        if key is None:
            continue
        found.keys[shard] = key
        if condemned.get(shard) == key:
            continue
        try:
            known = state.commits.get(shard) if keys.get(shard) == key else None
            commit = known or Commit.read(places.commit(shard), layout, shard)
        except FileNotFoundError:
            continue
        except ShardDamaged as error:
            found.unreadable[shard] = error.message
            continue
        # A repair that could not reproduce the bytes waits for the generation that will list it.
        if shard >= len(sealed) or sealed[shard] == commit.sha256:
            found.commits[shard] = commit
    return found
