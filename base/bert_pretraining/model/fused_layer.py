"""An encoder layer as one operation: its forward pass and a hand-written backward pass.

The backward pass adds the gradients of the parameters where the optimizer reads them, so that
nothing is copied or added afterwards. What it computes is what the modules of `bert.py` compute;
the tests compare both. How autograd comes to call it: `fused_record.py`.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from bert_pretraining.kernels.fp8 import Scaling
from bert_pretraining.kernels.fp8_casts import GRADIENT, INPUT, Cast
from bert_pretraining.kernels.fp8_linear import linear_backward, linear_forward
from bert_pretraining.kernels.fp8_operators import (
    Factor,
    gelu_backward,
    gelu_forward,
    norm_backward,
    norm_forward,
)
from bert_pretraining.kernels.pairs import LayerPairs, Sums
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.parameter_memory import side_by_side
from bert_pretraining.runtime import compat
from bert_pretraining.runtime.gradient_sink import GradientSink

if TYPE_CHECKING:
    from bert_pretraining.model.bert import Layer, ResidualOutput

SEEDS = 3  # of a layer: attention, and the dropout before each of the two LayerNorms

Seeds = tuple[Tensor | None, ...]  # SEEDS tensors, (2,) int32 each; None where nothing is dropped
NO_SEEDS: Seeds = (None,) * SEEDS


def draw_seeds(num_layers: int, device: torch.device) -> list[Seeds]:
    """The seeds of each layer: one draw from the device's generator for all of them."""
    shape = (num_layers * SEEDS, 2)
    drawn = torch.randint(0, 2**31 - 1, shape, device=device, dtype=torch.int32).unbind()
    return [drawn[start : start + SEEDS] for start in range(0, len(drawn), SEEDS)]


class Saved(NamedTuple):
    """What the backward pass reads: activations, (T, size) each, and what operators keep.

    inner: before GELU, without its bias. The fields after cu_seqlens: the layer's seeds, and what
    the operators keep, those named after a projection for its products.
    """

    qkv: Tensor
    context: Tensor
    inner: Tensor
    cu_seqlens: Tensor
    seeds: Seeds
    attention: tuple[Tensor, ...]
    first_norm: tuple[Tensor, ...]
    second_norm: tuple[Tensor, ...]
    to_qkv: tuple[Tensor, ...]
    to_middle: tuple[Tensor, ...]
    to_inner: tuple[Tensor, ...]
    to_output: tuple[Tensor, ...]

    def flat(self) -> tuple[list[Tensor | None], list[int]]:
        """All tensors in one list, and how many each field after `cu_seqlens` has."""
        single, kept = self[:SINGLE], self[SINGLE:]
        return [*single, *itertools.chain(*kept)], [len(one) for one in kept]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], counts: Sequence[int]) -> Saved:
        """The inverse of `flat`."""
        rest = iter(tensors[SINGLE:])
        kept = [tuple(itertools.islice(rest, count)) for count in counts]
        return cls(*tensors[:SINGLE], *kept)


SINGLE = Saved._fields.index("seeds")  # the fields before it are one tensor each


