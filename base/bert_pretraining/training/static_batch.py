"""Batches of constant shape, for compiled code and CUDA graphs.

Buffers of a fixed size receive one packed batch after the other. After the last token of a batch
come copies of its first ones. These form dummy sequences, whose labels are ignored, so that they do
not affect the losses or the gradients. Copies, because the zeros that come back for equal ids or
positions may be added one by one to the same row of a table, and because everything that a step
computes then follows from its batch alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bert_pretraining.model.batch import PackedBatch

# Mean tokens and masked tokens per sequence in the MLPerf training set (Wikipedia), and the factor
# above the mean that a balanced batch may need.
MEAN_TOKENS, MEAN_MASKED, MARGIN = 255.8, 38.2, 1.02
MULTIPLE = 64  # of token and row counts, for the speed of matrix kernels


@dataclass(frozen=True)
class Budget:
    """The constant sizes of a batch.

    tokens, masked: the largest numbers that fit. sequences: the exact number. dummies: sequences of
    at most max_seqlen tokens each, which fill the rest of `tokens`; a batch that leaves more tokens
    than they can hold does not fit.
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


def usual_budget(batch_size: int, max_seqlen: int, static_tokens: int = 0) -> Budget:
    """The sizes for the usual balanced batch. Larger ones keep their own shape.

    Sizes for any possible batch would need the memory of sequences that are all of full length:
    twice as much as the usual batch.

    batch_size: sequences per batch. max_seqlen: the most tokens per sequence. static_tokens: tokens
    of the usual batch; 0 computes them from the means of the MLPerf training set.
    """
    # Data preparation masks at most 15%, up to rounding: 76 of 512 in the published data set.
    max_masked = math.ceil(0.15 * max_seqlen) + 1
    most = batch_size * max_seqlen
    tokens = static_tokens or _rounded(batch_size * MEAN_TOKENS * MARGIN)
    masked = _rounded(max(batch_size * MEAN_MASKED, tokens / MEAN_TOKENS * MEAN_MASKED) * MARGIN)
    return Budget(
        min(tokens, most),
        batch_size,
        min(masked, batch_size * max_masked),
        max_seqlen,
        # A batch with a tenth fewer tokens than the budget still fits.
        math.ceil(0.1 * tokens / max_seqlen) + 1,
    )


def _rounded(count: float) -> int:
    return math.ceil(count / MULTIPLE) * MULTIPLE


class StaticBatch:
    """Buffers of one budget's sizes on one device.

    ignored: the label that the loss ignores. `batch` is always the same buffers; `load` fills them.
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
        # The positions of rows that no masked token needs: all different.
        rows = torch.arange(budget.masked, device=device)
        self._places = (rows * budget.tokens // max(budget.masked, 1)).to(torch.int32)
        # Where dummy sequences end, counted from the last real token.
        self._ends = budget.max_seqlen * torch.arange(
            1, budget.dummies + 1, dtype=torch.int32, device=device
        )

    def load(self, batch: PackedBatch) -> PackedBatch:
        """Copy a batch that fits the budget into the buffers, and return them.

        Nothing waits for the device.
        """
        if not self.budget.fits(batch):
            raise ValueError(f"{batch.num_tokens} tokens do not fit {self.budget}")
        sources = batch.tensors()
        for name, buffer in self.batch.tensors().items():
            buffer[: len(sources[name])].copy_(sources[name], non_blocking=True)
        for name in ("input_ids", "segment_ids", "position_ids"):
            _repeat(sources[name], getattr(self.batch, name))
        ends = self.batch.cu_seqlens[len(batch.cu_seqlens) :]
        torch.clamp(self._ends + batch.num_tokens, max=self.budget.tokens, out=ends)
        self.batch.masked_labels[batch.num_masked :].fill_(self._ignored)
        self.batch.masked_positions[batch.num_masked :].copy_(self._places[batch.num_masked :])
        return self.batch


def _repeat(source: torch.Tensor, buffer: torch.Tensor) -> None:
    """Fill what comes after the source's copy in the buffer with the source, again and again."""
    start = len(source)
    while start < len(buffer):
        count = min(len(source), len(buffer) - start)
        buffer[start : start + count].copy_(source[:count], non_blocking=True)
        start += count
