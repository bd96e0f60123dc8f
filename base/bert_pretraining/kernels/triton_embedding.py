"""dropout(LayerNorm(sum of three embeddings)) with gradients, over `triton_embedding_kernels`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bert_pretraining.kernels.pairs import Saved
from bert_pretraining.kernels.triton_common import divide_up, mask_constants, power_of_two_at_least
from bert_pretraining.kernels.triton_embedding_kernels import (
    backward_kernel,
    crossing_sums_kernel,
    entry_sums_kernel,
    forward_kernel,
)
from bert_pretraining.kernels.triton_layer_norm import program_rows, row_blocks
from bert_pretraining.kernels.triton_sums import PARTS_BLOCK, add_partial_sums
from bert_pretraining.runtime.compat import custom_op

Three = tuple[Tensor, Tensor, Tensor]
"""One for words, one for positions, one for segments."""

CHUNK = 64  # keys of a chunk, whose gradients one program adds up
_CHUNK_COLUMNS = 64


def forward(
    ids: Three,
    tables: Three,
    weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Saved]:
    """dropout(LayerNorm(word + position + segment embedding)), and what `backward` needs.

    ids: (T,), valid for their tables; tables: (entries, C); weight, norm_bias: (C,); all
    contiguous. seed: (2,) int32, or None without dropout. Returns (T, C), of the word table's
    dtype, and the mean and 1 / standard deviation of each row, (2, T) float32.
    """
    output, statistics = _empty_outputs(ids[0], tables[0])
    num_rows, num_columns = output.shape
    if num_rows:
        block_rows, block_columns, num_warps = row_blocks(num_columns)
        forward_kernel[(divide_up(num_rows, block_rows),)](
            *ids,
            *tables,
            weight,
            norm_bias,
            seed,
            output,
            statistics,
            num_rows,
            epsilon,
            num_columns,
            *mask_constants(dropout),
            block_rows,
            block_columns,
            num_warps=num_warps,
        )
    return output, (statistics,)


def _empty_outputs(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    rows = ids.shape[0]
    return (
        table.new_empty((rows, table.shape[1])),
        table.new_empty((2, rows), dtype=torch.float32),
    )


def backward(
    gradient: Tensor,
    ids: Three,
    tables: Three,
    weight: Tensor,
    dropout: float,
    seed: Tensor | None,
    saved: Saved,
    table_gradients: Three,
    weight_gradient: Tensor,
    norm_bias_gradient: Tensor,
    add: bool = True,
) -> None:
    """Add the gradients of the tables, weight and norm_bias to the last five tensors.

    Without `add`, those of weight and norm_bias are written over them. All are contiguous.
    """
    (statistics,) = saved
    num_rows, num_columns = gradient.shape
    block_rows, block_columns, num_warps = row_blocks(num_columns)
    rows = program_rows(num_rows, block_rows)
    programs = divide_up(num_rows, rows)
    embedded_gradient = tables[0].new_empty(gradient.shape)
    keys = statistics.new_empty((3 * num_rows,), dtype=torch.int32)
    partial = statistics.new_empty((programs, 2, num_columns))
    entries = (tables[0].shape[0], tables[1].shape[0])
    if num_rows:
        backward_kernel[(programs,)](
            gradient,
            *ids,
            *tables,
            weight,
            seed,
            statistics,
            embedded_gradient,
            keys,
            partial,
            num_rows,
            *entries,
            num_columns,
            *mask_constants(dropout),
            rows,
            block_rows,
            block_columns,
            num_warps=num_warps,
        )
        _add_to_tables(keys, embedded_gradient, table_gradients)
    add_partial_sums(partial, (weight_gradient, norm_bias_gradient), add)


@functools.cache
def chunk_columns(num_columns: int) -> int:
    """Columns of a program that adds up the gradients of a chunk."""
    return min(_CHUNK_COLUMNS, power_of_two_at_least(num_columns, 16))


def _add_to_tables(keys: Tensor, embedded_gradient: Tensor, tables: Three) -> None:
    """Add each token's gradient to its entries. keys: see `triton_embedding_kernels`."""
    num_rows, num_columns = embedded_gradient.shape
    keys, order = torch.sort(keys, stable=True)
    chunks = divide_up(3 * num_rows, CHUNK)
    partial = embedded_gradient.new_empty((chunks, 2, num_columns), dtype=torch.float32)
    constants = (tables[0].shape[0], tables[1].shape[0], num_columns, CHUNK)
    block = chunk_columns(num_columns)
    grid = (chunks, divide_up(num_columns, block))
    entry_sums_kernel[grid](
        keys, order, embedded_gradient, *tables, partial, num_rows, *constants, block
    )
    block_parts, block_columns = PARTS_BLOCK
    grid = (chunks, divide_up(num_columns, block_columns))
    crossing_sums_kernel[grid](
        keys, *tables, partial, num_rows, *constants, block_parts, block_columns
    )