class Product:
    """The products of one projection, in the dtype of its tensors."""

    def input_cast(self, record: bool) -> Cast | None:
        """How the operator before may cast its result for `forward`; None: not at all."""
        return None

    def gradient_cast(self) -> Cast | None:
        """How the operator behind may cast its gradient for `backward`; None: not at all."""
        return None

    def forward(
        self, x: Factor, weight: Tensor, bias: Tensor | None, record: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x W' + b, (T, N), and what `backward` needs. x: (T, K); weight: (N, K); bias: (N,).

        record: whether a backward pass will follow.
        """
        weight = weight.t()
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight), (x,)

    def backward(
        self,
        gradient: Factor,
        weight: Tensor,
        kept: tuple[Tensor, ...],
        target: Tensor,
        into: Tensor | None = None,
    ) -> Tensor:
        """The gradient of x, added to `into` if that is given; the weight's is added to target."""
        add_product(target, gradient, kept[0])
        return torch.mm(gradient, weight) if into is None else into.addmm_(gradient, weight)


class Fp8Product(Product):
    """The products of one projection in fp8."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling

    def input_cast(self, record: bool) -> Cast | None:
        """See `Product`."""
        return self._scaling.fused_cast(INPUT, record)

    def gradient_cast(self) -> Cast | None:
        """See `Product`."""
        return self._scaling.fused_cast(GRADIENT, record=True)

    def forward(
        self, x: Factor, weight: Tensor, bias: Tensor | None, record: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Product`. x and weight are kept in fp8."""
        return linear_forward(x, weight, bias, self._scaling, record)

    def backward(
        self,
        gradient: Factor,
        weight: Tensor,
        kept: tuple[Tensor, ...],
        target: Tensor,
        into: Tensor | None = None,
    ) -> Tensor:
        """See `Product`."""
        x_gradient = linear_backward(gradient, kept, self._scaling, target, weight.dtype)
        return x_gradient if into is None else into.add_(x_gradient)


def product_of(scaling: Scaling | None) -> Product:
    """Of a projection with these scales, or without."""
    return Product() if scaling is None else Fp8Product(scaling)


class _Norm(NamedTuple):
    """The parameters of one projection with the LayerNorm behind it, looked up once."""

    projection: nn.Parameter
    bias: nn.Parameter
    weight: nn.Parameter
    norm_bias: nn.Parameter
    epsilon: float
    dropout: float
    product: Product

    @classmethod
    def of(cls, output: ResidualOutput) -> _Norm:
        dense, norm = output.dense, output.LayerNorm
        parameters = (dense.weight, dense.bias, norm.weight, norm.bias)
        return cls(*parameters, output.epsilon, output.dropout, product_of(output.scaling))


class FusedLayer:
    """Runs the parameters of one layer.

    The parameters must not move to other memory while this object is used.

    Args:
        layer: the modules with the parameters.
        pairs: the operators besides matrix products.
        sink: where the gradients of the parameters go; autograd does not see them.
    """

    def __init__(self, layer: Layer, pairs: LayerPairs, sink: GradientSink) -> None:
        attention, projection = layer.attention.self, layer.intermediate.dense
        self.pairs, self.sink = pairs, sink
        self.parameters = tuple(layer.parameters())
        self.num_heads, self.attention_dropout = attention.num_heads, attention.dropout
        parts = (attention.query, attention.key, attention.value)
        self.qkv_weights = tuple(part.weight for part in parts)
        self.qkv_biases = tuple(part.bias for part in parts)
        self.qkv_weight, self.qkv_bias = map(side_by_side, (self.qkv_weights, self.qkv_biases))
        self.inner_weight, self.inner_bias = projection.weight, projection.bias
        self.to_qkv, self.to_inner = map(
            product_of, (attention.scaling, layer.intermediate.scaling)
        )
        self._targets: dict[tuple[nn.Parameter, ...], _Targets] = {}
        self.first, self.second = _Norm.of(layer.attention.output), _Norm.of(layer.output)

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Weight, (3 hidden, hidden), and bias of the projection to queries, keys and values."""
        weight = torch.cat(self.qkv_weights) if self.qkv_weight is None else self.qkv_weight
        return weight, torch.cat(self.qkv_biases) if self.qkv_bias is None else self.qkv_bias

    def forward(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        seeds: Seeds,
        record: bool = True,
        factor: Factor | None = None,
        following: Product | None = None,
    ) -> tuple[Tensor, Factor, Saved]:
        """The layer's output, the same as a factor of the following product, and for `backward`.

        record: whether a backward pass will follow. factor: `hidden` as the layer before has
        returned it, if there is one. following: the product that takes the output.
        """
        one, two, three = seeds
        factor = hidden if factor is None else factor
        qkv, to_qkv = self.to_qkv.forward(factor, *self._stacked(), record)
        context, attention_saved = self.pairs.attention.forward(
            qkv.view(hidden.shape[0], 3, self.num_heads, -1),
            batch.cu_seqlens,
            batch.max_seqlen,
            0.0 if one is None else self.attention_dropout,
            one,
        )
        context = context.view(hidden.shape)
        projected, to_middle = self.first.product.forward(
            context, self.first.projection, None, record
        )
        middle, first_saved, factor = self._norm(
            self.first, projected, hidden, two, self.to_inner.input_cast(record)
        )
        inner, to_inner = self.to_inner.forward(factor, self.inner_weight, None, record)
        activated = gelu_forward(
            self.pairs.bias_gelu, inner, self.inner_bias, self.second.product.input_cast(record)
        )
        projected, to_output = self.second.product.forward(
            activated, self.second.projection, None, record
        )
        how = None if following is None else following.input_cast(record)
        output, second_saved, factor = self._norm(self.second, projected, middle, three, how)
        return output, factor, Saved(
            qkv, context, inner, batch.cu_seqlens, seeds, attention_saved, first_saved,
            second_saved, to_qkv, to_middle, to_inner, to_output,
        )  # fmt: skip

    def _target(self, group: tuple[nn.Parameter, ...]) -> _Targets:
        """Where to add the gradients of parameters of equal shape all at once."""
        apart = [self.sink.target(parameter) for parameter in group]
        known = self._targets.get(group)
        if known is None or not all(map(operator.is_, known.apart, apart)):
            together = side_by_side(apart)
            shared = together is not None
            if not shared:
                together = apart[0].new_zeros(len(group) * len(apart[0]), *apart[0].shape[1:])
            known = self._targets[group] = _Targets(apart, together, shared)
        return known

    def _norm(
        self,
        norm: _Norm,
        projected: Tensor,
        residual: Tensor,
        seed: Tensor | None,
        how: Cast | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Factor]:
        dropout = 0.0 if seed is None else norm.dropout
        parameters = norm.weight, norm.norm_bias, norm.epsilon
        inputs = (projected, norm.bias, residual, *parameters, dropout, seed)
        return norm_forward(self.pairs.bias_dropout_residual_layer_norm, inputs, how)

    def backward(self, gradient: Tensor, saved: Saved, max_seqlen: int) -> Tensor:
        """The gradient of the input; those of the parameters are added to the sink's targets.

        gradient: of the output, (T, hidden size). Every tensor called "..._gradient" is the
        gradient of the tensor whose name it begins with.
        """
        one, two, three = saved.seeds
        target, sums = self.sink.target, self.pairs.sums()
        activated_gradient, middle_gradient = self._norm_backward(
            self.second, gradient, saved.to_output, saved.second_norm, three, sums
        )
        inner_gradient = gelu_backward(
            self.pairs.bias_gelu,
            activated_gradient,
            saved.inner,
            self.inner_bias,
            target(self.inner_bias),
            sums,
            self.to_inner.gradient_cast(),
        )
        del activated_gradient  # the largest activations: no two gradients of them are kept
        self.to_inner.backward(
            inner_gradient,
            self.inner_weight,
            saved.to_inner,
            target(self.inner_weight),
            middle_gradient,
        )
        del inner_gradient
        context_gradient, hidden_gradient = self._norm_backward(
            self.first, middle_gradient, saved.to_middle, saved.first_norm, two, sums
        )
        heads = (gradient.shape[0], self.num_heads, -1)
        weights, biases = map(self._target, (self.qkv_weights, self.qkv_biases))
        qkv_gradient = self.pairs.attention.backward(
            context_gradient.view(heads),
            saved.qkv.view(heads[0], 3, *heads[1:]),
            saved.cu_seqlens,
            max_seqlen,
            0.0 if one is None else self.attention_dropout,
            one,
            saved.context.view(heads),
            saved.attention,
            biases.together,
            sums,
        ).view(saved.qkv.shape)
        weight = self._stacked()[0]
        self.to_qkv.backward(qkv_gradient, weight, saved.to_qkv, weights.together, hidden_gradient)
        sums.finish()
        for added in (weights, biases):
            added.spread()
        return hidden_gradient

    def _norm_backward(
        self,
        norm: _Norm,
        gradient: Tensor,
        kept: tuple[Tensor, ...],
        saved: tuple[Tensor, ...],
        seed: Tensor | None,
        sums: Sums,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the projection's input and of the residual. kept: for its product."""
        target = self.sink.target
        dropout = 0.0 if seed is None else norm.dropout
        targets = target(norm.bias), target(norm.weight), target(norm.norm_bias)
        projected_gradient, residual_gradient = norm_backward(
            self.pairs.bias_dropout_residual_layer_norm,
            (gradient, norm.weight, dropout, seed, saved, *targets, sums),
            norm.product.gradient_cast(),
        )
        # Both may be the same tensor, and the caller adds to the residual's: it is read before.
        x_gradient = norm.product.backward(
            projected_gradient, norm.projection, kept, target(norm.projection)
        )
        return x_gradient, residual_gradient


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target += left' right, as for the gradient of a weight; target may be of a wider dtype."""
    if target.dtype == left.dtype:
        target.addmm_(left.t(), right)
    else:
        compat.add_wide_product(target, left.t(), right)


class _Targets(NamedTuple):
    """Gradients of equal shape, and one tensor to add to in place of them.

    shared: whether that is their own memory.
    """

    apart: list[Tensor]
    together: Tensor
    shared: bool

    def spread(self) -> None:
        """Bring what was added to `together` into `apart`."""
        if not self.shared:
            for target, part in zip(
                self.apart, self.together.split(len(self.apart[0])), strict=True
            ):
                target.add_(part)
            self.together.zero_()
