"""How the losses of micro-batches and ranks are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.runtime.process_group import Ranks, sum_over_ranks


def loss_weights(
    micro_batches: list[PackedBatch], normalization: str, ranks: Ranks
) -> list[Tensor]:
    """What to multiply each micro-batch's MLM and NSP loss sums by: (2,) float32 each.

    The products' gradients are then summed over micro-batches and averaged over ranks.

    "rank": each micro-batch's own mean, averaged, as upstream has it; a masked token of a
    micro-batch with few of them weighs more. "global": the mean over all masked tokens,
    and over all sequences, of the update, so that only the set of sequences matters and
    not how it is split. Asks the other ranks for their counts.
    """
    if normalization == "rank":
        counts = [(max(batch.num_masked, 1), batch.num_sequences) for batch in micro_batches]
        return list(1.0 / (len(counts) * _on_device(counts, ranks.device)))
    masked = sum(batch.num_masked for batch in micro_batches)
    sequences = sum(batch.num_sequences for batch in micro_batches)
    totals = _on_device([masked, sequences], ranks.device)
    return [ranks.world_size / sum_over_ranks(totals).clamp(min=1.0)] * len(micro_batches)


def _on_device(counts: list, device: torch.device) -> Tensor:
    """float32, copied without waiting for what the device has to do before."""
    pinned = device.type == "cuda"
    counted = torch.tensor(counts, dtype=torch.float32, pin_memory=pinned)
    return counted.to(device, non_blocking=True)
