"""All weights cast to fp8 in one launch, each in both orders and with its maximum.

Bytes moved: two read and two written for each number. As a part of LAMB's last pass the cast would
read nothing, but that pass works on flat memory, in which a rank with a sharded optimizer has only
pieces of a matrix, and its blocks of one row would write the transpose byte by byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.fp8_casts import WEIGHT
from bert_pretraining.kernels.fp8_weights import empty_copies
from bert_pretraining.kernels.triton_common import divide_up
from bert_pretraining.kernels.triton_fp8 import (
    BLOCK,
    NUM_WARPS,
    magnitude,
    record_maximum,
    to_fp8,
)
from bert_pretraining.kernels.triton_launch import launched_directly

_ALIGNED = 16  # elements and bytes; what starts at such multiples is read and written in words


class _Part(NamedTuple):
    """What the kernel reads of one part of a weight, as int64.

    source: in elements, from the first part in memory. rows, columns: where its copies begin, in
    bytes from the first copy. width, height: of the part. stride: of the transpose's rows. scale:
    the place in the table of scales. first_block: of the part.
    """

    source: int
    rows: int
    columns: int
    width: int
    height: int
    stride: int
    scale: int
    first_block: int

    @property
    def is_aligned(self) -> bool:
        return not any(number % _ALIGNED for number in self[:6])


_FIELDS = tl.constexpr(len(_Part._fields))


@launched_directly
@triton.jit(do_not_specialize=["scale_ptr", "maximum_ptr"])
def cast_weights_kernel(
    first_ptr,
    copies_ptr,
    parts_ptr,
    part_of_block_ptr,
    scale_ptr,
    maximum_ptr,
    ALIGNMENT: tl.constexpr,
    WRITTEN_AT_ONCE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    part_ptr = parts_ptr + tl.load(part_of_block_ptr + program) * _FIELDS
    width = tl.multiple_of(tl.load(part_ptr + 3), ALIGNMENT)
    height = tl.multiple_of(tl.load(part_ptr + 4), ALIGNMENT)
    stride = tl.multiple_of(tl.load(part_ptr + 5), ALIGNMENT)
    scale_place = tl.load(part_ptr + 6)
    block = program - tl.load(part_ptr + 7)
    across = (width + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    rows = (block // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (block % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    source_ptr = first_ptr + tl.multiple_of(tl.load(part_ptr), ALIGNMENT)
    x = tl.load(source_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    cast = to_fp8(x, tl.load(scale_ptr + scale_place), False)
    rows_ptr = copies_ptr + tl.multiple_of(tl.load(part_ptr + 1), WRITTEN_AT_ONCE)
    tl.store(rows_ptr + offsets, cast, mask=inside)
    columns_ptr = copies_ptr + tl.multiple_of(tl.load(part_ptr + 2), ALIGNMENT)
    transposed = columns[:, None] * stride + rows[None, :]
    inside = (columns < width)[:, None] & (rows < height)[None, :]
    tl.store(columns_ptr + transposed, tl.trans(cast), mask=inside)
    record_maximum(maximum_ptr + scale_place, tl.max(tl.max(magnitude(x), axis=1), axis=0))


class AllWeights:
    """A `WeightCast` in one launch.

    weights: see `empty_copies`; of one dtype, on one device.
    """

    def __init__(self, weights: Sequence[Sequence[Tensor]]) -> None:
        self._parts = [part for parts in weights for part in parts]
        self._layers = [number for number, parts in enumerate(weights) for _ in parts]
        self.kept = empty_copies(weights)
        self._addresses: tuple[int, ...] = ()  # for which the tables were made

    def __call__(self, table: Tensor) -> None:
        """See `WeightCast`."""
        addresses = tuple(part.data_ptr() for part in self._parts)
        if addresses != self._addresses:
            self._make_tables(addresses)
            self._addresses = addresses
        scales, _, maxima = table.view(3, -1)
        cast_weights_kernel[(len(self._part_of_block),)](
            self._first,
            self.kept[0].rows.view(torch.uint8),
            self._table,
            self._part_of_block,
            scales,
            maxima.view(torch.int32),
            self._alignment,
            min(self._alignment, 8),  # see `triton_fp8.row_pointers`
            *BLOCK,
            num_warps=NUM_WARPS,
        )

    def _make_tables(self, addresses: Sequence[int]) -> None:
        start = min(addresses)
        self._first = self._parts[addresses.index(start)].detach()
        copies = self.kept[0].rows.data_ptr()
        table: list[_Part] = []
        blocks: list[int] = []
        above = 0  # rows of the same weight
        for number, (part, address) in enumerate(zip(self._parts, addresses, strict=True)):
            layer, (height, width) = self._layers[number], part.shape
            above = above if layer in self._layers[number - 1 : number] else 0
            into = self.kept[layer]
            one = _Part(
                source=(address - start) // part.element_size(),
                rows=into.rows.data_ptr() - copies + above * width,
                columns=into.columns.data_ptr() - copies + above,
                width=width,
                height=height,
                stride=into.columns.shape[1],
                scale=3 * layer + WEIGHT,
                first_block=len(blocks),
            )
            table.append(one)
            blocks += [number] * (divide_up(height, BLOCK[0]) * divide_up(width, BLOCK[1]))
            above += height
        self._alignment = _ALIGNED if all(one.is_aligned for one in table) else 1
        device = self._first.device
        self._table = torch.tensor(table, dtype=torch.int64, device=device)
        self._part_of_block = torch.tensor(blocks, dtype=torch.int32, device=device)
