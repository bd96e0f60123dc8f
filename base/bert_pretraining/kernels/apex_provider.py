"""The operators that an installed NVIDIA apex has kernels for. Shapes: see `reference.py`.

Each function wants a symbol of apex; `missing` says which are absent. What apex has no
kernel for (attention, since its multi-head attention was removed, and GELU on its own) is
not here, and another provider takes its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from bert_pretraining.kernels.dropout import dropout as apply_dropout
from bert_pretraining.kernels.dropout import dropout_add
from bert_pretraining.kernels.reference import IGNORED

_LAYER_NORM = ("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")
_CROSS_ENTROPY = ("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss")
NEEDS = {
    "bias_dropout_residual_layer_norm": _LAYER_NORM,
    "embedding_layer_norm_dropout": _LAYER_NORM,
    "masked_cross_entropy": _CROSS_ENTROPY,
}


def missing(operator: str) -> str | None:
    """What apex lacks for an operator of NEEDS, or None."""
    try:
        apex = importlib.import_module("apex")
    except ImportError:
        return "NVIDIA apex is not installed"
    module, symbol = NEEDS[operator]
    try:
        if not hasattr(importlib.import_module(module), symbol):
            return f"the installed apex has no {module}.{symbol}"
    except ImportError as error:
        if not any(hasattr(apex, part) for part in ("normalization", "optimizers", "parallel")):
            return (
                "the installed 'apex' is another project (PyPI's web toolkit), not NVIDIA's; "
                "pip uninstall apex, then build https://github.com/NVIDIA/apex"
            )
        return f"the installed apex cannot load {module} ({error})"
    return None


def _symbol(name: tuple[str, str]) -> Callable:
    return getattr(importlib.import_module(name[0]), name[1])


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    return _symbol(_LAYER_NORM)(x, weight, bias, tuple(weight.shape), epsilon)


def bias_dropout_residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
) -> Tensor:
    return _layer_norm(dropout_add(x, bias, residual, dropout), weight, norm_bias, epsilon)


def embedding_layer_norm_dropout(
    input_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    segment_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
) -> Tensor:
    embedded = word_table[input_ids] + position_table[position_ids] + segment_table[segment_ids]
    return apply_dropout(_layer_norm(embedded, weight, norm_bias, epsilon), dropout)


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    # Arguments: smoothing, a label that does not count, whether 16-bit logits give float32
    # losses. The kernel reads the label's logit even where the label does not count.
    to_float32 = logits.dtype != torch.float32
    losses = _symbol(_CROSS_ENTROPY).apply(logits, labels.clamp(min=0), 0.0, IGNORED, to_float32)
    losses = torch.where(labels == IGNORED, 0.0, losses)
    return losses.sum(), (logits.argmax(dim=1) == labels).sum()
