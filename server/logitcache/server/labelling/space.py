"""Room on the disk: what a precompute needs, what there is, and a refusal before the first forward."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from logitcache.labels.errors import DiskFull
from logitcache.server.wording import counted, size
from logitcache.storage.layout import TEXTS, Layout

SPARE_BYTES = 1 << 20
"""Kept free beyond the chunk files: commits, statistics, a generation."""

BLOCK_BYTES = 4096
"""What the last bytes of a file may take up whole."""

TEXT_BYTES = 128
"""Room for a text id; how long they are is not known before they are read."""


def needed_bytes(layout: Layout, missing: Sequence[int]) -> int:
    """Bytes that these shards will take on disk, with some to spare; 0 when none is missing.

    Slots that no row uses are holes in their files and take none.
    """
    if not missing:
        return 0
    examples = sum(layout.shard_examples[shard] for shard in missing)
    rows = sum(layout.shard_rows[shard] for shard in missing)
    texts = TEXT_BYTES * examples if TEXTS in layout.parts else 0
    blocks = BLOCK_BYTES * len(missing) * len(layout.parts)
    return layout.used_bytes(examples, rows) + texts + blocks + SPARE_BYTES


def check_space(path: Path, layout: Layout, missing: Sequence[int]) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        DiskFull: less is free than the missing shards need.
    """
    needed, free = needed_bytes(layout, missing), free_bytes(path)
    if free < needed:
        # What exists already is neither moved nor made smaller by an argument.
        other = "" if path.exists() else ", name another --store, or store less (--top-k, --dtype float16)"
        raise DiskFull(
            f"{path} needs {size(needed)} for {counted(len(missing), 'more shard')}, {size(free)} are free: "
            f"make room{other}",
            needed=needed,
            free=free,
        )


def free_bytes(path: Path) -> int:
    """Free space where a path is, or would be made."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
