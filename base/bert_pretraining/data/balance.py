"""Batches of level token counts: equal work on every rank, no communication.

In a window of many batches, sequences are assigned to batches at random, and then
sequences are swapped between the longest and the shortest batches until all have about
the same number of tokens. Every batch keeps exactly B sequences.
"""

from __future__ import annotations

import numpy as np

MAX_ROUNDS = 24
SWAPS_AT_ONCE = 1 << 20  # bounds the memory: a few numbers for each swap that is looked at
LEVEL = 0.0005  # spread of token counts, as a share of their mean, that ends the swapping


def balance(lengths: np.ndarray, batch_size: int, random: np.random.RandomState) -> np.ndarray:
    """Assign a window's sequences to batches of level token counts.

    Args:
        lengths: (K * B,) tokens of each sequence.
        batch_size: B.
        random: decides everything but the swaps.

    Returns (K, B) indices into `lengths`, each exactly once, the batches in random order.
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
    """For pairs of batches, the swap of one sequence each that levels their tokens best.

    long, short: (P, B) tokens. Returns (P,): the place in long times B plus that in short.
    """
    wanted = (long.sum(axis=1) - short.sum(axis=1))[:, None, None]
    moved = long[:, :, None] - short[:, None, :]
    return np.abs(wanted - 2 * moved).reshape(len(long), -1).argmin(axis=1)


def window_of(
    number: int, batch_size: int, offset: int, epoch_starts: tuple[int, int], window: int
) -> range:
    """The batch numbers that are balanced together with batch `number`.

    Batch n of a rank holds its samples offset + n * batch_size and on. Windows lie inside
    one epoch; a batch that reaches into the next epoch is a window of its own, so that no
    sequence is drawn before another epoch's turn.

    epoch_starts: the rank's first sample of the epoch that the batch begins in, and of the
    next. window: batches at most.
    """
    first = max(0, -(-(epoch_starts[0] - offset) // batch_size))
    end = (epoch_starts[1] - offset) // batch_size
    if not first <= number < end:
        return range(number, number + 1)
    start = first + (number - first) // window * window
    return range(start, min(start + window, end))
