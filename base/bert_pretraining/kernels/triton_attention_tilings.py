"""Block sizes of the attention kernels: fixed ones, and candidates to be timed on a GPU.

Block sizes change the order of sums, so results differ in their last bits. They are therefore
fixed, and never follow from a time that was measured in a run: a resumed run must give the bits of
one that was not interrupted. `triton_attention.tune` finds better ones for this table.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

import torch


class Tiling(NamedTuple):
    """Block sizes of a kernel, and its compile options."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


class Tilings(NamedTuple):
    """Those of the three kernels, under their names."""

    forward: Tiling
    query_gradient: Tiling
    key_value_gradient: Tiling


class Problem(NamedTuple):
    """What block sizes depend on.

    tf32: whether tensor cores multiply float32 numbers. length_class: see `length_class`.
    """

    head_size: int
    dtype: torch.dtype
    tf32: bool
    length_class: int


# Upper bounds of the longest sequence of a batch; longer ones are the last class.
LENGTH_CLASSES = (64, 128, 256)

# For 16-bit dtypes: no registers spill on sm80 or sm90, and with head size 64 two to four programs
# run on one multiprocessor at a time. Larger blocks would waste more work on short sequences.
_SMALL_HEAD = Tiling(64, 64, num_warps=4, num_stages=2)
_LARGE_HEAD = Tiling(64, 64, num_warps=8, num_stages=2)
# For float32: products do not use tensor cores, and their operands are twice as large.
_FLOAT32 = Tiling(32, 32, num_warps=8, num_stages=1)
_TF32 = Tiling(32, 32, num_warps=4, num_stages=1)

# Beside the fixed ones. With head size 64 and dropout no registers spill on sm80 or sm90.
_CANDIDATES = Tilings(
    forward=(
        Tiling(64, 64, 4, 3),
        Tiling(64, 32, 4, 2),
        Tiling(64, 128, 8, 2),
        Tiling(128, 32, 8, 2),
        Tiling(128, 64, 8, 2),
        Tiling(128, 64, 8, 3),
    ),
    query_gradient=(
        Tiling(64, 64, 4, 3),
        Tiling(32, 64, 4, 2),
        Tiling(64, 32, 4, 2),
        Tiling(128, 32, 8, 2),
        Tiling(128, 64, 8, 2),
    ),
    key_value_gradient=(
        Tiling(32, 64, 4, 2),
        Tiling(64, 32, 4, 2),
        Tiling(64, 64, 8, 2),
        Tiling(64, 128, 8, 2),
        Tiling(128, 32, 8, 2),
    ),
)

_in_use: dict[Problem, Tilings] = {}


def length_class(max_seqlen: int) -> int:
    """The place of the longest length among LENGTH_CLASSES."""
    return bisect.bisect_left(LENGTH_CLASSES, max_seqlen)


def tilings(problem: Problem) -> Tilings:
    """The block sizes in use."""
    return _in_use.get(problem) or fixed(problem)


def fixed(problem: Problem) -> Tilings:
    """The block sizes that a run uses."""
    if problem.dtype == torch.float32:
        one = _TF32 if problem.tf32 else _FLOAT32
    else:
        one = _SMALL_HEAD if problem.head_size <= 64 else _LARGE_HEAD
    return Tilings(one, one, one)


def candidates(kernel: str, problem: Problem) -> tuple[Tiling, ...]:
    """The block sizes to be timed for a kernel, a field of `Tilings`; the fixed one is first."""
    others = () if problem.dtype == torch.float32 else getattr(_CANDIDATES, kernel)
    return (getattr(fixed(problem), kernel), *others)


def use(problem: Problem, chosen: Tilings | None) -> None:
    """Use these block sizes for a problem from now on; None: the fixed ones again."""
    if chosen is None:
        _in_use.pop(problem, None)
    else:
        _in_use[problem] = chosen
