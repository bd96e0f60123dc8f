"""The operators through this project's own Triton kernels. Shapes: see `reference.py`.

Each is a plain autograd function, which costs the host a fraction of a custom operator. Under
torch.compile it is the custom operator over the same kernels, which gives the same bits.

They take float32, float16 and bfloat16, and compute in float32. Nothing waits for the device, and
every size follows from shapes and `max_seqlen`. So the operators can be captured in a CUDA graph,
and torch.compile compiles them without a graph break. Gradients are deterministic.

For buffers of a fixed size, attention never reads tokens after cu_seqlens[-1] and returns zeros for
them, and masked_cross_entropy ignores every row with a negative label, not only with IGNORED.
"""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_compiling

from bert_pretraining.kernels import (
    triton_attention,
    triton_bias_gelu,
    triton_cross_entropy,
    triton_embedding,
    triton_layer_norm,
)
from bert_pretraining.kernels.triton_common import draw_seed, require_supported


def attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """Head size at most 128. Rows from cu_seqlens[-1] on are not read; their results are 0."""
    require_supported(qkv)
    seed = draw_seed(qkv.device, dropout)
    inputs = (qkv, cu_seqlens, max_seqlen, seed, dropout)
    if is_compiling():
        return triton_attention.packed_attention(*inputs)[0]
    return triton_attention.PackedAttention.apply(*inputs)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    require_supported(x, bias)
    if is_compiling():
        return triton_bias_gelu.bias_gelu(x, bias)
    return triton_bias_gelu.BiasGelu.apply(x, bias)


def bias_dropout_residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
) -> Tensor:
    require_supported(x, bias, residual, weight, norm_bias)
    seed = draw_seed(x.device, dropout)
    inputs = (x, bias, residual, weight, norm_bias, seed, epsilon, dropout)
    if is_compiling():
        return triton_layer_norm.residual_layer_norm(*inputs)[0]
    return triton_layer_norm.ResidualLayerNorm.apply(*inputs)


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
    """Ids must be valid for their tables: the kernel does not check them."""
    tables = (word_table, position_table, segment_table)
    require_supported(*tables, weight, norm_bias)
    seed = draw_seed(word_table.device, dropout)
    ids = (input_ids, position_ids, segment_ids)
    inputs = (*ids, *tables, weight, norm_bias, seed, epsilon, dropout)
    if is_compiling():
        return triton_embedding.embedding_layer_norm(*inputs)[0]
    return triton_embedding.EmbeddingLayerNorm.apply(*inputs)


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with a negative label are ignored, whatever their logits are."""
    require_supported(logits)
    if is_compiling():
        return triton_cross_entropy.cross_entropy(logits, labels)[:2]
    return triton_cross_entropy.CrossEntropy.apply(logits, labels)
