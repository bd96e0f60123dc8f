"""Evaluation: exact, and bit for bit the same at any world size."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from bert_pretraining.data.loader import EvaluationSet
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import LossMeans, LossTotals
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import rank_reports
from bert_pretraining.runtime.process_group import Ranks, sum_over_ranks


class Evaluation(NamedTuple):
    """losses: means over all masked tokens (mlm) and all sequences (nsp) of the set."""

    losses: LossMeans
    num_sequences: int
    seconds: float

    @property
    def loss(self) -> float:
        """The sum of the losses' means, in nats."""
        return self.losses.loss

    @property
    def mlm_accuracy(self) -> float:
        return self.losses.accuracy["mlm"]


@torch.no_grad()
def evaluate(model: BertForPreTraining, evaluation_set: EvaluationSet, ranks: Ranks) -> Evaluation:
    """Evaluate `model` on all batches of all ranks.

    Each batch's sums go into a row of their own, which exactly one rank fills: adding the
    other ranks' zeros is exact, and the rows are then added in the same order everywhere.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    columns = LossTotals.columns(model.losses) + 1
    dtype = devices.wide(ranks.device)
    rows = torch.zeros(evaluation_set.num_batches, columns, dtype=dtype, device=ranks.device)
    for number, batch in evaluation_set.batches:
        totals = LossTotals(model.losses, ranks.device, dtype)
        totals.add(model(batch.to(ranks.device, non_blocking=True)), batch)
        totals.write_to(rows[number, :-1])
        rows[number, -1] = batch.num_sequences
        rank_reports.heartbeat()
    *sums, sequences = sum_over_ranks(rows).cpu().double().sum(dim=0).tolist()
    model.train(was_training)
    return Evaluation(
        LossMeans.of(model.losses, sums), int(sequences), time.perf_counter() - started
    )
