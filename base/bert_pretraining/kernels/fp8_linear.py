"""A linear layer in fp8: y = x W' + b, as plain functions and as a function of autograd.

Three products: forward x W' (e4m3 times e4m3), the input's gradient dy W and the weight's dy' x
(e5m2 times e4m3). x, W and dy are cast once each, in both orders. Results are 16-bit numbers, or
float32 where the weight's gradient is. The bias and its gradient stay in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from bert_pretraining.errors import UserError
from bert_pretraining.kernels.fp8 import Fp8State, Scaling
from bert_pretraining.kernels.fp8_casts import (
    FORMATS,
    GRADIENT,
    INPUT,
    MULTIPLE,
    WEIGHT,
    Quantised,
    cast_bound,
)
from bert_pretraining.kernels.fp8_engine import engine_for
from bert_pretraining.kernels.fp8_weights import EachWeight, WeightCast

Saved = tuple[Tensor, ...]


def linear_forward(
    x: Tensor | Quantised,
    weight: Tensor,
    bias: Tensor | None,
    scaling: Scaling,
    record: bool = True,
) -> tuple[Tensor, Saved]:
    """x W' + b, (T, N), and what `linear_backward` needs: x and W in fp8.

    x: (T, K), may already be cast; weight: (N, K); bias: (N,) or None. On a GPU, K and N are
    multiples of 16. The result's dtype is that of x, or the weight's if x is cast.
    record: False in an evaluation, which must not move the scales of training.
    """
    inputs, dtype = _cast(x, scaling, INPUT, record, weight.dtype)
    weights = scaling.cast_weight(weight, record)
    saved = inputs.columns, weights.columns
    if inputs.rows.shape[0] == 0:
        return weight.new_empty((0, weight.shape[0]), dtype=dtype), saved
    inverses = scaling.inverses[INPUT], scaling.inverses[WEIGHT]
    return scaling.engine.product(inputs.rows, weights.rows, *inverses, dtype, bias), saved


def _cast(
    x: Tensor | Quantised, scaling: Scaling, which: int, record: bool, dtype: torch.dtype
) -> tuple[Quantised, torch.dtype]:
    """x in fp8, and its dtype before; `dtype` if it is already cast."""
    if isinstance(x, Quantised):
        return x, dtype
    return scaling.cast(x, which, record), x.dtype


def linear_backward(
    gradient: Tensor | Quantised,
    saved: Saved,
    scaling: Scaling,
    weight_gradient: Tensor,
    x_dtype: torch.dtype | None = None,
) -> Tensor:
    """The gradient of x, (T, K); the weight's is added to weight_gradient.

    gradient: (T, N), may already be cast; weight_gradient: (N, K), 16-bit or float32. The result's
    dtype is that of the gradient, or x_dtype if the gradient is cast. It comes between the forward
    function and `Fp8State.update`. A gradient that is not finite gives NaN in both results.
    """
    into_x, into_weight = _gradients(
        gradient, saved, scaling, weight_gradient.dtype, x_dtype or weight_gradient.dtype
    )
    if into_weight is not None:
        weight_gradient.add_(into_weight)
    return into_x


def _gradients(
    gradient: Tensor | Quantised,
    saved: Saved,
    scaling: Scaling,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and of the weight; None for the weight's where there are no tokens."""
    inputs, weights = saved
    outer, x_dtype = _cast(gradient, scaling, GRADIENT, True, x_dtype)
    if outer.rows.shape[0] == 0:
        return inputs.new_empty((0, len(inputs)), dtype=x_dtype), None
    product, scale = scaling.engine.product, scaling.inverses
    into_x = product(outer.rows, weights, scale[GRADIENT], scale[WEIGHT], x_dtype, None)
    into_weight = product(outer.columns, inputs, scale[GRADIENT], scale[INPUT], dtype, None)
    return into_x, into_weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling, record: bool
    ) -> Tensor:
        y, saved = linear_forward(x, weight, bias, scaling, record)
        ctx.save_for_backward(*saved)
        ctx.scaling, ctx.has_bias, ctx.dtype = scaling, bias is not None, weight.dtype
        ctx.shape = weight.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_gradient, weight_gradient = _gradients(
            gradient, ctx.saved_tensors, ctx.scaling, ctx.dtype, gradient.dtype
        )
        if weight_gradient is None:
            weight_gradient = gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
        bias_gradient = None
        if ctx.has_bias:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            bias_gradient = gradient.sum(0, dtype=wide).to(gradient.dtype)
        return x_gradient, weight_gradient, bias_gradient, None, None


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling) -> Tensor:
    """`linear_forward` with gradients for x, weight and bias through autograd.

    Without gradients (`torch.no_grad`), as in an evaluation, the scales stay as they are.
    """
    return _Linear.apply(x, weight, bias, scaling, torch.is_grad_enabled())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling | None) -> Tensor:
    """F.linear, or `fp8_linear` for a layer that has scales."""
    return F.linear(x, weight, bias) if scaling is None else fp8_linear(x, weight, bias, scaling)


