"""What can be served of a label set, at one moment: immutable, so that two moments are compared by two references."""

from dataclasses import dataclass, replace

import numpy as np

from logitcache.storage.layout import Layout
from logitcache.storage.records import Commit, Generation

FileKey = tuple[int, int]
"""Inode and time of a file: another commit of the same shard, or another label set of the same name, has another."""


@dataclass(frozen=True)
class State:
    """What can be served. Arrays are by shard and never changed in place.

    Attributes:
        layout: the label set's shape; it grows.
        generations: the complete ones, the oldest first; none while building for the first time.
        commits: trusted commits, damaged ones excluded.
        version: 0 where a shard is not mapped, else a number that is new each time it is.
        all_served: every shard of every generation is mapped: there is nothing to look up.
        replaced: another label set stands in the folder now: nothing of it is served here.
    """

    layout: Layout
    generations: tuple[Generation, ...]
    commits: dict[int, Commit]
    version: np.ndarray
    all_served: bool = False
    replaced: bool = False

    @property
    def newest(self) -> Generation | None:
        """The newest generation: what is served unless another is asked for."""
        return self.generations[-1] if self.generations else None

    @property
    def served_shards(self) -> int:
        """How many shards belong to what is served: those of the newest generation, or all while building."""
        return len(self.newest.commits) if self.newest else self.layout.shards

    def settled(self) -> "State":
        """This state with ``all_served`` as its other fields say."""
        most = max((len(each.commits) for each in self.generations), default=self.layout.shards)
        return replace(self, all_served=bool(self.version[:most].all()))

    def with_shard(self, shard: int, version: int) -> "State":
        """This state and one shard mapped."""
        versions = self.version.copy()
        versions[shard] = version
        return replace(self, version=versions).settled()

    def without_shard(self, shard: int) -> "State":
        """This state without one shard, which turned out to be damaged."""
        versions = self.version.copy()
        versions[shard] = 0
        commits = {number: commit for number, commit in self.commits.items() if number != shard}
        return replace(self, commits=commits, version=versions).settled()
