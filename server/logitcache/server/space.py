"""Room on the disk: what a precompute needs, what there is, and a refusal before the first forward."""

import shutil
from pathlib import Path

from logitcache.labels.errors import DiskFull
from logitcache.server.wording import counted, size
from logitcache.storage.layout import Layout

SPARE_BYTES = 1 << 20
"""Kept free beyond the chunk files: commits, statistics, a generation."""


def needed_bytes(layout: Layout, missing: list[int]) -> int:
    """Bytes that these shards will take, with some to spare; 0 when none is missing."""
    return len(missing) * layout.shard_bytes + SPARE_BYTES if missing else 0


def check_space(path: Path, layout: Layout, missing: list[int]) -> None:
    """Refuse to begin what cannot fit.

    Raises:
        DiskFull: less is free than the missing shards need.
    """
    needed, free = needed_bytes(layout, missing), free_bytes(path)
    if free < needed:
        raise DiskFull(
            f"{path} needs {size(needed)} for {counted(len(missing), 'more shard')}, {size(free)} are free: "
            "make room, name another --store, or store less (--top-k, --dtype float16)",
            needed=needed,
            free=free,
        )


def free_bytes(path: Path) -> int:
    """Free space where a path is, or would be made."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
