"""dropout(LayerNorm(sum of three embeddings)), and the gradients of the tables, as Triton kernels.

The sum is not saved: the backward kernel gathers the embeddings again, which reads as much memory
as a saved sum. It writes the gradient of each token's sum, and each token's three keys. A key is an
entry's number in all tables together: words, then positions, then segments.

The caller sorts the keys, so that the tokens of an entry are neighbours. `entry_sums_kernel` adds
their gradients up within chunks of a fixed number of keys, and `crossing_sums_kernel` adds up the
parts of an entry that crosses the end of a chunk. So an entry that most tokens have, such as a
segment, takes no longer than others; and one program adds to each entry, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_pretraining.kernels.triton_common import (
    NOT_SPECIALISED,
    dot,
    kept,
    only_stream_keys,
)
from bert_pretraining.kernels.triton_launch import launched_directly
from bert_pretraining.kernels.triton_layer_norm_kernels import (
    load_statistics,
    normalise,
    normalise_backward,
    store_statistics,
)


@triton.jit
def _gather(table_ptr, ids_ptr, rows, num_rows, columns, COLUMNS: tl.constexpr):
    """Each row's entry of a table, as float32; 0 outside."""
    row_inside = rows < num_rows
    ids = tl.load(ids_ptr + rows, mask=row_inside, other=0).to(tl.int64)
    inside = row_inside[:, None] & (columns < COLUMNS)[None, :]
    offsets = ids[:, None] * COLUMNS + columns[None, :]
    return tl.load(table_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _copy_keys(keys_ptr, ids_ptr, rows, num_rows, FIRST: tl.constexpr):
    """Write each id's entry in all tables together, of which this table's start at FIRST."""
    ids = tl.load(ids_ptr + rows, mask=rows < num_rows, other=0).to(tl.int32)
    tl.store(keys_ptr + rows, ids + FIRST, mask=rows < num_rows)


@launched_directly
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
    statistics_ptr,
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
    store_statistics(statistics_ptr, rows, num_rows, mean, inverse_deviation)
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


@launched_directly
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
    statistics_ptr,
    embedded_gradient_ptr,
    keys_ptr,
    partial_ptr,
    num_rows,
    WORDS: tl.constexpr,
    POSITIONS: tl.constexpr,
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
        mean, inverse_deviation = load_statistics(statistics_ptr, rows, num_rows)
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
        _copy_keys(keys_ptr, word_ids_ptr, rows, num_rows, 0)
        _copy_keys(keys_ptr + num_rows, position_ids_ptr, rows, num_rows, WORDS)
        _copy_keys(keys_ptr + 2 * num_rows, segment_ids_ptr, rows, num_rows, WORDS + POSITIONS)

    partial_ptr += program * 2 * COLUMNS + columns
    tl.store(partial_ptr, weight_sum, mask=column_inside)
    tl.store(partial_ptr + COLUMNS, norm_bias_sum, mask=column_inside)


@triton.jit
def _add_to_entries(table_ptr, entries, chosen, columns, sums, COLUMNS: tl.constexpr):
    offsets = entries.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    mask = chosen[:, None] & (columns < COLUMNS)[None, :]
    before = tl.load(table_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(table_ptr + offsets, before + sums, mask=mask)


@triton.jit
def _add_by_key(
    words_ptr, positions_ptr, segments_ptr, keys, chosen, columns, sums,
    WORDS: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add each row of sums to the entry of its key, where the row is chosen."""
    word = keys < WORDS
    segment = keys >= WORDS + POSITIONS
    position = (word | segment) == 0
    _add_to_entries(words_ptr, keys, chosen & word, columns, sums, COLUMNS)
    _add_to_entries(positions_ptr, keys - WORDS, chosen & position, columns, sums, COLUMNS)
    entries = keys - (WORDS + POSITIONS)
    _add_to_entries(segments_ptr, entries, chosen & segment, columns, sums, COLUMNS)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def entry_sums_kernel(
    keys_ptr,
    order_ptr,
    gradient_ptr,
    words_ptr,
    positions_ptr,
    segments_ptr,
    partial_ptr,
    num_rows,
    WORDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Add the sums of entries inside a chunk; write those that cross its ends into partial.

    keys, (3 num_rows,), are sorted; order: where each was before. partial: (chunks, 2, COLUMNS);
    in the second row is the entry that crosses the end but not the start.
    """
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first = chunk * CHUNK
    places = first + tl.arange(0, CHUNK)
    num_keys = 3 * num_rows
    inside = places < num_keys
    keys = tl.load(keys_ptr + places, mask=inside, other=-1)
    previous = tl.load(keys_ptr + places - 1, mask=inside & (places > first), other=-1)
    before_chunk = tl.load(keys_ptr + first - 1, mask=first > 0, other=-2)
    after_chunk = tl.load(keys_ptr + first + CHUNK, mask=first + CHUNK < num_keys, other=-2)

    rows = tl.load(order_ptr + places, mask=inside, other=0) % num_rows
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    mask = inside[:, None] & (columns < COLUMNS)[None, :]
    gradient = tl.load(gradient_ptr + offsets, mask=mask, other=0.0)
    # Products with 1 are exact. Each row is the sum of all rows with its key.
    same = tl.where(keys[:, None] == keys[None, :], 1.0, 0.0)
    sums = dot(same.to(gradient.dtype), gradient, "ieee")

    chosen = inside & (keys != previous)  # one row of each key
    crossing = (keys == before_chunk) | (keys == after_chunk)
    _add_by_key(
        words_ptr, positions_ptr, segments_ptr, keys, chosen & (crossing == 0), columns, sums,
        WORDS, POSITIONS, COLUMNS,
    )  # fmt: skip
    part = 2 * chunk + (places > first).to(tl.int32)
    mask = (chosen & crossing)[:, None] & (columns < COLUMNS)[None, :]
    tl.store(partial_ptr + part[:, None] * COLUMNS + columns[None, :], sums, mask=mask)


@launched_directly
@triton.jit(do_not_specialize=NOT_SPECIALISED)
def crossing_sums_kernel(
    keys_ptr,
    words_ptr,
    positions_ptr,
    segments_ptr,
    partial_ptr,
    num_rows,
    WORDS: tl.constexpr,
    POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Add the sum of the entry that begins in this program's chunk and crosses its end, if any."""
    chunk = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = (columns < COLUMNS)[None, :]
    num_keys = 3 * num_rows
    first = chunk * CHUNK
    last = first + CHUNK - 1
    if last + 1 >= num_keys:
        return
    key = tl.load(keys_ptr + last)
    if tl.load(keys_ptr + last + 1) != key:
        return
    if tl.load(keys_ptr + first - 1, mask=first > 0, other=-1) == key:
        return
    begins_later = (tl.load(keys_ptr + first) != key).to(tl.int32)

    # This chunk's part, then those of the chunks after it that begin with the same key.
    numbers = tl.arange(0, BLOCK_PARTS)
    total = tl.zeros((BLOCK_PARTS, BLOCK_COLUMNS), tl.float32)
    next_chunk = chunk
    more = begins_later * 0 + 1
    while more > 0:
        chunks = next_chunk + numbers
        places = chunks * CHUNK
        keys = tl.load(keys_ptr + places, mask=places < num_keys, other=-1)
        same = (keys == key) | (chunks == chunk)
        parts = 2 * chunks + tl.where(chunks == chunk, begins_later, 0)
        offsets = parts[:, None] * COLUMNS + columns[None, :]
        mask = same[:, None] & column_inside
        total += tl.load(partial_ptr + offsets, mask=mask, other=0.0)
        next_chunk += BLOCK_PARTS
        more = tl.min(same.to(tl.int32), axis=0)
    sums = tl.sum(total, axis=0)[None, :]
    entry = key + tl.arange(0, 1)
    _add_by_key(
        words_ptr, positions_ptr, segments_ptr, entry, entry >= 0, columns, sums,
        WORDS, POSITIONS, COLUMNS,
    )  # fmt: skip
