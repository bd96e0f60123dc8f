"""Launching Triton kernels with less work on the host.

`triton.jit` looks at every argument of every launch in Python, to find the compiled variant. With
BERT-large's few hundred launches an update that is a large part of the host's time. Here a variant
is looked up by what Triton compiles variants for on NVIDIA's GPUs: constants, dtypes, multiples of
16, and numbers that are 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from bert_pretraining.runtime import compat
from bert_pretraining.runtime import device as devices

# Compiled kernels take all arguments of the source, constants included, from this version on.
OLDEST = (3, 3)
_MULTIPLE = 15  # Triton compiles a variant for addresses and numbers whose last four bits are 0


def launched_directly(kernel: Any) -> Any:
    """A kernel made by `triton.jit`, to be called as `kernel[grid](*arguments, num_warps=...)`.

    All arguments must be positional; only options have names. The grid must be a tuple of one to
    three numbers. Where Triton is older or interprets kernels, it is the kernel itself.
    """
    if compat.release(triton.__version__) < OLDEST or not hasattr(kernel, "params"):
        return kernel
    return _Launcher(kernel) if hasattr(kernel, "device_caches") else kernel


class _Launcher:
    """See `launched_directly`. Other attributes are the kernel's."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.__name__, self.__module__ = kernel.__name__, kernel.__module__
        constant = [param.is_constexpr for param in kernel.params]
        self._first_constant = constant.index(True) if True in constant else len(constant)
        if not all(constant[self._first_constant :]):
            raise TypeError(f"the constants of {kernel.__name__} must be its last arguments")
        # Whether no variants are compiled for values of the argument.
        self._free = [
            bool(param.do_not_specialize) for param in kernel.params if not param.is_constexpr
        ]
        self._variants: dict[tuple, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: Any, **options: int) -> None:
            start = self._first_constant
            key: list[Any] = [arguments[start:], torch._C._cuda_getDevice()]
            values: list[Any] = []
            for argument, free in zip(arguments[:start], self._free, strict=True):
                kind = argument.__class__
                if kind is int:
                    # 1 is a constant to Triton, and a number of more than 31 bits has another type.
                    key.append(argument.bit_length() > 31)
                    key.append(free or (argument == 1, not argument & _MULTIPLE))
                    values.append(argument)
                elif argument is None or kind is float:
                    key.append(argument)
                    values.append(argument)
                else:
                    address = argument.data_ptr()
                    key.append(argument.dtype)
                    key.append(free or not address & _MULTIPLE)
                    values.append(address)
            if options:
                key += options.values()
            found = tuple(key)
            variant = self._variants.get(found)
            if variant is None or _is_watched():
                compiled = self.kernel[grid](*arguments, **options)
                if _on_nvidia():
                    self._variants[found] = compiled
                return
            first, second, third = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
            if first and second and third:
                variant.run(
                    first, second, third, torch._C._cuda_getCurrentRawStream(key[1]),
                    variant.function, variant.packed_metadata, None, None, None,
                    *values, *arguments[start:],
                )  # fmt: skip

        return run


def _on_nvidia() -> bool:
    """Elsewhere variants depend on more, such as the sizes of tensors."""
    return (devices.built_with() or "").startswith("CUDA")


def _is_watched() -> bool:
    """Whether a profiler wants to be told of launches, which Triton's own way does."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))
