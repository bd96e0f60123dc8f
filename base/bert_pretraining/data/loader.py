"""Loading packed batches: one thread reads whole shards ahead, another one packs."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from bert_pretraining.data.balance import balance, window_of
from bert_pretraining.data.flat_shard import FlatShard, ShardInfo
from bert_pretraining.data.order import SampleOrder
from bert_pretraining.data.packing import on_device, pack
from bert_pretraining.data.shards import read_listed
from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.seeds import derive
from bert_pretraining.runtime.words import counted

PACKED_TOGETHER = 32  # batches in a group; smaller groups cost more calls and thread switches
GROUPS_AHEAD = 2  # groups of batches that are packed before training asks for them
# Batches that are balanced together. A larger window gives more equal batches, but a later
# first batch.
BALANCE_WINDOW = 1024


@dataclass(frozen=True)
class LoaderConfig:
    """Which batches the loader of one rank gives.

    batch_size: sequences of each batch of this rank. The rank uses the samples g with
    g % world_size == rank. vocab_size, max_seq_length: the limits of the model; a shard
    beyond them is an error. batching: "random", or "balanced" for batches with about equal
    numbers of tokens. samples_seen: how many samples all ranks together have used already,
    any number. pin_for: see `pack`.

    Random batches continue with sample number samples_seen on any number of ranks. Which
    samples share a balanced batch also depends on batch_size and world_size. So a run that
    resumes inside a window with other values assigns the samples of that window again, and
    some of them come twice or not at all in that epoch.
    """

    batch_size: int
    rank: int
    world_size: int
    vocab_size: int
    max_seq_length: int | None
    batching: str = "random"
    samples_seen: int = 0
    pin_for: torch.device | None = None


class TrainingLoader:
    """An endless iterator over one rank's batches.

    Args:
        shards: from `list_shards`, the same on every rank.
        order: the order of the data set, the same on every rank.
        config: for this rank.

    Iterating raises UserError if a shard is damaged or missing.
    """

    def __init__(self, shards: list[ShardInfo], order: SampleOrder, config: LoaderConfig) -> None:
        self._shards = shards
        self._order = order
        self._config = config

    def __iter__(self) -> Iterator[PackedBatch]:
        groups: queue.Queue[list[PackedBatch] | BaseException] = queue.Queue(GROUPS_AHEAD)
        stop = threading.Event()

        def put(item: list[PackedBatch] | BaseException) -> None:
            while not stop.is_set():
                try:
                    return groups.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for group in self._groups():
                    put(group)
                    if stop.is_set():
                        return
            except BaseException as error:  # the consumer raises it
                put(error)

        producer = threading.Thread(target=produce, name="packer", daemon=True)
        producer.start()
        try:
            while True:
                item = groups.get()
                if isinstance(item, BaseException):
                    raise item
                yield from item
        finally:
            stop.set()
            with contextlib.suppress(queue.Empty):
                groups.get_nowait()  # makes room, so that a waiting producer sees `stop` at once
            producer.join()

    def _groups(self) -> Iterator[list[PackedBatch]]:
        config, order = self._config, self._order
        # Samples go to the ranks in turn, so where samples_seen is not a multiple of the number
        # of ranks, the first ranks have used one more than the others. The number of the next
        # batch is the same on all ranks.
        number = config.samples_seen // config.world_size // config.batch_size
        own_samples_seen = -((config.rank - config.samples_seen) // config.world_size)
        offset = own_samples_seen - number * config.batch_size
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader") as reader:
            loaded: dict[int, Future[FlatShard]] = {}

            def load(shard: int) -> Future[FlatShard]:
                if shard not in loaded:
                    arguments = (self._shards[shard], config.vocab_size, config.max_seq_length)
                    loaded[shard] = reader.submit(read_listed, *arguments)
                return loaded[shard]

            while True:
                window = self._window(number, offset)
                first, last = (
                    offset + batch * config.batch_size for batch in (window[0], window.stop)
                )
                samples = np.arange(first, last, dtype=np.int64) * config.world_size + config.rank
                shard_of, row_of = order.locate(samples)
                used, index_of = np.unique(shard_of, return_inverse=True)
                needed = used.tolist() + order.following_shards(samples)
                for shard in needed:
                    load(shard)
                for shard in set(loaded) - set(needed):
                    del loaded[shard]
                shards = [load(shard).result() for shard in used.tolist()]
                batches = self._assign(shards, index_of, row_of, window)[number - window.start :]
                for start in range(0, len(batches), PACKED_TOGETHER):
                    chosen = batches[start : start + PACKED_TOGETHER].ravel()
                    yield pack(
                        shards,
                        index_of[chosen],
                        row_of[chosen],
                        config.batch_size,
                        config.pin_for,
                    )
                number = window.stop

    def _window(self, number: int, offset: int) -> range:
        """The numbers of the batches that are made together with batch `number`."""
        config, order = self._config, self._order
        if config.batching == "random":
            return range(number, number + PACKED_TOGETHER)
        sample = (offset + number * config.batch_size) * config.world_size + config.rank
        epoch = order.epoch(sample)
        starts = tuple(
            -(-(which * order.num_sequences - config.rank) // config.world_size)
            for which in (epoch, epoch + 1)
        )
        return window_of(number, config.batch_size, offset, starts, BALANCE_WINDOW)

    def _assign(
        self, shards: list[FlatShard], index_of: np.ndarray, row_of: np.ndarray, window: range
    ) -> np.ndarray:
        """Assign the sequences of the window to its batches: (K, B) indices into row_of."""
        config = self._config
        if config.batching == "random" or len(window) == 1:
            return np.arange(len(row_of)).reshape(-1, config.batch_size)
        lengths = np.empty(len(row_of), dtype=np.int64)
        for index, shard in enumerate(shards):
            here = index_of == index
            lengths[here] = shard.lengths[row_of[here]]
        seed = derive(self._order.seed, "balance", config.rank, config.world_size, window.start)
        return balance(lengths, config.batch_size, np.random.RandomState(seed))


# Bytes of evaluation batches that may stay on a device. MLPerf's 10,000 sequences have 31 MB to
# 46 MB, divided by the number of ranks.
STAYING_BYTES = 2**27


class EvaluationSet(NamedTuple):
    """One rank's part of the evaluation set.

    num_batches: of all ranks. batches: of this rank, each with its number in
    [0, num_batches).
    """

    num_batches: int
    batches: list[tuple[int, PackedBatch]]

    @property
    def num_bytes(self) -> int:
        """Of this rank's batches."""
        tensors = (one for _, batch in self.batches for one in batch.tensors().values())
        return sum(one.numel() * one.element_size() for one in tensors)

    def near(self, device: torch.device) -> EvaluationSet:
        """The same set on the device, if it has at most STAYING_BYTES; else as it is."""
        if self.num_bytes > STAYING_BYTES:
            return self
        pinned = devices.can_pin(device)
        return self._replace(batches=[(n, batch.to(device, pinned)) for n, batch in self.batches])

    def on(self, device: torch.device) -> Iterator[PackedBatch]:
        """The batches on the device, in order; of those that are not there, one ahead is copied."""
        batches = [batch for _, batch in self.batches]
        if all(batch.input_ids.device == device for batch in batches):
            return iter(batches)
        return on_device(iter(batches), device)


