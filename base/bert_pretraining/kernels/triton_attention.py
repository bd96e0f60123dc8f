"""Packed self-attention as an operator with a gradient, over `triton_attention_kernels`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bert_pretraining.kernels.pairs import AddSums, Pair, Saved
from bert_pretraining.kernels.triton_attention_kernels import (
    forward_kernel,
    key_value_gradient_kernel,
    query_gradient_kernel,
)
from bert_pretraining.kernels.triton_attention_tilings import (
    Problem,
    Tiling,
    candidates,
    length_class,
    tilings,
    use,
)
from bert_pretraining.kernels.triton_common import (
    divide_up,
    mask_constants,
    power_of_two_at_least,
)
from bert_pretraining.kernels.triton_sums import add_partial_sums, column_sum
from bert_pretraining.runtime import arithmetic
from bert_pretraining.runtime.compat import custom_op

_LARGEST_HEAD = 128


def problem_of(qkv: Tensor, max_seqlen: int) -> Problem:
    """What the block sizes depend on. qkv: (T, 3, heads, D)."""
    tf32 = qkv.dtype == torch.float32 and arithmetic.multiplies_in_tf32(qkv.device)
    return Problem(qkv.shape[3], qkv.dtype, tf32, length_class(max_seqlen))


@functools.cache
def _constants(
    num_heads: int, head_size: int, dropout: float, tf32: bool, tiling: Tiling
) -> tuple[tuple, dict[str, int]]:
    """A kernel's constants and compile options."""
    if head_size > _LARGEST_HEAD:
        raise ValueError(f"head size {head_size} is larger than {_LARGEST_HEAD}")
    blocks = (power_of_two_at_least(head_size, 16), tiling.block_queries, tiling.block_keys)
    precision = "tf32" if tf32 else "ieee"
    constants = (num_heads, head_size, *blocks, *mask_constants(dropout), precision)
    return constants, {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}


def _launch(
    kernel: Any,
    name: str,
    pointers: tuple[Tensor | None, ...],
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
) -> None:
    """Run a kernel with the block sizes of this name, a field of `Tilings`."""
    num_tokens, _, num_heads, head_size = qkv.shape
    problem = problem_of(qkv, max_seqlen)
    tiling = getattr(tilings(problem), name)
    constants, options = _constants(num_heads, head_size, dropout, problem.tf32, tiling)
    if num_tokens == 0:
        return
    num_sequences = cu_seqlens.shape[0] - 1
    # One program for each block of what the kernel does not loop over.
    block = tiling.block_keys if name == "key_value_gradient" else tiling.block_queries
    num_blocks = max(divide_up(max_seqlen, block), 1)
    kernel[((num_sequences + 1) * num_heads * num_blocks,)](
        *pointers,
        num_tokens,
        num_sequences,
        num_blocks,
        *qkv.stride()[:3],
        head_size**-0.5,
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
    _launch(forward_kernel, "forward", pointers, qkv, cu_seqlens, max_seqlen, dropout)
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
        "query_gradient",
        (*inputs, context, log_sum_exp, delta, qkv_gradient),
        *sizes,
    )
    _launch(
        key_value_gradient_kernel,
        "key_value_gradient",
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

Seconds = Callable[[Callable[[], object]], float]
"""Runs a function and returns the seconds that the device took for it."""


def tune(
    seconds: Seconds,
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout: float,
    seed: Tensor | None,
) -> dict[str, dict[Tiling, float]]:
    """The seconds of every candidate of every kernel on these inputs; see `forward` for them.

    Those of the gradient kernels include the other gradient kernel. What a run uses stays as it
    was, so that its results do not depend on a measurement.
    """
    problem = problem_of(qkv, max_seqlen)
    before = tilings(problem)
    inputs = (qkv, cu_seqlens, max_seqlen, dropout, seed)
    context, saved = forward(*inputs)
    found = {}
    for kernel in before._fields:
        run = functools.partial(forward, *inputs)
        if kernel != "forward":
            run = functools.partial(backward, context, *inputs, context, saved)
        found[kernel] = {}
        for candidate in candidates(kernel, problem):
            use(problem, before._replace(**{kernel: candidate}))
            try:
                found[kernel][candidate] = seconds(run)
            finally:
                use(problem, before)
    return found


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
