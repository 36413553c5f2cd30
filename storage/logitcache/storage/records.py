"""Commits and generations: the small JSON files that say which bytes a label set consists of.

Both are canonical JSON. Whatever is read back is checked against the layout before it is believed.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.labels.errors import ShardDamaged
from logitcache.labels.identity import Identity, canonical_json, label_set_digest, sha256_hex
from logitcache.storage.layout import Layout

log = logging.getLogger("logitcache.storage")

MAX_RECORD_BYTES = 64 << 20
"""A longer commit or generation is refused unread."""


@dataclass(frozen=True)
class Commit:
    """One shard's span and the sha256 of each of its chunk files; ``sha256`` is that of the commit's own bytes."""

    shard: int
    arrays: dict[str, str]
    sha256: str

    @classmethod
    def of(cls, layout: Layout, shard: int, hashes: dict[str, str]) -> tuple["Commit", bytes]:
        """The commit of freshly hashed chunk files, and its bytes."""
        data = canonical_json(_commit_content(layout, shard, hashes))
        return cls(shard, dict(hashes), sha256_hex(data)), data

    @classmethod
    def read(cls, path: Path, layout: Layout, shard: int) -> "Commit":
        """Read a shard's commit.

        Raises:
            ShardDamaged: it is not the canonical JSON of this shard's span and arrays.
            FileNotFoundError: the shard is not committed.
        """
        data = _read(path)
        try:
            content = json.loads(data)
            hashes = {name: str(entry["sha256"]) for name, entry in content["arrays"].items()}
            whole = all(len(digest) == 64 for digest in hashes.values())
            if not whole or data != canonical_json(_commit_content(layout, shard, hashes)):
                raise ValueError("it does not describe this shard")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ShardDamaged(f"{path.name}: not a commit of shard {shard}: {error}", shard=shard) from None
        return cls(shard, hashes, sha256_hex(data))


def _commit_content(layout: Layout, shard: int, hashes: dict[str, str]) -> dict[str, Any]:
    span = layout.span(shard)
    if set(hashes) != set(layout.arrays):
        raise ValueError(f"its arrays are {sorted(hashes)}")
    return {
        "shard": shard,
        "first_example": span.start,
        "examples": len(span),
        "first_row": span.start,
        "rows": len(span),
        "arrays": {
            name: {"bytes": layout.chunk_bytes(array), "sha256": hashes[name]} for name, array in layout.arrays.items()
        },
    }


@dataclass(frozen=True)
class Generation:
    """A complete state of a label set: the sha256 of each shard's commit, and the digest that names the content."""

    number: int
    examples: int
    commits: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, identity: Identity, number: int, examples: int, commits: list[str]) -> tuple["Generation", bytes]:
        """The generation that these commits make, and its bytes."""
        digest = label_set_digest(identity, commits)
        content = {"generation": number, "examples": examples, "commits": commits, "digest": digest}
        return cls(number, examples, tuple(commits), digest), canonical_json(content)

    @classmethod
    def read(cls, path: Path, layout: Layout) -> "Generation":
        """Read a generation.

        Raises:
            ShardDamaged: it is not a generation of this label set, or its digest is not that of its commits.
        """
        try:
            data = _read(path)
            content = json.loads(data)
            commits = content["commits"]
            if not all(isinstance(digest, str) for digest in commits) or len(commits) != layout.shards:
                raise ValueError("its commits are not those of this label set")
            number = int(path.stem)
            generation, expected = cls.of(layout.identity, number, layout.examples, commits)
            if data != expected:
                raise ValueError("its digest is not that of its commits")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ShardDamaged(f"generations/{path.name}: {error}") from None
        return generation


def _read(path: Path) -> bytes:
    if path.stat().st_size > MAX_RECORD_BYTES:
        raise ShardDamaged(f"{path.name} has {path.stat().st_size:,} bytes, which no record of a label set has")
    return path.read_bytes()


def numbered(folder: Path) -> list[int]:
    """Numbers N of the files ``N.json`` in a folder, ascending; none when there is no such folder."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit() and str(int(stem)) == stem)


def newest_generation(folder: Path, layout: Layout) -> Generation | None:
    """The newest generation that reads as one; a damaged one is passed over."""
    for number in reversed(numbered(folder)):
        try:
            return Generation.read(folder / f"{number}.json", layout)
        except FileNotFoundError:
            continue
        except ShardDamaged as error:
            log.warning("label set %s: %s; passed over", folder.parent.name, error.message)
    return None