def load_evaluation_set(
    shards: list[ShardInfo], num_examples: int, config: LoaderConfig
) -> EvaluationSet:
    """The first `num_examples` sequences of the evaluation set's shards in fixed batches.

    The batches are numbered over the whole set, and rank r of W takes the numbers n with
    n % W == r. So every number of ranks evaluates exactly the same batches.

    config: batch_size, rank, world_size, pin_for and the model's limits are used.

    Raises UserError for a damaged shard, and where no token of these sequences is masked: the
    accuracy would be that of nothing.
    """
    count = masked = 0
    mine: list[tuple[int, PackedBatch]] = []
    remaining = num_examples
    for info in shards:
        if remaining == 0:
            break
        shard = read_listed(info, config.vocab_size, config.max_seq_length)
        rows = np.arange(min(remaining, shard.num_sequences))
        remaining -= len(rows)
        masked += int(shard.masked_counts[: len(rows)].sum())
        starts = range(0, len(rows), config.batch_size)
        numbers = range(count, count + len(starts))
        count += len(starts)
        own = [number for number in numbers if number % config.world_size == config.rank]
        if own:
            # Only a shard's last batch can have fewer sequences, also among these.
            chosen = [rows[starts[n - numbers.start] :][: config.batch_size] for n in own]
            indices = np.concatenate(chosen)
            zeros = np.zeros(len(indices), dtype=np.int64)
            mine += zip(
                own, pack([shard], zeros, indices, config.batch_size, config.pin_for), strict=True
            )
    if masked == 0:
        raise UserError(
            f"{shards[0].path.parent}: no masked token in the first "
            f"{counted(num_examples - remaining, 'evaluation sequence')}, so the accuracy "
            "would be that of nothing",
            "make the evaluation set again, or raise num_eval_examples",
        )
    return EvaluationSet(count, mine)
