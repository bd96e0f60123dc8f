"""LayerNorm(residual + dropout(x + bias)) with gradients, over `triton_layer_norm_kernels`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bert_pretraining.kernels.pairs import AddSums, Pair, Saved
from bert_pretraining.kernels.triton_common import (
    divide_up,
    mask_constants,
    power_of_two_at_least,
)
from bert_pretraining.kernels.triton_layer_norm_kernels import backward_kernel, forward_kernel
from bert_pretraining.kernels.triton_sums import add_partial_sums, write_partial_sums
from bert_pretraining.runtime.compat import custom_op

# The backward pass aims at this many programs: a few for each multiprocessor of a large GPU, but
# few enough that their partial sums are small compared with the activations.
BACKWARD_PROGRAMS = 512


@functools.cache
def row_blocks(num_columns: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a block of whole rows: about 16 numbers per thread.

    With 32, the backward kernels hold so many registers that two blocks run at a time instead of
    five.
    """
    columns = power_of_two_at_least(num_columns, 16)
    rows = min(max(2048 // columns, 1), 16)
    return rows, columns, 8 if columns > 4096 else 4


def program_rows(num_rows: int, block_rows: int) -> int:
    """Rows that a backward program sums: a power of two, so that few variants are compiled."""
    return power_of_two_at_least(divide_up(num_rows, BACKWARD_PROGRAMS), block_rows)


def forward(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Saved]:
    """LayerNorm(residual + dropout(x + bias)), and what `backward` needs.

    x, residual: (T, C); bias, weight, norm_bias: (C,); all contiguous. seed: (2,) int32, or None
    without dropout. Returns the output, (T, C), and residual + dropout(x + bias), (T, C), with the
    mean and 1 / standard deviation of each of its rows, (2, T) float32.
    """
    num_rows, num_columns = x.shape
    output, summed, statistics = empty_outputs(x, residual)
    if num_rows:
        block_rows, block_columns, num_warps = row_blocks(num_columns)
        forward_kernel[(divide_up(num_rows, block_rows),)](
            x,
            bias,
            residual,
            weight,
            norm_bias,
            seed,
            output,
            summed,
            statistics,
            num_rows,
            epsilon,
            num_columns,
            *mask_constants(dropout),
            block_rows,
            block_columns,
            num_warps=num_warps,
        )
    return output, (summed, statistics)


def empty_outputs(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the output, (T, C), and for what `backward` needs."""
    wider = x if x.dtype == torch.promote_types(x.dtype, residual.dtype) else residual
    statistics = x.new_empty((2, x.shape[0]), dtype=torch.float32)
    return wider.new_empty(x.shape), wider.new_empty(x.shape), statistics


def backward(
    gradient: Tensor,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    saved: Saved,
    bias_gradient: Tensor,
    weight_gradient: Tensor,
    norm_bias_gradient: Tensor,
    add_sums: AddSums = add_partial_sums,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the residual, (T, C) each; the same tensor without dropout.

    Their dtype is that of the sum of x and residual. The gradients of bias, weight and norm_bias
    go to the last three tensors as add_sums does it. All are contiguous.
    """
    summed, statistics = saved
    num_rows, num_columns = gradient.shape
    block_rows, block_columns, num_warps = row_blocks(num_columns)
    rows = program_rows(num_rows, block_rows)
    programs = divide_up(num_rows, rows)
    residual_gradient = torch.empty_like(summed)
    x_gradient = torch.empty_like(summed) if dropout else residual_gradient
    partial = statistics.new_empty((programs, 3, num_columns))
    if num_rows:
        backward_kernel[(programs,)](
            gradient,
            summed,
            statistics,
            weight,
            seed,
            x_gradient,
            residual_gradient,
            partial,
            num_rows,
            num_columns,
            *mask_constants(dropout),
            rows,
            block_rows,
            block_columns,
            num_warps=num_warps,
        )
    add_sums(partial, (bias_gradient, weight_gradient, norm_bias_gradient))
    return x_gradient, residual_gradient


PAIR = Pair(forward, backward)


def _forward_any(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor,
    seed: Tensor | None, epsilon: float, dropout: float,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """`forward` for any strides."""
    tensors = (each.contiguous() for each in (x, bias, residual, weight, norm_bias))
    return forward(*tensors, epsilon, dropout, seed)


def _gradients(
    gradient: Tensor,
    summed: Tensor,
    statistics: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, ...]:
    """The gradients of x, residual, bias, weight and norm_bias, for any strides."""
    parameters = [each.new_empty(each.shape) for each in (bias, weight, norm_bias)]
    inputs = (gradient.contiguous(), weight.contiguous(), dropout, seed, (summed, statistics))
    return *backward(*inputs, *parameters, write_partial_sums), *parameters


class ResidualLayerNorm(torch.autograd.Function):
    """`forward` and `backward` with autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        norm_bias: Tensor,
        seed: Tensor | None,
        epsilon: float,
        dropout: float,
    ) -> Tensor:
        output, saved = _forward_any(x, bias, residual, weight, norm_bias, seed, epsilon, dropout)
        ctx.save_for_backward(*saved, bias, weight, norm_bias, seed)
        ctx.dropout, ctx.dtypes = dropout, (x.dtype, residual.dtype)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        x, residual, *parameters = _gradients(gradient, *ctx.saved_tensors, ctx.dropout)
        return _in_order(ctx, x, residual, *parameters)


def _in_order(
    ctx: Any, x: Tensor, residual: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the inputs. x and residual may be of different dtypes."""
    x, residual = x.to(ctx.dtypes[0]), residual.to(ctx.dtypes[1])
    return x, bias, residual, weight, norm_bias, None, None, None


# The same for torch.compile, which needs operators.


@custom_op("bert_pretraining::residual_layer_norm")
def residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    epsilon: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output of `forward`, and what `backward` needs."""
    output, saved = _forward_any(x, bias, residual, weight, norm_bias, seed, epsilon, dropout)
    return output, *saved


@residual_layer_norm.register_fake
def _(x: Tensor, bias: Tensor, residual: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return empty_outputs(x, residual)


@custom_op("bert_pretraining::residual_layer_norm_backward")
def residual_layer_norm_backward(
    gradient: Tensor,
    summed: Tensor,
    statistics: Tensor,
    bias: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, bias, weight and norm_bias.

    The gradient of x is empty, (0, C), without dropout, where it equals the residual's: an operator
    must not return one tensor twice.
    """
    x_gradient, *others = _gradients(
        gradient, summed, statistics, bias, weight, norm_bias, seed, dropout
    )
    return x_gradient if dropout else x_gradient.new_empty((0, summed.shape[1])), *others


@residual_layer_norm_backward.register_fake
def _(gradient: Tensor, summed: Tensor, _: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor,
      _seed: Tensor | None, dropout: float) -> tuple[Tensor, ...]:  # fmt: skip
    rows, columns = summed.shape
    return (
        summed.new_empty((rows if dropout else 0, columns)),
        summed.new_empty((rows, columns)),
        *(each.new_empty(each.shape) for each in (bias, weight, norm_bias)),
    )


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, bias, residual, weight, norm_bias, seed, _, dropout = inputs
    _, summed, statistics = output
    ctx.mark_non_differentiable(summed, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(summed, statistics, bias, weight, norm_bias, seed)
    ctx.dropout, ctx.dtypes = dropout, (x.dtype, residual.dtype)


def _differentiate(ctx: Any, gradient: Tensor | None, *_: object) -> tuple:
    if gradient is None:
        return (None,) * 8
    x, residual, *parameters = residual_layer_norm_backward(
        gradient, *ctx.saved_tensors, ctx.dropout
    )
    return _in_order(ctx, x if ctx.dropout else residual, residual, *parameters)


residual_layer_norm.register_autograd(_differentiate, setup_context=_save)
