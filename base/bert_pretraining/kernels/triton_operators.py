"""The operators through this project's own Triton kernels. Shapes: see `reference.py`.

They take float32, float16 and bfloat16, and compute in float32. Nothing waits for the device, and
every size follows from shapes and `max_seqlen`. So the operators can be captured in a CUDA graph,
and torch.compile compiles them without a graph break. Gradients are deterministic.

For buffers of a fixed size, attention never reads tokens after cu_seqlens[-1] and returns zeros for
them, and masked_cross_entropy ignores every row with a negative label, not only with IGNORED.
"""

from __future__ import annotations

from torch import Tensor

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
    return triton_attention.packed_attention(qkv, cu_seqlens, max_seqlen, seed, dropout)[0]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    require_supported(x, bias)
    return triton_bias_gelu.bias_gelu(x, bias)


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
    return triton_layer_norm.residual_layer_norm(
        x, bias, residual, weight, norm_bias, seed, epsilon, dropout
    )[0]


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
    return triton_embedding.embedding_layer_norm(
        input_ids, position_ids, segment_ids, *tables, weight, norm_bias, seed, epsilon, dropout
    )[0]


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with a negative label are ignored, whatever their logits are."""
    require_supported(logits)
    loss_sum, correct, _ = triton_cross_entropy.cross_entropy(logits, labels)
    return loss_sum, correct
