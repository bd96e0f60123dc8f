"""NVIDIA apex's fused LAMB behind the interface of `Optimizer`.

An installed apex may lack some classes, so each is looked up separately. `FusedMixedPrecisionLamb`
is preferred: it keeps float32 masters and never waits for the GPU. `FusedLAMB` is used for float32
parameters where the other is missing. It cannot skip a step, so its wrapper must first read the
norm of the gradients, which waits for the GPU.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from bert_pretraining.errors import NotInstalled, Unavailable, UserError
from bert_pretraining.optim.adam import MOMENTS
from bert_pretraining.optim.optimizer import Optimizer
from bert_pretraining.runtime import device as devices

CLASSES = ("FusedMixedPrecisionLamb", "FusedLAMB")


BUILD = "build https://github.com/NVIDIA/apex with its CUDA extensions"


def find_classes() -> dict[str, type] | Unavailable:
    """The classes of CLASSES that the installed apex has, by name; or why there are none."""
    try:
        importlib.import_module("apex")
    except ImportError as error:
        return NotInstalled(f"the package 'apex' is not installed ({error})", BUILD)
    try:
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError as error:
        if getattr(error, "name", None) == "apex.optimizers":
            return Unavailable(
                "the installed 'apex' is not NVIDIA's: it has no apex.optimizers, and PyPI's "
                "'apex' is a web toolkit",
                f"uninstall it and {BUILD}",
            )
        return Unavailable(f"apex.optimizers cannot be imported ({error})", BUILD)
    found = {name: getattr(optimizers, name) for name in CLASSES if hasattr(optimizers, name)}
    return found or Unavailable(f"the installed apex has neither {' nor '.join(CLASSES)}", BUILD)


def unavailable(device: torch.device) -> Unavailable | None:
    """Why apex's LAMB cannot run on a device, or None if it can."""
    found = find_classes()
    if isinstance(found, Unavailable):
        return found
    if not devices.is_cuda(device):
        return Unavailable(f"apex needs a GPU, not device {device.type}")
    return None


class _Scaler:
    """The methods of GradScaler that FusedMixedPrecisionLamb calls, computed from two tensors."""

    def __init__(self, finite: Tensor, inverse_scale: Tensor) -> None:
        self._found = (~finite).float().reshape(1)
        self._scale = inverse_scale.double().reciprocal().float().reshape(1)

    def _check_inf_per_device(self, _: torch.optim.Optimizer) -> dict[torch.device, Tensor]:
        return {self._found.device: self._found}

    def _get_scale_async(self) -> Tensor:
        return self._scale


class ApexLamb(Optimizer):
    """apex's LAMB with two parameter groups, with and without weight decay.

    apex's kernels overwrite the gradients during a step. apex keeps a float32 master of each 16-bit
    parameter; `masters` are these same tensors.
    """

    SLOTS = MOMENTS

    def _create_state(self, masters: list[Tensor]) -> None:
        super()._create_state(masters)
        if self.settings.weight_decay == 0.0:
            raise UserError(
                "--optimizer apex: with --weight_decay_rate 0 apex leaves out the trust ratio",
                "use another optimizer",
            )
        classes = find_classes()
        if isinstance(classes, Unavailable):
            raise UserError(f"--optimizer apex: {classes.reason}", classes.fix)
        dtypes = {parameter.dtype for parameter in self.parameters}
        dtype = dtypes.pop()
        if dtypes or dtype == torch.float64:
            raise UserError(
                "--optimizer apex needs parameters of one dtype, float32 or 16 bit",
                "use another optimizer",
            )
        mixed = "FusedMixedPrecisionLamb" in classes
        if not mixed and dtype != torch.float32:
            raise UserError(
                "--optimizer apex: the installed apex lacks FusedMixedPrecisionLamb, which 16-bit "
                "parameters need",
                "use triton or foreach",
            )
        self._mixed = mixed
        settings, indices = self.settings, range(len(self.parameters))
        split = [
            ([i for i in indices if self.decays[i]], settings.weight_decay),
            ([i for i in indices if not self.decays[i]], 0.0),
        ]
        # Without empty groups. Below, masters are listed in the order in which apex lists
        # parameters.
        split = [(members, decay) for members, decay in split if members]
        arguments = {"reduced_precision_dtype": dtype} if dtype != torch.float32 else {}
        self.optimizer = classes["FusedMixedPrecisionLamb" if mixed else "FusedLAMB"](
            [
                {"params": [self.parameters[i] for i in members], "weight_decay": decay}
                for members, decay in split
            ],
            lr=0.0,
            bias_correction=True,
            betas=(settings.beta_1, settings.beta_2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_gradient_norm,
            use_nvlamb=False,
            **arguments,
        )
        for parameter, first, second in zip(
            self.parameters, *(self.slots[moment] for moment in MOMENTS), strict=True
        ):
            self.optimizer.state[parameter].update(exp_avg=first, exp_avg_sq=second)
        if mixed:
            # Otherwise apex would create this at its first step from the rounded parameters.
            self.optimizer.param_groups_full_precision = [
                {"params": [self.masters[i] if arguments else None for i in members]}
                for members, _ in split
            ]

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor, inverse_scale: float | Tensor = 1.0) -> Tensor:
        for parameter in self.parameters:
            if parameter.grad is None:  # apex would not update such a parameter
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters]
        norms = torch._foreach_norm(gradients, 2, torch.float32)
        self.gradient_norm = torch.stack(norms).norm() * inverse_scale
        finite = torch.isfinite(self.gradient_norm)
        groups = self.optimizer.param_groups
        if self._mixed:
            for group in groups:
                group["lr"].fill_(learning_rate)
                group["step"].fill_(self.num_updates)
            scale = torch.ones((), device=finite.device) * inverse_scale
            self.optimizer.step(grad_scaler=_Scaler(finite, scale))
        elif finite:
            for group in groups:
                group["lr"] = float(learning_rate)
                group["step"] = int(self.num_updates)
            if isinstance(inverse_scale, Tensor) or inverse_scale != 1.0:
                torch._foreach_mul_(gradients, inverse_scale)
            self.optimizer.step()
        self.num_updates += finite
        return finite
