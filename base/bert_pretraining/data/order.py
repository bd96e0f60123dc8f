"""The order of the sequences: a pure function of the seed and the sample number.

Samples are numbered 0, 1, 2, ... without end. With N sequences, sample g belongs to epoch
g // N. In every epoch the shards are shuffled, and the sequences inside each shard are
shuffled. The epoch is then divided into L lanes of consecutive sequences of the shuffled
shards, and the samples take the lanes in turn:

    shuffled shards   | 7 7 7 7 | 2 2 2 | 5 5 5 5 5 | ...
    L = 2 lanes         0 0 0 0   0 0 1   1 1 1 1 1
    samples             0 2 4 6   8 ... |  1 3 5 7 ...

Rank r of W uses the samples g with g % W == r. So where W divides L, a rank reads only the
shards of its own lanes. Every sequence is used once in each epoch, whatever N, L and W are.
Batches are always full; one may reach into the next epoch. The order does not depend on W,
so that a run resumes with the number of samples seen and L alone. (With balanced batches, a
window of samples is assigned to batches in another order; see `loader.py`.)
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bert_pretraining.runtime.seeds import derive


class SampleOrder:
    """The order of the sequences of a data set.

    Args:
        shard_sizes: sequences in each shard, in the order of the sorted file names.
        seed: the master seed.
        lanes: L above, at least 1.
    """

    def __init__(self, shard_sizes: list[int], seed: int, lanes: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_sequences = int(self.shard_sizes.sum())
        if self.num_sequences < 1:
            raise ValueError("no sequences in the data set")
        if lanes < 1:
            raise ValueError(f"lanes must be at least 1, not {lanes}")
        self.seed = seed
        self.lanes = lanes
        sizes = np.maximum(-(-(self.num_sequences - np.arange(lanes)) // lanes), 0)
        self._lane_starts = np.concatenate([[0], np.cumsum(sizes)])
        self._epoch_shards = lru_cache(maxsize=4)(self._shuffle_shards)
        self._rows: dict[tuple[int, int], np.ndarray] = {}  # of the latest samples' shards

    def epoch(self, sample: int) -> int:
        """The epoch that sample number `sample` belongs to."""
        return sample // self.num_sequences

    def shard_ordinal(self, sample: int) -> int:
        """How many shards the lane of the sample has finished in this epoch."""
        epoch, in_epoch = divmod(sample, self.num_sequences)
        lane, step = in_epoch % self.lanes, in_epoch // self.lanes
        _, ends = self._epoch_shards(epoch)
        start = self._lane_starts[lane]
        first, now = np.searchsorted(ends, [start, start + step], side="right")
        return int(now - first)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the given samples in the shards.

        samples: (n,) int64 sample numbers. Returns the shard of each sample and its row in
        that shard, both (n,) int64. The shuffled rows of their shards stay in memory until the
        next call, which usually asks for most of them again.
        """
        shard_of, row_of = np.empty_like(samples), np.empty_like(samples)
        before, self._rows = self._rows, {}
        epochs = samples // self.num_sequences
        for epoch in np.unique(epochs).tolist():
            mine = np.flatnonzero(epochs == epoch)
            in_epoch = samples[mine] - epoch * self.num_sequences
            position = self._lane_starts[in_epoch % self.lanes] + in_epoch // self.lanes
            shards, ends = self._epoch_shards(epoch)
            index = np.searchsorted(ends, position, side="right")
            shard_of[mine] = shards[index]
            row = position - (ends - self.shard_sizes[shards])[index]
            together = np.argsort(index, kind="stable")
            used, starts = np.unique(index[together], return_index=True)
            parts = np.split(together, starts[1:])
            for shard, here in zip(shards[used].tolist(), parts, strict=True):
                rows = before.get((epoch, shard))
                if rows is None:
                    rows = self._shuffle_rows(epoch, shard)
                self._rows[epoch, shard] = rows
                row_of[mine[here]] = rows[row[here]]
        return shard_of, row_of

    def following_shards(self, samples: np.ndarray) -> list[int]:
        """The next shard of each lane that these samples belong to, for prefetching."""
        epoch = int(samples[-1]) // self.num_sequences
        in_epoch = samples[samples // self.num_sequences == epoch] - epoch * self.num_sequences
        in_epoch = in_epoch[::-1]  # so that the first of a lane is its latest
        shards, ends = self._epoch_shards(epoch)
        lanes, latest = np.unique(in_epoch % self.lanes, return_index=True)
        position = self._lane_starts[lanes] + in_epoch[latest] // self.lanes
        next_start = ends[np.searchsorted(ends, position, side="right")]
        following = _shards_at(next_start, shards, ends)
        ended = next_start >= self._lane_starts[lanes + 1]
        if ended.any():
            starts = self._lane_starts[lanes[ended]]
            following[ended] = _shards_at(starts, *self._epoch_shards(epoch + 1))
        return following.tolist()

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # NumPy never changes the numbers of RandomState (NEP 19), so that a run resumes in the
        # same order with another NumPy. It may change those of default_rng.
        random = np.random.RandomState(derive(self.seed, "shards", epoch))
        shards = random.permutation(len(self.shard_sizes))
        return shards, np.cumsum(self.shard_sizes[shards])

    def _shuffle_rows(self, epoch: int, shard: int) -> np.ndarray:
        random = np.random.RandomState(derive(self.seed, "rows", epoch, shard))
        return random.permutation(int(self.shard_sizes[shard]))


def _shards_at(positions: np.ndarray, shards: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The shard at each position of an epoch; the last one for positions behind the end."""
    which = np.searchsorted(ends, positions, side="right")
    return shards[np.minimum(which, len(shards) - 1)]
