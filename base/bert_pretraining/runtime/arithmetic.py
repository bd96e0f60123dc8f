"""How devices compute: whether the same input always gives the same bits, and TF32.

These are states of the whole process. A rank sets them before it uses its device.
"""

from __future__ import annotations

import os

import torch

from bert_pretraining.errors import UserError
from bert_pretraining.runtime import device as devices

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")  # with these, cuBLAS documents the same bits each time
_TF32_BITS = 10  # after the binary point
_TF32_CAPABILITY = (8, 0)


def use_deterministic_operators(kind: str) -> None:
    """The same input gives the same bits from here on, in this process.

    PyTorch takes operators that add in a fixed order, its flash attention too, and raises
    RuntimeError for an operator that it has in no such form. cuBLAS and NCCL read their variables
    when they are used first.

    kind: of the device, or "auto". UserError if a variable that the user has set forbids it.
    """
    if kind != "cpu":
        workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
        if workspace not in _WORKSPACES:
            raise UserError(
                f"--deterministic: with {_WORKSPACE}={workspace}, cuBLAS may give other bits each "
                "time",
                f"set it to {_WORKSPACES[0]}, or leave it unset",
            )
        # The switches between GPUs add the ranks' parts in any order.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor, which costs time and hides nothing from correct code.
    torch.utils.deterministic.fill_uninitialized_memory = False


def are_operators_deterministic() -> bool:
    """Whether `use_deterministic_operators` was called."""
    return torch.are_deterministic_algorithms_enabled()


def set_tf32(device: torch.device, allowed: bool) -> None:
    """Allow or forbid products of float32 matrices in TF32, where the device has it."""
    if devices.is_cuda(device):
        torch.set_float32_matmul_precision("high" if allowed else "highest")


def multiplies_in_tf32(device: torch.device) -> bool:
    """Whether products of float32 matrices are computed in TF32 on the device.

    AMD's GPUs count as without: most of them ignore it.
    """
    capability = devices.capability(device) if devices.is_cuda(device) else None
    has_it = capability is not None and capability >= _TF32_CAPABILITY
    return (
        has_it
        and getattr(torch.version, "hip", None) is None
        and torch.get_float32_matmul_precision() != "highest"
    )


def rounding(device: torch.device, dtype: torch.dtype) -> float:
    """The relative error of one number that enters a product of matrices of this dtype."""
    if dtype == torch.float32 and multiplies_in_tf32(device):
        return 2.0**-_TF32_BITS
    return torch.finfo(dtype).eps
