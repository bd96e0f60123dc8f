"""What feeds training: shards, the order of their sequences, packed batches."""
