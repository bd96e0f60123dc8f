"""Batches with about equal numbers of tokens, so that all ranks have about equal work.

The ranks do not communicate for this. In a window of many batches, sequences are assigned
to batches at random. Then sequences are swapped between the longest and the shortest
batches until all have about the same number of tokens. Every batch keeps exactly B
sequences.
"""

from __future__ import annotations

import numpy as np

MAX_ROUNDS = 24
SWAPS_AT_ONCE = 1 << 20  # possible swaps that are compared at once; limits the memory
LEVEL = 0.0005  # swapping ends when token counts differ by this share of their mean


def balance(lengths: np.ndarray, batch_size: int, random: np.random.RandomState) -> np.ndarray:
    """Assign the sequences of a window to batches with about equal numbers of tokens.

    Args:
        lengths: (K * B,) the number of tokens of each sequence.
        batch_size: B.
        random: for the first assignment and the order of the batches.

    Returns (K, B) indices into `lengths`, each exactly once. The batches have random order.
    """
    batches = random.permutation(len(lengths)).reshape(-1, batch_size)
    half = len(batches) // 2
    if half == 0:
        return batches
    tokens = lengths.astype(np.int32)[batches]
    pairs = max(1, SWAPS_AT_ONCE // batch_size**2)
    for _ in range(MAX_ROUNDS):
        totals = tokens.sum(axis=1, dtype=np.int32)
        if np.ptp(totals) <= LEVEL * totals.mean():
            break
        by_length = np.argsort(totals, kind="stable")
        short, long = by_length[:half], by_length[::-1][:half]
        best = np.concatenate(
            [
                _best_swaps(tokens[long[at : at + pairs]], tokens[short[at : at + pairs]])
                for at in range(0, half, pairs)
            ]
        )
        from_long, from_short = np.divmod(best, batch_size)
        for table in (batches, tokens):
            kept = table[long, from_long].copy()
            table[long, from_long] = table[short, from_short]
            table[short, from_short] = kept
    return batches[random.permutation(len(batches))]


def _best_swaps(long: np.ndarray, short: np.ndarray) -> np.ndarray:
    """For pairs of batches, the swap of one sequence each that makes their tokens most equal.

    long, short: (P, B) tokens. Returns (P,): the index in long, times B, plus that in short.
    """
    wanted = (long.sum(axis=1) - short.sum(axis=1))[:, None, None]
    moved = long[:, :, None] - short[:, None, :]
    return np.abs(wanted - 2 * moved).reshape(len(long), -1).argmin(axis=1)


def window_of(
    number: int, batch_size: int, offset: int, epoch_starts: tuple[int, int], window: int
) -> range:
    """The numbers of the batches that are balanced together with batch `number`.

    Batch n of a rank begins with its sample offset + n * batch_size. A window lies inside
    one epoch. A batch that reaches into the next epoch is a window of its own, so that no
    sequence of the next epoch comes too early.

    epoch_starts: the first sample of this rank in the epoch in which the batch begins, and
    in the next epoch. window: the largest number of batches.
    """
    first = max(0, -(-(epoch_starts[0] - offset) // batch_size))
    end = (epoch_starts[1] - offset) // batch_size
    if not first <= number < end:
        return range(number, number + 1)
    start = first + (number - first) // window * window
    return range(start, min(start + window, end))
