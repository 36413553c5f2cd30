"""The manifest: a label set's identity and shape in the attributes of its Zarr group, read without the Zarr library.

Reading checks everything against what this version would have written, before anything is allocated or mapped.
"""

from pathlib import Path
from typing import Any

from logitcache.labels.errors import LabelSetNotFound, NewerFormat, NotALabelSet
from logitcache.labels.identity import FORMAT_VERSION, Identity
from logitcache.storage.layout import Layout
from logitcache.storage.packing import MOST_SHARDS, MOST_SLOTS, QUANTUM
from logitcache.storage.places import Places
from logitcache.storage.reading import parsed, read_file, refuse_links, status

MAX_METADATA_BYTES = 1 << 20
"""A longer zarr.json is refused unread."""


def read_layout(root: Path) -> Layout:
    """The layout of the label set in a folder.

    Raises:
        LabelSetNotFound: there is no such folder, or no label set was begun in it.
        NewerFormat: a newer logitcache wrote it.
        NotALabelSet: the folder holds something else, or its metadata are damaged.
        StorageFault: the folder is a symbolic link or holds one, or cannot be read.
    """
    places = Places(root)
    try:
        refuse_links(root)
        group = _read_json(root, places.group)
    except FileNotFoundError:
        if status(root) is not None and status(places.lock) is None:
            raise NotALabelSet(f"{root} is not a label set: it has no zarr.json") from None
        raise LabelSetNotFound(
            f"there is no label set in {root}; make it with `logitcache precompute {root.name} ...`"
        ) from None
    layout = _layout(root, group)
    for array in layout.arrays.values():
        path = root / array.name / "zarr.json"
        try:
            found = _read_json(root, path)
        except FileNotFoundError:
            raise NotALabelSet(
                f"{path} is missing: the label set is damaged; restore it, or precompute it anew"
            ) from None
        expected = layout.array_metadata(array)
        wrong = [key for key, value in expected.items() if found.get(key) != value]
        if not _holds(found.get("shape"), shape := list(layout.array_shape(array))):
            wrong, expected = [*wrong, "shape"], expected | {"shape": shape}
        if found.get("storage_transformers"):
            wrong, expected = [*wrong, "storage_transformers"], expected | {"storage_transformers": []}
        if wrong:
            raise NotALabelSet(
                f"{path}: {wrong[0]} is {found.get(wrong[0])!r:.200}, not {expected[wrong[0]]!r}; "
                "the array was changed after it was made: restore it, or precompute the label set anew"
            )
    return layout


def _layout(root: Path, group: dict[str, Any]) -> Layout:
    attributes = group.get("attributes")
    manifest = attributes.get("logitcache") if isinstance(attributes, dict) else None
    if not isinstance(manifest, dict):
        raise NotALabelSet(
            f"{root} is a Zarr {group.get('node_type', 'node')!s:.20} that logitcache did not write; name another"
        )
    version = manifest.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise NewerFormat(
            f"{root} has format version {version!s:.40}, this logitcache reads up to {FORMAT_VERSION}: "
            "upgrade logitcache",
            found=version,
            supported=FORMAT_VERSION,
        )
    try:
        identity = Identity.from_json(manifest["identity"])
        return Layout(
            identity,
            rows_per_shard=_slots(manifest, "rows_per_shard"),
            examples_per_shard=_slots(manifest, "examples_per_shard"),
            **_shards(manifest, identity.views if identity.alignment == "pointwise" else None),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise NotALabelSet(f"{root}/zarr.json: the manifest is damaged: {error!s:.200}") from None


def _holds(found: Any, shape: list[int]) -> bool:
    """The shape found is this one, or longer: growing writes the arrays' shapes first and the manifest last."""
    if not isinstance(found, list) or len(found) != len(shape) or any(type(size) is not int for size in found):
        return False
    return found[0] >= shape[0] and found[1:] == shape[1:]


def _slots(manifest: dict[str, Any], name: str) -> int:
    slots = manifest[name]
    if not (type(slots) is int and QUANTUM <= slots <= MOST_SLOTS and slots % QUANTUM == 0):
        raise ValueError(f"{name}={slots!r} is not a multiple of {QUANTUM:,} up to {MOST_SLOTS:,}")
    return slots


def _shards(manifest: dict[str, Any], rows_each: int | None) -> dict[str, tuple[int, ...]]:
    """Examples and rows of each shard, none of which uses more slots than it has; rows of each example, if equal."""
    counts: dict[str, list[int]] = manifest["shards"]
    for name in ("examples", "rows"):
        most = manifest[f"{name}_per_shard"]
        if not all(type(count) is int and 1 <= count <= most for count in counts[name]):
            raise ValueError(f"a shard has not 1 to {most:,} {name}")
    examples, rows = counts["examples"], counts["rows"]
    if set(counts) != {"examples", "rows"} or len(examples) != len(rows):
        raise ValueError("its shards are not told by examples and rows")
    if not 1 <= len(examples) <= MOST_SHARDS:
        raise ValueError(f"{len(examples):,} shards are not 1 to {MOST_SHARDS:,}")
    if rows_each is not None and any(
        count * rows_each != all_rows
        for count, all_rows in [
            (manifest["examples_per_shard"], manifest["rows_per_shard"]),
            *zip(examples, rows, strict=True),
        ]
    ):
        raise ValueError(f"examples with {rows_each:,} row{'s' * (rows_each > 1)} each have other rows than examples")
    if any(count < each for count, each in zip(rows, examples, strict=True)):
        raise ValueError("a shard has fewer rows than examples")
    return {"shard_examples": tuple(examples), "shard_rows": tuple(rows)}


def _read_json(root: Path, path: Path) -> dict[str, Any]:
    try:
        value = parsed(read_file(root, path, MAX_METADATA_BYTES, NotALabelSet))
    except ValueError as error:
        raise NotALabelSet(f"{path} is not JSON: {error!s:.200}") from None
    if not isinstance(value, dict):
        raise NotALabelSet(f"{path} is not a JSON object")
    return value
