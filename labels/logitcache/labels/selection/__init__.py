"""From logits on any device to the rows that are stored. It needs torch, and nothing else of `labels` does."""
