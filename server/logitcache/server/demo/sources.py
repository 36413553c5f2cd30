"""The text of the demo's language model: sources of the running Python's standard library, cut at their definitions.

The same Python gives the same texts in the same order. Knows nothing of tokens.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from logitcache.labels.errors import DatasetFault

PASSED_OVER = frozenset(
    {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "site-packages", "dist-packages"}
    | {"encodings", "pydoc_data"}
)
"""Folders that hold tests, other packages, or tables more than programs."""

BEGINNINGS = ("def ", "class ", "async def ", "@")
"""What a line with a definition, or with a decorator of one, begins with after its indentation."""

LARGEST_BYTES = 200_000
"""Files beyond this are mostly tables."""


@dataclass(frozen=True)
class Source:
    """One file: its path in the standard library, with slashes, and its lines with their ends."""

    path: str
    lines: tuple[str, ...]

    def definitions(self) -> Iterator[range]:
        """Runs of lines, counted from 0, that together are the file: each function, method and class as far as the next
        one's beginning, and what stands before the first.
        """
        start, decorated = 0, False
        for number, line in enumerate(self.lines):
            if number > start and line.lstrip(" ").startswith(BEGINNINGS) and not decorated:
                yield range(start, number)
                start = number
            decorated = line.lstrip(" ").startswith("@")
        yield range(start, len(self.lines))


def standard_library(most_bytes: int, root: Path | None = None) -> list[Source]:
    """Sources of the standard library, by path: all, or where that is too much every n-th.

    Args:
        most_bytes: about how much text there may be.
        root: another folder than the running Python's own.

    Raises:
        DatasetFault: the folder has no sources, or too little of them, as in an installation of compiled files alone.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    sizes = {path: path.stat().st_size for path in sorted(root.rglob("*.py")) if _is_wanted(path.relative_to(root))}
    kept = [path for path, size in sizes.items() if 0 < size <= LARGEST_BYTES]
    total = sum(sizes[path] for path in kept)
    if total < most_bytes / 2:
        raise DatasetFault(
            f"{root} has {total:,} bytes of Python sources and the demo's language model needs {most_bytes // 2:,}: "
            "run it with a Python whose standard library has its sources, or run `logitcache demo digits` alone"
        )
    return [_read(path, root) for path in kept[:: -(-total // most_bytes)]]


def _is_wanted(path: Path) -> bool:
    # What was found out when this Python was built tells of one machine, and not of the language.
    made = any(part.startswith(("config-", "_sysconfigdata")) for part in path.parts)
    return not made and PASSED_OVER.isdisjoint(path.parts)


def _read(path: Path, root: Path) -> Source:
    text = path.read_text(encoding="utf-8", errors="replace")
    return Source(path.relative_to(root).as_posix(), tuple(text.splitlines(keepends=True)))
