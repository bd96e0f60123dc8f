"""GELU(x + bias) in its tanh approximation, as one Triton kernel forward and one backward.

Hendrycks and Gimpel 2016, section 2: 0.5 z (1 + tanh(u)), u = sqrt(2 / pi) (z + 0.044715 z^3).
Since 0.5 (1 + tanh(u)) = sigmoid(2u) = s, this is z s, and its derivative is
s + z s (1 - s) 2u'. The forward pass saves only x and the bias. The bias gradient is summed in
float32 in a fixed order without atomics: each program sums a group of rows, then
`triton_sums.add_partial_sums` adds the groups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.pairs import AddSums, Pair
from bert_pretraining.kernels.triton_common import NOT_SPECIALISED, divide_up
from bert_pretraining.kernels.triton_launch import launched_directly
from bert_pretraining.kernels.triton_sums import add_partial_sums, block_shape, write_partial_sums
from bert_pretraining.runtime.compat import custom_op

_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)
# A bound for |z|. Beyond it sigmoid(2u) is 1 in float32, or below 1.2e-38; within it exp does not
# overflow.
_SATURATED = tl.constexpr(10.0)

# All four warps of a program lie side by side in a row of 1,024 columns, so that each thread sums
# its own columns of the bias gradient.
FORWARD_BLOCK = (2, 1024)
BACKWARD_BLOCK = (2, 1024)
# Rows over which one backward program sums the bias gradient.
_PROGRAM_ROWS = 128


@triton.jit
def sigmoid_of_twice_u(z):
    """sigmoid(2u) and d(2u)/dz."""
    bounded = tl.minimum(tl.maximum(z, -_SATURATED), _SATURATED)
    square = bounded * bounded
    twice_u = _TWICE_SQRT_2_OVER_PI * bounded * (1.0 + _CUBIC * square)
    slope = _TWICE_SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * square)
    return 1.0 / (1.0 + tl.exp(-twice_u)), slope


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def forward_kernel(
    x_ptr,
    bias_ptr,
    output_ptr,
    num_rows,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows < num_rows)[:, None] & (columns < COLUMNS)[None, :]
    offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)
    z = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    sigmoid, _ = sigmoid_of_twice_u(z)
    tl.store(output_ptr + offsets, z * sigmoid, mask=inside)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def backward_kernel(
    gradient_ptr,
    x_ptr,
    bias_ptr,
    x_gradient_ptr,
    partial_ptr,
    num_rows,
    COLUMNS: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < COLUMNS
    bias = tl.load(bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for step in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        rows = program * PROGRAM_ROWS + step + tl.arange(0, BLOCK_ROWS)
        inside = (rows < num_rows)[:, None] & column_inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        sigmoid, slope = sigmoid_of_twice_u(z)
        gradient *= sigmoid * (1.0 + z * (1.0 - sigmoid) * slope)
        tl.store(x_gradient_ptr + offsets, gradient, mask=inside)
        bias_sum += tl.sum(gradient, axis=0)
    tl.store(partial_ptr + program * COLUMNS + columns, bias_sum, mask=column_inside)


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias). x: (..., C), contiguous; bias: (C,). Returns (..., C) of the dtype of x."""
    output = torch.empty_like(x)
    num_columns = bias.shape[0]
    num_rows = x.numel() // num_columns
    if num_rows:
        block_rows, block_columns = block_shape(FORWARD_BLOCK, num_columns)
        forward_kernel[(divide_up(num_rows, block_rows), divide_up(num_columns, block_columns))](
            x, bias, output, num_rows, num_columns, block_rows, block_columns
        )
    return output


def backward(
    gradient: Tensor,
    x: Tensor,
    bias: Tensor,
    bias_gradient: Tensor,
    add_sums: AddSums = add_partial_sums,
) -> Tensor:
    """The gradient of x. All tensors are contiguous.

    The gradient of the bias goes to bias_gradient, (C,), as add_sums does it.
    """
    num_columns = bias.shape[0]
    num_rows = x.numel() // num_columns
    programs = divide_up(num_rows, _PROGRAM_ROWS)
    x_gradient = torch.empty_like(x)
    partial = x.new_empty((programs, num_columns), dtype=torch.float32)
    if num_rows:
        block_rows, block_columns = block_shape(BACKWARD_BLOCK, num_columns)
        backward_kernel[(programs, divide_up(num_columns, block_columns))](
            gradient,
            x,
            bias,
            x_gradient,
            partial,
            num_rows,
            num_columns,
            _PROGRAM_ROWS,
            block_rows,
            block_columns,
        )
    add_sums(partial, (bias_gradient,))
    return x_gradient


PAIR = Pair(forward, backward)


def _gradients(gradient: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and the bias, for any strides."""
    bias_gradient = bias.new_empty(bias.shape)
    tensors = (gradient.contiguous(), x.contiguous(), bias.contiguous())
    return backward(*tensors, bias_gradient, write_partial_sums), bias_gradient


class BiasGelu(torch.autograd.Function):
    """`forward` and `backward` with autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return forward(x.contiguous(), bias.contiguous())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(gradient, *ctx.saved_tensors)


# The same for torch.compile, which needs operators.


@custom_op("bert_pretraining::bias_gelu")
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU(x + bias). x: (..., C); bias: (C,). Returns (..., C) of the dtype of x."""
    return forward(x.contiguous(), bias.contiguous())


@bias_gelu.register_fake
def _(x: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("bert_pretraining::bias_gelu_backward")
def bias_gelu_backward(gradient: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and the bias."""
    return _gradients(gradient, x, bias)


@bias_gelu_backward.register_fake
def _(gradient: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    return bias_gelu_backward(gradient, *ctx.saved_tensors)


bias_gelu.register_autograd(_differentiate, setup_context=_save)
