"""Packed self-attention as an operator with a gradient, over `triton_attention_kernels`."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_pretraining.kernels.pairs import AddSums, Pair, Saved
from bert_pretraining.kernels.triton_attention_kernels import (
    forward_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from bert_pretraining.kernels.triton_common import (
    divide_up,
    mask_constants,
    power_of_two_at_least,
)
from bert_pretraining.kernels.triton_sums import add_partial_sums, column_sum
from bert_pretraining.runtime.compat import custom_op


class Tiling(NamedTuple):
    """Block sizes of a kernel, and its compile options."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


# For 16-bit dtypes: no registers spill on sm80 or sm90, and with head size 64 two to four programs
# run on one multiprocessor at a time. Larger blocks would waste more work on short sequences.
_SMALL_HEAD_TILING = Tiling(64, 64, num_warps=4, num_stages=2)
_LARGE_HEAD_TILING = Tiling(64, 64, num_warps=8, num_stages=2)
# For float32: products do not use tensor cores, and their operands are twice as large.
_FLOAT32_TILING = Tiling(32, 32, num_warps=8, num_stages=1)
_LARGEST_HEAD = 128


def tiling(head_size: int, dtype: torch.dtype) -> Tiling:
    """The block sizes for a head size and a dtype."""
    if dtype == torch.float32:
        return _FLOAT32_TILING
    return _SMALL_HEAD_TILING if head_size <= 64 else _LARGE_HEAD_TILING


@functools.cache
def _constants(
    num_heads: int, head_size: int, dtype: torch.dtype, dropout: float
) -> tuple[Tiling, float, tuple, dict[str, int]]:
    """The tiling, the scale of scores, and a kernel's constants and compile options."""
    if head_size > _LARGEST_HEAD:
        raise ValueError(f"head size {head_size} is larger than {_LARGEST_HEAD}")
    sizes = tiling(head_size, dtype)
    block_size = power_of_two_at_least(head_size, 16)
    blocks = (block_size, sizes.block_queries, sizes.block_keys)
    constants = (num_heads, head_size, *blocks, *mask_constants(dropout), "ieee")
    options = {"num_warps": sizes.num_warps, "num_stages": sizes.num_stages}
    return sizes, 1.0 / math.sqrt(head_size), constants, options


def _launch(
    kernel: Any,
    programs_over: str,
    pointers: tuple[Tensor | None, ...],
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
) -> None:
    """Run a kernel with one program per block of `programs_over` ("queries" or "keys")."""
    num_tokens, _, num_heads, head_size = qkv.shape
    sizes, scale, constants, options = _constants(num_heads, head_size, qkv.dtype, dropout)
    if num_tokens == 0:
        return
    num_sequences = cu_seqlens.shape[0] - 1
    block = sizes.block_queries if programs_over == "queries" else sizes.block_keys
    num_blocks = max(divide_up(max_seqlen, block), 1)
    kernel[((num_sequences + 1) * num_heads * num_blocks,)](
        *pointers,
        num_tokens,
        num_sequences,
        num_blocks,
        *qkv.stride()[:3],
        scale,
        *constants,
        **options,
    )


def forward(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float, seed: Tensor | None
) -> tuple[Tensor, Saved]:
    """softmax(Q K' / sqrt(D)) V inside each sequence, with dropout of the attention weights.

    qkv: (T, 3, heads, D), D up to 128, of stride 1 in the last dimension; cu_seqlens: (B + 1,)
    int32, the first is 0, sequences may be empty; max_seqlen: at least the longest length; seed:
    (2,) int32, or None without dropout.
    Returns the context (T, heads, D), 0 from row cu_seqlens[-1] on, and the log-sum-exp to base 2,
    log2 sum 2^(scores * log2 e), (heads, T) float32, undefined from that row on.
    """
    context, log_sum_exp = _empty_outputs(qkv)
    pointers = (qkv, cu_seqlens, seed, context, log_sum_exp)
    _launch(forward_kernel, "queries", pointers, qkv, cu_seqlens, max_seqlen, dropout)
    return context, (log_sum_exp,)


def _empty_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, _, num_heads, head_size = qkv.shape
    return (
        qkv.new_empty((num_tokens, num_heads, head_size)),
        qkv.new_empty((num_heads, num_tokens), dtype=torch.float32),
    )


