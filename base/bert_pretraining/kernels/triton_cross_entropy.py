"""Cross-entropy of logits over a large vocabulary: one Triton kernel forward, one backward.

A program processes one row in one pass. It keeps the largest logit so far and the sum of
exponentials relative to it (Milakov and Gimelshein 2018, algorithm 3). The forward pass saves the
log-sum-exp, one float32 per row; the backward pass computes (softmax - one-hot) times the loss's
gradient. As with argmax, a row is correct if no other logit is larger than the label's and no
earlier one is equal.

The gradient is written to new memory. Writing it over the logits would save that memory, but change
a tensor that the caller can see.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.triton_common import divide_up, power_of_two_at_least
from bert_pretraining.kernels.triton_launch import launched_directly
from bert_pretraining.runtime.compat import custom_op

_LARGEST_BLOCK = 4096
TOTAL_BLOCK = 1024  # rows that `total_kernel` reads at a time


@launched_directly
@triton.jit
def forward_kernel(
    logits_ptr,
    labels_ptr,
    loss_ptr,
    correct_ptr,
    log_sum_exp_ptr,
    row_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    label = tl.load(labels_ptr + row).to(tl.int32)
    # The logits of an ignored row may hold anything. They are not read, and count as 0.
    counted = label >= 0
    # A label beyond the vocabulary gives an infinite loss instead of a read outside the row.
    # It is loaded as a block of one: Triton 2.1 cannot load a bfloat16 scalar with a mask.
    place = label + tl.arange(0, 1)
    known = (place >= 0) & (place < COLUMNS)
    chosen = tl.load(logits_ptr + place, mask=known, other=0.0).to(tl.float32)
    chosen = tl.where(label < COLUMNS, tl.sum(chosen, axis=0), float("-inf"))
    readable = tl.where(counted, COLUMNS, 0)
    beaten = row * 0  # Triton 2.1 has no tl.zeros(())
    total = beaten.to(tl.float32)
    largest = total - float("inf")
    for start in range(0, COLUMNS, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < COLUMNS
        logits = tl.load(logits_ptr + columns, mask=columns < readable, other=float("-inf"))
        logits = tl.where(counted, logits.to(tl.float32), 0.0)
        new_largest = tl.maximum(largest, tl.max(logits, axis=0))
        # If all logits so far are -inf, the difference of two infinities would be NaN.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift), axis=0)
        largest = new_largest
        # The comparisons are negated so that a NaN counts as larger: such a row is not correct.
        earlier = (columns < label) & ((logits < chosen) == 0)
        later = (columns > label) & ((logits <= chosen) == 0)
        beaten += tl.sum(((earlier | later) & inside).to(tl.int32), axis=0)
    log_sum_exp = tl.where(largest == float("-inf"), 0.0, largest) + tl.log(total)
    tl.store(log_sum_exp_ptr + row, log_sum_exp)
    tl.store(loss_ptr + row, tl.where(counted, log_sum_exp - chosen, 0.0))
    tl.store(correct_ptr + row, (counted & (beaten == 0)).to(tl.int32))


@launched_directly
@triton.jit(do_not_specialize=["num_rows"])
def total_kernel(
    loss_ptr, correct_ptr, loss_sum_ptr, correct_sum_ptr, num_rows, BLOCK: tl.constexpr
):
    """Sum the losses and the correct rows in a fixed order, as one program."""
    loss = tl.zeros((BLOCK,), tl.float32)
    correct = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        loss += tl.load(loss_ptr + rows, mask=rows < num_rows, other=0.0)
        correct += tl.load(correct_ptr + rows, mask=rows < num_rows, other=0)
    tl.store(loss_sum_ptr, tl.sum(loss, axis=0))
    tl.store(correct_sum_ptr, tl.sum(correct, axis=0).to(tl.int64))


@launched_directly
@triton.jit
def backward_kernel(
    loss_gradient_ptr,
    logits_ptr,
    labels_ptr,
    log_sum_exp_ptr,
    logits_gradient_ptr,
    row_stride,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < COLUMNS
    label = tl.load(labels_ptr + row).to(tl.int32)
    counted = label >= 0
    scale = tl.load(loss_gradient_ptr).to(tl.float32)
    log_sum_exp = tl.load(log_sum_exp_ptr + row)
    logits_ptr += row.to(tl.int64) * row_stride
    readable = tl.where(counted, COLUMNS, 0)
    logits = tl.load(logits_ptr + columns, mask=columns < readable, other=0.0).to(tl.float32)
    gradient = tl.exp(logits - log_sum_exp) - (columns == label).to(tl.float32)
    gradient = tl.where(counted, gradient * scale, 0.0)
    logits_gradient_ptr += row.to(tl.int64) * COLUMNS
    tl.store(logits_gradient_ptr + columns, gradient, mask=inside)


@functools.cache
def block_and_warps(num_columns: int) -> tuple[int, int]:
    """Columns and warps of a block: 16 numbers per thread for a large vocabulary."""
    block = min(power_of_two_at_least(num_columns, 16), _LARGEST_BLOCK)
    return block, 8 if block == _LARGEST_BLOCK else 4


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of -log softmax(logits)[label], number of correct rows, and each row's log-sum-exp.

    logits: (M, V); labels: (M,) integers; rows with a negative label are ignored. Returns a float32
    scalar, an int64 scalar, and (M,) float32.
    """
    num_rows, num_columns = logits.shape
    logits, labels = _rows(logits), labels.contiguous()
    loss_sum, correct_sum, log_sum_exp = _empty_outputs(logits)
    loss = torch.empty_like(log_sum_exp)
    correct = torch.empty_like(log_sum_exp, dtype=torch.int32)
    block, num_warps = block_and_warps(num_columns)
    if num_rows:
        forward_kernel[(num_rows,)](
            logits,
            labels,
            loss,
            correct,
            log_sum_exp,
            logits.stride(0),
            num_columns,
            block,
            num_warps=num_warps,
        )
    total_kernel[(1,)](loss, correct, loss_sum, correct_sum, num_rows, TOTAL_BLOCK)
    return loss_sum, correct_sum, log_sum_exp


