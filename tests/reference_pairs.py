"""`LayerPairs` over the reference operators, for tests on a CPU in any dtype; without dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bert_pretraining.kernels import reference
from bert_pretraining.kernels.pairs import LayerPairs, Pair


def _gradients(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor
) -> tuple[Tensor, ...]:
    leaves = [one.detach().requires_grad_() for one in inputs]
    with torch.enable_grad():
        return torch.autograd.grad(function(*leaves), leaves, gradient)


def _attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float, seed: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    assert dropout == 0.0
    return reference.attention(qkv, cu_seqlens, max_seqlen, 0.0), ()


def _attention_backward(
    gradient: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *others: object
) -> Tensor:
    (found,) = _gradients(
        lambda one: reference.attention(one, cu_seqlens, max_seqlen, 0.0), (qkv,), gradient
    )
    bias_gradient = others[-2]
    bias_gradient += found.flatten(1).sum(0)
    return found


def _gelu_backward(
    gradient: Tensor, x: Tensor, bias: Tensor, bias_gradient: Tensor, _: object
) -> Tensor:
    found, added = _gradients(reference.bias_gelu, (x, bias), gradient)
    bias_gradient += added
    return found


EPSILON = 1e-12


def _norm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, norm_bias: Tensor,
    epsilon: float, dropout: float, seed: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    assert dropout == 0.0 and epsilon == EPSILON
    inputs = (x, bias, residual, weight, norm_bias)
    return reference.bias_dropout_residual_layer_norm(*inputs, epsilon, 0.0), inputs


def _norm_backward(
    gradient: Tensor, weight: Tensor, dropout: float, seed: Tensor | None,
    saved: tuple[Tensor, ...], *targets_and_sums: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, bias, residual, weight, norm_bias = _gradients(
        lambda *one: reference.bias_dropout_residual_layer_norm(*one, EPSILON, 0.0), saved, gradient
    )
    for target, added in zip(targets_and_sums[:3], (bias, weight, norm_bias), strict=True):
        target += added
    # The Triton kernels return one tensor twice where nothing is dropped.
    torch.testing.assert_close(x, residual)
    return x, x


PAIRS = LayerPairs(
    Pair(_attention, _attention_backward),
    Pair(reference.bias_gelu, _gelu_backward),
    Pair(_norm, _norm_backward),
)
