"""Attention over packed sequences through PyTorch's CUDA kernels.

PyTorch has FlashAttention-2 and memory-efficient attention with `cu_seqlens` and dropout, but only
as internal operators, and some of their shape functions are wrong. This module has both as plain
functions (`pairs.py`), and wrapped as custom operators, so that they work under torch.compile.
Shapes: see `reference.py`. Both draw dropout masks from PyTorch's generator, in CUDA graphs too.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bert_pretraining.kernels.pairs import AddSums, AttentionBackward, Pair, Saved
from bert_pretraining.runtime import device as devices
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


def flash_forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float, seed: object = None
) -> tuple[Tensor, Saved]:
    """The context, and the log-sum-exp with the generator's state. `seed` is ignored."""
    query, key, value = qkv.unbind(1)
    # Arguments up to return_debug_mask are positional, because the keywords after it differ between
    # versions of PyTorch.
    context, log_sum_exp, seed, offset, _ = aten._flash_attention_forward(
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, False, False
    )
    return context, (log_sum_exp, seed, offset)


def flash_backward(
    gradient: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
    seed: object,
    context: Tensor,
    saved: Saved,
    bias_gradient: Tensor | None = None,
    add_sums: AddSums | None = None,
) -> Tensor:
    """The gradient of qkv. gradient: contiguous. The last two: see `pairs.AttentionBackward`.

    PyTorch's function (2.4 to 2.13) always makes three new tensors, so that they must be copied
    into one.
    """
    query, key, value = qkv.unbind(1)
    log_sum_exp, seed, offset = saved
    gradients = aten._flash_attention_backward(
        gradient, query, key, value, context, log_sum_exp, cu_seqlens, cu_seqlens,
        max_seqlen, max_seqlen, dropout, False, seed, offset,
    )  # fmt: skip
    if bias_gradient is not None and add_sums is not None and _has_triton():
        from bert_pretraining.kernels.triton_sums import stack

        return stack(gradients, bias_gradient, add_sums)
    stacked = torch.stack(gradients, 1)
    _add_sum(stacked, bias_gradient)
    return stacked


def _add_sum(gradient: Tensor, bias_gradient: Tensor | None) -> None:
    if bias_gradient is not None:
        bias_gradient.add_(gradient.flatten(1).sum(0, dtype=torch.float32))


_has_triton = functools.cache(functools.partial(devices.is_installed, "triton"))


def efficient_forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float, seed: object = None
) -> tuple[Tensor, Saved]:
    """The context, and the log-sum-exp with the generator's state. `seed` is ignored."""
    query, key, value = qkv[None].unbind(2)
    context, log_sum_exp, seed, offset, _, _ = aten._efficient_attention_forward(
        query, key, value, None, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout, 0, True
    )
    return context[0], (log_sum_exp, seed, offset)


def efficient_backward(
    gradient: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
    seed: object,
    context: Tensor,
    saved: Saved,
    bias_gradient: Tensor | None = None,
    add_sums: AddSums | None = None,
) -> Tensor:
    """The gradient of qkv. gradient: contiguous. The last two: see `pairs.AttentionBackward`."""
    query, key, value = qkv[None].unbind(2)
    log_sum_exp, seed, offset = saved
    # With shared storage, the three gradients are parts of one tensor of the shape of qkv.
    gradients = aten._efficient_attention_backward(
        gradient[None], query, key, value, None, context[None], cu_seqlens, cu_seqlens,
        max_seqlen, max_seqlen, log_sum_exp, dropout, seed, offset, 0, False,
        shared_storage_dqdkdv=True,
    )[:3]  # fmt: skip
    whole = torch.empty(0, dtype=qkv.dtype, device=qkv.device)
    whole.set_(gradients[0].untyped_storage(), 0, qkv.shape)
    _add_sum(whole, bias_gradient)
    return whole


FLASH = Pair(flash_forward, flash_backward)
EFFICIENT = Pair(efficient_forward, efficient_backward)


@custom_op("bert_pretraining::flash_attention", random=True)
def _flash(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context, saved = flash_forward(qkv, cu_seqlens, max_seqlen, dropout)
    return context, *saved


@_flash.register_fake
def _(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> tuple[Tensor, ...]:
    context, saved = flash_forward(qkv, cu_seqlens, max_seqlen, dropout)
    return context, *saved


@custom_op("bert_pretraining::efficient_attention", random=True)
def _efficient(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context, saved = efficient_forward(qkv, cu_seqlens, max_seqlen, dropout)
    # Cloned, because it is a view of what the kernel returns, and an operator must not return one.
    return context.clone(), *saved


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


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    qkv, cu_seqlens, ctx.max_seqlen, ctx.dropout = inputs
    ctx.save_for_backward(qkv, cu_seqlens, *output)


def _register(forward: torch.library.CustomOpDef, backward: AttentionBackward, name: str) -> None:
    """Give a forward operator its gradient, through a backward operator of this name."""

    @custom_op(name)
    def differentiate(
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
        saved = (log_sum_exp, seed, offset)
        inputs = (qkv, cu_seqlens, max_seqlen, dropout, None)
        return backward(gradient.contiguous(), *inputs, context, saved)

    @differentiate.register_fake
    def _(gradient: Tensor, qkv: Tensor, *_: object) -> Tensor:
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)

    def from_context(ctx: FunctionCtx, gradient: Tensor, *_: Tensor) -> tuple:
        qkv, cu_seqlens, context, log_sum_exp, seed, offset = ctx.saved_tensors
        inputs = (gradient, qkv, context, log_sum_exp, cu_seqlens, ctx.max_seqlen, ctx.dropout)
        return differentiate(*inputs, seed, offset), None, None, None

    forward.register_autograd(from_context, setup_context=_save)


_register(_flash, flash_backward, "bert_pretraining::flash_attention_backward")
_register(_efficient, efficient_backward, "bert_pretraining::efficient_attention_backward")
