"""Self-attention inside each sequence of a packed batch, as Triton kernels.

The algorithm is FlashAttention-2 (Dao 2023, algorithms 1 and 2). It computes the softmax over
blocks of keys with a running maximum and sum, and saves one log-sum-exp per query. In the backward
pass, P are the weights, M is the dropout mask (0 or 1 / (1 - dropout)), dO the output's gradient
and delta = rowsum(dO * O):

    dV = (P M)' dO,   dS = P (M (dO V') - delta),   dQ = dS K / sqrt(D),   dK = dS' Q / sqrt(D)

One kernel loops over the keys for a block of queries and writes dQ and delta. Another loops over
the queries for a block of keys and writes dK and dV. So one program writes each element, without
atomics.

A program computes one block of one head of one sequence. The grid has as many blocks per sequence
as `max_seqlen` needs, so that its size does not depend on data; a program beyond the end of its
sequence returns at once. The rows after the last sequence are handled as one extra sequence, whose
programs only write zeros. No program reads a row outside its own sequence, so such rows may hold
anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_pretraining.kernels.triton_common import add_dot, dot, exp2, kept, log2, stream_keys
from bert_pretraining.kernels.triton_launch import launched_directly

_LOG2_E = tl.constexpr(1.4426950408889634)
# Arguments for whose special values Triton must not compile variants, since they change with every
# batch; for the seed see `triton_common`.
NOT_SPECIALISED = ("num_tokens", "num_sequences", "num_blocks", "seed_ptr")


@triton.jit
def _place(cu_seqlens_ptr, num_tokens, num_sequences, num_blocks, NUM_HEADS: tl.constexpr):
    """This program's block, head, first token, length, and whether its sequence is a real one."""
    program = tl.program_id(0)
    block = program % num_blocks
    head = (program // num_blocks) % NUM_HEADS
    sequence = program // (num_blocks * NUM_HEADS)
    start = tl.load(cu_seqlens_ptr + sequence).to(tl.int32)
    real = sequence < num_sequences
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=real, other=num_tokens).to(tl.int32)
    return block, head, start, end - start, real


