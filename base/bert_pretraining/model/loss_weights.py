"""How the losses of micro-batches and ranks are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.data.packing import PackedBatch
from bert_pretraining.distributed import Ranks, sum_over_ranks


def loss_weights(
    micro_batches: list[PackedBatch], normalization: str, ranks: Ranks
) -> list[tuple[float | Tensor, float | Tensor]]:
    """What to multiply each micro-batch's MLM and NSP loss sums by.

    The products' gradients are then summed over micro-batches and averaged over ranks.

    "rank": each micro-batch's own mean, averaged, as upstream has it; a masked token of a
    micro-batch with few of them weighs more. "global": the mean over all masked tokens,
    and over all sequences, of the update, so that only the set of sequences matters and
    not how it is split. Asks the other ranks for their counts.
    """
    if normalization == "rank":
        count = len(micro_batches)
        return [
            (1.0 / (max(batch.num_masked, 1) * count), 1.0 / (batch.num_sequences * count))
            for batch in micro_batches
        ]
    masked = sum(batch.num_masked for batch in micro_batches)
    sequences = sum(batch.num_sequences for batch in micro_batches)
    totals = torch.tensor([masked, sequences], dtype=torch.float32, device=ranks.device)
    totals = sum_over_ranks(totals).clamp(min=1.0)
    mlm_weight, next_sentence_weight = (ranks.world_size / totals).unbind()
    return [(mlm_weight, next_sentence_weight)] * len(micro_batches)
