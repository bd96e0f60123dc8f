"""Attention over packed sequences through PyTorch's CUDA kernels.

PyTorch has FlashAttention-2 and memory-efficient attention with `cu_seqlens` and dropout, but only
as internal operators, and some of their shape functions are wrong. This module wraps both as custom
operators, so that they work under torch.compile and in CUDA graphs. Shapes: see `reference.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bert_pretraining.runtime.compat import custom_op

aten = torch.ops.aten


def flash_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """FlashAttention-2 (CUDA sm80 and newer, fp16 or bf16).

    Rows of tokens after the last sequence are undefined.
    """
    return _flash(qkv, cu_seqlens, max_seqlen, dropout)[0]


def efficient_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
    """Memory-efficient attention (any CUDA device and dtype)."""
    return _efficient(qkv, cu_seqlens, max_seqlen, dropout)[0]


@custom_op("bert_pretraining::flash_attention", random=True)
def _flash(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = qkv.unbind(dim=1)
    # Arguments up to return_debug_mask are positional, because the keywords after it differ between
    # versions of PyTorch.
    context, log_sum_exp, seed, offset, _ = aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, False, False
    )
    return context, log_sum_exp, seed, offset


@_flash.register_fake
def _(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> tuple[Tensor, ...]:
    query, key, value = qkv.unbind(dim=1)
    return aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, False, False
    )[:4]


@custom_op("bert_pretraining::flash_attention_backward")
def _flash_backward(
    gradient: Tensor,
    qkv: Tensor,
    context: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    query, key, value = qkv.unbind(dim=1)
    gradients = aten._flash_attention_backward(
        gradient.contiguous(), query, key, value, context, log_sum_exp, cu_seqlens, cu_seqlens,
        max_seqlen, max_seqlen, dropout, False, seed, offset,
    )  # fmt: skip
    return torch.stack(gradients, dim=1)


@custom_op("bert_pretraining::efficient_attention", random=True)
def _efficient(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = qkv[None].unbind(dim=2)
    context, log_sum_exp, seed, offset, _, _ = aten._efficient_attention_forward(
        query, key, value, None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, 0, True
    )
    # The kernel returns a leading dimension of 1. The result is cloned, because a custom operator
    # must not return a view.
    return context[0].clone(), log_sum_exp, seed, offset


@_efficient.register_fake
def _(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> tuple[Tensor, ...]:
    tokens, _, heads, size = qkv.shape
    # The kernel pads each row of log-sum-exps to a multiple of 32.
    rows = (cu_seqlens.shape[0] - 1, heads, -(-max_seqlen // 32) * 32)
    return (
        qkv.new_empty(tokens, heads, size),
        qkv.new_empty(rows, dtype=torch.float32),
        qkv.new_empty((), dtype=torch.int64),
        qkv.new_empty((), dtype=torch.int64),
    )


@custom_op("bert_pretraining::efficient_attention_backward")
def _efficient_backward(
    gradient: Tensor,
    qkv: Tensor,
    context: Tensor,
    log_sum_exp: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
    seed: Tensor,
    offset: Tensor,
) -> Tensor:
    query, key, value = qkv[None].unbind(dim=2)
    gradients = aten._efficient_attention_backward(
        gradient[None].contiguous(), query, key, value, None, context[None], cu_seqlens,
        cu_seqlens, max_seqlen, max_seqlen, log_sum_exp, dropout, seed, offset, 0, False,
    )  # fmt: skip
    return torch.stack([part[0] for part in gradients[:3]], dim=1)


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.dropout = inputs
    ctx.save_for_backward(qkv, cu_seqlens, *output)


def _register(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> None:
    @backward.register_fake
    def _(gradient: Tensor, qkv: Tensor, *_: object) -> Tensor:
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)

    def differentiate(ctx: FunctionCtx, gradient: Tensor, *_: Tensor) -> tuple:
        qkv, cu_seqlens, context, log_sum_exp, seed, offset = ctx.saved_tensors
        qkv_gradient = backward(
            gradient,
            qkv,
            context,
            log_sum_exp,
            cu_seqlens,
            ctx.max_seqlen,
            ctx.dropout,
            seed,
            offset,
        )
        return qkv_gradient, None, None, None

    forward.register_autograd(differentiate, setup_context=_save)


_register(_flash, _flash_backward)
_register(_efficient, _efficient_backward)
