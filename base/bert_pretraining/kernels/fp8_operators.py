"""An encoder layer's operators before a product in fp8: their result is cast for it.

Where the provider has a kernel that casts as it goes (`Pair.casting`), it does both. Elsewhere the
operator leaves its result in 16 bits, and the product casts it (`fp8_linear.py`). Both give the
same bits.

how: a `Cast` where the operator is to cast its result, else None; see `Scaling.fused_cast`.
"""

from __future__ import annotations

from torch import Tensor

from bert_pretraining.kernels.fp8_casts import Cast, Quantised
from bert_pretraining.kernels.pairs import AddSums, Pair, Saved

Factor = Tensor | Quantised  # what a product multiplies: in 16 bits, or already cast


def gelu_forward(pair: Pair, x: Tensor, bias: Tensor, how: Cast | None) -> Factor:
    """GELU(x + bias). See `pairs.GeluForward`."""
    if how is None or pair.casting is None:
        return pair.forward(x, bias)
    return pair.casting.forward(x, bias, how)


def gelu_backward(
    pair: Pair,
    gradient: Tensor,
    x: Tensor,
    bias: Tensor,
    bias_gradient: Tensor,
    add_sums: AddSums,
    how: Cast | None,
) -> Factor:
    """The gradient of x. See `pairs.GeluBackward`."""
    given = gradient, x, bias, bias_gradient, add_sums
    if how is None or pair.casting is None:
        return pair.backward(*given)
    return pair.casting.backward(*given, how)


def norm_forward(pair: Pair, inputs: tuple, how: Cast | None) -> tuple[Tensor, Saved, Factor]:
    """The LayerNorm's output, what its backward function needs, and the output as a factor.

    inputs: the arguments of `pairs.NormForward`.
    """
    if how is None or pair.casting is None:
        output, saved = pair.forward(*inputs)
        return output, saved, output
    return pair.casting.forward(*inputs, how)


def norm_backward(pair: Pair, inputs: tuple, how: Cast | None) -> tuple[Factor, Tensor]:
    """The gradients of x and of the residual. inputs: the arguments of `pairs.NormBackward`."""
    if how is None or pair.casting is None:
        return pair.backward(*inputs)
    return pair.casting.backward(*inputs, how)
