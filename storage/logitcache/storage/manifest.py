"""The manifest: a label set's identity and shape in the attributes of its Zarr group, read without the Zarr library.

Reading checks everything against what this version would have written, before anything is allocated or mapped.
"""

import json
from pathlib import Path
from typing import Any

from logitcache.labels.errors import LabelSetNotFound, NewerFormat, NotALabelSet
from logitcache.labels.identity import FORMAT_VERSION, Identity
from logitcache.storage.layout import MAX_EXAMPLES, MOST_SHARDS, ROW_QUANTUM, Layout, Places

MAX_METADATA_BYTES = 1 << 20
"""A longer zarr.json is refused unread."""


def read_layout(root: Path) -> Layout:
    """The layout of the label set in a folder.

    Raises:
        LabelSetNotFound: there is no such folder, or no label set was begun in it.
        NewerFormat: a newer logitcache wrote it.
        NotALabelSet: the folder holds something else, or its metadata are damaged.
    """
    places = Places(root)
    if not places.group.is_file():
        if root.exists() and not places.lock.exists():
            raise NotALabelSet(f"{root} is not a label set: it has no zarr.json")
        raise LabelSetNotFound(f"there is no label set in {root}; make it with `logitcache precompute {root.name} ...`")
    layout = _layout(root, _read_json(places.group))
    for array in layout.arrays.values():
        path = root / array.name / "zarr.json"
        found, expected = _read_json(path), layout.array_metadata(array)
        wrong = [key for key, value in expected.items() if found.get(key) != value]
        if wrong:
            raise NotALabelSet(
                f"{path}: {wrong[0]} is {found.get(wrong[0])!r}, not {expected[wrong[0]]!r}; "
                "the array was changed after it was made: restore it, or precompute the label set anew"
            )
    return layout


def _layout(root: Path, group: dict[str, Any]) -> Layout:
    attributes = group.get("attributes")
    manifest = attributes.get("logitcache") if isinstance(attributes, dict) else None
    if not isinstance(manifest, dict):
        raise NotALabelSet(
            f"{root} is a Zarr {group.get('node_type', 'node')} that logitcache did not write; name another"
        )
    version = manifest.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise NewerFormat(
            f"{root} has format version {version}, this logitcache reads up to {FORMAT_VERSION}: upgrade logitcache",
            found=version,
            supported=FORMAT_VERSION,
        )
    try:
        examples, rows_per_shard = manifest["examples"], manifest["rows_per_shard"]
        if not (type(examples) is int and 1 <= examples <= MAX_EXAMPLES):
            raise ValueError(f"examples={examples!r} is out of bounds")
        if not (type(rows_per_shard) is int and ROW_QUANTUM <= rows_per_shard <= MAX_EXAMPLES):
            raise ValueError(f"rows_per_shard={rows_per_shard!r} is out of bounds")
        if rows_per_shard % ROW_QUANTUM:
            raise ValueError(f"rows_per_shard={rows_per_shard} is not a multiple of {ROW_QUANTUM}")
        if examples > MOST_SHARDS * rows_per_shard:
            raise ValueError(
                f"{examples:,} examples in shards of {rows_per_shard:,} are more than {MOST_SHARDS:,} shards"
            )
        return Layout(Identity.from_json(manifest["identity"]), examples, rows_per_shard)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise NotALabelSet(f"{root}/zarr.json: the manifest is damaged: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise NotALabelSet(f"{path} is too long to be a label set's")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotALabelSet(f"{path} is missing: the label set is damaged; restore it, or precompute it anew") from None
    except (ValueError, RecursionError) as error:
        raise NotALabelSet(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise NotALabelSet(f"{path} is not a JSON object")
    return value