def backward(
    gradient: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
    seed: Tensor | None,
    context: Tensor,
    saved: Saved,
) -> Tensor:
    """The gradient of qkv, (T, 3, heads, D), 0 after the last sequence. gradient: contiguous."""
    (log_sum_exp,) = saved
    qkv_gradient = qkv.new_empty(qkv.shape)
    delta = torch.empty_like(log_sum_exp)
    inputs = (gradient, qkv, cu_seqlens, seed)
    sizes = (qkv, cu_seqlens, max_seqlen, dropout)
    # The order matters: the second kernel reads the delta that the first one writes.
    _launch(
        query_gradient_kernel,
        "queries",
        (*inputs, context, log_sum_exp, delta, qkv_gradient),
        *sizes,
    )
    _launch(
        key_value_gradient_kernel,
        "keys",
        (*inputs, log_sum_exp, delta, qkv_gradient),
        *sizes,
    )
    return qkv_gradient


def backward_with_bias(
    gradient: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
    seed: Tensor | None,
    context: Tensor,
    saved: Saved,
    bias_gradient: Tensor,
    add_sums: AddSums = add_partial_sums,
) -> Tensor:
    """See `pairs.AttentionBackward`."""
    inputs = (gradient, qkv, cu_seqlens, max_seqlen, dropout, seed, context, saved)
    qkv_gradient = backward(*inputs)
    column_sum(qkv_gradient.view(qkv.shape[0], -1), bias_gradient, add_sums)
    return qkv_gradient


PAIR = Pair(forward, backward_with_bias)


def _readable(qkv: Tensor) -> Tensor:
    """qkv with stride 1 in the last dimension; the kernels accept any other strides."""
    return qkv if qkv.stride(3) == 1 else qkv.contiguous()


def _forward_any(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Saved]:
    """`forward` for any strides."""
    return forward(_readable(qkv), cu_seqlens.contiguous(), max_seqlen, dropout, seed)


def _gradient(
    gradient: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    seed: Tensor | None,
    dropout: float,
    context: Tensor,
    log_sum_exp: Tensor,
) -> Tensor:
    """`backward` for any strides."""
    inputs = (_readable(qkv), cu_seqlens.contiguous(), max_seqlen, dropout, seed)
    return backward(gradient.contiguous(), *inputs, context, (log_sum_exp,))


class PackedAttention(torch.autograd.Function):
    """`forward` and `backward` with autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        seed: Tensor | None,
        dropout: float,
    ) -> Tensor:
        context, saved = _forward_any(qkv, cu_seqlens, max_seqlen, seed, dropout)
        ctx.save_for_backward(qkv, cu_seqlens, seed, context, *saved)
        ctx.max_seqlen, ctx.dropout = max_seqlen, dropout
        return context

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return _gradient(gradient, *_backward_inputs(ctx)), None, None, None, None


def _backward_inputs(ctx: Any) -> tuple:
    qkv, cu_seqlens, seed, context, log_sum_exp = ctx.saved_tensors
    return qkv, cu_seqlens, ctx.max_seqlen, seed, ctx.dropout, context, log_sum_exp


# The same for torch.compile, which needs operators.


@custom_op("bert_pretraining::packed_attention")
def packed_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The context and the log-sum-exp; see `forward`."""
    context, (log_sum_exp,) = _forward_any(qkv, cu_seqlens, max_seqlen, seed, dropout)
    return context, log_sum_exp


@packed_attention.register_fake
def _(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(qkv)


@custom_op("bert_pretraining::packed_attention_backward")
def packed_attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    seed: Tensor | None,
    dropout: float,
    context: Tensor,
    log_sum_exp: Tensor,
) -> Tensor:
    """The gradient of qkv; see `backward`."""
    return _gradient(gradient, qkv, cu_seqlens, max_seqlen, seed, dropout, context, log_sum_exp)


@packed_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, cu_seqlens, max_seqlen, seed, dropout = inputs
    context, log_sum_exp = output
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, cu_seqlens, seed, context, log_sum_exp)
    ctx.max_seqlen, ctx.dropout = max_seqlen, dropout


def _differentiate(ctx: Any, gradient: Tensor | None, _: object) -> tuple:
    if gradient is None:
        return (None,) * 5
    return packed_attention_backward(gradient, *_backward_inputs(ctx)), None, None, None, None


packed_attention.register_autograd(_differentiate, setup_context=_save)
