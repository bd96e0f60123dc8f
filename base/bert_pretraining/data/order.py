"""Which sequence comes when: a pure function of (seed, sample number).

Samples are numbered 0, 1, 2, ... without end: sample g belongs to epoch g // N, N the
number of sequences. In every epoch the shards are shuffled and the sequences inside
each shard are shuffled; the epoch is then dealt, sample by sample, to L lanes, each of
which walks its own stretch of the shuffled shards:

    shuffled shards   | 7 7 7 7 | 2 2 2 | 5 5 5 5 5 | ...
    L = 2 lanes         0 0 0 0   0 0 1   1 1 1 1 1
    samples             0 2 4 6   8 ... |  1 3 5 7 ...

Rank r of W uses the samples g with g % W == r, so where W divides L a rank reads its own
lanes' shards only. Every sequence is used once an epoch whatever N, L and W are, batches
are always full (one may reach into the next epoch), and the order does not depend on W:
a resumed run only needs the number of samples seen and L. (Balanced batches deal a window of
samples among themselves; see `loader.py`.)
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from bert_pretraining.runtime.seeds import derive


class SampleOrder:
    """The order of a data set's sequences.

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
        sizes = [len(range(lane, self.num_sequences, lanes)) for lane in range(lanes)]
        self._lane_starts = np.concatenate([[0], np.cumsum(sizes)])
        self._epoch_shards = lru_cache(maxsize=4)(self._shuffle_shards)
        self._shard_rows = lru_cache(maxsize=4 * lanes + 4)(self._shuffle_rows)

    def epoch(self, sample: int) -> int:
        """The epoch that sample number `sample` belongs to."""
        return sample // self.num_sequences

    def shard_ordinal(self, sample: int) -> int:
        """How many shards the sample's lane has left behind in this epoch."""
        epoch, in_epoch = divmod(sample, self.num_sequences)
        lane, step = in_epoch % self.lanes, in_epoch // self.lanes
        _, ends = self._epoch_shards(epoch)
        start = self._lane_starts[lane]
        first, now = np.searchsorted(ends, [start, start + step], side="right")
        return int(now - first)

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the given samples lie.

        samples: (n,) int64 sample numbers. Returns the shard of each and its row in that
        shard, (n,) int64 both.
        """
        shard_of, row_of = np.empty_like(samples), np.empty_like(samples)
        epochs = samples // self.num_sequences
        for epoch in np.unique(epochs).tolist():
            mine = np.flatnonzero(epochs == epoch)
            in_epoch = samples[mine] - epoch * self.num_sequences
            place = self._lane_starts[in_epoch % self.lanes] + in_epoch // self.lanes
            shards, ends = self._epoch_shards(epoch)
            index = np.searchsorted(ends, place, side="right")
            shard_of[mine] = shards[index]
            row = place - (ends - self.shard_sizes[shards])[index]
            for which in np.unique(index).tolist():
                here = index == which
                rows = self._shard_rows(epoch, int(shards[which]))
                row_of[mine[here]] = rows[row[here]]
        return shard_of, row_of

    def following_shards(self, samples: np.ndarray) -> list[int]:
        """The shards that the lanes of these samples come to next, for prefetching."""
        following = []
        epoch = int(samples[-1]) // self.num_sequences
        in_epoch = samples[samples // self.num_sequences == epoch] - epoch * self.num_sequences
        shards, ends = self._epoch_shards(epoch)
        for lane in np.unique(in_epoch % self.lanes):
            last = in_epoch[in_epoch % self.lanes == lane][-1]
            place = self._lane_starts[lane] + last // self.lanes
            next_place = ends[np.searchsorted(ends, place, side="right")]
            if next_place < self._lane_starts[lane + 1]:
                following.append(int(shards[np.searchsorted(ends, next_place, side="right")]))
            else:
                next_shards, next_ends = self._epoch_shards(epoch + 1)
                start = self._lane_starts[lane]
                which = np.searchsorted(next_ends, start, side="right")
                following.append(int(next_shards[min(which, len(next_shards) - 1)]))
        return following

    def _shuffle_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # RandomState's streams are frozen by NumPy's policy (NEP 19), so that a run
        # resumes in the same order under another NumPy; default_rng's are not.
        random = np.random.RandomState(derive(self.seed, "shards", epoch))
        shards = random.permutation(len(self.shard_sizes))
        return shards, np.cumsum(self.shard_sizes[shards])

    def _shuffle_rows(self, epoch: int, shard: int) -> np.ndarray:
        random = np.random.RandomState(derive(self.seed, "rows", epoch, shard))
        return random.permutation(int(self.shard_sizes[shard]))
