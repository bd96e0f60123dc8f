"""An encoder layer as one operation with a hand-written backward pass.

Autograd's record of each small operator takes the host longer than a GPU takes for the work. Here
a layer is one record. Its backward pass adds the gradients of the parameters where the optimizer
reads them, so that nothing is copied or added afterwards. What it computes is what the modules of
`bert.py` compute; the tests compare both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bert_pretraining.kernels.pairs import LayerPairs
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.gradient_sink import GradientSink, side_by_side

if TYPE_CHECKING:
    from bert_pretraining.model.bert import Layer, ResidualOutput

SEEDS = 3  # of a layer: attention, and the dropout before each of the two LayerNorms


def draw_seeds(num_layers: int, device: torch.device) -> Tensor:
    """The seeds of all layers, (num_layers, SEEDS, 2) int32: one draw from the generator."""
    shape = (num_layers, SEEDS, 2)
    return torch.randint(0, 2**31 - 1, shape, device=device, dtype=torch.int32)


class Saved(NamedTuple):
    """What the backward pass reads: activations, (T, size) each, and what operators keep.

    hidden: the layer's input. inner: before GELU, without its bias. seeds: None without dropout.
    """

    hidden: Tensor
    qkv: Tensor
    context: Tensor
    middle: Tensor
    inner: Tensor
    activated: Tensor
    cu_seqlens: Tensor
    seeds: Tensor | None
    attention: tuple[Tensor, ...]
    first_norm: tuple[Tensor, ...]
    second_norm: tuple[Tensor, ...]

    def flat(self) -> tuple[list[Tensor | None], list[int]]:
        """All tensors in one list, and how many the last three fields have."""
        kept = self[-3:]
        return [*self[:-3], *kept[0], *kept[1], *kept[2]], [len(one) for one in kept]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], counts: Sequence[int]) -> Saved:
        """The inverse of `flat`."""
        first, second, _ = counts
        kept = tensors[8:]
        return cls(*tensors[:8], kept[:first], kept[first : first + second], kept[first + second :])


class _Norm(NamedTuple):
    """The parameters of one projection with the LayerNorm behind it, looked up once."""

    projection: nn.Parameter
    bias: nn.Parameter
    weight: nn.Parameter
    norm_bias: nn.Parameter
    epsilon: float
    dropout: float

    @classmethod
    def of(cls, output: ResidualOutput) -> _Norm:
        dense, norm = output.dense, output.LayerNorm
        return cls(dense.weight, dense.bias, norm.weight, norm.bias, output.epsilon, output.dropout)


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
        self.first, self.second = _Norm.of(layer.attention.output), _Norm.of(layer.output)

    def __call__(self, hidden: Tensor, batch: PackedBatch, seeds: Tensor | None) -> Tensor:
        """Run the layer. hidden: (T, hidden size). Returns the same shape.

        seeds: (SEEDS, 2) int32 on the device, from which the dropout masks follow; None without
        dropout.
        """
        return _FusedLayer.apply(hidden, seeds, batch, self)

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """Weight, (3 hidden, hidden), and bias of the projection to queries, keys and values."""
        weight = torch.cat(self.qkv_weights) if self.qkv_weight is None else self.qkv_weight
        return weight, torch.cat(self.qkv_biases) if self.qkv_bias is None else self.qkv_bias

    def forward(
        self, hidden: Tensor, batch: PackedBatch, seeds: Tensor | None
    ) -> tuple[Tensor, Saved]:
        """The layer's output, and what `backward` needs."""
        one, two, three = (None,) * SEEDS if seeds is None else seeds.unbind()
        weight, bias = self._stacked()
        qkv = torch.addmm(bias, hidden, weight.t())
        context, attention_saved = self.pairs.attention.forward(
            qkv.view(hidden.shape[0], 3, self.num_heads, -1),
            batch.cu_seqlens,
            batch.max_seqlen,
            0.0 if one is None else self.attention_dropout,
            one,
        )
        context = context.view(hidden.shape)
        middle, first_saved = self._norm(self.first, context, hidden, two)
        inner = torch.mm(middle, self.inner_weight.t())
        activated = self.pairs.bias_gelu.forward(inner, self.inner_bias)
        output, second_saved = self._norm(self.second, activated, middle, three)
        return output, Saved(
            hidden, qkv, context, middle, inner, activated, batch.cu_seqlens, seeds,
            attention_saved, first_saved, second_saved,
        )  # fmt: skip

    def _norm(
        self, norm: _Norm, x: Tensor, residual: Tensor, seed: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.pairs.bias_dropout_residual_layer_norm.forward(
            torch.mm(x, norm.projection.t()),
            norm.bias,
            residual,
            norm.weight,
            norm.norm_bias,
            norm.epsilon,
            0.0 if seed is None else norm.dropout,
            seed,
        )

    def backward(self, gradient: Tensor, saved: Saved, max_seqlen: int) -> Tensor:
        """The gradient of the input; those of the parameters are added to the sink's targets.

        gradient: of the output, (T, hidden size). Every tensor called "..._gradient" is the
        gradient of the tensor whose name it begins with.
        """
        one, two, three = (None,) * SEEDS if saved.seeds is None else saved.seeds.unbind()
        target = self.sink.target
        activated_gradient, middle_gradient = self._norm_backward(
            self.second, gradient, saved.activated, saved.second_norm, three
        )
        inner_gradient = self.pairs.bias_gelu.backward(
            activated_gradient, saved.inner, self.inner_bias, target(self.inner_bias)
        )
        del activated_gradient  # the largest activations: no two gradients of them are kept
        add_product(target(self.inner_weight), inner_gradient, saved.middle)
        middle_gradient.addmm_(inner_gradient, self.inner_weight)
        del inner_gradient
        context_gradient, hidden_gradient = self._norm_backward(
            self.first, middle_gradient, saved.context, saved.first_norm, two
        )
        heads = (gradient.shape[0], self.num_heads, -1)
        qkv_gradient = self.pairs.attention.backward(
            context_gradient.view(heads),
            saved.qkv.view(heads[0], 3, *heads[1:]),
            saved.cu_seqlens,
            max_seqlen,
            0.0 if one is None else self.attention_dropout,
            one,
            saved.context.view(heads),
            saved.attention,
        ).view(saved.qkv.shape)
        weights, apart = _together([target(part) for part in self.qkv_weights])
        add_product(weights, qkv_gradient, saved.hidden)
        _spread(weights, apart)
        biases, apart = _together([target(part) for part in self.qkv_biases])
        self.pairs.column_sum(qkv_gradient, biases)
        _spread(biases, apart)
        return hidden_gradient.addmm_(qkv_gradient, self._stacked()[0])

    def _norm_backward(
        self,
        norm: _Norm,
        gradient: Tensor,
        x: Tensor,
        saved: tuple[Tensor, ...],
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the projection's input x and of the residual."""
        target = self.sink.target
        projected_gradient, residual_gradient = (
            self.pairs.bias_dropout_residual_layer_norm.backward(
                gradient,
                norm.weight,
                0.0 if seed is None else norm.dropout,
                seed,
                saved,
                target(norm.bias),
                target(norm.weight),
                target(norm.norm_bias),
            )
        )
        # Both may be the same tensor, and the caller adds to the residual's: it is read before.
        add_product(target(norm.projection), projected_gradient, x)
        return torch.mm(projected_gradient, norm.projection), residual_gradient


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, seeds: Tensor | None, batch: PackedBatch, layer: FusedLayer
    ) -> Tensor:
        output, saved = layer.forward(hidden, batch, seeds)
        tensors, ctx.counts = saved.flat()
        ctx.save_for_backward(*tensors)
        ctx.layer, ctx.max_seqlen = layer, batch.max_seqlen
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        layer = ctx.layer
        saved = Saved.of(ctx.saved_tensors, ctx.counts)
        hidden_gradient = layer.backward(gradient, saved, ctx.max_seqlen)
        layer.sink.arrived(layer.parameters)
        return hidden_gradient, None, None, None


def add_product(target: Tensor, left: Tensor, right: Tensor) -> None:
    """target += left' right, as for the gradient of a weight; target may be of a wider dtype."""
    if target.dtype == left.dtype:
        target.addmm_(left.t(), right)
    else:
        target.add_(torch.mm(left.t(), right))


def _together(targets: list[Tensor]) -> tuple[Tensor, list[Tensor] | None]:
    """One tensor to add to in place of several, and these if it is not their memory."""
    together = side_by_side(targets)
    if together is not None:
        return together, None
    first = targets[0]
    return first.new_zeros(len(targets) * first.shape[0], *first.shape[1:]), targets


def _spread(together: Tensor, apart: list[Tensor] | None) -> None:
    for target, part in zip(apart or (), together.split(len(together) // 3), strict=False):
        target.add_(part)