# Hopper's tensor cores keep about 14 bits of an fp8 sum, and with fast accumulation the whole sum
# stays there: errors of up to 2 % are known for sums of 4,096 terms (DeepSeek-V3, section 3.3.2).
# This share of the sum of absolute terms is four times as much; a wrong scale is far beyond it.
ACCUMULATION = 2.0**-9


def check(device: torch.device, dtype: torch.dtype, features: tuple[tuple[int, int], ...]) -> float:
    """Run small layers of these (inputs, outputs) on the device, forward and backward.

    Results are compared with float64 products of the same fp8 numbers, on the CPU. Returns the
    largest error as a share of its bound. Raises UserError where a size is not a multiple of 16,
    or where a result is wrong.
    """
    for size in {size for pair in features for size in pair}:
        if size % MULTIPLE:
            raise UserError(
                f"--precision fp8: {size} features are no multiple of {MULTIPLE}",
                "pass another bert_config.json, or --precision bf16",
            )
    generator = torch.Generator().manual_seed(1)
    weights = [
        [torch.randn((outputs, inputs), generator=generator).to(device, dtype)]
        for inputs, outputs in features
    ]
    if not _same_copies(weights, engine_for(device).weights(weights), EachWeight(weights)):
        raise UserError(
            f"--precision fp8: the casts of all weights at once are wrong on {device}",
            "pass --precision bf16",
        )
    worst = 0.0
    for inputs, outputs in dict.fromkeys(features):
        shapes = {INPUT: (37, inputs), WEIGHT: (outputs, inputs), GRADIENT: (37, outputs)}
        given = {
            which: torch.randn(shape, generator=generator).to(device, dtype)
            for which, shape in shapes.items()
        }
        fault, share = _fault(given, Fp8State(["checked"], device)["checked"])
        worst = max(worst, share)
        if fault:
            raise UserError(
                f"--precision fp8: a layer of {inputs} to {outputs} features is wrong on "
                f"{device}: {fault}",
                "pass --precision bf16",
            )
    return worst


def _same_copies(weights: list[list[Tensor]], one: WeightCast, other: WeightCast) -> bool:
    """Whether both casts give the same bits and the same maxima."""
    tables = []
    for cast in (one, other):
        tables.append(torch.ones((3, len(weights), 3), device=weights[0][0].device))
        tables[-1][0] = 60.0  # so that some numbers saturate
        cast(tables[-1])
    return torch.equal(*tables) and all(
        torch.equal(found.view(torch.uint8), right.view(torch.uint8))
        for pair in zip(one.kept, other.kept, strict=True)
        for found, right in zip(*pair, strict=True)
    )


def _fault(given: dict[int, Tensor], scaling: Scaling) -> tuple[str | None, float]:
    """What is wrong with a layer's results for these tensors, or None; and their largest error,
    as a share of its bound."""
    worst = 0.0
    x, weight, gradient = given[INPUT], given[WEIGHT], given[GRADIENT]
    into_weight = torch.zeros_like(weight, dtype=torch.float32)
    y, saved = linear_forward(x, weight, None, scaling)
    into_x = linear_backward(gradient, saved, scaling, into_weight)
    exact = {
        which: scaling.cast(tensor, which, record=False).rows.cpu().double()
        * scaling.inverses[which].cpu().double()
        for which, tensor in given.items()
    }
    for which, tensor in given.items():
        wide, scale = tensor.cpu().double(), scaling.scales[which].cpu()
        if not ((exact[which] - wide).abs() <= cast_bound(wide, scale, FORMATS[which])).all():
            return f"the cast of {('x', 'the weight', 'the gradient')[which]} is off", worst
    for name, found, left, right in (
        ("the output", y, exact[INPUT], exact[WEIGHT].t()),
        ("the gradient of x", into_x, exact[GRADIENT], exact[WEIGHT]),
        ("the gradient of the weight", into_weight, exact[GRADIENT].t(), exact[INPUT]),
    ):
        expected = left @ right
        bound = ACCUMULATION * (left.abs() @ right.abs())
        bound += torch.finfo(found.dtype).eps * expected.abs()
        away = (found.cpu().double() - expected).abs()
        bound += 1e-6
        if not (away <= bound).all():  # NaN is not
            return f"{name} differs by {(away - bound).max().item():.2g} more than it may", worst
        worst = max(worst, (away / bound).max().item())
    return None, worst
