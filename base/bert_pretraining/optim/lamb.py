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

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LambSettings:
    """beta_1, beta_2, epsilon, weight decay and the gradient norm that clips."""

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0


def has_weight_decay(name: str) -> bool:
    """Whether a parameter of this name has weight decay and a trust ratio."""
    return not (name.endswith("bias") or "LayerNorm" in name)


class Lamb:
    """What both versions share: parameters, moments, float32 masters, state.

    A 16-bit parameter keeps a float32 master copy here, which the update works on; the
    parameter is its rounding.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: LambSettings,
        masters: dict[str, Tensor] | None = None,
    ) -> None:
        """masters: float32 weights that 16-bit parameters were rounded from, by name."""
        named = list(named_parameters)
        self.settings = settings
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.decays = [has_weight_decay(name) for name in self.names]
        self.masters = [
            parameter.detach()
            if parameter.element_size() >= 4
            else (masters[name] if masters else parameter.detach().float())
            for name, parameter in named
        ]
        self.first_moments = [torch.zeros_like(master) for master in self.masters]
        self.second_moments = [torch.zeros_like(master) for master in self.masters]
        self.updates = 0
        self.gradient_norm = torch.zeros(())  # of the latest step, before clipping

    def zero_grad(self, keep_memory: bool = False) -> None:
        """Forget the gradients; with keep_memory, by zeroing them where they lie."""
        for parameter in self.parameters:
            if keep_memory and parameter.grad is not None:
                parameter.grad.zero_()
            else:
                parameter.grad = None

    def step(self, learning_rate: float, inverse_scale: float = 1.0) -> bool:
        """One update with the gradients in the parameters' `grad`.

        inverse_scale multiplies the gradients first: 1 / loss scale.
        Returns False, having changed nothing, if a gradient is not finite.
        """
        gradients = [
            torch.zeros_like(master)
            if parameter.grad is None
            else parameter.grad.to(master.dtype) * inverse_scale
            for parameter, master in zip(self.parameters, self.masters, strict=True)
        ]
        self.gradient_norm = norm = torch.stack(torch._foreach_norm(gradients)).norm()
        if not torch.isfinite(norm):
            return False
        self.updates += 1
        clip = torch.clamp(norm / self.settings.max_gradient_norm, min=1.0)
        self._update(gradients, clip, learning_rate)
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.dtype != master.dtype:
                parameter.data.copy_(master)
        return True

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float) -> None:
        raise NotImplementedError

    def _bias_corrections(self) -> tuple[float, float]:
        settings = self.settings
        return 1.0 - settings.beta_1**self.updates, 1.0 - settings.beta_2**self.updates

    def state_dict(self) -> dict:
        """Plain tensors and numbers: masters and moments by parameter name."""
        return {
            "updates": self.updates,
            "master": dict(zip(self.names, self.masters, strict=True)),
            "first_moment": dict(zip(self.names, self.first_moments, strict=True)),
            "second_moment": dict(zip(self.names, self.second_moments, strict=True)),
        }


class ReferenceLamb(Lamb):
    """One tensor at a time, as the formulas stand above; float64 works too."""

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float) -> None:
        settings = self.settings
        first_correction, second_correction = self._bias_corrections()
        for master, gradient, first, second, decays in zip(
            self.masters,
            gradients,
            self.first_moments,
            self.second_moments,
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
                weight_norm, update_norm = master.norm(), update.norm()
                if weight_norm > 0 and update_norm > 0:
                    ratio = weight_norm / update_norm
            master.sub_(learning_rate * ratio * update)


class ForeachLamb(Lamb):
    """The same update over lists of tensors: a few calls instead of a few a tensor."""

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float) -> None:
        settings = self.settings
        first_correction, second_correction = self._bias_corrections()
        torch._foreach_div_(gradients, clip)
        torch._foreach_lerp_(self.first_moments, gradients, 1.0 - settings.beta_1)
        torch._foreach_mul_(self.second_moments, settings.beta_2)
        torch._foreach_addcmul_(self.second_moments, gradients, gradients, 1.0 - settings.beta_2)
        denominators = torch._foreach_div(self.second_moments, second_correction)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, settings.epsilon)
        updates = torch._foreach_div(self.first_moments, first_correction)
        torch._foreach_div_(updates, denominators)

        decayed = [index for index, decays in enumerate(self.decays) if decays]
        weights = [self.masters[index] for index in decayed]
        steps = [updates[index] for index in decayed]
        torch._foreach_add_(steps, weights, alpha=settings.weight_decay)
        weight_norms = torch.stack(torch._foreach_norm(weights))
        update_norms = torch.stack(torch._foreach_norm(steps))
        both = (weight_norms > 0) & (update_norms > 0)
        ratios = torch.where(both, weight_norms / update_norms, torch.ones_like(weight_norms))
        for step, ratio in zip(steps, ratios.unbind(), strict=True):
            step.mul_(ratio)
        torch._foreach_add_(self.masters, updates, alpha=-learning_rate)
