"""Helpers of the tests of Triton kernels: the device, inputs, comparison with float64.

Kernels run natively on a GPU, otherwise in Triton's interpreter on the CPU.

Import this before anything that imports triton. A kernel is bound to the interpreter or to the
compiler when it is defined, and so are the functions of triton.language.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NATIVE = DEVICE.type == "cuda"

if not NATIVE and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before the tests could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton")

# isort: split
from bert_pretraining.kernels import triton_fp8, triton_fp8_weights  # noqa: E402
from bert_pretraining.kernels.fp8_engine import Engine, emulated_product  # noqa: E402


def _fix_interpreter() -> None:
    """Work around three faults of Triton's interpreter.

    It converts a run-time loop bound by int(array of one element), which NumPy 2.4 rejects (to
    3.6). It multiplies bfloat16 matrices as if their bits were integers (to 3.7 at least). And it
    does not know the annotation "tl.constexpr" as a string (to 3.0 at least).
    """
    from triton.runtime import interpreter, jit

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patch_and_fix(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        if scope:  # Triton before 3.4 has none, and patches the class for good
            scope[0].set_attr(tensor, "__index__", lambda self: self.handle.data.item())
        else:
            tensor.__index__ = lambda self: self.handle.data.item()

    def widen(matrix: Any) -> Any:
        if matrix.dtype.scalar != triton.language.bfloat16:
            return matrix
        bits = matrix.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

    def dot(builder: Any, left: Any, right: Any, *others: Any) -> Any:
        return create_dot(builder, widen(left), widen(right), *others)

    def without_module(annotation: Any) -> str:
        return normalize(annotation).removeprefix("tl.")

    normalize = jit._normalize_ty
    jit._normalize_ty = without_module
    interpreter._patch_lang_tensor = patch_and_fix
    interpreter.InterpreterBuilder.create_dot = dot


if not NATIVE:
    _fix_interpreter()

# In Triton's interpreter a conversion to bfloat16 truncates: two units in the last of 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2.0**-6}
DTYPES = list(TOLERANCE)
EPSILON = 1e-12
# The embedding operator's three tables, weight and bias.
TABLES = [(50, 12), (20, 12), (2, 12), (12,), (12,)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def randoms(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(*shape, seed=number, dtype=dtype) for number, shape in enumerate(shapes)]


def random_ids(count: int, entries: int, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(entries)
    return torch.randint(entries, (count,), generator=generator, dtype=dtype).to(DEVICE)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def fixed_seed(number: int = 1) -> Tensor:
    return torch.tensor([12345 * number, 987654321], dtype=torch.int32, device=DEVICE)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Bound the largest difference, relative to the largest expected number (or to 1)."""
    assert actual.shape == expected.shape
    if expected.numel():
        scale = max(expected.abs().max().item(), 1.0)
        assert (actual.double() - expected).abs().max().item() <= tolerance * scale


def compare(
    operator: Callable, exact_operator: Callable, inputs: list[Tensor], tolerance: float
) -> None:
    """Compare outputs, and gradients of a random projection; the exact operator in float64."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    output, expected = operator(*leaves), exact_operator(*exact)
    assert_near(output, expected, tolerance)
    direction = random(*output.shape, seed=99, dtype=output.dtype)
    gradients = torch.autograd.grad(output, leaves, direction)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    for gradient, leaf, wanted in zip(gradients, leaves, expected_gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, wanted, 2 * tolerance)


def norm_inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    row, vector = (rows, columns), (columns,)
    return randoms([row, vector, row, vector, vector], dtype)


def fix_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter round to fp8 as GPUs do, to the nearest number and ties to even.

    Its own conversion loses the carry into the exponent, 31.5 becomes 16, and truncates numbers
    below the least normal one (to Triton 3.9 at least).
    """
    if NATIVE:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    formats = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}

    def convert_like_a_gpu(values: np.ndarray, source: Any, target: Any, rounding: Any) -> Any:
        if str(target) not in formats or str(source) != "fp32":
            return convert(values, source, target, rounding)
        numbers = torch.from_numpy(np.ascontiguousarray(values).view(np.float32).copy())
        return numbers.to(formats[str(target)]).view(torch.uint8).numpy().reshape(values.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert_like_a_gpu)


def interpreted_engine() -> Engine:
    """The engine of a GPU, with products that run anywhere."""
    return Engine(
        "kernels",
        triton_fp8.cast,
        emulated_product,
        triton_fp8.update,
        triton_fp8_weights.AllWeights,
        fuses=True,
    )
