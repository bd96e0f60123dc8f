"""Operators of an encoder layer as two plain functions, forward and backward, without autograd.

Autograd's records of small operators cost the host more time than a GPU needs for their work. The
layer of `model/fused_layer.py` is one record, and calls these functions by itself. A backward
function adds the gradients of parameters to tensors that the caller gives, so that they are
written where the optimizer reads them. Shapes and formulas: see `reference.py`.

Dropout masks follow from `seed`, (2,) int32 on the device, or None where nothing is dropped. An
operator that draws its masks by itself ignores it and keeps what it needs in `saved`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from bert_pretraining.kernels.fp8_casts import Quantised

Saved = tuple[Tensor, ...]

# Takes partial sums of parameters' gradients, (parts, ..., C) float32, and the tensors to which
# their sum over the parts is added, now or when the layer's backward pass ends.
AddSums = Callable[[Tensor, Sequence[Tensor]], None]


class AttentionForward(Protocol):
    def __call__(
        self, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float, seed: Tensor | None
    ) -> tuple[Tensor, Saved]:
        """The context, (T, heads, D), and what the backward function needs besides it."""


class AttentionBackward(Protocol):
    def __call__(
        self,
        gradient: Tensor,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        dropout: float,
        seed: Tensor | None,
        context: Tensor,
        saved: Saved,
        bias_gradient: Tensor,
        add_sums: AddSums,
    ) -> Tensor:
        """The gradient of qkv, (T, 3, heads, D), contiguous.

        Its sum over the tokens is added to bias_gradient, (3 * heads * D,): it is the gradient of
        the bias of the projection to qkv.
        """


class GeluForward(Protocol):
    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """GELU(x + bias)."""


class GeluBackward(Protocol):
    def __call__(
        self,
        gradient: Tensor,
        x: Tensor,
        bias: Tensor,
        bias_gradient: Tensor,
        add_sums: AddSums,
    ) -> Tensor:
        """The gradient of x. The bias's is added to bias_gradient, (C,)."""


class NormForward(Protocol):
    def __call__(
        self,
        x: Tensor,
        bias: Tensor,
        residual: Tensor,
        weight: Tensor,
        norm_bias: Tensor,
        epsilon: float,
        dropout: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Saved]:
        """LayerNorm(residual + dropout(x + bias)), and what the backward function needs."""


class NormBackward(Protocol):
    def __call__(
        self,
        gradient: Tensor,
        weight: Tensor,
        dropout: float,
        seed: Tensor | None,
        saved: Saved,
        bias_gradient: Tensor,
        weight_gradient: Tensor,
        norm_bias_gradient: Tensor,
        add_sums: AddSums,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of x and of the residual, (T, C) each; they may be the same tensor.

        The gradients of bias, weight and norm_bias are added to the last three, (C,) each.
        """


class CastingForward(Protocol):
    def __call__(self, *inputs: object) -> Quantised | tuple[Tensor, Saved, Quantised]:
        """The operator's output in fp8. Its arguments, and then how to cast.

        GELU's output is in fp8 only; that of the LayerNorm comes before, with what its backward
        function needs.
        """


class CastingBackward(Protocol):
    def __call__(self, *inputs: object) -> Quantised | tuple[Quantised, Tensor]:
        """As the operator's backward function, but the gradient of x is in fp8 only."""


class CastingPair(NamedTuple):
    """An operator whose result is cast to fp8 in the same pass.

    The bits are those of the operator and a cast after it; sums may be added in another order. The
    functions take a `Cast` after all other arguments.
    """

    forward: CastingForward
    backward: CastingBackward


class Sums(Protocol):
    """An `AddSums` that may keep what it gets until `finish`."""

    def __call__(self, partial: Tensor, outputs: Sequence[Tensor]) -> None:
        """Take partial sums; see `AddSums`."""

    def finish(self) -> None:
        """Now all sums must be in the outputs."""


class PlainSums:
    """Adds at once, by PyTorch's operators: one output for each row of C numbers."""

    def __call__(self, partial: Tensor, outputs: Sequence[Tensor]) -> None:
        """See `Sums`."""
        rows = partial.sum(0).view(len(outputs), -1)
        for output, row in zip(outputs, rows, strict=True):
            output.add_(row)

    def finish(self) -> None:
        """See `Sums`."""


class Pair(NamedTuple):
    """One operator: its forward and its backward function.

    sums: of the same provider, where it has a faster way to add them; see `LayerPairs`. casting:
    the same operator with its result in fp8, where the provider has it; see `fp8_operators.py`.
    """

    forward: AttentionForward | GeluForward | NormForward
    backward: AttentionBackward | GeluBackward | NormBackward
    sums: Callable[[], Sums] = PlainSums
    casting: CastingPair | None = None


@dataclass(frozen=True)
class LayerPairs:
    """All that an encoder layer needs besides matrix products.

    sums: makes the object that takes the partial sums of one layer's backward pass.
    """

    attention: Pair
    bias_gelu: Pair
    bias_dropout_residual_layer_norm: Pair
    sums: Callable[[], Sums] = PlainSums


def layer_pairs(pairs: Mapping[str, Pair | None]) -> LayerPairs | None:
    """The pairs of a layer's operators, from those of all operators; None if one has no pair."""
    names = ("attention", "bias_gelu", "bias_dropout_residual_layer_norm")
    chosen = {name: pairs.get(name) for name in names}
    if None in chosen.values():
        return None
    return LayerPairs(**chosen, sums=chosen["bias_dropout_residual_layer_norm"].sums)
