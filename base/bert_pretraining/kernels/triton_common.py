"""What the Triton kernels share: dropout masks from a seed, dtypes, sizes of blocks.

A dropout mask is never stored. Element (row, column) of stream s keeps its value when a
hash of (seed, s, row, column) is at or above dropout * 2^32, so that any kernel can make any
part of the mask again, in any tiling and either orientation. The hash is "lowbias32" (Wellons,
Hash Prospector, 2018: two rounds of shift, exclusive or, multiply) of a counter, with a
second seed word added between the rounds. About nine integer instructions an element; Philox,
at about a hundred for four, would take longer than the memory traffic of these kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# 2^32 / golden ratio. Multiples of it modulo 2^32 keep so far apart that (row, column)
# pairs have distinct counters while rows * columns < 2^32 / sqrt(5).
_ROW_STEP = tl.constexpr(0x9E3779B1)
_FIRST_MULTIPLIER = tl.constexpr(0x7FEB352D)
_SECOND_MULTIPLIER = tl.constexpr(0x846CA68B)

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw_seed(device: torch.device, dropout: float) -> Tensor | None:
    """Two random int32 words on the device, (2,), or None if nothing is dropped.

    They come from the device's default generator by an ordinary operator: no value passes
    through the host, and a captured CUDA graph draws new ones on every replay.

    Raises ValueError unless 0 <= dropout < 1.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if dropout == 0.0:
        return None
    return torch.randint(0, 2**31 - 1, (2,), device=device, dtype=torch.int32)


def drop_threshold(dropout: float) -> int:
    """The hash values below this are dropped; 0 drops nothing."""
    return min(round(dropout * 2**32), 2**32 - 1)


def keep_scale(dropout: float) -> float:
    """What the kept values are multiplied with, so that the mean stays."""
    return 1.0 / (1.0 - dropout)


def require_supported(*tensors: Tensor) -> None:
    """Raises TypeError for a dtype that the kernels would compute with too few digits."""
    for tensor in tensors:
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"the Triton kernels take float32, float16, bfloat16: {tensor.dtype}")


def power_of_two_at_least(count: int, least: int = 1) -> int:
    """The smallest power of two that is >= count and >= least."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def divide_up(count: int, size: int) -> int:
    """How many blocks of `size` hold `count` things."""
    return (count + size - 1) // size


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * _FIRST_MULTIPLIER
    x = x ^ (x >> 15)
    x = x * _SECOND_MULTIPLIER
    return x ^ (x >> 16)


@triton.jit
def stream_keys(seed_ptr, stream):
    """Two uint32 keys of one stream (an attention head, say) of the seed."""
    first = tl.load(seed_ptr).to(tl.uint32)
    second = tl.load(seed_ptr + 1).to(tl.uint32)
    first_key = _mix(first + stream.to(tl.uint32) * _ROW_STEP)
    return first_key, _mix(second ^ first_key)


@triton.jit
def kept(first_key, second_key, rows, columns, THRESHOLD: tl.constexpr):
    """Which elements stay: bool of the shape that rows and columns broadcast to."""
    x = rows.to(tl.uint32) * _ROW_STEP + first_key + columns.to(tl.uint32)
    x = x ^ (x >> 16)
    x = x * _FIRST_MULTIPLIER + second_key
    x = x ^ (x >> 15)
    # The last shift of the hash would change low bits only, and the comparison is with high ones.
    return x * _SECOND_MULTIPLIER >= THRESHOLD
