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

from bert_pretraining.errors import UserError


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
    """What all providers share: parameters, float32 masters, moments, state.

    A 16-bit parameter has a float32 master copy here, which the update works on; the
    parameter is its rounding. A float32 or float64 parameter is its own master.

    Attributes:
        names, parameters, decays: in the order given, one entry a parameter.
        masters, first_moments, second_moments: lists of tensors of the parameters' shapes,
            in the same order; float32, or float64 for float64 parameters.
        gradient_norm: 0-d tensor; of the latest step, after `inverse_scale`, before clipping.
        num_updates: 0-d int64 tensor on the parameters' device: t of the formulas. Skipped steps
            do not count.
        choice: the provider's name and why it was taken, for the log.
    """

    choice = ""

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
        device = self.parameters[0].device
        self.gradient_norm = torch.zeros((), device=device)
        self.num_updates = torch.zeros((), dtype=torch.int64, device=device)
        self.may_read = device.type == "cpu"
        self._create_state(
            [
                parameter.detach()
                if parameter.element_size() >= 4
                else (masters[name] if masters else parameter.detach().float())
                for name, parameter in named
            ]
        )

    def _create_state(self, masters: list[Tensor]) -> None:
        """Set `masters` and both moments; parameters that are not 16-bit share theirs."""
        self.masters = masters
        self.first_moments = [torch.zeros_like(master) for master in masters]
        self.second_moments = [torch.zeros_like(master) for master in masters]

    @property
    def updates(self) -> int:
        """`num_updates` as a number: waits for a GPU to finish what it was given."""
        return int(self.num_updates)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or with set_to_none=False zero them where they lie."""
        for parameter in self.parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def gradients(self) -> list[Tensor]:
        """All gradients, where they lie; zeros in place of None."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters]

    def step(self, learning_rate: float | Tensor, inverse_scale: float | Tensor = 1.0) -> Tensor:
        """One update with the gradients in the parameters' `grad`; None counts as zeros.

        learning_rate, inverse_scale: numbers, or 0-d tensors on the parameters' device.
        inverse_scale multiplies the gradients first: 1 / loss scale.

        Returns `finite`, a 0-d bool tensor on the parameters' device. Where a gradient is
        not finite it is False, and masters, moments, parameters and `updates` are what they
        were. Nothing here waits for a GPU; whoever reads `finite` does. The gradients may be
        overwritten.
        """
        raise NotImplementedError

    def _bias_corrections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """1 - beta_1^t and 1 - beta_2^t for t = the present count; 0-d, on its device."""
        # In float64 first: in float32, 1 - 0.999 has lost five digits.
        updates = self.num_updates.double()
        settings = self.settings
        first, second = 1.0 - settings.beta_1**updates, 1.0 - settings.beta_2**updates
        return first.to(dtype), second.to(dtype)

    def _round_masters(self) -> None:
        """Make 16-bit parameters the rounding of their masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.dtype != master.dtype:
                parameter.data.copy_(master)

    def state_dict(self) -> dict:
        """Plain tensors and numbers: masters and moments by parameter name.

        The tensors are those in use, not copies: the next step changes them. The form is the
        same for every provider.
        """
        return {
            "updates": self.updates,
            "master": dict(zip(self.names, self.masters, strict=True)),
            "first_moment": dict(zip(self.names, self.first_moments, strict=True)),
            "second_moment": dict(zip(self.names, self.second_moments, strict=True)),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take over what any provider's `state_dict` returned, bit for bit.

        The parameters become the loaded masters, or their rounding. UserError, with nothing
        changed, if the names or shapes are not those of this optimizer's parameters.
        """
        if not isinstance(state.get("updates"), int):
            raise UserError("optimizer state without its number of updates; it was cut or edited")
        for key in ("master", "first_moment", "second_moment"):
            saved = state.get(key, {})
            if set(saved) != set(self.names):
                first = sorted(set(saved) ^ set(self.names))[0]
                raise UserError(
                    f"optimizer state of another model: '{first}' is "
                    f"{'unknown here' if first in saved else 'missing'} in {key}"
                )
            for name, parameter in zip(self.names, self.parameters, strict=True):
                if saved[name].shape != parameter.shape:
                    raise UserError(
                        f"optimizer state of another model: {key} of '{name}' is "
                        f"{tuple(saved[name].shape)}, not {tuple(parameter.shape)}"
                    )
        self._copy_state(state)
        self.num_updates.fill_(state["updates"])
        self._round_masters()

    def _copy_state(self, state: dict) -> None:
        own = {
            "master": self.masters,
            "first_moment": self.first_moments,
            "second_moment": self.second_moments,
        }
        for key, tensors in own.items():
            for name, tensor in zip(self.names, tensors, strict=True):
                tensor.copy_(state[key][name])


