"""Euclidean norms of gradients and weights, exact enough for tensors of any length."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_pretraining.runtime import device as devices


def norm_of(tensor: Tensor) -> Tensor:
    """The Euclidean norm, 0-d, of the dtype `devices.wide`.

    The norm of each row is computed first. A CPU sums a long tensor in the tensor's own precision:
    in float32, the sum of 100 million squares is too small by a hundredth.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    rows = tensor.unsqueeze(0) if tensor.dim() < 2 else tensor.flatten(0, -2)
    norms = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
    return norms.to(devices.wide(tensor.device)).norm()


def scale_down(gradients: list[Tensor], limit: Tensor) -> None:
    """Scale gradients in place so that their common norm is at most `limit` (0-d).

    If their norm is not finite, they become NaN, so that the step is skipped.
    """
    norm = torch.stack([norm_of(gradient) for gradient in gradients]).norm()
    factor = torch.where(torch.isfinite(norm), torch.clamp(limit / norm, max=1.0), torch.nan)
    torch._foreach_mul_(
        gradients, factor.to(torch.promote_types(gradients[0].dtype, torch.float32))
    )
