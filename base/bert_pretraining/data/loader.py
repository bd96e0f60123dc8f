"""Feeds packed batches: whole shards read ahead in one thread, packed in another."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_pretraining.data.balance import balance, window_of
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.packing import PackedBatch, pack
from bert_pretraining.data.shards import FlatShard, ShardInfo, list_shards, read_shard
from bert_pretraining.errors import UserError
from bert_pretraining.seeds import derive

BATCHES_AHEAD = 4
BALANCE_WINDOW = 1024  # batches; more are more level, and take longer to the first batch


@dataclass(frozen=True)
class Feed:
    """Which batches one rank wants.

    batch_size: sequences a batch, on this rank. The rank uses the samples g with
    g % world_size == rank. vocab_size, max_seq_length: what the model can take; a shard
    that goes beyond is an error. batching: "random", or "balanced" for level token
    counts. samples_seen: how many samples all ranks together have used already; nothing
    before that is read. pin_memory: page-locked batches, for copies that do not block.
    """

    batch_size: int
    rank: int
    world_size: int
    vocab_size: int
    max_seq_length: int
    batching: str = "random"
    samples_seen: int = 0
    pin_memory: bool = False


class TrainingLoader:
    """An endless iterator over one rank's batches.

    Args:
        shards: as `list_shards` gives them, the same on every rank.
        order: the data set's order; the same on every rank.
        feed: this rank's wishes.

    Iterating raises UserError when a shard is damaged or gone.
    """

    def __init__(self, shards: list[ShardInfo], order: SampleOrder, feed: Feed) -> None:
        if feed.samples_seen % feed.world_size:
            raise ValueError(
                f"{feed.samples_seen} samples do not divide by {feed.world_size} ranks"
            )
        self._shards = shards
        self._order = order
        self._feed = feed

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
        feed, order = self._feed, self._order
        number, offset = divmod(feed.samples_seen // feed.world_size, feed.batch_size)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as reader:
            loaded: dict[int, Future[FlatShard]] = {}

            def load(shard: int) -> Future[FlatShard]:
                if shard not in loaded:
                    path = self._shards[shard].path
                    arguments = (path, feed.vocab_size, feed.max_seq_length)
                    loaded[shard] = reader.submit(read_shard, *arguments)
                return loaded[shard]

            while True:
                window = self._window(number, offset)
                first, last = (
                    offset + place * feed.batch_size for place in (window[0], window.stop)
                )
                samples = np.arange(first, last, dtype=np.int64) * feed.world_size + feed.rank
                pieces = order.locate(samples)
                needed = [shard for shard, _ in pieces] + order.following_shards(samples)
                for shard in needed:
                    load(shard)
                for shard in set(loaded) - set(needed):
                    del loaded[shard]
                found = [(load(shard).result(), rows) for shard, rows in pieces]
                for batch in self._deal(found, window, number):
                    yield batch.pin_memory() if feed.pin_memory else batch
                number = window.stop

    def _window(self, number: int, offset: int) -> range:
        """The batches that are drawn together with batch `number`."""
        feed, order = self._feed, self._order
        if feed.batching == "random":
            return range(number, number + 1)
        sample = (offset + number * feed.batch_size) * feed.world_size + feed.rank
        epoch = order.epoch(sample)
        starts = tuple(
            -(-(which * order.num_sequences - feed.rank) // feed.world_size)
            for which in (epoch, epoch + 1)
        )
        return window_of(number, feed.batch_size, offset, starts, BALANCE_WINDOW)

    def _deal(
        self, pieces: list[tuple[FlatShard, np.ndarray]], window: range, number: int
    ) -> Iterator[PackedBatch]:
        """The window's batches from batch `number` on."""
        if len(window) == 1:
            yield pack(pieces)
            return
        feed = self._feed
        lengths = np.concatenate([shard.lengths[rows] for shard, rows in pieces])
        piece_of = np.repeat(np.arange(len(pieces)), [len(rows) for _, rows in pieces])
        row_of = np.concatenate([rows for _, rows in pieces])
        seed = derive(self._order.seed, "balance", feed.rank, feed.world_size, window.start)
        batches = balance(lengths, feed.batch_size, np.random.RandomState(seed))
        for chosen in batches[number - window.start :]:
            chosen = chosen[np.argsort(piece_of[chosen], kind="stable")]
            used, starts = np.unique(piece_of[chosen], return_index=True)
            rows = np.split(row_of[chosen], starts[1:])
            yield pack([(pieces[piece][0], part) for piece, part in zip(used, rows, strict=True)])


def load_evaluation_batches(
    directory: Path,
    num_examples: int,
    batch_size: int,
    vocab_size: int,
    max_seq_length: int,
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
        shard = read_shard(info.path, vocab_size, max_seq_length)
        rows = np.arange(min(remaining, shard.num_sequences))
        remaining -= len(rows)
        for start in range(0, len(rows), batch_size):
            if count % world_size == rank:
                mine.append((count, pack([(shard, rows[start : start + batch_size])])))
            count += 1
    if count == 0:
        raise UserError(f"no evaluation sequences in {directory}; make the data set again")
    return count, mine
