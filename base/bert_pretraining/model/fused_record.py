"""What autograd knows of fused layers: one record for all of them, or one for each.

Autograd's record of each small operator would take the host longer than a GPU takes for the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.fused_layer import FusedLayer, Saved, Seeds


def run_layers(
    layers: Sequence[FusedLayer], seeds: Sequence[Seeds], hidden: Tensor, batch: PackedBatch
) -> Tensor:
    """Run the layers one after the other, as one record.

    layers: at least one. seeds: of each layer; the dropout masks follow from them. hidden:
    (T, hidden size). Returns the same shape.
    """
    return _Layers.apply(hidden, seeds, batch, layers, torch.is_grad_enabled())


def run_layer(layer: FusedLayer, seeds: Seeds, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Run one layer, as a record whose tensors `torch.utils.checkpoint` can compute again.

    See `run_layers`.
    """
    return _Layer.apply(hidden, seeds, batch, layer, torch.is_grad_enabled())


class _Layers(torch.autograd.Function):
    """See `run_layers`. Autograd would free what layers save only when all have gone back."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        seeds: Sequence[Seeds],
        batch: PackedBatch,
        layers: Sequence[FusedLayer],
        record: bool,
    ) -> Tensor:
        ctx.max_seqlen, ctx.to_do = batch.max_seqlen, []
        factor, following = None, [*(layer.to_qkv for layer in layers[1:]), None]
        for layer, own_seeds, product in zip(layers, seeds, following, strict=True):
            hidden, factor, saved = layer.forward(hidden, batch, own_seeds, record, factor, product)
            if record:
                ctx.to_do.append((layer, saved))
            del saved  # an evaluation keeps none of it while the next layer runs
        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        if not ctx.to_do:
            raise RuntimeError("fused layers keep nothing for a second backward pass")
        while ctx.to_do:
            layer, saved = ctx.to_do.pop()
            gradient = layer.backward(gradient, saved, ctx.max_seqlen)
            layer.sink.arrived(layer.parameters)
        return gradient, None, None, None, None


class _Layer(torch.autograd.Function):
    """See `run_layer`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        seeds: Seeds,
        batch: PackedBatch,
        layer: FusedLayer,
        record: bool,
    ) -> Tensor:
        output, _, saved = layer.forward(hidden, batch, seeds, record)
        tensors, ctx.counts = saved.flat()
        ctx.save_for_backward(*tensors)
        ctx.layer, ctx.max_seqlen = layer, batch.max_seqlen
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        layer, saved = ctx.layer, Saved.of(ctx.saved_tensors, ctx.counts)
        hidden_gradient = layer.backward(gradient, saved, ctx.max_seqlen)
        layer.sink.arrived(layer.parameters)
        return hidden_gradient, None, None, None, None
