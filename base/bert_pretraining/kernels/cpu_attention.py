"""Attention over packed sequences on a CPU, for which PyTorch has no such kernel."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bert_pretraining.kernels.dropout import keep_mask, keep_scale

# A limit on tokens x hidden size of the longest sequence. Up to it, all sequences are padded and
# computed in one call, because short sequences are bound by the number of calls. Above it, each
# sequence is computed separately, because long ones are bound by arithmetic. Measured: docs/LOG.md,
# 2026-11-23.
PADDED_ATTENTION_LIMIT = 8192


def cpu_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """Attention inside each sequence: padded for short sequences, one by one for long ones."""
    if max_seqlen * qkv.shape[2] * qkv.shape[3] > PADDED_ATTENTION_LIMIT:
        return looped_attention(qkv, cu_seqlens, max_seqlen, dropout)
    return padded_attention(qkv, cu_seqlens, max_seqlen, dropout)


def looped_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """Compute one sequence after the other. Tokens after the last sequence give zeros."""
    runs = itertools.pairwise(cu_seqlens.tolist())
    return _LoopedAttention.apply(qkv, [slice(*run) for run in runs if run[0] < run[1]], dropout)


def padded_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """One scaled_dot_product_attention call on (B, heads, max_seqlen, D), padding masked."""
    num_sequences = cu_seqlens.shape[0] - 1
    lengths = cu_seqlens.diff().long()
    inside = torch.arange(max_seqlen, device=qkv.device) < lengths[:, None]
    slots = inside.flatten().nonzero()[:, 0]
    padded = qkv.new_zeros(num_sequences * max_seqlen, *qkv.shape[1:])
    padded = padded.index_copy(0, slots, qkv[: slots.shape[0]])
    query, key, value = padded.view(num_sequences, max_seqlen, *qkv.shape[1:]).permute(
        2, 0, 3, 1, 4
    )
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=inside[:, None, None, :], dropout_p=dropout
    )
    context = context.transpose(1, 2).reshape(-1, *qkv.shape[2:])[slots]
    return F.pad(context, (0, 0, 0, 0, 0, qkv.shape[0] - slots.shape[0]))


class _LoopedAttention(torch.autograd.Function):
    """Hand-written forward and backward, which save the attention weights only once.

    With P = softmax(Q K' / sqrt(D)), M the dropout mask (0 or 1) and s its scale:
    O = s (P M) V, and for a given dO:
    dV = s (P M)' dO; dP = s M (dO V'); dS = P (dP - rowsum(dP P)); dQ = dS K / sqrt(D);
    dK = dS' Q / sqrt(D).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, runs: list[slice], dropout: float) -> Tensor:
        # (3, heads, T, D), so that each sequence is a batch of plain matrices, one per head.
        by_head = qkv.permute(1, 2, 0, 3).contiguous()
        query, key, value = by_head.unbind()
        context = torch.zeros_like(query)
        saved = []
        for here in runs:
            scores = torch.bmm(query[:, here], key[:, here].transpose(1, 2))
            weights = torch.softmax(scores.mul_(1.0 / math.sqrt(qkv.shape[3])), dim=-1)
            kept = weights
            if dropout:
                mask = keep_mask(tuple(weights.shape), dropout)
                kept = weights * mask
                saved.append(mask)
            saved.append(weights)
            context[:, here] = torch.bmm(kept, value[:, here])
        if dropout:
            context.mul_(keep_scale(dropout))
        ctx.save_for_backward(by_head, *saved)
        ctx.runs, ctx.dropout = runs, dropout
        return context.transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        by_head, *saved = ctx.saved_tensors
        query, key, value = by_head.unbind()
        gradients = torch.zeros_like(by_head)
        query_gradient, key_gradient, value_gradient = gradients.unbind()
        scaled = gradient.transpose(0, 1).contiguous()
        if ctx.dropout:
            scaled = scaled * keep_scale(ctx.dropout)  # not in place: the caller may still use it
        remaining = iter(saved)
        for here in ctx.runs:
            mask = next(remaining) if ctx.dropout else None
            weights = next(remaining)
            kept = weights if mask is None else weights * mask
            value_gradient[:, here] = torch.bmm(kept.transpose(1, 2), scaled[:, here])
            weights_gradient = torch.bmm(scaled[:, here], value[:, here].transpose(1, 2))
            if mask is not None:
                weights_gradient.mul_(mask)
            scores_gradient = torch._softmax_backward_data(
                weights_gradient, weights, -1, weights.dtype
            ).mul_(1.0 / math.sqrt(by_head.shape[3]))
            query_gradient[:, here] = torch.bmm(scores_gradient, key[:, here])
            key_gradient[:, here] = torch.bmm(scores_gradient.transpose(1, 2), query[:, here])
        return gradients.permute(2, 0, 1, 3), None, None
