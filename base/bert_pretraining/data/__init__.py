"""Shards, their order, packed batches, and the makers of data sets."""
