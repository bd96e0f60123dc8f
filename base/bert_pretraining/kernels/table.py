"""One table, operator -> provider, and the choice for a device.

Every provider of an operator has the signature of its namesake in `reference.py`, where
shapes and formulas are written down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bert_pretraining.errors import UserError
from bert_pretraining.kernels import reference, torch_provider

OPERATORS = (
    "attention",
    "bias_gelu",
    "bias_dropout_residual_layer_norm",
    "embedding_layer_norm_dropout",
    "masked_cross_entropy",
)
PROVIDERS = ("reference", "torch")
_MODULES = {"reference": reference, "torch": torch_provider}


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


def select(provider: str, device: torch.device, dtype: torch.dtype, head_size: int = 64) -> Kernels:
    """The operators for a device, the dtype of activations and the attention's head size.

    provider: "auto" or one of PROVIDERS. A provider that lacks an operator falls back to
    `reference` for it, and `choice` says so.

    Raises UserError for a provider that does not exist.
    """
    if provider not in ("auto", *PROVIDERS):
        raise UserError(
            f"--kernels {provider}: no such provider; one of auto, {', '.join(PROVIDERS)}"
        )
    wanted = "torch" if provider == "auto" else provider
    functions, choice = {}, {}
    for operator in OPERATORS:
        function = getattr(_MODULES[wanted], operator, None)
        if function is None:
            functions[operator] = getattr(reference, operator)
            choice[operator] = f"reference ({wanted} has none)"
        else:
            functions[operator] = function
            choice[operator] = wanted
    if wanted == "torch":
        functions["attention"], why = torch_provider.attention_for(device, dtype, head_size)
        choice["attention"] = f"torch ({why})"
    return Kernels(choice=choice, **functions)
