"""How the losses of micro-batches and ranks are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks, sum_over_ranks


def loss_weights(
    micro_batches: list[PackedBatch],
    names: Sequence[str],
    normalization: str,
    ranks: Ranks,
    scale: float | Tensor = 1.0,
) -> list[dict[str, Tensor]]:
    """For each micro-batch, what to multiply each of its loss sums by: name -> 0-d float32.

    names: of the losses. scale: the loss scale; multiplies every weight. The gradients of the
    products are then summed over micro-batches and averaged over ranks.

    "rank": each micro-batch's own mean, averaged, as upstream does it; a masked token of a
    micro-batch with few of them weighs more. "global": the mean over all masked tokens,
    and over all sequences, of the update, so that only the set of sequences matters and
    not how it is split. Asks the other ranks for their counts.
    """
    counts = torch.tensor(
        [[batch.num_predictions(name) for name in names] for batch in micro_batches],
        dtype=torch.float32,
    )
    # The host computes what it can: a device would need a launch for each operator.
    if normalization == "rank":
        weights = devices.sent(1.0 / (len(counts) * counts.clamp(min=1.0)), ranks.device)
    else:
        totals = counts.sum(0)
        if ranks.world_size > 1:
            totals = sum_over_ranks(devices.sent(totals, ranks.device))
        weights = ranks.world_size / totals.clamp(min=1.0)
        weights = devices.sent(weights, ranks.device).expand(len(counts), -1)
    return [dict(zip(names, row.unbind(), strict=True)) for row in weights * scale]
