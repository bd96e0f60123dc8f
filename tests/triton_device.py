"""Where tests run Triton kernels: natively on a GPU, else in Triton's interpreter on the CPU.

Import this before anything that imports triton: a kernel is made for the interpreter, or not,
when it is defined, and so are the functions of triton.language.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NATIVE = DEVICE.type == "cuda"

if not NATIVE and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before the tests could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton")


def _mend_interpreter() -> None:
    """Two faults of Triton's interpreter, in 3.6 and the second in 3.7 too.

    A run-time number as the bound of a loop is converted by int(array of one element), which
    NumPy 2.4 refuses. A product of bfloat16 matrices multiplies their bits as integers.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def widen(matrix: Any) -> Any:
        if matrix.dtype.scalar != triton.language.bfloat16:
            return matrix
        bits = matrix.data.view(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

    def dot(builder: Any, left: Any, right: Any, *others: Any) -> Any:
        return create_dot(builder, widen(left), widen(right), *others)

    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.InterpreterBuilder.create_dot = dot


if not NATIVE:
    _mend_interpreter()
