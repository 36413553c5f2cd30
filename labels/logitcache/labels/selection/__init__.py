"""From logits on any device to the rows that are stored. It needs torch, and nothing else of `labels` does."""

from logitcache.labels.selection.kernels import settle

# At the first import, and so before a teacher or a dataset is made, and in one thread: the import lock sees to it.
settle()
