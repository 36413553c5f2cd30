"""From ids to ordinals: a vectorised look-up over the ids of a label set whose ids are not its ordinals.

A segment holds the keys of some shards, ordered by a 64-bit hash, and a table from the hash's upper bits to where they
begin; a batch is looked up with a handful of gathers, whatever its size. Segments of similar size are merged, so that a
label set that is being built adds shard after shard in time that stays proportional to what is added, times a
logarithm. Everything is immutable: a reader may look up while the next index is made.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt64

from logitcache.labels.errors import ShardDamaged
from logitcache.labels.ids import Keys
from logitcache.storage.admission import stored_rows
from logitcache.storage.layout import Layout
from logitcache.storage.places import Places
from logitcache.storage.records import Commit

_GOLDEN, _FIRST, _SECOND = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def key_hashes(keys: Keys) -> UInt64[np.ndarray, " ids"]:
    """Evenly spread 64 bits of each key: of a text's the low half of its hash, of a number's a mix of its bits.

    The mix is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014),
    which is a bijection: different numbers have different hashes.
    """
    if keys.ndim == 2:
        return keys[:, 1]
    mixed = keys.view(np.uint64) + _GOLDEN
    mixed ^= mixed >> np.uint64(30)
    mixed *= _FIRST
    mixed ^= mixed >> np.uint64(27)
    mixed *= _SECOND
    mixed ^= mixed >> np.uint64(31)
    return mixed


@dataclass(frozen=True)
class Segment:
    """Ids of some shards. Arrays are ordered by hash.

    Attributes:
        hashes: (ids,) see `key_hashes`.
        highs: (ids,) the other half of a text's key, or None: a number's hash is as good as the number.
        ordinals: (ids,) what is looked up.
        begins: (2**bits,) where the hashes with each value of their upper bits begin.
        shift: 64 - bits.
        fullest: most hashes that share their upper bits.
    """

    hashes: np.ndarray
    highs: np.ndarray | None
    ordinals: np.ndarray
    begins: np.ndarray
    shift: np.uint64
    fullest: int

    @classmethod
    def of(cls, hashes: np.ndarray, highs: np.ndarray | None, ordinals: np.ndarray) -> "Segment":
        """A segment of these ids, in any order."""
        order = np.argsort(hashes)
        hashes, ordinals = hashes[order], ordinals[order]
        highs = None if highs is None else highs[order]
        # Half as many hashes as places: most look-ups end at their first step.
        bits = len(hashes).bit_length() + 1
        shift = np.uint64(64 - bits)
        counts = np.bincount((hashes >> shift).view(np.int64), minlength=2**bits)
        begins = np.zeros(2**bits, np.uint32 if len(hashes) < 2**32 else np.int64)
        np.cumsum(counts[:-1], out=begins[1:])
        return cls(hashes, highs, ordinals, begins, shift, int(counts.max()))

    def merged(self, other: "Segment") -> "Segment":
        """Both segments in one."""
        highs = None
        if self.highs is not None and other.highs is not None:
            highs = np.concatenate([self.highs, other.highs])
        return Segment.of(
            np.concatenate([self.hashes, other.hashes]), highs, np.concatenate([self.ordinals, other.ordinals])
        )

    def look_up(self, hashes: np.ndarray, highs: np.ndarray | None) -> Int64[np.ndarray, " ids"]:
        """Ordinals of these ids, -1 where the segment has none."""
        last = len(self.hashes) - 1
        here = self.begins.take((hashes >> self.shift).view(np.int64)).astype(np.int64)
        found = np.full(len(hashes), -1, np.int64)
        waiting: np.ndarray | None = None
        for _ in range(self.fullest):
            np.minimum(here, last, out=here)
            stored = self.hashes.take(here)
            same = stored == hashes
            if self.highs is not None and highs is not None:
                same &= self.highs.take(here) == highs
            at = np.flatnonzero(same)
            found[at if waiting is None else waiting[at]] = self.ordinals.take(here[at])
            # Hashes are in order: past one that is larger there is nothing to find.
            going = np.flatnonzero((stored <= hashes) & ~same)
            if not len(going):
                break
            waiting = going if waiting is None else waiting[going]
            here, hashes = here[going] + 1, hashes[going]
            highs = None if highs is None else highs[going]
        return found


@dataclass(frozen=True)
class IdIndex:
    """Ids of a label set's committed shards.

    Attributes:
        segments: by falling size.
        commits: sha256 of the commit of each shard that is in it.
    """

    segments: tuple[Segment, ...] = ()
    commits: dict[int, str] = field(default_factory=dict)

    def with_shard(self, shard: int, commit: str, keys: Keys, first_ordinal: int) -> "IdIndex":
        """This index and the ids of one more shard, whose examples begin at an ordinal."""
        return self._with({shard: commit}, [keys], [np.arange(first_ordinal, first_ordinal + len(keys))])

    def _with(self, commits: dict[int, str], keys: list[np.ndarray], ordinals: list[np.ndarray]) -> "IdIndex":
        """This index and the ids of some more shards: sorted together, which is what makes opening fast."""
        if not commits:
            return self
        together = np.concatenate(keys)
        highs = together[:, 0].copy() if together.ndim == 2 else None
        segments = [*self.segments, Segment.of(key_hashes(together), highs, np.concatenate(ordinals))]
        while len(segments) > 1 and len(segments[-2].hashes) < 2 * len(segments[-1].hashes):
            segments[-2:] = [segments[-2].merged(segments[-1])]
        return IdIndex(tuple(segments), self.commits | commits)

    def following(
        self, places: Places, layout: Layout, commits: dict[int, Commit]
    ) -> tuple["IdIndex", list[tuple[Commit, ShardDamaged]]]:
        """This index brought up to date with these commits; and commits whose ids are damaged, with what is wrong."""
        index, damaged = self, []
        if any(index.commits.get(shard, commit.sha256) != commit.sha256 for shard, commit in commits.items()):
            index = IdIndex()  # a shard was labelled anew: what is known of it may be wrong
        added: dict[int, str] = {}
        keys, ordinals = [], []
        for shard in sorted(commits.keys() - index.commits.keys()):
            try:
                keys.append(stored_rows(places, layout, commits[shard], "ids"))
            except ShardDamaged as error:
                damaged.append((commits[shard], error))
                continue
            ordinals.append(np.arange(*layout.first_examples[shard : shard + 2]))
            added[shard] = commits[shard].sha256
        index = index._with(added, keys, ordinals)
        return (index.compact() if len(index.commits) == layout.shards else index), damaged

    def compact(self) -> "IdIndex":
        """The same in one segment, which is looked up fastest: for a label set that is complete."""
        if len(self.segments) < 2:
            return self
        segments = list(self.segments)
        while len(segments) > 1:
            segments[-2:] = [segments[-2].merged(segments[-1])]
        return IdIndex(tuple(segments), self.commits)

    def ordinals(self, keys: Keys) -> Int64[np.ndarray, " ids"]:
        """Ordinals of these ids, -1 where no shard of the index has one."""
        hashes, highs = key_hashes(keys), (keys[:, 0] if keys.ndim == 2 else None)
        if not self.segments:
            return np.full(len(keys), -1, np.int64)
        found = self.segments[0].look_up(hashes, highs)
        for segment in self.segments[1:]:
            waiting = np.flatnonzero(found < 0)
            found[waiting] = segment.look_up(hashes[waiting], None if highs is None else highs[waiting])
        return found


def repeated(keys: Keys) -> list[tuple[int, int]]:
    """Pairs of positions that hold the same key, the earlier first, a few of them; empty when all are different."""
    order = np.argsort(keys, kind="stable") if keys.ndim == 1 else np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1] if keys.ndim == 1 else (ordered[1:] == ordered[:-1]).all(1)
    return [(int(order[at]), int(order[at + 1])) for at in np.flatnonzero(same)[:10].tolist()]
