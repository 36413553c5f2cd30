"""Make the golden label sets: small ones of each kind, as archives, with what a reader must find in them.

    python -m tests.golden.make FOLDER

It was run once for each format version. The archives of a version are never made again: later versions must read the
bytes that this one wrote.
"""

import base64
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from tests.building import ROWS_PER_SHARD, Reference, build, grow, grown, reference

KINDS: dict[str, dict[str, Any]] = {
    "pointwise": {"temperatures": (0.5, 1.0, 2.0)},
    "pointwise-wide-float32-targets": {"classes": 70_000, "dtype": "float32", "targets": True, "ids": "integer"},
    "pointwise-complete-text": {"k": 20, "classes": 20, "ids": "text"},
    "causal": {"alignment": "causal", "longest": 12},
    "causal-wide-text-targets": {
        "alignment": "causal",
        "longest": 12,
        "classes": 70_000,
        "ids": "text",
        "targets": True,
    },
}


def sources(options: dict[str, Any]) -> list[Reference]:
    """One generation after the other: begun, and grown twice."""
    begun = reference(1, short_by=ROWS_PER_SHARD - 60, seed=7, **options)
    middle = grown(begun, 5, longest=12, seed=8)
    return [begun, middle, grown(middle, 7, longest=12, seed=9)]


def expected(source: Reference, digests: list[str]) -> dict[str, Any]:
    """What a reader finds: the arrays of all examples in order, as dtype, shape and base64."""
    arrays = source.arrays(range(source.layout.examples))
    arrays.pop("row_start", None)
    return {
        "digests": digests,
        "examples": [source.layout.first(shards).examples for shards in range(1, source.layout.shards + 1)],
        "ids": list(source.ids),
        "arrays": {
            name: [array.dtype.str, list(array.shape), base64.b64encode(array.tobytes()).decode()]
            for name, array in arrays.items()
            if name != "ids"
        },
    }


def make(folder: Path) -> None:
    """Write an archive a kind."""
    for kind, options in KINDS.items():
        generations = sources(options)
        with tempfile.TemporaryDirectory() as scratch:
            path = build(Path(scratch) / kind, generations[0])
            for source in generations[1:]:
                grow(path, source)
            records = [json.loads((path / "generations" / f"{number}.json").read_bytes()) for number in (1, 2, 3)]
            told = expected(generations[-1], [record["digest"] for record in records])
            with zipfile.ZipFile(
                folder / f"format-1-{kind}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9
            ) as archive:
                for file in sorted(path.rglob("*")):
                    inside = file.relative_to(path.parent)
                    if file.is_file() and inside.parts[1] not in ("lock", "staging", "stamps.json"):
                        archive.writestr(zipfile.ZipInfo(str(inside)), file.read_bytes(), zipfile.ZIP_DEFLATED)
                archive.writestr(zipfile.ZipInfo("expected.json"), json.dumps(told), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
