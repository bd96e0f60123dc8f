"""The operators of an encoder layer as plain functions over this project's Triton kernels.

They launch the kernels directly: a custom operator costs the host several times as much as a
launch. All tensors must be contiguous, and x and residual of the LayerNorm must have one dtype.
"""

from __future__ import annotations

from bert_pretraining.kernels import triton_attention, triton_bias_gelu, triton_layer_norm
from bert_pretraining.kernels.pairs import LayerPairs
from bert_pretraining.kernels.triton_layer_sums import LayerSums

PAIRS = LayerPairs(
    attention=triton_attention.PAIR,
    bias_gelu=triton_bias_gelu.PAIR,
    bias_dropout_residual_layer_norm=triton_layer_norm.PAIR,
    sums=LayerSums,
)