def norm_of(tensor: Tensor) -> Tensor:
    """The Euclidean norm, 0-d float64.

    By rows first: over a long tensor, a CPU adds up in the tensor's own precision, and of 100
    million squares in float32 a hundredth is lost.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    rows = tensor.unsqueeze(0) if tensor.dim() < 2 else tensor.flatten(0, -2)
    return torch.linalg.vector_norm(rows, dim=-1, dtype=wide).double().norm()


def scale_down(gradients: list[Tensor], limit: Tensor) -> None:
    """Scale gradients, in place, so that their common norm is at most `limit` (0-d).

    They become NaN where their norm is not finite, so that the step is skipped.
    """
    norm = torch.stack([norm_of(gradient) for gradient in gradients]).norm()
    factor = torch.where(torch.isfinite(norm), torch.clamp(limit / norm, max=1.0), torch.nan)
    torch._foreach_mul_(
        gradients, factor.to(torch.promote_types(gradients[0].dtype, torch.float32))
    )


class TensorListLamb(Lamb):
    """A step over separate tensors; how they are updated is left to `_update`."""

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor, inverse_scale: float | Tensor = 1.0) -> Tensor:
        gradients = [
            torch.zeros_like(master)
            if parameter.grad is None
            else parameter.grad.to(master.dtype) * inverse_scale
            for parameter, master in zip(self.parameters, self.masters, strict=True)
        ]
        norm = torch.stack([norm_of(gradient) for gradient in gradients]).norm()
        self.gradient_norm = norm.to(gradients[0].dtype)
        finite = torch.isfinite(self.gradient_norm)
        if self.may_read and not finite:
            return finite
        state = [*self.masters, *self.first_moments, *self.second_moments]
        # On a GPU the outcome is not known here: update, then take it back if need be. That
        # costs a copy of the state; `triton` is the version for speed.
        before = [] if self.may_read else [tensor.clone() for tensor in state]
        self.num_updates += finite
        clip = torch.clamp(norm / self.settings.max_gradient_norm, min=1.0)
        self._update(gradients, clip.to(gradients[0].dtype), learning_rate)
        if before:
            for tensor, old in zip(state, before, strict=True):
                tensor.copy_(torch.where(finite, tensor, old))
        self._round_masters()
        return finite

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float | Tensor) -> None:
        raise NotImplementedError


class ReferenceLamb(TensorListLamb):
    """One tensor at a time, as the formulas stand above; float64 works too."""

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float | Tensor) -> None:
        settings = self.settings
        first_correction, second_correction = self._bias_corrections(self.masters[0].dtype)
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
                weight_norm, update_norm = norm_of(master), norm_of(update)
                both = (weight_norm > 0) & (update_norm > 0)
                ratio = torch.where(both, weight_norm / update_norm, 1.0).to(master.dtype)
            master.sub_(learning_rate * ratio * update)


class ForeachLamb(TensorListLamb):
    """The same update over lists of tensors: a few calls instead of a few a tensor."""

    def _update(self, gradients: list[Tensor], clip: Tensor, learning_rate: float | Tensor) -> None:
        settings = self.settings
        first_correction, second_correction = self._bias_corrections(self.masters[0].dtype)
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
