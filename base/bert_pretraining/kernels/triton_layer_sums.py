"""The partial sums of all operators of a layer, added in one launch.

Each operator's sums take a GPU a few microseconds; four launches of them take the host longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from bert_pretraining.kernels.triton_common import divide_up
from bert_pretraining.kernels.triton_launch import launched_directly
from bert_pretraining.kernels.triton_sums import (
    PARTS_BLOCK,
    add_partial_sums,
    add_sums_of_columns,
)

AT_ONCE = 4  # operators of which one launch adds the sums


@triton.jit
def _operator(
    program, partial_ptr, first_ptr, second_ptr, third_ptr, num_parts,
    COLUMNS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program of one operator; see `triton_sums.add_partial_sums_kernel`."""
    blocks = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    add_sums_of_columns(
        partial_ptr, first_ptr, second_ptr, third_ptr, num_parts, program // blocks,
        program % blocks, COLUMNS, COUNT, True, BLOCK_PARTS, BLOCK_COLUMNS,
    )  # fmt: skip


@launched_directly
@triton.jit(do_not_specialize=["parts_0", "parts_1", "parts_2", "parts_3"])
def add_layer_sums_kernel(
    partial_0_ptr, partial_1_ptr, partial_2_ptr, partial_3_ptr,
    first_0_ptr, first_1_ptr, first_2_ptr, first_3_ptr,
    second_0_ptr, second_1_ptr, second_2_ptr, second_3_ptr,
    third_0_ptr, third_1_ptr, third_2_ptr, third_3_ptr,
    parts_0, parts_1, parts_2, parts_3,
    COLUMNS_0: tl.constexpr, COLUMNS_1: tl.constexpr,
    COLUMNS_2: tl.constexpr, COLUMNS_3: tl.constexpr,
    COUNT_0: tl.constexpr, COUNT_1: tl.constexpr, COUNT_2: tl.constexpr, COUNT_3: tl.constexpr,
    END_0: tl.constexpr, END_1: tl.constexpr, END_2: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Operator n has the programs from END_(n - 1) to END_n."""
    program = tl.program_id(0)
    if program < END_0:
        _operator(
            program, partial_0_ptr, first_0_ptr, second_0_ptr, third_0_ptr, parts_0,
            COLUMNS_0, COUNT_0, BLOCK_PARTS, BLOCK_COLUMNS,
        )  # fmt: skip
    elif program < END_1:
        _operator(
            program - END_0, partial_1_ptr, first_1_ptr, second_1_ptr, third_1_ptr, parts_1,
            COLUMNS_1, COUNT_1, BLOCK_PARTS, BLOCK_COLUMNS,
        )  # fmt: skip
    elif program < END_2:
        _operator(
            program - END_1, partial_2_ptr, first_2_ptr, second_2_ptr, third_2_ptr, parts_2,
            COLUMNS_2, COUNT_2, BLOCK_PARTS, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        _operator(
            program - END_2, partial_3_ptr, first_3_ptr, second_3_ptr, third_3_ptr, parts_3,
            COLUMNS_3, COUNT_3, BLOCK_PARTS, BLOCK_COLUMNS,
        )  # fmt: skip


class LayerSums:
    """Keeps partial sums until `finish` adds them. An `AddSums`; see `add_partial_sums`."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Sequence[Tensor]]] = []

    def __call__(self, partial: Tensor, outputs: Sequence[Tensor]) -> None:
        self._kept.append((partial, outputs))

    def finish(self) -> None:
        """Add the sums to their outputs: for four operators in one launch."""
        while len(self._kept) >= AT_ONCE:
            _add(self._kept[:AT_ONCE])
            del self._kept[:AT_ONCE]
        for partial, outputs in self._kept:
            add_partial_sums(partial, outputs)
        self._kept.clear()


def _add(kept: Sequence[tuple[Tensor, Sequence[Tensor]]]) -> None:
    partials = [partial for partial, _ in kept]
    firsts, seconds, thirds = zip(*((*outputs, None, None)[:3] for _, outputs in kept), strict=True)
    columns = [partial.shape[-1] for partial in partials]
    counts = [partial.stride(0) // width for partial, width in zip(partials, columns, strict=True)]
    ends, end = [], 0
    for width, count in zip(columns, counts, strict=True):
        end += divide_up(width, PARTS_BLOCK[1]) * count
        ends.append(end)
    add_layer_sums_kernel[(end,)](
        *partials, *firsts, *seconds, *thirds, *(partial.shape[0] for partial in partials),
        *columns, *counts, *ends[:-1], *PARTS_BLOCK,
    )  # fmt: skip
