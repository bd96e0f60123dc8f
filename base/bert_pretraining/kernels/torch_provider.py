"""The operators through PyTorch's own fused functions. Shapes: see `reference.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_pretraining.errors import UserError

# A CPU attends to all sequences at once, padded, while the longest one's queries are no
# more than this many numbers (tokens x hidden size); else one by one. Small ones are bound
# by the number of calls, large ones by the arithmetic. Measured: docs/LOG.md, 2026-11-23.
PADDED_ATTENTION_LIMIT = 8192


def attention_for(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[Callable, str]:
    """The attention for a device, dtype and head size, and the reason for it.

    On a CUDA-like device each is tried on two small sequences, forward and backward: what
    a device can do depends on its build of PyTorch as much as on its capability.
    """
    if device.type == "cpu":
        return cpu_attention, "padded for small sequences, else one by one"
    refusals = []
    for name, attention in (
        ("flash", flash_attention),
        ("memory-efficient", efficient_attention),
        ("padded", padded_attention),
    ):
        try:
            _try_attention(attention, device, dtype, head_size)
        except (RuntimeError, NotImplementedError) as error:
            refusals.append(f"{name} refused: {str(error).splitlines()[0][:80]}")
            continue
        return attention, "; ".join([name, *refusals])
    raise UserError(f"no attention runs on {device}: {'; '.join(refusals)}; use --device cpu")


def _try_attention(
    attention: Callable, device: torch.device, dtype: torch.dtype, head_size: int
) -> None:
    cu_seqlens = torch.tensor([0, 5, 16], dtype=torch.int32, device=device)
    qkv = torch.ones(16, 3, 2, head_size, device=device, dtype=dtype, requires_grad=True)
    attention(qkv, cu_seqlens, 11, 0.1).sum().backward()


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
