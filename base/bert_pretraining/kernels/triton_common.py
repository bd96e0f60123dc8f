"""Code that the Triton kernels share: dropout masks from a seed, dtypes, block sizes.

A dropout mask is never stored. Element (row, column) of stream s keeps its value if a hash of
(seed, s, row, column) is at least dropout * 2^32. So any kernel can recompute any part of the mask,
in any tiling and in either orientation. The hash is "lowbias32" (Wellons, Hash Prospector, 2018:
two rounds of shift, exclusive or, multiply) of a counter, with a second seed word added between the
rounds. It takes about nine integer instructions per element. Philox takes about a hundred for four
elements, which would be longer than the memory traffic of these kernels.
"""

from __future__ import annotations

import functools
import inspect

import torch
import triton
import triton.language as tl
from torch import Tensor

# 2^32 / golden ratio. Its multiples modulo 2^32 are so far apart that (row, column) pairs have
# distinct counters while rows * columns < 2^32 / sqrt(5).
_ROW_STEP = tl.constexpr(0x9E3779B1)
_FIRST_MULTIPLIER = tl.constexpr(0x7FEB352D)
_SECOND_MULTIPLIER = tl.constexpr(0x846CA68B)

# Arguments for whose special values Triton must not compile variants. The number of rows changes
# with every batch. A seed may be one row of a tensor of seeds, at any multiple of 8 bytes.
NOT_SPECIALISED = ("num_rows", "seed_ptr")

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw_seed(device: torch.device, dropout: float) -> Tensor | None:
    """A seed of two random int32 words on the device, (2,), or None if nothing is dropped.

    An ordinary operator draws them from the device's default generator. So no value passes through
    the host, and a captured CUDA graph draws new words on every replay.

    Raises ValueError unless 0 <= dropout < 1.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), not {dropout}")
    if dropout == 0.0:
        return None
    return torch.randint(0, 2**31 - 1, (2,), device=device, dtype=torch.int32)


def drop_threshold(dropout: float) -> int:
    """Elements with a hash below this are dropped; 0 drops nothing."""
    return min(round(dropout * 2**32), 2**32 - 1)


def keep_scale(dropout: float) -> float:
    """The factor for kept values, which preserves the mean."""
    return 1.0 / (1.0 - dropout)


@functools.cache
def mask_constants(dropout: float) -> tuple[int, float]:
    """The constants THRESHOLD and KEEP_SCALE of a kernel that drops."""
    return drop_threshold(dropout), keep_scale(dropout)


def require_supported(*tensors: Tensor) -> None:
    """Raise TypeError for other dtypes, such as float64: the kernels compute in float32."""
    for tensor in tensors:
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise TypeError(f"no Triton kernel takes {tensor.dtype}, only 16- and 32-bit floats")


def power_of_two_at_least(count: int, least: int = 1) -> int:
    """The smallest power of two that is >= count and >= least."""
    return max(least, 1 << max(count - 1, 0).bit_length())


def divide_up(count: int, size: int) -> int:
    """count / size, rounded up."""
    return (count + size - 1) // size


if hasattr(tl, "exp2"):

    @triton.jit
    def exp2(x):
        return tl.exp2(x)

    @triton.jit
    def log2(x):
        return tl.log2(x)

else:  # Triton 2.1 and earlier

    @triton.jit
    def exp2(x):
        return tl.math.exp2(x)

    @triton.jit
    def log2(x):
        return tl.math.log2(x)


if "input_precision" in inspect.signature(tl.dot).parameters:

    @triton.jit
    def dot(left, right, PRECISION: tl.constexpr):
        return tl.dot(left, right, input_precision=PRECISION)

    @triton.jit
    def add_dot(total, left, right, PRECISION: tl.constexpr):
        return tl.dot(left, right, acc=total, input_precision=PRECISION)

else:  # Triton 2.3 and earlier

    @triton.jit
    def dot(left, right, PRECISION: tl.constexpr):
        return tl.dot(left, right, allow_tf32=PRECISION != "ieee")

    @triton.jit
    def add_dot(total, left, right, PRECISION: tl.constexpr):
        return total + tl.dot(left, right, allow_tf32=PRECISION != "ieee")


@triton.jit
def _mix(x):
    x = x ^ (x >> 16)
    x = x * _FIRST_MULTIPLIER
    x = x ^ (x >> 15)
    x = x * _SECOND_MULTIPLIER
    return x ^ (x >> 16)


@triton.jit
def stream_keys(seed_ptr, stream_number):
    """Two uint32 keys for one stream of the seed, for example for one attention head."""
    first = tl.load(seed_ptr).to(tl.uint32)
    second = tl.load(seed_ptr + 1).to(tl.uint32)
    first_key = _mix(first + stream_number.to(tl.uint32) * _ROW_STEP)
    return first_key, _mix(second ^ first_key)


@triton.jit
def only_stream_keys(seed_ptr):
    """The keys of stream 0, for kernels that use one stream. Triton 2.1 has no tl.zeros(())."""
    return stream_keys(seed_ptr, tl.program_id(0) * 0)


@triton.jit
def kept(first_key, second_key, rows, columns, THRESHOLD: tl.constexpr):
    """The mask of elements to keep: bool, of the shape to which rows and columns broadcast."""
    x = rows.to(tl.uint32) * _ROW_STEP + first_key + columns.to(tl.uint32)
    x = x ^ (x >> 16)
    x = x * _FIRST_MULTIPLIER + second_key
    x = x ^ (x >> 15)
    # The hash's last shift is left out: it changes only low bits, which hardly matter here.
    return x * _SECOND_MULTIPLIER >= THRESHOLD
