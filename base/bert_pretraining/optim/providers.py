"""LAMB's implementations by name, and the choice for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.optim.flat_lamb import FlatLamb
from bert_pretraining.optim.flat_torch import TorchKernels
from bert_pretraining.optim.lamb import ForeachLamb, Lamb, LambSettings, ReferenceLamb
from bert_pretraining.optim.sharded_lamb import ShardedLamb

OPTIMIZERS = ("reference", "foreach", "flat", "triton", "apex")
FLAT = ("flat", "triton")

# How ranks hold gradients and state: nobody but the optimizer holds a rank's gradients; somebody
# else does, and makes one of the ranks'; the optimizer makes it, and each rank holds a part.
Sharing = Literal["alone", "replicated", "sharded"]


class Choice(NamedTuple):
    """A provider and why it was taken."""

    name: str
    reason: str

    def describe(self) -> str:
        """`name (reason)`, for the log."""
        return f"{self.name} ({self.reason})"


def choose(name: str, device: torch.device, sharded: bool = False) -> Choice:
    """The provider called `name` for parameters on `device`; "auto" is the fastest one.

    Raises UserError for an unknown name, and for a provider that cannot run here: the message
    says what is missing.
    """
    if name == "auto":
        return _fastest(device)
    if name not in OPTIMIZERS:
        raise UserError(
            f"--optimizer {name}: no such provider; one of auto, {', '.join(OPTIMIZERS)}"
        )
    if sharded and name not in FLAT:
        raise UserError(
            f"--optimizer {name}: with distributed_lamb it must be auto, {' or '.join(FLAT)}, "
            "which can share their state between ranks; or pass --distributed_lamb false"
        )
    problem = _problem(name, device)
    if problem is not None:
        raise UserError(f"--optimizer {name}: {problem}; use auto, or flat, which runs anywhere")
    return Choice(name, "as asked")


def _fastest(device: torch.device) -> Choice:
    if device.type == "cpu":
        return Choice("flat", "the fastest on a CPU")
    problem = _problem("triton", device)
    if problem is None:
        return Choice("triton", "the fewest bytes moved on a GPU")
    return Choice("flat", f"triton cannot be had: {problem}")


def _problem(name: str, device: torch.device) -> str | None:
    """Why a provider cannot run on a device, or None."""
    if name == "triton":
        from bert_pretraining.optim import flat_triton

        return flat_triton.unavailable(device)
    if name == "apex":
        from bert_pretraining.optim import apex_lamb

        return apex_lamb.unavailable(device)
    return None


def create_optimizer(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    settings: LambSettings,
    masters: dict[str, Tensor] | None = None,
    sharing: Sharing = "alone",
) -> Lamb:
    """The optimizer called `name`, or with "auto" the fastest for the parameters' device.

    masters: the float32 weights that 16-bit parameters were rounded from, by name.
    The result's `choice` says which provider it is, and why. UserError as `choose`, and for
    parameters of a dtype that the provider does not take.
    """
    named = list(named_parameters)
    choice = choose(name, named[0][1].device, sharing == "sharded")
    make = _maker(choice.name, named[0][1].dtype, sharing)
    optimizer = make(named, settings, masters)
    optimizer.choice = choice.describe()
    return optimizer


def _maker(name: str, dtype: torch.dtype, sharing: Sharing) -> Callable[..., Lamb]:
    if name == "reference":
        return ReferenceLamb
    if name == "foreach":
        return ForeachLamb
    if name == "apex":
        from bert_pretraining.optim.apex_lamb import ApexLamb

        return ApexLamb
    kernels = TorchKernels()
    if name == "triton":
        from bert_pretraining.optim.flat_triton import TritonKernels

        if dtype == torch.float64:
            raise UserError("--optimizer triton has no float64; the other optimizers have")
        kernels = TritonKernels()

    def make(
        named: list[tuple[str, nn.Parameter]],
        settings: LambSettings,
        masters: dict[str, Tensor] | None,
    ) -> Lamb:
        if sharing == "sharded":
            return ShardedLamb(named, settings, masters, kernels=kernels)
        in_place = sharing == "alone"
        return FlatLamb(named, settings, masters, kernels=kernels, gradients_in_place=in_place)

    return make
