"""The operators through PyTorch's own fused functions. Shapes: see `reference.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# A CPU attends to all sequences at once, padded, while the longest one's queries are no
# more than this many numbers (tokens x hidden size); else one by one. Small ones are bound
# by the number of calls, large ones by the arithmetic. Measured: docs/LOG.md, 2026-11-23.
PADDED_ATTENTION_LIMIT = 8192


def attention_for(device: torch.device, dtype: torch.dtype) -> tuple[Callable, str]:
    """The attention for a device and dtype, and the reason for it."""
    if device.type != "cuda":
        return cpu_attention, "padded for small sequences, else one by one"
    if dtype not in (torch.float16, torch.bfloat16):
        return efficient_attention, f"memory-efficient: no flash attention in {dtype}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return efficient_attention, f"memory-efficient: no flash attention on sm{major}{minor}"
    return flash_attention, f"flash, sm{major}{minor}"


def cpu_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """Attention on a CPU: no work between sequences, and few calls for short ones."""
    if max_seqlen * qkv.shape[2] * qkv.shape[3] > PADDED_ATTENTION_LIMIT:
        return looped_attention(qkv, cu_seqlens, max_seqlen, dropout)
    return padded_attention(qkv, cu_seqlens, max_seqlen, dropout)


def looped_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """One scaled-dot-product call a sequence."""
    contexts = []
    for sequence in qkv.split(cu_seqlens.diff().tolist()):
        query, key, value = sequence.permute(1, 2, 0, 3)[:, None]
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        contexts.append(context[0].transpose(0, 1))
    return torch.cat(contexts)


def padded_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """One scaled-dot-product call on (B, heads, max_seqlen, D), padding masked away."""
    num_sequences = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens.diff().long()
    inside = torch.arange(max_seqlen, device=qkv.device) < lengths[:, None]
    slots = inside.flatten().nonzero()[:, 0]
    padded = qkv.new_zeros(num_sequences * max_seqlen, *qkv.shape[1:]).index_copy(0, slots, qkv)
    query, key, value = padded.view(num_sequences, max_seqlen, *qkv.shape[1:]).permute(
        2, 0, 3, 1, 4
    )
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=inside[:, None, None, :], dropout_p=dropout
    )
    return context.transpose(1, 2).reshape(-1, *qkv.shape[2:])[slots]


def flash_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """FlashAttention-2 over cu_seqlens (CUDA sm80 and newer, fp16 or bf16)."""
    query, key, value = qkv.unbind(dim=1)
    # Positional up to return_debug_mask: the keywords after it differ between versions.
    return torch.ops.aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, False, False
    )[0]


def efficient_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """Memory-efficient attention over cu_seqlens (any CUDA device and dtype)."""
    query, key, value = qkv[None].unbind(dim=2)
    needs_gradient = torch.is_grad_enabled() and qkv.requires_grad
    return torch.ops.aten._efficient_attention_forward(
        query,
        key,
        value,
        None,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout,
        0,
        needs_gradient,
    )[0][0]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def bias_dropout_residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
) -> Tensor:
    summed = residual + F.dropout(x + bias, dropout, training=dropout > 0)
    # F.layer_norm computes 16-bit input in float32 inside.
    return F.layer_norm(summed, weight.shape, weight, norm_bias, epsilon)


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
    embedded = F.embedding(input_ids, word_table) + F.embedding(position_ids, position_table)
    embedded = embedded + F.embedding(segment_ids, segment_table)
    normed = F.layer_norm(embedded, weight.shape, weight, norm_bias, epsilon)
    return F.dropout(normed, dropout, training=dropout > 0)


def masked_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    loss_sum = F.cross_entropy(logits.float(), labels, reduction="sum")
    return loss_sum, (logits.argmax(dim=1) == labels).sum()
