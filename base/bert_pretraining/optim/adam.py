"""Adam's moments and update direction over lists of tensors, shared by LAMB and AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.optim.optimizer import Optimizer

MOMENTS = ("first_moment", "second_moment")  # m and v of the formulas


def adam_directions(optimizer: Optimizer, gradients: list[Tensor], clip: Tensor) -> list[Tensor]:
    """Update both moments; return m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon).

    gradients: of the masters' dtype; they are divided by `clip` in place.
    """
    settings = optimizer.settings
    firsts, seconds = (optimizer.slots[moment] for moment in MOMENTS)
    first_correction, second_correction = optimizer.bias_corrections(optimizer.masters[0].dtype)
    torch._foreach_div_(gradients, clip)
    torch._foreach_lerp_(firsts, gradients, 1.0 - settings.beta_1)
    torch._foreach_mul_(seconds, settings.beta_2)
    torch._foreach_addcmul_(seconds, gradients, gradients, 1.0 - settings.beta_2)
    denominators = torch._foreach_div(seconds, second_correction)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, settings.epsilon)
    directions = torch._foreach_div(firsts, first_correction)
    torch._foreach_div_(directions, denominators)
    return directions
