"""The one representation of a batch: real tokens only, sequences end to end."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bert_pretraining.data.shards import FlatShard


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of T real tokens in all, of which M are masked.

    input_ids, segment_ids, position_ids: (T,) int32.
    cu_seqlens: (B + 1,) int32, where each sequence starts; the last entry is T.
    max_seqlen: the longest sequence's length.
    masked_positions: (M,) int32 indices into T; masked_labels: (M,) int64.
    next_sentence_labels: (B,) int64, 1 where the second segment is a random one.
    """

    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    masked_positions: Tensor
    masked_labels: Tensor
    next_sentence_labels: Tensor
    max_seqlen: int

    @property
    def num_sequences(self) -> int:
        return self.next_sentence_labels.shape[0]

    @property
    def num_masked(self) -> int:
        return self.masked_labels.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on `device`; copies from pinned memory do not block."""
        if self.input_ids.device == device:
            return self
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            is_tensor = isinstance(value, Tensor)
            moved[field.name] = value.to(device, non_blocking=True) if is_tensor else value
        return PackedBatch(**moved)

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (needs a CUDA device)."""
        pinned = {}
        for field in fields(self):
            value = getattr(self, field.name)
            pinned[field.name] = value.pin_memory() if isinstance(value, Tensor) else value
        return PackedBatch(**pinned)


def ragged_arange(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Indices of the runs [start, start + length), end to end.

    starts, lengths: (N,) integers. Returns (sum(lengths),) int64.
    """
    ends = np.cumsum(lengths)
    offsets = starts - (ends - lengths)
    return np.repeat(offsets, lengths) + np.arange(ends[-1] if len(ends) else 0)


def pack(pieces: list[tuple[FlatShard, np.ndarray]]) -> PackedBatch:
    """Pack chosen rows of one or more shards, in the order given.

    pieces: (shard, (n,) row numbers) each; at least one row in all.
    """
    lengths = np.concatenate([shard.lengths[rows] for shard, rows in pieces])
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    # 32-bit integers: half the memory to touch here, and to copy to a device.
    position_ids = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)

    input_ids, segment_ids, masked_positions, masked_labels, next_sentence = [], [], [], [], []
    first = 0
    for shard, rows in pieces:
        starts = cu_seqlens[first : first + len(rows)]
        here = slice(starts[0], cu_seqlens[first + len(rows)])
        tokens = np.repeat(shard.offsets[rows], shard.lengths[rows]) + position_ids[here]
        input_ids.append(shard.input_ids[tokens])
        segment_ids.append(shard.segment_ids[tokens])
        masked_counts = shard.masked_counts[rows]
        masked = ragged_arange(shard.masked_offsets[rows], masked_counts)
        masked_positions.append(shard.masked_positions[masked] + np.repeat(starts, masked_counts))
        masked_labels.append(shard.masked_labels[masked])
        next_sentence.append(shard.next_sentence_labels[rows])
        first += len(rows)

    def tensor(parts: list[np.ndarray], dtype: type) -> Tensor:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return torch.from_numpy(whole.astype(dtype))

    return PackedBatch(
        input_ids=tensor(input_ids, np.int32),
        segment_ids=tensor(segment_ids, np.int32),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        masked_positions=tensor(masked_positions, np.int32),
        masked_labels=tensor(masked_labels, np.int64),
        next_sentence_labels=tensor(next_sentence, np.int64),
        max_seqlen=int(lengths.max()),
    )
