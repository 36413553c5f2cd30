"""The only module that imports the Zarr library: it lets the library write a label set's metadata, into memory.

Bytes of chunks never pass through it: the library neither fsyncs nor keeps chunks that are all zero.
"""

from logitcache.labels.errors import MissingExtra
from logitcache.storage.layout import Layout

try:
    import zarr
    from zarr.abc.buffer import Buffer
    from zarr.storage import MemoryStore
except ImportError as error:
    raise MissingExtra(
        f"writing a label set needs the zarr package ({error}): pip install 'logitcache[teacher]'"
    ) from None


def library_metadata(layout: Layout) -> dict[str, bytes]:
    """Every zarr.json by its path in the label set's folder; the group's is last: it makes the label set exist."""
    content: dict[str, Buffer] = {}
    group = zarr.create_group(
        store=MemoryStore(content), zarr_format=3, attributes=layout.group_metadata()["attributes"]
    )
    for array in layout.arrays.values():
        group.create_array(
            array.name,
            shape=layout.array_shape(array),
            chunks=(layout.slots(array), *array.row_shape),
            dtype=array.dtype,
            compressors=None,
            filters=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=array.dimensions,
            attributes={name: list(values) for name, values in array.attributes},
        )
    keys = [*(f"{name}/zarr.json" for name in layout.arrays), "zarr.json"]
    return {key: content[key].to_bytes() for key in keys}
