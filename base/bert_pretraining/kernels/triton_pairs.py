"""The operators of an encoder layer as plain functions over this project's Triton kernels.

They launch the kernels directly: a custom operator costs the host several times as much as a
launch. All tensors must be contiguous, and x and residual of the LayerNorm must have one dtype.
"""

from __future__ import annotations

from bert_pretraining.kernels import (
    triton_attention,
    triton_bias_gelu,
    triton_fp8_gelu,
    triton_fp8_layer_norm,
    triton_layer_norm,
)
from bert_pretraining.kernels.pairs import CastingPair, LayerPairs
from bert_pretraining.kernels.triton_layer_sums import LayerSums

_GELU = CastingPair(triton_fp8_gelu.forward, triton_fp8_gelu.backward)
_NORM = CastingPair(triton_fp8_layer_norm.forward, triton_fp8_layer_norm.backward)
PAIRS = LayerPairs(
    attention=triton_attention.PAIR,
    bias_gelu=triton_bias_gelu.PAIR._replace(casting=_GELU),
    bias_dropout_residual_layer_norm=triton_layer_norm.PAIR._replace(casting=_NORM),
    sums=LayerSums,
)
