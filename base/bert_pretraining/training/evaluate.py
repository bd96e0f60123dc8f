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
    The host waits for the device once, at the end.
    """
    started = time.perf_counter()
    was_training = model.training
    model.eval()
    rows = _rows(model, evaluation_set, ranks.device)
    *sums, sequences = sum_over_ranks(rows).cpu().double().sum(dim=0).tolist()
    model.train(was_training)
    return Evaluation(
        LossMeans.of(model.losses, sums), int(sequences), time.perf_counter() - started
    )


def _rows(
    model: BertForPreTraining, evaluation_set: EvaluationSet, device: torch.device
) -> torch.Tensor:
    """A row for each batch of all ranks: what `LossTotals.flat` has, and the sequences.

    Rows of other ranks' batches are 0.
    """
    losses, dtype = model.losses, devices.wide(device)
    columns = LossTotals.columns(losses) + 1
    rows = torch.zeros(evaluation_set.num_batches, columns, dtype=dtype, device=device)
    found = []
    for batch in evaluation_set.on(device):
        sums = model(batch)
        found.append(
            [torch.stack(part) for part in zip(*(sums[name] for name in losses), strict=True)]
        )
        rank_reports.heartbeat()
    if not found:
        return rows
    loss, correct = (torch.stack(part).to(dtype) for part in zip(*found, strict=True))
    counts = torch.tensor(
        [
            [*(batch.num_predictions(name) for name in losses), batch.num_sequences]
            for _, batch in evaluation_set.batches
        ],
        dtype=dtype,
    )
    own = torch.tensor([number for number, _ in evaluation_set.batches])
    values = [torch.stack([loss, correct], dim=2).flatten(1), devices.sent(counts, device)]
    return rows.index_copy_(0, devices.sent(own, device), torch.cat(values, dim=1))