def _forward_any(
    word_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, word_table: Tensor,
    position_table: Tensor, segment_table: Tensor, weight: Tensor, norm_bias: Tensor,
    seed: Tensor | None, epsilon: float, dropout: float,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """`forward` for any strides."""
    ids = tuple(each.contiguous() for each in (word_ids, position_ids, segment_ids))
    tables = tuple(each.contiguous() for each in (word_table, position_table, segment_table))
    parameters = (weight.contiguous(), norm_bias.contiguous())
    return forward(ids, tables, *parameters, epsilon, dropout, seed)


def _gradients(
    gradient: Tensor, word_ids: Tensor, position_ids: Tensor, segment_ids: Tensor,
    word_table: Tensor, position_table: Tensor, segment_table: Tensor, weight: Tensor,
    norm_bias: Tensor, seed: Tensor | None, statistics: Tensor, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the tables, weight and norm_bias, for any strides."""
    ids = tuple(each.contiguous() for each in (word_ids, position_ids, segment_ids))
    tables = tuple(each.contiguous() for each in (word_table, position_table, segment_table))
    table_gradients = tuple(each.new_zeros(each.shape) for each in tables)
    parameters = [each.new_empty(each.shape) for each in (weight, norm_bias)]
    inputs = (gradient.contiguous(), ids, tables, weight.contiguous(), dropout, seed)
    backward(*inputs, (statistics,), table_gradients, *parameters, add=False)
    return *table_gradients, *parameters


class EmbeddingLayerNorm(torch.autograd.Function):
    """`forward` and `backward` with autograd.

    Inputs: the three ids, the three tables, weight, norm_bias, seed, epsilon, dropout.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        output, (statistics,) = _forward_any(*inputs)
        *tensors, _, ctx.dropout = inputs
        ctx.save_for_backward(*tensors, statistics)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        gradients = _gradients(gradient, *ctx.saved_tensors, ctx.dropout)
        return None, None, None, *gradients, None, None, None


# The same for torch.compile, which needs operators.


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
) -> tuple[Tensor, Tensor]:
    """The output of `forward`, and what `backward` needs."""
    output, saved = _forward_any(
        word_ids, position_ids, segment_ids, word_table, position_table, segment_table, weight,
        norm_bias, seed, epsilon, dropout,
    )  # fmt: skip
    return output, *saved


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
    norm_bias: Tensor,
    seed: Tensor | None,
    statistics: Tensor,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the tables, weight and norm_bias."""
    return _gradients(
        gradient, word_ids, position_ids, segment_ids, word_table, position_table, segment_table,
        weight, norm_bias, seed, statistics, dropout,
    )  # fmt: skip


@embedding_layer_norm_backward.register_fake
def _(_gradient: Tensor, _words: Tensor, _positions: Tensor, _segments: Tensor,
      *others: Any) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(each.new_empty(each.shape) for each in others[:5])


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, _, ctx.dropout = inputs
    _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, statistics)


def _differentiate(ctx: Any, gradient: Tensor | None, *_: object) -> tuple:
    if gradient is None:
        return (None,) * 11
    gradients = embedding_layer_norm_backward(gradient, *ctx.saved_tensors, ctx.dropout)
    return None, None, None, *gradients, None, None, None


embedding_layer_norm.register_autograd(_differentiate, setup_context=_save)
