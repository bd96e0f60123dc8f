"""The optimizers by name, and the choice for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bert_pretraining.errors import Unavailable, UserError
from bert_pretraining.optim.adamw import AdamW
from bert_pretraining.optim.flat import FlatKernels
from bert_pretraining.optim.flat_lamb import FlatLamb
from bert_pretraining.optim.flat_torch import TorchKernels
from bert_pretraining.optim.lamb import ForeachLamb, ReferenceLamb
from bert_pretraining.optim.optimizer import Optimizer, OptimizerSettings
from bert_pretraining.optim.sharded_lamb import ShardedLamb

# What the ranks share:
#   alone       nothing: there is one rank, or the caller averages the gradients
#   replicated  gradients, which an optimizer with a flat gradient averages itself; every rank has
#               the whole state
#   sharded     gradients, and every rank has a shard of the state
Sharing = Literal["alone", "replicated", "sharded"]


@dataclass(frozen=True)
class OptimizerProvider:
    """One entry of OPTIMIZERS.

    make: (parameters by name, settings, masters, sharing, gradient dtype) -> the optimizer.
    unavailable: device -> why it cannot run there, or None.
    flat: whether it has a flat gradient, of any dtype, and can shard its state over the ranks.
    """

    make: Callable[..., Optimizer]
    unavailable: Callable[[torch.device], Unavailable | None] = lambda _: None
    flat: bool = False


def _unsharded(optimizer: type[Optimizer]) -> Callable[..., Optimizer]:
    """`OptimizerProvider.make` for an optimizer without a flat gradient."""
    return lambda named, settings, masters, *_: optimizer(named, settings, masters)


def _flat(
    named: list[tuple[str, nn.Parameter]],
    settings: OptimizerSettings,
    masters: dict[str, Tensor] | None,
    sharing: Sharing,
    gradient_dtype: torch.dtype | None,
    kernels: FlatKernels | None = None,
) -> Optimizer:
    arguments = {"kernels": kernels or TorchKernels(), "gradient_dtype": gradient_dtype}
    if sharing == "sharded":
        return ShardedLamb(named, settings, masters, **arguments)
    reduces = sharing == "replicated"
    return FlatLamb(named, settings, masters, reduces_gradients=reduces, **arguments)


def _triton(named: list[tuple[str, nn.Parameter]], *arguments: object) -> Optimizer:
    from bert_pretraining.optim.flat_triton import TritonKernels

    if named[0][1].dtype == torch.float64:
        raise UserError("--optimizer triton does not support float64", "use another optimizer")
    return _flat(named, *arguments, kernels=TritonKernels())


def _no_triton(device: torch.device) -> Unavailable | None:
    from bert_pretraining.optim import flat_triton

    return flat_triton.unavailable(device)


def _apex(
    named: list[tuple[str, nn.Parameter]],
    settings: OptimizerSettings,
    masters: dict[str, Tensor] | None,
    *_: object,
) -> Optimizer:
    from bert_pretraining.optim.apex_lamb import ApexLamb

    return ApexLamb(named, settings, masters)


def _no_apex(device: torch.device) -> Unavailable | None:
    from bert_pretraining.optim import apex_lamb

    return apex_lamb.unavailable(device)


OPTIMIZERS: dict[str, OptimizerProvider] = {
    "reference": OptimizerProvider(_unsharded(ReferenceLamb)),
    "foreach": OptimizerProvider(_unsharded(ForeachLamb)),
    "flat": OptimizerProvider(_flat, flat=True),
    "triton": OptimizerProvider(_triton, _no_triton, flat=True),
    "apex": OptimizerProvider(_apex, _no_apex),
    "adamw": OptimizerProvider(_unsharded(AdamW)),
}


class Choice(NamedTuple):
    """A provider and why it was chosen."""

    name: str
    reason: str

    def describe(self) -> str:
        """`name (reason)`, for the log."""
        return f"{self.name} ({self.reason})"


def choose(name: str, device: torch.device, sharded: bool = False) -> Choice:
    """The provider called `name` for parameters on `device`; "auto" is the fastest LAMB.

    Raises UserError for an unknown name, or if the provider cannot run here; the message says what
    is missing.
    """
    if name == "auto":
        return _fastest(device)
    if name not in OPTIMIZERS:
        raise UserError(
            f"--optimizer {name}: no such optimizer", f"choose one of auto, {', '.join(OPTIMIZERS)}"
        )
    if sharded and not OPTIMIZERS[name].flat:
        able = " or ".join(one for one, provider in OPTIMIZERS.items() if provider.flat)
        raise UserError(
            f"--optimizer {name} cannot shard its state over ranks, which distributed_lamb needs",
            f"pass --optimizer auto, {able}; or pass --distributed_lamb false",
        )
    problem = OPTIMIZERS[name].unavailable(device)
    if problem is not None:
        other = "use auto, or flat, which runs anywhere"
        fix = f"{problem.fix}, or {other}" if problem.fix else other
        raise UserError(f"--optimizer {name}: {problem.reason}", fix)
    return Choice(name, "as asked")


def _fastest(device: torch.device) -> Choice:
    if device.type == "cpu":
        return Choice("flat", "the fastest on a CPU")
    problem = OPTIMIZERS["triton"].unavailable(device)
    if problem is None:
        return Choice("triton", "the fewest bytes moved on a GPU")
    return Choice("flat", f"triton is not available: {problem.reason}")


def create_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    settings: OptimizerSettings,
    masters: dict[str, Tensor] | None = None,
    sharing: Sharing = "alone",
    gradient_dtype: torch.dtype | None = None,
) -> Optimizer:
    """Create the optimizer called `name`; "auto" is the fastest LAMB on the parameters' device.

    masters: by name, the float32 weights of which 16-bit parameters are the rounding.
    gradient_dtype: in which gradients are summed over micro-batches and ranks; None for the
        parameters' own.
    The result's `choice` says which provider it is, and why. Raises UserError as `choose` does, and
    if the provider does not support the parameters' dtype.
    """
    named = list(named_parameters)
    choice = choose(name, named[0][1].device, sharing == "sharded")
    provider = OPTIMIZERS[choice.name]
    if gradient_dtype not in (None, named[0][1].dtype) and not provider.flat:
        able = " or ".join(one for one, provider in OPTIMIZERS.items() if provider.flat)
        raise UserError(
            f"--optimizer {choice.name} sums gradients in the parameters' dtype alone",
            f"pass --gradient_dtype param, or --optimizer auto, {able}",
        )
    optimizer = provider.make(named, settings, masters, sharing, gradient_dtype)
    optimizer.choice = choice.describe()
    return optimizer
