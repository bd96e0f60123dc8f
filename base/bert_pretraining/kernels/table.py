"""The kernel providers, and the choice of a provider for each operator on a device.

A provider's function has the signature of the function of the same name in `reference.py`, which
documents shapes and formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bert_pretraining.errors import Unavailable, UserError
from bert_pretraining.kernels import (
    apex_provider,
    reference,
    torch_provider,
    triton_provider,
)
from bert_pretraining.kernels.provider import OPERATORS, Implementation, Provider, Target

PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        reference.PROVIDER,
        torch_provider.PROVIDER,
        triton_provider.PROVIDER,
        apex_provider.PROVIDER,
    )
}
FALLBACK = "torch"  # it has every operator on every device
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --precision


@dataclass(frozen=True)
class Kernels:
    """The operators in use. choice: for each operator, its provider and why it was chosen."""

    attention: Callable
    bias_gelu: Callable
    bias_dropout_residual_layer_norm: Callable
    embedding_layer_norm_dropout: Callable
    masked_cross_entropy: Callable
    choice: dict[str, str]

    def describe(self) -> str:
        """One line: operator=provider (reason), ..."""
        return ", ".join(f"{operator}={why}" for operator, why in self.choice.items())


def select(
    provider: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int = 64,
    per_operator: Mapping[str, str] | None = None,
) -> Kernels:
    """Choose the operators for a device, the dtype of activations and the attention's head size.

    provider: "auto" or one of PROVIDERS, for all operators. If it has no kernel for an operator,
    `torch` runs that operator, and `choice` says so. per_operator: operator -> provider, which
    overrides `provider`; here a provider that lacks the operator is an error.

    Raises UserError for a provider that does not exist or cannot run on the device.
    """
    target = Target(device, dtype, head_size)
    chosen = {
        operator: _choose(operator, (per_operator or {}).get(operator), provider, target)
        for operator in OPERATORS
    }
    return Kernels(
        choice={operator: found.description for operator, found in chosen.items()},
        **{operator: found.function for operator, found in chosen.items()},
    )


def unavailable(provider: str, operator: str, target: Target) -> Unavailable | None:
    """Why a provider cannot run an operator on the target, or None if it can."""
    found = _find(provider, operator, target)
    return found if isinstance(found, Unavailable) else None


def _find(name: str, operator: str, target: Target) -> Implementation | Unavailable:
    provider = PROVIDERS[name]
    problem = provider.unavailable(target)
    if problem is None and operator not in provider.operators:
        problem = Unavailable("has no such kernel")
    return problem or provider.find(operator, target)


def _choose(operator: str, named: str | None, general: str, target: Target) -> Implementation:
    wanted = named or general
    flag = f"--kernels.{operator}" if named else "--kernels"
    if wanted not in ("auto", *PROVIDERS):
        raise UserError(
            f"{flag} {wanted}: no such provider", f"choose one of auto, {', '.join(PROVIDERS)}"
        )
    if wanted == "auto":
        return _automatic(operator, target)
    found = _find(wanted, operator, target)
    if isinstance(found, Implementation):
        return found
    declared = operator in PROVIDERS[wanted].operators
    if named or declared or PROVIDERS[wanted].unavailable(target):
        others = ", ".join(other for other in PROVIDERS if other != wanted)
        choose = f"choose another of auto, {others}"
        fix = f"{found.fix}, or {choose}" if found.fix else choose
        raise UserError(f"{flag} {wanted}: {found.reason}", fix)
    return _fallback(operator, target, f"{wanted} {found}")


def _automatic(operator: str, target: Target) -> Implementation:
    """The provider that is expected to be the fastest of those that run on the target."""
    if target.device.type == "cpu":
        return _fallback(operator, target)
    if operator == "attention":
        # PyTorch's hand-tuned attention is preferred to our own kernel where it supports the device
        # and the dtype.
        found = PROVIDERS[FALLBACK].find(operator, target)
        if found.function is not torch_provider.padded_attention:
            return found
    found = _find("triton", operator, target)
    if isinstance(found, Implementation):
        return found
    return _fallback(operator, target, str(found))


def _fallback(operator: str, target: Target, why: str = "") -> Implementation:
    found = PROVIDERS[FALLBACK].find(operator, target)
    return found._replace(description=f"{found.description} ({why})") if why else found