def _empty_outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((), dtype=torch.int64),
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
    )


def backward(loss_gradient: Tensor, logits: Tensor, labels: Tensor, log_sum_exp: Tensor) -> Tensor:
    """The gradient of the first result of `forward` with respect to the logits, (M, V)."""
    num_rows, num_columns = logits.shape
    logits, labels = _rows(logits), labels.contiguous()
    logits_gradient = logits.new_empty((num_rows, num_columns))
    block, num_warps = block_and_warps(num_columns)
    if num_rows:
        backward_kernel[(num_rows, divide_up(num_columns, block))](
            loss_gradient,
            logits,
            labels,
            log_sum_exp,
            logits_gradient,
            logits.stride(0),
            num_columns,
            block,
            num_warps=num_warps,
        )
    return logits_gradient


class CrossEntropy(torch.autograd.Function):
    """The first two results of `forward`, and `backward`, with autograd."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss_sum, correct, log_sum_exp = forward(logits, labels)
        ctx.mark_non_differentiable(correct)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, log_sum_exp)
        return loss_sum, correct

    @staticmethod
    def backward(ctx: Any, loss_gradient: Tensor | None, _: object) -> tuple:
        if loss_gradient is None:
            return None, None
        return backward(loss_gradient, *ctx.saved_tensors), None


# The same for torch.compile, which needs operators.


@custom_op("bert_pretraining::cross_entropy")
def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `forward`."""
    return forward(logits, labels)


@cross_entropy.register_fake
def _(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(logits)


@custom_op("bert_pretraining::cross_entropy_backward")
def cross_entropy_backward(
    loss_gradient: Tensor, logits: Tensor, labels: Tensor, log_sum_exp: Tensor
) -> Tensor:
    """The gradient of the logits; see `backward`."""
    return backward(loss_gradient, logits, labels, log_sum_exp)


@cross_entropy_backward.register_fake
def _(loss_gradient: Tensor, logits: Tensor, *_: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, correct, log_sum_exp = output
    ctx.mark_non_differentiable(correct, log_sum_exp)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, log_sum_exp)


def _differentiate(ctx: Any, loss_gradient: Tensor | None, *_: object) -> tuple:
    if loss_gradient is None:
        return None, None
    return cross_entropy_backward(loss_gradient, *ctx.saved_tensors), None


cross_entropy.register_autograd(_differentiate, setup_context=_save)