@triton.jit
def _inside(rows, length, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Mask of the elements of a (rows, BLOCK_SIZE) tile that are inside sequence and head."""
    inside = (rows < length)[:, None]
    if HEAD_SIZE < BLOCK_SIZE:
        inside = inside & (tl.arange(0, BLOCK_SIZE) < HEAD_SIZE)[None, :]
    return inside


@triton.jit
def _load_tile(
    pointer, rows, row_stride, length, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """Load a (rows, BLOCK_SIZE) tile of the sequence at `pointer`; 0 outside of it."""
    offsets = rows[:, None] * row_stride + tl.arange(0, BLOCK_SIZE)[None, :]
    return tl.load(pointer + offsets, mask=_inside(rows, length, HEAD_SIZE, BLOCK_SIZE), other=0.0)


@triton.jit
def _store_tile(
    pointer, rows, row_stride, length, tile, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    offsets = rows[:, None] * row_stride + tl.arange(0, BLOCK_SIZE)[None, :]
    tl.store(pointer + offsets, tile, mask=_inside(rows, length, HEAD_SIZE, BLOCK_SIZE))


@triton.jit
def _store_zeros(
    pointer,
    row_stride,
    length,
    block,
    num_blocks,
    HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Zero this program's part of `length` rows, which may exceed num_blocks * BLOCK_ROWS."""
    for first in range(block * BLOCK_ROWS, length, num_blocks * BLOCK_ROWS):
        rows = first + tl.arange(0, BLOCK_ROWS)
        zeros = tl.zeros((BLOCK_ROWS, BLOCK_SIZE), tl.float32)
        _store_tile(pointer, rows, row_stride, length, zeros, HEAD_SIZE, BLOCK_SIZE)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def forward_kernel(
    qkv_ptr, cu_seqlens_ptr, seed_ptr, output_ptr, log_sum_exp_ptr, num_tokens, num_sequences,
    num_blocks, token_stride, part_stride, head_stride, softmax_scale,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write output, (T, heads, D), and log_sum_exp to base 2, (heads, T)."""
    block, head, start, length, real = _place(
        cu_seqlens_ptr, num_tokens, num_sequences, num_blocks, NUM_HEADS
    )
    output_ptr += (start.to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE
    if not real:
        _store_zeros(
            output_ptr, NUM_HEADS * HEAD_SIZE, length, block, num_blocks,
            HEAD_SIZE, BLOCK_SIZE, BLOCK_QUERIES,
        )  # fmt: skip
        return
    if block * BLOCK_QUERIES >= length:
        return
    queries = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    query_ptr = qkv_ptr + start.to(tl.int64) * token_stride + head * head_stride
    key_ptr = query_ptr + part_stride
    value_ptr = key_ptr + part_stride
    query = _load_tile(query_ptr, queries, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
    if THRESHOLD > 0:
        first_key, second_key = stream_keys(seed_ptr, head)

    largest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    context = tl.zeros((BLOCK_QUERIES, BLOCK_SIZE), tl.float32)
    for first in range(0, length, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        key = _load_tile(key_ptr, keys, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
        scores = dot(query, tl.trans(key), PRECISION)
        scores = scores * (softmax_scale * _LOG2_E)
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
        # Every block holds at least one key of the sequence, so the maximum is finite.
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        weights = exp2(scores - new_largest[:, None])
        rescale = exp2(largest - new_largest)
        total = total * rescale + tl.sum(weights, axis=1)
        largest = new_largest
        if THRESHOLD > 0:
            rows = (start + queries)[:, None]
            keep = kept(first_key, second_key, rows, keys[None, :], THRESHOLD)
            weights = tl.where(keep, weights, 0.0)
        value = _load_tile(value_ptr, keys, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
        context = add_dot(context * rescale[:, None], weights.to(value.dtype), value, PRECISION)

    context = context * (KEEP_SCALE / total)[:, None]
    _store_tile(output_ptr, queries, NUM_HEADS * HEAD_SIZE, length, context, HEAD_SIZE, BLOCK_SIZE)
    log_sum_exp_ptr += head.to(tl.int64) * num_tokens + start
    tl.store(log_sum_exp_ptr + queries, largest + log2(total), mask=queries < length)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def query_gradient_kernel(
    output_gradient_ptr, qkv_ptr, cu_seqlens_ptr, seed_ptr, output_ptr, log_sum_exp_ptr,
    delta_ptr, qkv_gradient_ptr, num_tokens, num_sequences, num_blocks, token_stride,
    part_stride, head_stride, softmax_scale,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dQ into qkv_gradient, (T, 3, heads, D), and delta, (heads, T)."""
    block, head, start, length, real = _place(
        cu_seqlens_ptr, num_tokens, num_sequences, num_blocks, NUM_HEADS
    )
    qkv_gradient_ptr += (start.to(tl.int64) * 3 * NUM_HEADS + head) * HEAD_SIZE
    if not real:
        _store_zeros(
            qkv_gradient_ptr, 3 * NUM_HEADS * HEAD_SIZE, length, block, num_blocks,
            HEAD_SIZE, BLOCK_SIZE, BLOCK_QUERIES,
        )  # fmt: skip
        return
    if block * BLOCK_QUERIES >= length:
        return
    queries = block * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    query_ptr = qkv_ptr + start.to(tl.int64) * token_stride + head * head_stride
    key_ptr = query_ptr + part_stride
    value_ptr = key_ptr + part_stride
    query = _load_tile(query_ptr, queries, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
    packed = (start.to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE
    output_stride = NUM_HEADS * HEAD_SIZE
    output = _load_tile(output_ptr + packed, queries, output_stride, length, HEAD_SIZE, BLOCK_SIZE)
    output_gradient = _load_tile(
        output_gradient_ptr + packed, queries, output_stride, length, HEAD_SIZE, BLOCK_SIZE
    )
    delta = tl.sum(output.to(tl.float32) * output_gradient.to(tl.float32), axis=1)
    row_offset = head.to(tl.int64) * num_tokens + start
    tl.store(delta_ptr + row_offset + queries, delta, mask=queries < length)
    log_sum_exp = tl.load(log_sum_exp_ptr + row_offset + queries, mask=queries < length, other=0.0)
    if THRESHOLD > 0:
        first_key, second_key = stream_keys(seed_ptr, head)

    gradient = tl.zeros((BLOCK_QUERIES, BLOCK_SIZE), tl.float32)
    for first in range(0, length, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        key = _load_tile(key_ptr, keys, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
        value = _load_tile(value_ptr, keys, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
        scores = dot(query, tl.trans(key), PRECISION)
        scores = scores * (softmax_scale * _LOG2_E) - log_sum_exp[:, None]
        weights = exp2(tl.where((keys < length)[None, :], scores, float("-inf")))
        weight_gradient = dot(output_gradient, tl.trans(value), PRECISION)
        if THRESHOLD > 0:
            rows = (start + queries)[:, None]
            keep = kept(first_key, second_key, rows, keys[None, :], THRESHOLD)
            weight_gradient = tl.where(keep, weight_gradient * KEEP_SCALE, 0.0)
        score_gradient = weights * (weight_gradient - delta[:, None])
        gradient = add_dot(gradient, score_gradient.to(key.dtype), key, PRECISION)

    _store_tile(
        qkv_gradient_ptr,
        queries,
        3 * NUM_HEADS * HEAD_SIZE,
        length,
        gradient * softmax_scale,
        HEAD_SIZE,
        BLOCK_SIZE,
    )


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def key_value_gradient_kernel(
    output_gradient_ptr, qkv_ptr, cu_seqlens_ptr, seed_ptr, log_sum_exp_ptr, delta_ptr,
    qkv_gradient_ptr, num_tokens, num_sequences, num_blocks, token_stride, part_stride,
    head_stride, softmax_scale,
    NUM_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, THRESHOLD: tl.constexpr,
    KEEP_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write dK and dV into qkv_gradient. Reads the delta of `query_gradient_kernel`."""
    block, head, start, length, real = _place(
        cu_seqlens_ptr, num_tokens, num_sequences, num_blocks, NUM_HEADS
    )
    gradient_stride = 3 * NUM_HEADS * HEAD_SIZE
    key_gradient_ptr = qkv_gradient_ptr + start.to(tl.int64) * gradient_stride
    key_gradient_ptr += (NUM_HEADS + head) * HEAD_SIZE
    value_gradient_ptr = key_gradient_ptr + NUM_HEADS * HEAD_SIZE
    if not real:
        for part in tl.static_range(2):
            _store_zeros(
                key_gradient_ptr + part * NUM_HEADS * HEAD_SIZE, gradient_stride, length, block,
                num_blocks, HEAD_SIZE, BLOCK_SIZE, BLOCK_KEYS,
            )  # fmt: skip
        return
    if block * BLOCK_KEYS >= length:
        return
    keys = block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    query_ptr = qkv_ptr + start.to(tl.int64) * token_stride + head * head_stride
    key_ptr = query_ptr + part_stride
    value_ptr = key_ptr + part_stride
    key = _load_tile(key_ptr, keys, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
    value = _load_tile(value_ptr, keys, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
    output_gradient_ptr += (start.to(tl.int64) * NUM_HEADS + head) * HEAD_SIZE
    row_offset = head.to(tl.int64) * num_tokens + start
    if THRESHOLD > 0:
        first_key, second_key = stream_keys(seed_ptr, head)

    # Scores are transposed, (keys, queries), so that they are the left factor in both products.
    # They need no mask: a query outside the sequence has a row of zeros in the right factor, and
    # the result's row for a key outside the sequence is not stored.
    key_gradient = tl.zeros((BLOCK_KEYS, BLOCK_SIZE), tl.float32)
    value_gradient = tl.zeros((BLOCK_KEYS, BLOCK_SIZE), tl.float32)
    for first in range(0, length, BLOCK_QUERIES):
        queries = first + tl.arange(0, BLOCK_QUERIES)
        query = _load_tile(query_ptr, queries, token_stride, length, HEAD_SIZE, BLOCK_SIZE)
        output_gradient = _load_tile(
            output_gradient_ptr, queries, NUM_HEADS * HEAD_SIZE, length, HEAD_SIZE, BLOCK_SIZE
        )
        row_ptrs = row_offset + queries
        log_sum_exp = tl.load(log_sum_exp_ptr + row_ptrs, mask=queries < length, other=0.0)
        delta = tl.load(delta_ptr + row_ptrs, mask=queries < length, other=0.0)
        scores = dot(key, tl.trans(query), PRECISION)
        weights = exp2(scores * (softmax_scale * _LOG2_E) - log_sum_exp[None, :])
        weight_gradient = dot(value, tl.trans(output_gradient), PRECISION)
        dropped = weights
        if THRESHOLD > 0:
            rows = (start + queries)[None, :]
            keep = kept(first_key, second_key, rows, keys[:, None], THRESHOLD)
            dropped = tl.where(keep, weights, 0.0)
            weight_gradient = tl.where(keep, weight_gradient * KEEP_SCALE, 0.0)
        value_gradient = add_dot(
            value_gradient, dropped.to(value.dtype), output_gradient, PRECISION
        )
        score_gradient = weights * (weight_gradient - delta[None, :])
        key_gradient = add_dot(key_gradient, score_gradient.to(query.dtype), query, PRECISION)

    key_gradient = key_gradient * softmax_scale
    value_gradient = value_gradient * KEEP_SCALE
    _store_tile(
        key_gradient_ptr, keys, gradient_stride, length, key_gradient, HEAD_SIZE, BLOCK_SIZE
    )
    _store_tile(
        value_gradient_ptr, keys, gradient_stride, length, value_gradient, HEAD_SIZE, BLOCK_SIZE
    )
