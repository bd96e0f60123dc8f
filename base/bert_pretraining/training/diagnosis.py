"""Where a number that is not finite comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.layer_form import PLAIN
from bert_pretraining.model.losses import mean_loss
from bert_pretraining.runtime.words import counted


class NonFinite(NamedTuple):
    """What was not finite first, in words.

    place: the stage at which it appears: 0 a weight or an activation, 1 a gradient, 2 not found
    again.
    """

    place: int
    text: str


def first_non_finite(
    model: BertForPreTraining, batches: list[PackedBatch], scale: float = 1.0
) -> NonFinite:
    """Name what is not finite first: a parameter, an activation of these batches, a gradient.

    Runs the batches once more, with other dropout masks: forward, and if that is finite,
    backward from the mean losses times `scale`. Modules run one by one, whatever the model's
    form, so that the first one is found.
    """
    with model.layers_as(PLAIN):
        return _first_non_finite(model, batches, scale)


def _first_non_finite(
    model: BertForPreTraining, batches: list[PackedBatch], scale: float
) -> NonFinite:
    for name, parameter in model.named_parameters():
        if (what := _fault(parameter)) is not None:
            return NonFinite(0, f"parameter {name} holds {what}")
    for batch in batches:
        found = _first_activation(model, batch)
        if found is not None:
            return NonFinite(0, found)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for batch in batches:
        loss = mean_loss(model(batch), batch) * scale / len(batches)
        added = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        torch._foreach_add_(gradients, added)
    # Backward goes from the last parameter to the first.
    for name, gradient in reversed(list(zip(names, gradients, strict=True))):
        if (what := _fault(gradient)) is not None:
            text = f"parameters and activations are finite; the gradient of {name} holds {what}"
            return NonFinite(1, text)
    return NonFinite(2, "parameters, activations and gradients were finite when tried again")


def _first_activation(model: nn.Module, batch: PackedBatch) -> str | None:
    found: list[str] = []

    def look(name: str, output: object) -> None:
        for part in _tensors(output):
            if not found and (what := _fault(part)) is not None:
                found.append(f"the output of {name or 'the model'} holds {what}")

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(output: object) -> Iterator[Tensor]:
    """The tensors in what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


def _fault(tensor: Tensor) -> str | None:
    """ "n NaN and m infinite of k numbers", or None if all are finite."""
    if not tensor.is_floating_point() or torch.isfinite(tensor).all():
        return None
    nan, infinite = tensor.isnan().sum().item(), tensor.isinf().sum().item()
    return f"{nan} NaN and {infinite} infinite of {counted(tensor.numel(), 'number')}"
