"""Label sets on a local disk: written shard by shard, read through memory mappings. Knows no teacher and no HTTP."""

from logitcache.storage.local import LocalLabelSet
from logitcache.storage.shards import ShardReport
from logitcache.storage.store import label_set_names

__all__ = ["LocalLabelSet", "ShardReport", "label_set_names"]
