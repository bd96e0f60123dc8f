"""AdamW (Loshchilov and Hutter 2019, algorithm 2), with the same gradient clipping as LAMB.

The update of a tensor p with gradient g at update t:

    g <- g / max(1, norm of all gradients / max_gradient_norm)
    m <- beta_1 m + (1 - beta_1) g             v <- beta_2 v + (1 - beta_2) g^2
    p <- p - learning_rate * (m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)
                              + weight_decay p)

Biases and LayerNorm parameters have no weight decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.optim.adam import MOMENTS, adam_directions
from bert_pretraining.optim.optimizer import TensorListOptimizer


class AdamW(TensorListOptimizer):
    """AdamW over lists of tensors, on any device, in float32 or float64."""

    SLOTS = MOMENTS

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float | Tensor) -> None:
        updates = adam_directions(self, gradients, clip)
        decayed = [index for index, decays in enumerate(self.decays) if decays]
        if decayed:
            torch._foreach_add_(
                [updates[index] for index in decayed],
                [self.masters[index] for index in decayed],
                alpha=self.settings.weight_decay,
            )
        for master, update in zip(self.masters, updates, strict=True):
            master.sub_(learning_rate * update)
