"""A shard in memory, the checks that it must pass, and what a reader of a file format is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_pretraining.errors import UserError

AGAIN = "make the shard again"


@dataclass(frozen=True)
class ShardInfo:
    """What the header of a shard says, before any row is read.

    max_seq_length is None for a shard whose rows vary in length. forms: what is read in another
    form than this package's own, for people.
    """

    path: Path
    num_sequences: int
    max_seq_length: int | None
    forms: tuple[str, ...] = ()


@dataclass(frozen=True)
class FlatShard:
    """A whole shard in memory.

    input_ids, segment_ids: (T,) the tokens of all N sequences, one sequence behind the
    other. The entries between the end of one sequence and the start of the next are
    padding. They are never used, and stay because removing them takes longer than copying
    the sequences of a batch.
    offsets, lengths: (N,) int64, the index of each sequence's first token, and its length.
    masked_positions: (M,) relative to the start of the sequence; masked_labels: (M,).
    masked_offsets, masked_counts: (N,) int64, the same for the masked tokens.
    next_sentence_labels: (N,).
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    masked_positions: np.ndarray
    masked_labels: np.ndarray
    masked_offsets: np.ndarray
    masked_counts: np.ndarray
    next_sentence_labels: np.ndarray

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class ShardFormat:
    """How files of one format are read. Both functions raise UserError that names the file.

    inspect: the header of a file. read: the whole file, checked against a vocabulary size.
    """

    inspect: Callable[[Path], ShardInfo]
    read: Callable[[Path, int], FlatShard]


def flatten(arrays: dict[str, np.ndarray], vocab_size: int, where: str) -> FlatShard:
    """Turn padded arrays, named and shaped as in a fixed-length file, into a checked FlatShard.

    Errors begin with `where`.
    """
    mask = arrays["input_mask"].astype(bool)
    lengths = mask.sum(axis=1, dtype=np.int16).astype(np.int64)
    # The mask must not have a zero before a one.
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise UserError(f"{where}: input_mask is not ones followed by zeros", AGAIN)
    labelled = arrays["masked_lm_ids"] != 0
    counts = np.count_nonzero(labelled, axis=1)
    count, length = mask.shape
    shard = FlatShard(
        input_ids=arrays["input_ids"].reshape(-1),
        segment_ids=arrays["segment_ids"].reshape(-1),
        offsets=np.arange(count, dtype=np.int64) * length,
        lengths=lengths,
        masked_positions=arrays["masked_lm_positions"][labelled],
        masked_labels=arrays["masked_lm_ids"][labelled],
        masked_offsets=np.cumsum(counts) - counts,
        masked_counts=counts,
        next_sentence_labels=arrays["next_sentence_labels"],
    )
    return checked(shard, vocab_size, where)


def checked(shard: FlatShard, vocab_size: int, where: str) -> FlatShard:
    """Return the shard if a model with this vocabulary can train on it, else raise UserError."""
    if shard.lengths.size and shard.lengths.min() < 1:
        raise UserError(f"{where}: a sequence without tokens", AGAIN)
    for name, ids, limit in (
        ("input_ids", shard.input_ids, vocab_size),
        ("segment_ids", shard.segment_ids, 2),
        ("masked_lm_ids", shard.masked_labels, vocab_size),
        ("next_sentence_labels", shard.next_sentence_labels, 2),
    ):
        if not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"{where}: {name} is {ids.dtype}, not integer", AGAIN)
        if _within(ids, limit):
            continue
        if len(ids) == len(shard.input_ids):
            ids = ids[ragged_arange(shard.offsets, shard.lengths)]
            if _within(ids, limit):
                continue  # only the padding was outside
        wrong = ids.max() if ids.max() >= limit else ids.min()
        problem = f"{where}: {name} has the value {wrong}, but "
        if limit == vocab_size and wrong < 0:
            raise UserError(f"{where}: {name} has the value {wrong}, which is no token", AGAIN)
        if limit == vocab_size:
            raise UserError(
                f"{problem}the model's vocabulary has {vocab_size} entries",
                "use data and a bert_config.json of one vocabulary",
            )
        raise UserError(f"{problem}only 0 and 1 make sense", AGAIN)
    positions = shard.masked_positions
    ends = np.repeat(shard.lengths, shard.masked_counts)
    if positions.size and (positions.min() < 0 or (positions >= ends).any()):
        raise UserError(f"{where}: a masked position outside its sequence", AGAIN)
    return shard


def _within(values: np.ndarray, limit: int) -> bool:
    return not values.size or (values.min() >= 0 and values.max() < limit)


def ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The indices start, start + 1, ..., start + length - 1 of each run, run after run.

    starts, lengths: (N,) integers. Returns (sum(lengths),) int64.
    """
    ends = np.cumsum(lengths)
    offsets = starts - (ends - lengths)
    return np.repeat(offsets, lengths) + np.arange(ends[-1] if len(ends) else 0)
