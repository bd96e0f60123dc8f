"""LAMB in pieces that fit a CPU's cache.

A step of LAMB is a dozen elementwise operations. Over whole tensors each of them reads and
writes main memory, and each temporary is fresh memory besides; over pieces, all of them work in
the cache, and main memory is touched once a stage. The update is the one of `lamb.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.optim.lamb import Lamb

PIECE = 1 << 18  # numbers; the best of 2^15 to 2^20 (docs/LOG.md, 2026-11-23)


class ChunkedLamb(Lamb):
    """Uses the gradients' memory for the updates: a step leaves them overwritten."""

    def step(self, learning_rate: float, inverse_scale: float = 1.0) -> bool:
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for parameter in self.parameters
        ]
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        norms = torch.stack(torch._foreach_norm(gradients, dtype=wide))
        self.gradient_norm = norm = norms.norm() * inverse_scale
        if not torch.isfinite(norm):
            return False
        self.updates += 1
        clip = max(norm.item() / self.settings.max_gradient_norm, 1.0)
        scratch = [
            gradient
            if gradient.dtype == master.dtype and gradient.is_contiguous()
            else torch.empty_like(master)
            for gradient, master in zip(gradients, self.masters, strict=True)
        ]
        for index, (gradient, update) in enumerate(zip(gradients, scratch, strict=True)):
            ratio = self._direction(index, gradient, update, inverse_scale / clip)
            self._apply(index, update, learning_rate * ratio)
        return True

    def _direction(self, index: int, gradient: Tensor, update: Tensor, scale: float) -> float:
        """Advance the moments, write u into `update`, return the trust ratio."""
        settings, decays = self.settings, self.decays[index]
        first_correction, second_correction = self._bias_corrections()
        # u = f m / (sqrt(v) + e), with the corrections in f and e instead of in m and v.
        root = second_correction**0.5
        factor, epsilon = root / first_correction, settings.epsilon * root
        flat = (
            self.masters[index],
            self.first_moments[index],
            self.second_moments[index],
            gradient.to(update.dtype).contiguous(),
            update,
        )
        weight_squares = update_squares = 0.0
        denominator = update.new_empty(min(PIECE, update.numel()))
        pieces = (tensor.view(-1).split(PIECE) for tensor in flat)
        for weight, first, second, given, direction in zip(*pieces, strict=True):
            first.mul_(settings.beta_1).add_(given, alpha=(1.0 - settings.beta_1) * scale)
            second.mul_(settings.beta_2)
            second.addcmul_(given, given, value=(1.0 - settings.beta_2) * scale**2)
            below = torch.sqrt(second, out=denominator[: len(weight)]).add_(epsilon)
            if not decays:
                torch.div(first, below, out=direction).mul_(factor)
                continue
            torch.mul(weight, settings.weight_decay, out=direction)
            direction.addcdiv_(first, below, value=factor)
            weight_squares += torch.dot(weight, weight).item()
            update_squares += torch.dot(direction, direction).item()
        if weight_squares > 0 and update_squares > 0:
            return (weight_squares / update_squares) ** 0.5
        return 1.0

    def _apply(self, index: int, update: Tensor, factor: float) -> None:
        parameter, master = self.parameters[index], self.masters[index]
        pieces = (tensor.view(-1).split(PIECE) for tensor in (master, update, parameter.data))
        for weight, direction, rounded in zip(*pieces, strict=True):
            weight.add_(direction, alpha=-factor)
            if rounded.dtype != weight.dtype:
                rounded.copy_(weight)
