"""The base class of optimizers: parameters, float32 master weights, named state, saved format.

A new optimizer derives from `Optimizer`, or from `TensorListOptimizer` if it updates separate
tensors; see docs/extending.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.optim.loss_scale import LossScale
from bert_pretraining.optim.norms import norm_of
from bert_pretraining.optim.schedule import Schedule
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.gradient_sink import GradientSink


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of LAMB and AdamW. Gradients are clipped to the norm max_gradient_norm."""

    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-6
    weight_decay: float = 0.01
    max_gradient_norm: float = 1.0


def has_weight_decay(name: str) -> bool:
    """Whether a parameter of this name has weight decay (and, in LAMB, a trust ratio)."""
    return not (name.endswith("bias") or "LayerNorm" in name)


class Optimizer:
    """The base of all optimizers.

    A 16-bit parameter has a float32 master copy: an update changes the master, and the parameter is
    the rounded master. A float32 or float64 parameter is its own master.

    Class attributes:
        SLOTS: names of the state that each parameter has besides its master weight. They are keys
            of checkpoints.
        reduces_gradients: whether the optimizer itself averages gradients over the ranks. If so,
            it implements `overlap` and `finish_reduction`, and DistributedDataParallel is not used.
        waits_in_step: whether the ranks wait for each other in the optimizer's step.

    Attributes:
        names, parameters, decays: one entry per parameter, in the order given.
        masters: tensors of the parameters' shapes, in the same order; float32, or float64 for
            float64 parameters.
        slots: name in SLOTS -> a list of tensors like `masters`.
        gradient_norm: 0-d tensor, the norm in the latest step, after `inverse_scale`, before
            clipping.
        num_updates: 0-d int64 tensor on the parameters' device. Skipped steps do not count.
        may_read: whether the host may read values without waiting for the device, as on a CPU.
        choice: the provider's name and why it was chosen, for the log.
        sink: where code that does without autograd adds gradients; None if the optimizer reads
            only the parameters' `grad`.
    """

    SLOTS: tuple[str, ...] = ()
    reduces_gradients = False
    waits_in_step = False
    choice = ""
    sink: GradientSink | None = None

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimizerSettings,
        masters: dict[str, Tensor] | None = None,
    ) -> None:
        """masters: by name, the float32 weights of which 16-bit parameters are the rounding."""
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
        """Set `masters` and `slots`. A parameter that is not 16-bit shares its master's memory."""
        self.masters = masters
        self.slots = {slot: [torch.zeros_like(master) for master in masters] for slot in self.SLOTS}

    @property
    def updates(self) -> int:
        """`num_updates` as an int. On a GPU, this waits for all queued work."""
        return int(self.num_updates)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set the gradients to None, or with set_to_none=False to zeros in place."""
        for parameter in self.parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def gradients(self) -> list[Tensor]:
        """All gradients, not copied, in pieces of any shape; a gradient of None becomes zeros."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter.grad for parameter in self.parameters]

    def gradients_by_name(self) -> dict[str, Tensor]:
        """The sums of all micro-batches so far, by parameter; zeros for None. Not copied."""
        return dict(zip(self.names, self.gradients(), strict=True))

    def step(self, learning_rate: float | Tensor, inverse_scale: float | Tensor = 1.0) -> Tensor:
        """One update with the gradients in the parameters' `grad`; None counts as zeros.

        learning_rate, inverse_scale: numbers, or 0-d tensors on the parameters' device.
        inverse_scale (1 / loss scale) multiplies the gradients first.

        Returns `finite`, a 0-d bool tensor on the parameters' device. It is False if a gradient is
        not finite; masters, slots, parameters and `updates` are then unchanged. This method does
        not wait for a GPU, but reading `finite` does. The gradients may be overwritten.
        """
        raise NotImplementedError

    def scheduled_step(self, schedule: Schedule, loss_scale: LossScale) -> Tensor:
        """`step` with the schedule's rate and the inverse loss scale, which is updated afterwards.

        Like `step`, it returns `finite` and does not wait for a GPU.
        """
        rate = schedule.at(self.num_updates)
        finite = self.step(rate, 1.0 / loss_scale.scale)
        loss_scale.update(finite)
        return finite

    def overlap(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """With `reduces_gradients`: a context for forward and backward of one micro-batch.

        last: whether it is the update's last micro-batch. If so, the optimizer may reduce gradients
        while backward is still running.
        """
        raise NotImplementedError

    def finish_reduction(self, limit: Tensor | None) -> None:
        """With `reduces_gradients`: reduce the remaining gradients after the last backward pass.

        limit: 0-d; this rank's own gradient is first scaled down to that norm. None: no limit. With
        a limit, every `overlap` of the update must have had last=False, so that nothing was reduced
        yet.
        """
        raise NotImplementedError

    def bias_corrections(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """1 - beta_1^t and 1 - beta_2^t for t = `num_updates`; 0-d, on its device."""
        settings, updates = self.settings, self.num_updates
        first = bias_correction(settings.beta_1, updates)
        return first.to(dtype), bias_correction(settings.beta_2, updates).to(dtype)

    def _round_masters(self) -> None:
        """Set 16-bit parameters to their rounded masters."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.dtype != master.dtype:
                parameter.data.copy_(master)

    def _state(self) -> dict[str, list[Tensor]]:
        """The state to save for each parameter: the masters and every slot."""
        return {"master": self.masters, **self.slots}

    def state_dict(self) -> dict:
        """The number of updates, and masters and slots as tensors by parameter name.

        The tensors are not copies: the next step changes them. The format is the same for every
        provider.
        """
        named = {
            key: dict(zip(self.names, tensors, strict=True))
            for key, tensors in self._state().items()
        }
        return {"updates": self.updates, **named}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore, bit for bit, what the `state_dict` of any provider returned.

        The parameters become the loaded masters, rounded if they are 16-bit. Raises UserError, and
        changes nothing, if names or shapes differ from those of this optimizer's parameters.
        """
        if not isinstance(state.get("updates"), int):
            raise UserError(
                "the optimizer state lacks its number of updates: the file was cut or edited",
                "resume from another checkpoint",
            )
        other = "pass the checkpoint, the bert_config.json and the --objective of one run"
        for key in ("master", *self.SLOTS):
            if key not in state:
                raise UserError(
                    f"the checkpoint is of another optimizer: its state has no '{key}'",
                    "pass the --optimizer that wrote it, or start from its weights with "
                    "python -m bert_pretraining checkpoint convert --to apex",
                )
            saved = state[key]
            if set(saved) != set(self.names):
                first = sorted(set(saved) ^ set(self.names))[0]
                raise UserError(
                    f"optimizer state of another model: '{first}' is "
                    f"{'unknown here' if first in saved else 'missing'} in {key}",
                    other,
                )
            for name, parameter in zip(self.names, self.parameters, strict=True):
                if saved[name].shape != parameter.shape:
                    raise UserError(
                        f"optimizer state of another model: {key} of '{name}' is "
                        f"{tuple(saved[name].shape)}, not {tuple(parameter.shape)}",
                        other,
                    )
        self._copy_state(state)
        self.num_updates.fill_(state["updates"])
        self._round_masters()

    def _copy_state(self, state: dict) -> None:
        for key, tensors in self._state().items():
            for name, tensor in zip(self.names, tensors, strict=True):
                tensor.copy_(state[key][name])


class TensorListOptimizer(Optimizer):
    """A step over separate tensors: it clips and skips, and `_update` has the formula."""

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
        state = [tensor for tensors in self._state().values() for tensor in tensors]
        # On a GPU the host does not know yet whether the gradients are finite. It updates in any
        # case, and restores a copy of the state if they were not.
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
        """Update `masters` and `slots`.

        gradients: one per parameter, of the masters' dtype, not clipped; may be overwritten.
        clip: 0-d; divide the gradients by it. `num_updates` already counts this update.
        """
        raise NotImplementedError


def bias_correction(beta: float, updates: Tensor) -> Tensor:
    """1 - beta^updates, 0-d, of the dtype `devices.wide`. updates: 0-d, of any dtype."""
    # Computed in float64: in float32, 1 - 0.999 has only five correct digits.
    if devices.wide(updates.device) == torch.float64:
        return 1.0 - beta ** updates.double()
    return -torch.expm1(updates.float() * (math.log(beta) if beta else -math.inf))
