"""How a device casts to fp8 and multiplies in it: on its own, or emulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bert_pretraining.errors import UserError
from bert_pretraining.kernels.fp8_casts import (
    Quantised,
    emulated_cast,
    padded_cast,
    update_scales,
)
from bert_pretraining.kernels.fp8_weights import EachWeight, WeightCast
from bert_pretraining.runtime import compat
from bert_pretraining.runtime import device as devices

OLDEST_CAPABILITY = (8, 9)  # the first CUDA devices with fp8 products: Ada; then Hopper


def emulated_product(
    left: Tensor,
    right: Tensor,
    left_inverse: Tensor,
    right_inverse: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    """left @ right.T, scaled back, added up in float32 and rounded once to `dtype`.

    left: (M, K), right: (N, K), in fp8; their inverse scales are 0-d; bias: (N,).
    """
    total = (left.float() @ right.float().t()) * (left_inverse * right_inverse)
    return (total if bias is None else total + bias.float()).to(dtype)


def device_product(
    left: Tensor,
    right: Tensor,
    left_inverse: Tensor,
    right_inverse: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
) -> Tensor:
    """As `emulated_product`, on the tensor cores. K and N must be multiples of 16.

    Fast accumulation keeps fewer digits of the sums than float32; NVIDIA's submissions use it in
    all three products of a linear layer.
    """
    return compat.scaled_mm(
        left,
        right.t(),
        scale_a=left_inverse,
        scale_b=right_inverse,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )


class Engine(NamedTuple):
    """How a device casts and multiplies; the functions have the signatures of the emulated ones.

    weights: makes what casts all weights at once; see `fp8_weights.EachWeight`. fuses: whether
    kernels that cast their own results, in the form of `padded_cast`, may take the place of `cast`.
    """

    name: str
    cast: Callable[[Tensor, Tensor, torch.dtype, Tensor | None], Quantised]
    product: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, Tensor | None], Tensor]
    update: Callable[[Tensor], None]
    weights: Callable[[Sequence[Sequence[Tensor]]], WeightCast]
    fuses: bool = False


def engine_for(device: torch.device) -> Engine:
    """The device's own fp8 on CUDA devices of capability 8.9 and later, emulation on a CPU.

    UserError for all others.
    """
    if device.type == "cpu":
        return Engine("emulated", emulated_cast, emulated_product, update_scales, EachWeight)
    capability = devices.capability(device) if devices.is_cuda(device) else None
    if capability is None or capability < OLDEST_CAPABILITY or torch.version.hip:
        what = f"{devices.name(device)} has"
        if capability is not None:
            what += f" compute capability {capability[0]}.{capability[1]} and"
        raise UserError(
            f"--precision fp8: {what} no fp8 products of the kind that this program uses "
            "(NVIDIA GPUs of capability 8.9 and later have them)",
            "pass --precision bf16, or fp16 where the GPU has no bf16",
        )
    from bert_pretraining.kernels import triton_provider
    from bert_pretraining.kernels.provider import Target

    if triton_provider.unavailable(Target(device, torch.bfloat16, 64)) is not None:
        name = "device, cast by PyTorch"
        return Engine(name, padded_cast, device_product, update_scales, EachWeight)
    from bert_pretraining.kernels import triton_fp8, triton_fp8_weights

    name, all_weights = "device, cast by Triton", triton_fp8_weights.AllWeights
    return Engine(name, triton_fp8.cast, device_product, triton_fp8.update, all_weights, True)
