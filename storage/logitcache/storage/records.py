"""Commits and generations: the small JSON files that say which bytes a label set consists of.

Both are canonical JSON. Whatever is read back is checked against the layout before it is believed.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.labels.errors import NotALabelSet, ShardDamaged
from logitcache.labels.identity import Identity, canonical_json, label_set_digest, sha256_hex
from logitcache.labels.ids import MAX_TEXT_BYTES
from logitcache.storage.layout import TEXTS, Layout
from logitcache.storage.reading import names, parsed, read_file

log = logging.getLogger("logitcache.storage")

MAX_COMMIT_BYTES = 16 << 10
"""A longer commit is refused unread: it has an entry for each of at most ten files."""

MAX_GENERATION_BYTES = 1 << 20
"""A longer generation is refused unread: it has 67 bytes for each of at most 6,000 shards."""

MAX_TEXT_JSON_BYTES = 6 * MAX_TEXT_BYTES + 3
"""Bytes that a text id may take in a texts file: each of its own as ``\\uXXXX``, quotes and a comma."""


@dataclass(frozen=True, slots=True)
class Part:
    """One file that a commit covers: its size in bytes and its sha256."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Commit:
    """One shard's span and the files that it consists of; ``sha256`` is that of the commit's own bytes."""

    shard: int
    parts: dict[str, Part]
    sha256: str

    @classmethod
    def of(cls, layout: Layout, shard: int, parts: dict[str, Part]) -> tuple["Commit", bytes]:
        """The commit of freshly hashed files, and its bytes."""
        data = canonical_json(_commit_content(layout, shard, parts))
        return cls(shard, dict(parts), sha256_hex(data)), data

    @classmethod
    def read(cls, path: Path, layout: Layout, shard: int) -> "Commit":
        """Read a shard's commit.

        Raises:
            ShardDamaged: it is not the canonical JSON of this shard's span and files.
            FileNotFoundError: the shard is not committed.
            StorageFault: it cannot be read.
        """
        data = read_file(path.parent.parent, path, MAX_COMMIT_BYTES, ShardDamaged)
        try:
            entries = parsed(data)["files"]
            # The layout's names, and not the file's: thousands of commits share them.
            parts = {name: Part(entries[name]["bytes"], entries[name]["sha256"]) for name in layout.parts}
            whole = all(_is_hash(part.sha256) and type(part.bytes) is int for part in parts.values())
            if not whole or data != canonical_json(_commit_content(layout, shard, parts)):
                raise ValueError("it does not describe this shard")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardDamaged(f"{path.name}: not a commit of shard {shard}: {error!s:.200}", shard=shard) from None
        return cls(shard, parts, sha256_hex(data))


def most_texts(layout: Layout, shard: int) -> int:
    """Bytes that the text ids of a shard may take."""
    return 1 + len(layout.span(shard)) * MAX_TEXT_JSON_BYTES


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


def _commit_content(layout: Layout, shard: int, parts: dict[str, Part]) -> dict[str, Any]:
    span = layout.span(shard)
    if set(parts) != set(layout.parts):
        raise ValueError(f"its files are {sorted(parts)}")
    for name, array in layout.arrays.items():
        if parts[name].bytes != layout.chunk_bytes(array):
            raise ValueError(f"{name} has {parts[name].bytes} bytes in it, not {layout.chunk_bytes(array)}")
    if TEXTS in parts and not 0 < parts[TEXTS].bytes <= most_texts(layout, shard):
        raise ValueError(f"its texts have {parts[TEXTS].bytes} bytes")
    return {
        "shard": shard,
        "first_example": span.start,
        "examples": len(span),
        "rows": layout.shard_rows[shard],
        "files": {name: {"bytes": parts[name].bytes, "sha256": parts[name].sha256} for name in layout.parts},
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
            FileNotFoundError: there is none of this number.
            StorageFault: it cannot be read.
        """
        data = read_file(path.parent.parent, path, MAX_GENERATION_BYTES, ShardDamaged)
        try:
            content = parsed(data)
            commits = content["commits"]
            if (
                not isinstance(commits, list)
                or not all(map(_is_hash, commits))
                or not 1 <= len(commits) <= layout.shards
            ):
                raise ValueError("its commits are not those of this label set")
            number, examples = int(path.stem), layout.first(len(commits)).examples
            generation, expected = cls.of(layout.identity, number, examples, commits)
            if data != expected:
                raise ValueError("its digest is not that of its commits")
        except (ValueError, KeyError, TypeError) as error:
            raise ShardDamaged(f"generations/{path.name}: {error!s:.200}") from None
        return generation


def numbered(folder: Path) -> list[int]:
    """Numbers N of the files ``N.json`` in one of a label set's folders, ascending; none when there is no such folder.

    Raises:
        StorageFault: the folder is a symbolic link, no folder, or cannot be listed.
    """
    stems = (name.removesuffix(".json") for name in names(folder.parent, folder) if name.endswith(".json"))
    return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit() and str(int(stem)) == stem)


def read_generations(folder: Path, layout: Layout, known: Iterable[Generation] = ()) -> list[Generation]:
    """The generations that read as such, the oldest first; a damaged one is passed over.

    Those that are ``known`` are not read again: a generation is never changed once it is there.
    """
    read = {generation.number: generation for generation in known}
    found = (read.get(number) or _readable(folder, number, layout) for number in numbered(folder))
    return [generation for generation in found if generation is not None]


def newest_generation(folder: Path, layout: Layout) -> Generation | None:
    """The newest generation that reads as such."""
    found = (_readable(folder, number, layout) for number in reversed(numbered(folder)))
    return next((generation for generation in found if generation is not None), None)


def refuse_another_manifest(generations: Path, commits: Path, layout: Layout) -> None:
    """Refuse an identity that is not the one under which the shards there were sealed: rows of one teacher would pass
    for those of another. Of a label set that was never sealed nothing tells.

    Raises:
        NotALabelSet: no generation is of this identity, and one that reads as such otherwise lists the commits there.
        StorageFault: something cannot be read.
    """
    numbers = numbered(generations)
    if not numbers or newest_generation(generations, layout) is not None:
        return
    if any(_lists(generations / f"{number}.json", commits) for number in numbers):
        raise NotALabelSet(
            f"{generations.parent}/zarr.json is not the one that this label set was sealed with: its generations are "
            "of another identity; restore it. Nothing was changed"
        )


def _lists(path: Path, commits: Path) -> bool:
    """A generation of whatever identity that lists the commits that are there."""
    try:
        data = read_file(path.parent.parent, path, MAX_GENERATION_BYTES, ShardDamaged)
        content = parsed(data)
        listed, digest = content["commits"], content["digest"]
        if data != canonical_json(content) or not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            return False
        there = [shard for shard in numbered(commits) if shard < len(listed)]
        for shard in there:
            commit = read_file(commits.parent, commits / f"{shard}.json", MAX_COMMIT_BYTES, ShardDamaged)
            if sha256_hex(commit) != listed[shard]:
                return False
        return bool(there)
    except (FileNotFoundError, ShardDamaged, ValueError, KeyError, TypeError):
        return False


def _readable(folder: Path, number: int, layout: Layout) -> Generation | None:
    try:
        return Generation.read(folder / f"{number}.json", layout)
    except FileNotFoundError:
        return None
    except ShardDamaged as error:
        log.warning("label set %s: %s; passed over", folder.parent.name, error.message)
        return None
