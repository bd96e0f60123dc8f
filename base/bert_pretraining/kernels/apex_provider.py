"""The operators for which NVIDIA apex has kernels. Shapes: see `reference.py`.

Each operator needs one symbol of the installed apex, listed in NEEDS; `missing` says if it is
absent. apex has no attention kernel (its multi-head attention was removed) and no kernel for GELU
alone, so another provider runs these two.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from bert_pretraining.errors import NotInstalled, Unavailable
from bert_pretraining.kernels.dropout import dropout as apply_dropout
from bert_pretraining.kernels.dropout import dropout_add
from bert_pretraining.kernels.provider import Implementation, Provider, Target
from bert_pretraining.kernels.reference import IGNORED

NAME = "apex"

_LAYER_NORM = ("apex.normalization.fused_layer_norm", "fused_layer_norm_affine")
_CROSS_ENTROPY = ("apex.contrib.xentropy", "SoftmaxCrossEntropyLoss")
NEEDS = {
    "bias_dropout_residual_layer_norm": _LAYER_NORM,
    "embedding_layer_norm_dropout": _LAYER_NORM,
    "masked_cross_entropy": _CROSS_ENTROPY,
}


def installation_fault() -> Unavailable | None:
    """Why apex cannot be used on any device (absent, or another package), or None."""
    try:
        apex = importlib.import_module("apex")
    except ImportError:
        return NotInstalled("NVIDIA apex is not installed")
    if not _is_nvidias(apex):
        return Unavailable(
            "the installed 'apex' is another project (PyPI's web toolkit), not NVIDIA's",
            "pip uninstall apex, then build https://github.com/NVIDIA/apex",
        )
    return None


def unavailable(target: Target) -> Unavailable | None:
    """Why no operator of apex can run on the target, or None."""
    problem = installation_fault()
    if problem is None and target.device.type == "cpu":
        problem = Unavailable("apex has no kernels for cpu")
    return problem


def _is_nvidias(apex: ModuleType) -> bool:
    if any(hasattr(apex, part) for part in ("normalization", "optimizers", "parallel")):
        return True
    try:
        importlib.import_module(_LAYER_NORM[0])
    except ImportError:
        return False
    return True


def missing(operator: str) -> Unavailable | None:
    """Why the installed apex lacks the symbol for an operator in NEEDS, or None if it has it."""
    module, symbol = NEEDS[operator]
    try:
        if hasattr(importlib.import_module(module), symbol):
            return None
    except ImportError as error:
        return Unavailable(f"the installed apex cannot load {module} ({error})")
    return Unavailable(f"the installed apex has no {module}.{symbol}")


def find(operator: str, target: Target) -> Implementation | Unavailable:
    """The operator's implementation, if the installed apex has its symbol. See `Provider`."""
    return missing(operator) or Implementation(globals()[operator], NAME)


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
    # The last arguments: label smoothing, the label to ignore, whether 16-bit logits give float32
    # losses. The kernel reads the label's logit in ignored rows too, so the label must be a valid
    # index.
    to_float32 = logits.dtype != torch.float32
    losses = _symbol(_CROSS_ENTROPY).apply(logits, labels.clamp(min=0), 0.0, IGNORED, to_float32)
    losses = torch.where(labels == IGNORED, 0.0, losses)
    return losses.sum(), (logits.argmax(dim=1) == labels).sum()


PROVIDER = Provider(NAME, tuple(NEEDS), find, unavailable)
