"""Evaluation: exact, and bit for bit the same at any world size."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.runtime import rank_reports
from bert_pretraining.runtime.process_group import Ranks, sum_over_ranks


class Evaluation(NamedTuple):
    """loss: MLM mean over masked tokens + NSP mean over sequences, in nats."""

    loss: float
    mlm_accuracy: float
    num_sequences: int
    seconds: float


@torch.no_grad()
def evaluate(
    model: nn.Module, num_batches: int, batches: list[tuple[int, PackedBatch]], ranks: Ranks
) -> Evaluation:
    """Evaluate `model` on all batches of all ranks.

    Args:
        num_batches: over all ranks.
        batches: this rank's, with their numbers in [0, num_batches).

    Each batch's sums go into a row of their own, which exactly one rank fills: adding the
    other ranks' zeros is exact, and the rows are then added in the same order everywhere.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    rows = torch.zeros(num_batches, 5, dtype=torch.float64, device=ranks.device)
    for number, batch in batches:
        sums = model(batch.to(ranks.device))
        rows[number, 0] = sums.mlm_loss
        rows[number, 1] = sums.mlm_correct
        rows[number, 2] = sums.next_sentence_loss
        rows[number, 3] = batch.num_masked
        rows[number, 4] = batch.num_sequences
        rank_reports.heartbeat()
    mlm_loss, correct, next_sentence_loss, masked, sequences = (
        sum_over_ranks(rows).cpu().sum(dim=0).tolist()
    )
    model.train(was_training)
    return Evaluation(
        loss=mlm_loss / max(masked, 1) + next_sentence_loss / sequences,
        mlm_accuracy=correct / max(masked, 1),
        num_sequences=int(sequences),
        seconds=time.perf_counter() - started,
    )
