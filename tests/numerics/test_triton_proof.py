"""The Triton kernels pass the proof, on a GPU at all sizes, else at the small one."""

from __future__ import annotations

import pytest
import torch

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import DEVICE, DTYPES, NATIVE

# isort: split
from bert_pretraining.kernels import OPERATORS, Target, triton_operators
from bert_pretraining.kernels.proof import cases, find_fault
from bert_pretraining.kernels.proof_problem import Sizes, lengths_of

SIZES = Sizes(lengths_of(8, 512, 2046), 300, 16, 64, 4096, 30528, 512, 2, 1e-12, 0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_kernels_pass(operator: str, dtype: torch.dtype) -> None:
    target = Target(DEVICE, dtype, 64)
    for case in cases(operator, SIZES):
        if case.is_small or NATIVE:
            function = getattr(triton_operators, operator)
            assert find_fault(function, case.problem(target), case.dropout) is None
