"""The model's input and only representation of a batch: packed sequences, without padding."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """B sequences with T tokens in total, of which M are masked.

    input_ids, segment_ids, position_ids: (T,) int32.
    cu_seqlens: (B + 1,) int32, the start of each sequence; the last entry is T.
    max_seqlen: the longest sequence's length.
    token_pairs: the sum of the squares of the lengths, which decides the arithmetic of attention; 0
        where it is not counted.
    masked_positions: (M,) int32 indices into T; masked_labels: (M,) int64.
    next_sentence_labels: (B,) int64, 1 if the second segment is a random one.
    """

    input_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    masked_positions: Tensor
    masked_labels: Tensor
    next_sentence_labels: Tensor
    max_seqlen: int
    token_pairs: int = 0

    @property
    def num_sequences(self) -> int:
        return self.next_sentence_labels.shape[0]

    @property
    def num_masked(self) -> int:
        return self.masked_labels.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    def num_predictions(self, loss: str) -> int:
        """The number of predictions that the loss of this name ("mlm", "nsp") sums over."""
        return {"mlm": self.num_masked, "nsp": self.num_sequences}[loss]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device, non_blocking: bool = False) -> PackedBatch:
        """The same batch on `device`.

        non_blocking: do not wait for the copies; this batch must stay until they are made.
        """
        if self.input_ids.device == device:
            return self
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self.tensors().items()
        }
        return PackedBatch(**moved, max_seqlen=self.max_seqlen, token_pairs=self.token_pairs)


def smallest_batch(device: torch.device) -> PackedBatch:
    """One sequence of two tokens, one of them masked: for a warm-up pass."""

    def zeros(count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=device)

    return PackedBatch(
        input_ids=zeros(2),
        segment_ids=zeros(2),
        position_ids=torch.arange(2, dtype=torch.int32, device=device),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32, device=device),
        masked_positions=zeros(1),
        masked_labels=zeros(1, torch.int64),
        next_sentence_labels=zeros(1, torch.int64),
        max_seqlen=2,
    )
