"""dropout(LayerNorm(sum of three embeddings)) as one Triton kernel forward and one backward.

The sum is not saved: the backward kernel gathers the embeddings again, which reads as much memory
as a saved sum. It returns the gradient of each token's sum; PyTorch's embedding gradient adds these
into the three tables, in a fixed order for each entry. Parameter gradients are summed over rows as
in `triton_layer_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.triton_common import (
    NOT_SPECIALISED,
    divide_up,
    drop_threshold,
    keep_scale,
    kept,
    only_stream_keys,
)
from bert_pretraining.kernels.triton_layer_norm import (
    normalise,
    normalise_backward,
    program_rows,
    row_blocks,
)
from bert_pretraining.runtime.compat import custom_op


@triton.jit
def _gather(table_ptr, ids_ptr, rows, num_rows, columns, COLUMNS: tl.constexpr):
    """Each row's entry of a table, as float32; 0 outside."""
    row_inside = rows < num_rows
    ids = tl.load(ids_ptr + rows, mask=row_inside, other=0).to(tl.int64)
    inside = row_inside[:, None] & (columns < COLUMNS)[None, :]
    offsets = ids[:, None] * COLUMNS + columns[None, :]
    return tl.load(table_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def forward_kernel(
    word_ids_ptr,
    position_ids_ptr,
    segment_ids_ptr,
    word_ptr,
    position_ptr,
    segment_ptr,
    weight_ptr,
    norm_bias_ptr,
    seed_ptr,
    output_ptr,
    mean_ptr,
    inverse_deviation_ptr,
    num_rows,
    epsilon,
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < COLUMNS
    embedded = _gather(word_ptr, word_ids_ptr, rows, num_rows, columns, COLUMNS)
    embedded += _gather(position_ptr, position_ids_ptr, rows, num_rows, columns, COLUMNS)
    embedded += _gather(segment_ptr, segment_ids_ptr, rows, num_rows, columns, COLUMNS)

    normal, mean, inverse_deviation = normalise(embedded, column_inside[None, :], epsilon, COLUMNS)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(inverse_deviation_ptr + rows, inverse_deviation, mask=rows < num_rows)
    weight = tl.load(weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    output = normal * weight[None, :] + norm_bias[None, :]
    if THRESHOLD > 0:
        first_key, second_key = only_stream_keys(seed_ptr)
        keep = kept(first_key, second_key, rows[:, None], columns[None, :], THRESHOLD)
        output = tl.where(keep, output * KEEP_SCALE, 0.0)
    inside = (rows < num_rows)[:, None] & column_inside[None, :]
    offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    tl.store(output_ptr + offsets, output, mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def backward_kernel(
    gradient_ptr,
    word_ids_ptr,
    position_ids_ptr,
    segment_ids_ptr,
    word_ptr,
    position_ptr,
    segment_ptr,
    weight_ptr,
    seed_ptr,
    mean_ptr,
    inverse_deviation_ptr,
    embedded_gradient_ptr,
    partial_ptr,
    num_rows,
    COLUMNS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr,
    PROGRAM_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_COLUMNS)
    column_inside = columns < COLUMNS
    weight = tl.load(weight_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    norm_bias_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    if THRESHOLD > 0:
        first_key, second_key = only_stream_keys(seed_ptr)

    for step in range(0, PROGRAM_ROWS, BLOCK_ROWS):
        rows = program * PROGRAM_ROWS + step + tl.arange(0, BLOCK_ROWS)
        row_inside = rows < num_rows
        inside = row_inside[:, None] & column_inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
        embedded = _gather(word_ptr, word_ids_ptr, rows, num_rows, columns, COLUMNS)
        embedded += _gather(position_ptr, position_ids_ptr, rows, num_rows, columns, COLUMNS)
        embedded += _gather(segment_ptr, segment_ids_ptr, rows, num_rows, columns, COLUMNS)
        mean = tl.load(mean_ptr + rows, mask=row_inside, other=0.0)
        inverse_deviation = tl.load(inverse_deviation_ptr + rows, mask=row_inside, other=0.0)
        normal = (embedded - mean[:, None]) * inverse_deviation[:, None]
        normal = tl.where(column_inside[None, :], normal, 0.0)
        gradient = tl.load(gradient_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            keep = kept(first_key, second_key, rows[:, None], columns[None, :], THRESHOLD)
            gradient = tl.where(keep, gradient * KEEP_SCALE, 0.0)
        weight_sum += tl.sum(gradient * normal, axis=0)
        norm_bias_sum += tl.sum(gradient, axis=0)
        total = normalise_backward(gradient, weight, normal, inverse_deviation, COLUMNS)
        tl.store(embedded_gradient_ptr + offsets, total, mask=inside)

    partial_ptr += program * 2 * COLUMNS + columns
    tl.store(partial_ptr, weight_sum, mask=column_inside)
    tl.store(partial_ptr + COLUMNS, norm_bias_sum, mask=column_inside)


@custom_op("bert_pretraining::embedding_layer_norm")
def embedding_layer_norm(
    word_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    segment_table: Tensor,
    weight: Tensor,
    norm_bias: Tensor,
    seed: Tensor | None,
    epsilon: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dropout(LayerNorm(word + position + segment embedding)), and each row's statistics.

    ids: (T,), valid for their tables; tables: (entries, C); weight, norm_bias: (C,); seed: (2,)
    int32, or None without dropout. Returns (T, C), of the word table's dtype, and each row's
    mean and 1 / standard deviation, (T,) float32.
    """
    ids = [each.contiguous() for each in (word_ids, position_ids, segment_ids)]
    tables = [each.contiguous() for each in (word_table, position_table, segment_table)]
    output, mean, inverse_deviation = _empty_outputs(word_ids, word_table)
    num_rows, num_columns = output.shape
    block_rows, block_columns, num_warps = row_blocks(num_columns)
    if num_rows:
        forward_kernel[(divide_up(num_rows, block_rows),)](
            *ids,
            *tables,
            weight.contiguous(),
            norm_bias.contiguous(),
            seed,
            output,
            mean,
            inverse_deviation,
            num_rows,
            epsilon,
            COLUMNS=num_columns,
            THRESHOLD=drop_threshold(dropout),
            KEEP_SCALE=keep_scale(dropout),
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=num_warps,
        )
    return output, mean, inverse_deviation


def _empty_outputs(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = ids.shape[0]
    mean = table.new_empty((rows,), dtype=torch.float32)
    return table.new_empty((rows, table.shape[1])), mean, torch.empty_like(mean)


@embedding_layer_norm.register_fake
def _(word_ids: Tensor, _position: Tensor, _segment: Tensor, word_table: Tensor, *_: Any) -> tuple:
    return _empty_outputs(word_ids, word_table)


@custom_op("bert_pretraining::embedding_layer_norm_backward")
def embedding_layer_norm_backward(
    gradient: Tensor,
    word_ids: Tensor,
    position_ids: Tensor,
    segment_ids: Tensor,
    word_table: Tensor,
    position_table: Tensor,
    segment_table: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    mean: Tensor,
    inverse_deviation: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum of embeddings, (T, C), and of weight and norm_bias, (2, C) float32."""
    gradient = gradient.contiguous()
    ids = [each.contiguous() for each in (word_ids, position_ids, segment_ids)]
    tables = [each.contiguous() for each in (word_table, position_table, segment_table)]
    num_rows, num_columns = gradient.shape
    block_rows, block_columns, num_warps = row_blocks(num_columns)
    rows = program_rows(num_rows, block_rows)
    programs = divide_up(num_rows, rows)
    embedded_gradient = word_table.new_empty(gradient.shape)
    partial = mean.new_empty((programs, 2, num_columns))
    if num_rows:
        backward_kernel[(programs,)](
            gradient,
            *ids,
            *tables,
            weight.contiguous(),
            seed,
            mean,
            inverse_deviation,
            embedded_gradient,
            partial,
            num_rows,
            COLUMNS=num_columns,
            THRESHOLD=drop_threshold(dropout),
            KEEP_SCALE=keep_scale(dropout),
            PROGRAM_ROWS=rows,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            num_warps=num_warps,
        )
    return embedded_gradient, partial.sum(0)


@embedding_layer_norm_backward.register_fake
def _(gradient: Tensor, _words: Tensor, _positions: Tensor, _segments: Tensor, word_table: Tensor,
      *_: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    parameters = gradient.new_empty((2, gradient.shape[1]), dtype=torch.float32)
    return word_table.new_empty(gradient.shape), parameters


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, norm_bias, seed, _, dropout = inputs
    _, mean, inverse_deviation = output
    ctx.mark_non_differentiable(mean, inverse_deviation)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, seed, mean, inverse_deviation)
    ctx.dropout, ctx.norm_bias_dtype = dropout, norm_bias.dtype


def _backward(ctx: Any, gradient: Tensor | None, *_: object) -> tuple:
    if gradient is None:
        return (None,) * 11
    tensors = ctx.saved_tensors
    embedded, parameters = embedding_layer_norm_backward(gradient, *tensors, ctx.dropout)
    tables = [
        torch.ops.aten.embedding_dense_backward(
            embedded.to(table.dtype), ids.long(), table.shape[0], -1, False
        )
        for ids, table in zip(tensors[:3], tensors[3:6], strict=True)
    ]
    weight, norm_bias = parameters
    weight, norm_bias = weight.to(tensors[6].dtype), norm_bias.to(ctx.norm_bias_dtype)
    return None, None, None, *tables, weight, norm_bias, None, None, None


embedding_layer_norm.register_autograd(_backward, setup_context=_save)
