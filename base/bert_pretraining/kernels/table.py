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
from bert_pretraining.kernels.pairs import LayerPairs, layer_pairs
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
LAST_RESORT = "reference"
NOT_ON_CPU = ("triton", "apex")  # Triton's kernels run there in Python, for tests alone
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --precision


@dataclass(frozen=True)
class Kernels:
    """The operators in use.

    choice: for each operator, its provider and why it was chosen. pairs: those of an encoder layer
    without autograd; None where a provider does not have them.
    """

    attention: Callable
    bias_gelu: Callable
    bias_dropout_residual_layer_norm: Callable
    embedding_layer_norm_dropout: Callable
    masked_cross_entropy: Callable
    choice: dict[str, str]
    pairs: LayerPairs | None = None

    def describe(self) -> str:
        """One line: operator=provider (reason), ..."""
        return ", ".join(f"{operator}={why}" for operator, why in self.choice.items())

    def summary(self) -> str:
        """The provider of most operators, and the operators of others: "triton; torch for ..."."""
        operators: dict[str, list[str]] = {}
        for operator, why in self.choice.items():
            operators.setdefault(why.split()[0], []).append(operator)
        most, *others = sorted(operators, key=lambda name: len(operators[name]), reverse=True)
        return "; ".join([most, *(f"{name} for {', '.join(operators[name])}" for name in others)])


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
    return assemble(chosen)


def assemble(found: Mapping[str, Implementation]) -> Kernels:
    """The operators in use, from each operator's implementation."""
    return Kernels(
        choice={operator: one.description for operator, one in found.items()},
        pairs=layer_pairs({operator: one.pair for operator, one in found.items()}),
        **{operator: one.function for operator, one in found.items()},
    )


def unavailable(provider: str, operator: str, target: Target) -> Unavailable | None:
    """Why a provider cannot run an operator on the target, or None if it can."""
    found = find(provider, operator, target)
    return found if isinstance(found, Unavailable) else None


def find(name: str, operator: str, target: Target) -> Implementation | Unavailable:
    """A provider's implementation of an operator, or why it cannot run on the target."""
    provider = PROVIDERS[name]
    problem = provider.unavailable(target)
    if problem is None and operator not in provider.operators:
        problem = Unavailable("has no such kernel")
    return problem or provider.find(operator, target)


@dataclass(frozen=True)
class Candidates:
    """The providers to prove for an operator, the preferred one first.

    flag: "--kernels NAME" where the user asked for this one by name, else "".
    """

    names: tuple[str, ...]
    flag: str = ""


def candidates(
    operator: str, provider: str, target: Target, per_operator: Mapping[str, str] | None = None
) -> Candidates:
    """Which providers may run an operator; arguments and errors as for `select`.

    Nothing runs on the device, so that a provider that hangs or breaks there does no harm.
    """
    named = (per_operator or {}).get(operator)
    wanted, flag = _wanted(operator, named, provider)
    if wanted != "auto":
        chosen = PROVIDERS[wanted]
        if named or operator in chosen.operators or chosen.unavailable(target):
            return Candidates((wanted,), f"{flag} {wanted}")
    preferred = [FALLBACK]
    if target.device.type != "cpu" and wanted == "auto":
        # PyTorch's hand-tuned attention is preferred to our own kernel.
        preferred = [FALLBACK, "triton"] if operator == "attention" else ["triton", FALLBACK]
    on_cpu = NOT_ON_CPU if target.device.type == "cpu" else ()
    others = [name for name in PROVIDERS if name not in (*preferred, *on_cpu, LAST_RESORT)]
    return Candidates(
        tuple(
            name
            for name in (*preferred, *others)
            if operator in PROVIDERS[name].operators and not PROVIDERS[name].unavailable(target)
        )
    )


def _wanted(operator: str, named: str | None, general: str) -> tuple[str, str]:
    """The provider that was asked for, or "auto", and by which flag."""
    wanted = named or general
    flag = f"--kernels.{operator}" if named else "--kernels"
    if wanted not in ("auto", *PROVIDERS):
        raise UserError(
            f"{flag} {wanted}: no such provider", f"choose one of auto, {', '.join(PROVIDERS)}"
        )
    return wanted, flag


def others(provider: str) -> str:
    """What to choose in place of a provider, as an order."""
    return f"choose another of auto, {', '.join(name for name in PROVIDERS if name != provider)}"


def _choose(operator: str, named: str | None, general: str, target: Target) -> Implementation:
    wanted, flag = _wanted(operator, named, general)
    if wanted == "auto":
        return _automatic(operator, target)
    found = find(wanted, operator, target)
    if isinstance(found, Implementation):
        return found
    declared = operator in PROVIDERS[wanted].operators
    if named or declared or PROVIDERS[wanted].unavailable(target):
        choose = others(wanted)
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
    found = find("triton", operator, target)
    if isinstance(found, Implementation):
        return found
    return _fallback(operator, target, str(found))


def _fallback(operator: str, target: Target, why: str = "") -> Implementation:
    found = PROVIDERS[FALLBACK].find(operator, target)
    return found._replace(description=f"{found.description} ({why})") if why else found
