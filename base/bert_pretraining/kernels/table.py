"""One table, operator -> provider, and the choice for a device.

Every provider of an operator has the signature of its namesake in `reference.py`, where
shapes and formulas are written down.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from bert_pretraining.errors import UserError
from bert_pretraining.kernels import apex_provider, reference, torch_provider

OPERATORS = (
    "attention",
    "bias_gelu",
    "bias_dropout_residual_layer_norm",
    "embedding_layer_norm_dropout",
    "masked_cross_entropy",
)
PROVIDERS = ("reference", "torch", "triton", "apex")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision


@dataclass(frozen=True)
class Kernels:
    """The operators in use, and for each the provider and why it was chosen."""

    attention: Callable
    bias_gelu: Callable
    bias_dropout_residual_layer_norm: Callable
    embedding_layer_norm_dropout: Callable
    masked_cross_entropy: Callable
    choice: dict[str, str]

    def describe(self) -> str:
        """One line: operator=provider (reason), ..."""
        return ", ".join(f"{operator}={why}" for operator, why in self.choice.items())


@dataclass(frozen=True)
class Target:
    """What the operators run on: a device, the dtype of activations, the head size."""

    device: torch.device
    dtype: torch.dtype
    head_size: int


def select(
    provider: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int = 64,
    per_operator: Mapping[str, str] | None = None,
) -> Kernels:
    """The operators for a device, the dtype of activations and the attention's head size.

    provider: "auto" or one of PROVIDERS, for all operators. An operator that it has no
    kernel for is taken from `torch`, and `choice` says so. per_operator: operator ->
    provider, in place of `provider`; here a provider without the operator is an error.

    Raises UserError for a provider that does not exist or is not installed.
    """
    target = Target(device, dtype, head_size)
    functions, choice = {}, {}
    for operator in OPERATORS:
        named = (per_operator or {}).get(operator)
        functions[operator], choice[operator] = _choose(operator, named, provider, target)
    return Kernels(choice=choice, **functions)


def _choose(operator: str, named: str | None, general: str, target: Target) -> tuple[Callable, str]:
    wanted = named or general
    flag = f"--kernels.{operator}" if named else "--kernels"
    if wanted not in ("auto", *PROVIDERS):
        raise UserError(f"{flag} {wanted}: no such provider; one of auto, {', '.join(PROVIDERS)}")
    if wanted == "auto":
        return _automatic(operator, target)
    why_not = unavailable(wanted, operator, target)
    if why_not is None:
        return _function(wanted, operator, target)
    if named or not why_not.startswith("has no"):
        raise UserError(f"{flag} {wanted}: {why_not}; choose another of auto, {_others(wanted)}")
    function, why = _function("torch", operator, target)
    return function, f"{why} ({wanted} {why_not})"


def _others(provider: str) -> str:
    return ", ".join(other for other in PROVIDERS if other != provider)


def unavailable(provider: str, operator: str, target: Target) -> str | None:
    """Why a provider cannot run an operator on the target, or None if it can."""
    if provider == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        return None if _runs_triton(target.device) else f"triton has no kernels for {target.device}"
    if provider == "apex":
        if operator not in apex_provider.NEEDS:
            # An operator that no apex has is no reason to refuse the others.
            installed = next(iter(apex_provider.NEEDS))
            absent = apex_provider.missing(installed)
            is_absent = absent is not None and "not installed" in absent
            return absent if is_absent or "another project" in str(absent) else "has no such kernel"
        if target.device.type == "cpu":
            return apex_provider.missing(operator) or "apex has no kernels for cpu"
        return apex_provider.missing(operator)
    return None


def _runs_triton(device: torch.device) -> bool:
    if device.type == "cuda":
        return True
    # TRITON_INTERPRET=1 runs the kernels in Python, for tests.
    import triton

    return bool(triton.knobs.runtime.interpret)


def _automatic(operator: str, target: Target) -> tuple[Callable, str]:
    """What is thought fastest on the target of what runs there."""
    if target.device.type == "cpu":
        return _function("torch", operator, target)
    if operator == "attention":
        # Hand-tuned kernels before our own, where they take the device and dtype.
        function, why = torch_provider.attention_for(target.device, target.dtype, target.head_size)
        if function is not torch_provider.padded_attention:
            return function, f"torch ({why})"
    why_not = unavailable("triton", operator, target)
    if why_not is None:
        return _function("triton", operator, target)
    function, why = _function("torch", operator, target)
    return function, f"{why} ({why_not})"


def _function(provider: str, operator: str, target: Target) -> tuple[Callable, str]:
    if provider == "torch" and operator == "attention":
        function, why = torch_provider.attention_for(target.device, target.dtype, target.head_size)
        return function, f"torch ({why})"
    return getattr(_module(provider), operator), provider


def _module(provider: str) -> ModuleType:
    if provider == "triton":
        from bert_pretraining.kernels import triton_provider

        return triton_provider
    return {"reference": reference, "torch": torch_provider, "apex": apex_provider}[provider]
