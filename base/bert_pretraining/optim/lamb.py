"""LAMB as MLPerf's reference defines it: a readable version and one over tensor lists.

The update of a tensor p with gradient g at update t (You et al. 2020, algorithm 2, with
the gradient clipping of MLPerf's TensorFlow reference and of NVIDIA apex's FusedLAMB):

    g <- g / max(1, norm of all gradients / max_gradient_norm)
    m <- beta_1 m + (1 - beta_1) g             v <- beta_2 v + (1 - beta_2) g^2
    u = m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon) + weight_decay p
    p <- p - learning_rate * (norm(p) / norm(u) if both are non-zero else 1) * u

Biases and LayerNorm parameters have neither weight decay nor the trust ratio.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.optim.adam import MOMENTS, adam_directions
from bert_pretraining.optim.norms import norm_of
from bert_pretraining.optim.optimizer import TensorListOptimizer


class ReferenceLamb(TensorListOptimizer):
    """The formulas above, one tensor at a time, in float32 or float64."""

    SLOTS = MOMENTS

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float | Tensor) -> None:
        settings = self.settings
        first_correction, second_correction = self.bias_corrections(self.masters[0].dtype)
        for master, gradient, first, second, decays in zip(
            self.masters,
            gradients,
            self.slots["first_moment"],
            self.slots["second_moment"],
            self.decays,
            strict=True,
        ):
            gradient = gradient / clip
            first.mul_(settings.beta_1).add_(gradient * (1.0 - settings.beta_1))
            second.mul_(settings.beta_2).add_(gradient.square() * (1.0 - settings.beta_2))
            update = (first / first_correction) / (
                (second / second_correction).sqrt() + settings.epsilon
            )
            ratio = 1.0
            if decays:
                update = update + settings.weight_decay * master
                weight_norm, update_norm = norm_of(master), norm_of(update)
                both = (weight_norm > 0) & (update_norm > 0)
                ratio = torch.where(both, weight_norm / update_norm, 1.0).to(master.dtype)
            master.sub_(learning_rate * ratio * update)


class ForeachLamb(TensorListOptimizer):
    """The same update over lists of tensors: a few calls in all instead of a few per tensor."""

    SLOTS = MOMENTS

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float | Tensor) -> None:
        settings = self.settings
        updates = adam_directions(self, gradients, clip)
        decayed = [index for index, decays in enumerate(self.decays) if decays]
        if decayed:
            weights = [self.masters[index] for index in decayed]
            steps = [updates[index] for index in decayed]
            torch._foreach_add_(steps, weights, alpha=settings.weight_decay)
            weight_norms = torch.stack([norm_of(weight) for weight in weights])
            update_norms = torch.stack([norm_of(step) for step in steps])
            both = (weight_norms > 0) & (update_norms > 0)
            ratios = torch.where(both, weight_norms / update_norms, 1.0).to(steps[0].dtype)
            for step, ratio in zip(steps, ratios.unbind(), strict=True):
                step.mul_(ratio)
        if isinstance(learning_rate, Tensor):
            torch._foreach_mul_(updates, learning_rate.to(updates[0].dtype))
            torch._foreach_sub_(self.masters, updates)
        else:
            torch._foreach_add_(self.masters, updates, alpha=-learning_rate)
