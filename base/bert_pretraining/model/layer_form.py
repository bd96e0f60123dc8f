"""The ways to run the model's parts: as modules, compiled, or the layers as one operation.

The parameters are the same in every form, so that the form may change from batch to batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bert_pretraining.kernels.pairs import LayerPairs
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.fused_layer import NO_SEEDS, FusedLayer, draw_seeds
from bert_pretraining.model.fused_record import run_layer, run_layers
from bert_pretraining.runtime import compat
from bert_pretraining.runtime.gradient_sink import GradientSink

if TYPE_CHECKING:
    from bert_pretraining.model.bert import Layer

LayerCall = Callable[[Tensor, PackedBatch], Tensor]


class LayerForm:
    """Every module runs as it is, operator by operator."""

    name = "plain"

    def call(self, function: Callable, module: nn.Module, *arguments: object) -> object:
        """function(module, *arguments): one part of the model besides its encoder layers.

        The last argument is the batch.
        """
        return function(module, *arguments)

    def layers(
        self, layers: Iterable[Layer], batch: PackedBatch, apart: bool
    ) -> Iterable[LayerCall]:
        """What to call with the hidden state and the batch, one after the other.

        apart: each encoder layer must be one call.
        """
        return layers


PLAIN = LayerForm()


class CompiledForm(LayerForm):
    """torch.compile makes one program for all encoder layers, and one for each other part.

    A program for the whole model would take minutes: PyTorch 2.11 prints the graph below each
    custom operator while it compiles, which grows exponentially with the number of layers.

    Args:
        tokens: the number of tokens for which programs are made. Other batches run as in the plain
            form. None: one program for any number.
    """

    name = "compiled"

    def __init__(self, tokens: int | None) -> None:
        self._tokens = tokens
        self._programs: dict[Callable, Callable] = {}

    def call(self, function: Callable, module: nn.Module, *arguments: object) -> object:
        """See `LayerForm`."""
        if not self._applies(module, arguments[-1]):
            return function(module, *arguments)
        if function not in self._programs:
            compat.compile_once_for_equal_modules()
            dynamic = self._tokens is None
            self._programs[function] = torch.compile(function, dynamic=dynamic)
        return self._programs[function](module, *arguments)

    def layers(
        self, layers: Iterable[Layer], batch: PackedBatch, apart: bool
    ) -> Iterable[LayerCall]:
        """See `LayerForm`."""
        return [functools.partial(self.call, _run, layer) for layer in layers]

    def _applies(self, module: nn.Module, batch: PackedBatch) -> bool:
        # Evaluation has batches of many sizes, each of which would be compiled.
        return module.training and (self._tokens is None or batch.num_tokens == self._tokens)


def _run(layer: Layer, hidden: Tensor, batch: PackedBatch) -> Tensor:
    return layer(hidden, batch)


class FusedForm(LayerForm):
    """All encoder layers are one operation; see `fused_layer.py`.

    Args:
        layers: the encoder's layers; their parameters must stay where they are in memory.
        pairs: the operators.
        sink: where the gradients of the layers' parameters go.
    """

    name = "fused"

    def __init__(self, layers: Iterable[Layer], pairs: LayerPairs, sink: GradientSink) -> None:
        self._fused = [FusedLayer(layer, pairs, sink) for layer in layers]

    def layers(
        self, layers: Iterable[Layer], batch: PackedBatch, apart: bool
    ) -> Iterable[LayerCall]:
        """See `LayerForm`."""
        seeds = [NO_SEEDS] * len(self._fused)
        if any(layer.training and layer.has_dropout for layer in layers):
            seeds = draw_seeds(len(self._fused), batch.cu_seqlens.device)
        if not apart:
            return [functools.partial(run_layers, self._fused, seeds)]
        return [
            functools.partial(run_layer, fused, seed)
            for fused, seed in zip(self._fused, seeds, strict=True)
        ]
