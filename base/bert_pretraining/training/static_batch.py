"""Batches of constant shape, for compiled code and CUDA graphs.

Buffers of a fixed size take one packed batch after the other. What lies behind a batch's
last token stays there from the batches before it: valid, but meaningless numbers. It is
cut into dummy sequences of its own, whose labels do not count, so that nothing of it
reaches a loss or a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bert_pretraining.model.batch import PackedBatch

# Of the MLPerf training set (Wikipedia), the mean of tokens and of masked tokens a sequence,
# and how much more than the mean a balanced batch may need.
MEAN_TOKENS, MEAN_MASKED, MARGIN = 255.8, 38.2, 1.02
MULTIPLE = 64  # token and row counts that suit matrix kernels


@dataclass(frozen=True)
class Budget:
    """The constant sizes of a batch.

    tokens, sequences, masked: at most so many. dummies: sequences of at most max_seqlen
    tokens each that fill up `tokens`; a batch of fewer tokens than they can fill does not
    fit either.
    """

    tokens: int
    sequences: int
    masked: int
    max_seqlen: int
    dummies: int

    def fits(self, batch: PackedBatch) -> bool:
        return (
            batch.num_sequences == self.sequences
            and self.tokens - self.dummies * self.max_seqlen <= batch.num_tokens <= self.tokens
            and batch.num_masked <= self.masked
            and batch.max_seqlen <= self.max_seqlen
        )


def budgets(batch_size: int, max_seqlen: int, static_tokens: int = 0) -> tuple[Budget, Budget]:
    """Sizes for the usual balanced batch, and for any batch whatever.

    batch_size: sequences. max_seqlen: tokens of one. static_tokens: tokens of the usual
    batch; 0 for those of the MLPerf training set.
    """
    # No procedure masks more than 15%, but for rounding: 76 of 512 in the published set.
    max_masked = math.ceil(0.15 * max_seqlen) + 1
    most = batch_size * max_seqlen
    tokens = static_tokens or _rounded(batch_size * MEAN_TOKENS * MARGIN)
    masked = _rounded(max(batch_size * MEAN_MASKED, tokens / MEAN_TOKENS * MEAN_MASKED) * MARGIN)
    usual = Budget(
        min(tokens, most),
        batch_size,
        min(masked, batch_size * max_masked),
        max_seqlen,
        # Tokens that are short of the budget by a tenth still fit.
        math.ceil(0.1 * tokens / max_seqlen) + 1,
    )
    return usual, Budget(most, batch_size, batch_size * max_masked, max_seqlen, batch_size)


def _rounded(count: float) -> int:
    return math.ceil(count / MULTIPLE) * MULTIPLE


class StaticBatch:
    """Buffers of one budget's sizes on one device.

    ignored: the label that does not count. `batch` holds the buffers, always the same ones.
    """

    def __init__(self, budget: Budget, device: torch.device, ignored: int) -> None:
        self.budget = budget
        self._ignored = ignored
        num_sequences = budget.sequences + budget.dummies

        def zeros(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(count, dtype=dtype, device=device)

        self.batch = PackedBatch(
            input_ids=zeros(budget.tokens),
            segment_ids=zeros(budget.tokens),
            position_ids=zeros(budget.tokens),
            cu_seqlens=zeros(num_sequences + 1),
            masked_positions=zeros(budget.masked),
            masked_labels=zeros(budget.masked, torch.int64).fill_(ignored),
            next_sentence_labels=zeros(num_sequences, torch.int64).fill_(ignored),
            max_seqlen=budget.max_seqlen,
        )
        # Where dummy sequences end, counted from the last real token.
        self._ends = budget.max_seqlen * torch.arange(
            1, budget.dummies + 1, dtype=torch.int32, device=device
        )

    def load(self, batch: PackedBatch) -> PackedBatch:
        """Copy a batch that fits the budget into the buffers; returns them.

        Nothing waits for the device.
        """
        if not self.budget.fits(batch):
            raise ValueError(f"{batch.num_tokens} tokens do not fit {self.budget}")
        sources = batch.tensors()
        for name, buffer in self.batch.tensors().items():
            buffer[: len(sources[name])].copy_(sources[name], non_blocking=True)
        ends = self.batch.cu_seqlens[len(batch.cu_seqlens) :]
        torch.clamp(self._ends + batch.num_tokens, max=self.budget.tokens, out=ends)
        self.batch.masked_labels[batch.num_masked :].fill_(self._ignored)
        self.batch.masked_positions[batch.num_masked :].fill_(0)
        return self.batch
