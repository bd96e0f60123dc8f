"""Feeds packed batches: whole shards read ahead in one thread, packed in another."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.packing import PackedBatch, pack
from bert_pretraining.data.shards import FlatShard, ShardInfo, list_shards, read_shard
from bert_pretraining.errors import UserError

BATCHES_AHEAD = 4


class TrainingLoader:
    """An endless iterator over one rank's batches.

    Args:
        shards: as `list_shards` gives them, the same on every rank.
        order: the data set's order; the same on every rank.
        batch_size: sequences a batch, on this rank.
        rank, world_size: this rank uses the samples g with g % world_size == rank.
        samples_seen: how many samples all ranks together have used already. Nothing
            before that is read.
        vocab_size: ids at or above it are an error.
        pin_memory: page-locked batches, for copies to a GPU that do not block.

    Iterating raises UserError when a shard is damaged or gone.
    """

    def __init__(
        self,
        shards: list[ShardInfo],
        order: SampleOrder,
        batch_size: int,
        rank: int,
        world_size: int,
        vocab_size: int,
        samples_seen: int = 0,
        pin_memory: bool = False,
    ) -> None:
        if samples_seen % world_size:
            raise ValueError(f"{samples_seen} samples do not divide by {world_size} ranks")
        self._shards = shards
        self._order = order
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._vocab_size = vocab_size
        self._first = samples_seen // world_size
        self._pin_memory = pin_memory

    def __iter__(self) -> Iterator[PackedBatch]:
        batches: queue.Queue[PackedBatch | BaseException] = queue.Queue(BATCHES_AHEAD)
        stop = threading.Event()

        def put(item: PackedBatch | BaseException) -> None:
            while not stop.is_set():
                try:
                    return batches.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for batch in self._batches():
                    put(batch)
                    if stop.is_set():
                        return
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        producer = threading.Thread(target=produce, name="packer", daemon=True)
        producer.start()
        try:
            while True:
                item = batches.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            producer.join()

    def _batches(self) -> Iterator[PackedBatch]:
        loaded: dict[int, Future[FlatShard]] = {}
        first = self._first
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as reader:

            def load(shard: int) -> Future[FlatShard]:
                if shard not in loaded:
                    path = self._shards[shard].path
                    loaded[shard] = reader.submit(read_shard, path, self._vocab_size)
                return loaded[shard]

            while True:
                local = np.arange(first, first + self._batch_size, dtype=np.int64)
                samples = local * self._world_size + self._rank
                pieces = self._order.locate(samples)
                wanted = {shard for shard, _ in pieces}
                for shard in wanted:
                    load(shard)
                ahead = self._order.following_shards(samples)
                for shard in ahead:
                    load(shard)
                batch = pack([(load(shard).result(), rows) for shard, rows in pieces])
                yield batch.pin_memory() if self._pin_memory else batch
                for shard in set(loaded) - wanted - set(ahead):
                    del loaded[shard]
                first += self._batch_size


def load_evaluation_batches(
    directory: Path,
    num_examples: int,
    batch_size: int,
    vocab_size: int,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[int, list[tuple[int, PackedBatch]]]:
    """The first `num_examples` sequences of the evaluation set in fixed batches.

    The batches are numbered over the whole set whatever the number of ranks is, and
    rank r of W takes every W-th: so any world size evaluates exactly the same thing.

    Returns the number of batches over all ranks, and this rank's (number, batch) pairs.
    """
    count = 0
    mine: list[tuple[int, PackedBatch]] = []
    remaining = num_examples
    for info in list_shards(directory):
        if remaining == 0:
            break
        shard = read_shard(info.path, vocab_size)
        rows = np.arange(min(remaining, shard.num_sequences))
        remaining -= len(rows)
        for start in range(0, len(rows), batch_size):
            if count % world_size == rank:
                mine.append((count, pack([(shard, rows[start : start + batch_size])])))
            count += 1
    if count == 0:
        raise UserError(f"no evaluation sequences in {directory}; make the data set again")
    return count, mine
