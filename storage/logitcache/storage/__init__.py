"""Label sets on a local disk: written shard by shard, read through memory mappings. Knows no teacher and no HTTP."""

from logitcache.storage.local import LocalLabelSet
from logitcache.storage.recorded_label_set import Readable, RecordedLabelSet, open_label_set
from logitcache.storage.recording import Recording
from logitcache.storage.shards import ShardReport
from logitcache.storage.store import label_set_names

__all__ = [
    "LocalLabelSet",
    "Readable",
    "RecordedLabelSet",
    "Recording",
    "ShardReport",
    "label_set_names",
    "open_label_set",
]
