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
    counts = [[batch.num_predictions(name) for name in names] for batch in micro_batches]
    if normalization == "rank":
        at_least_one = [[max(count, 1) for count in row] for row in counts]
        weights = 1.0 / (len(counts) * _on_device(at_least_one, ranks.device))
    else:
        totals = _on_device([sum(column) for column in zip(*counts, strict=True)], ranks.device)
        weights = ranks.world_size / sum_over_ranks(totals).clamp(min=1.0)
        weights = weights.expand(len(counts), -1)
    return [dict(zip(names, row.unbind(), strict=True)) for row in weights * scale]


def _on_device(counts: list, device: torch.device) -> Tensor:
    """float32 on the device; where memory can be pinned, nothing waits for earlier work there."""
    return devices.sent(torch.tensor(counts, dtype=torch.float32), device)
