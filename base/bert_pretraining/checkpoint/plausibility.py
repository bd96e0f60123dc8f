"""Weights that fit a model and yet cannot be those of a trained BERT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bert_pretraining.checkpoint.structure import untied

# Trained weights, those of the mini data set included, lie well within: the spread of a matrix is
# 0.02 to 0.3, and the mean of a LayerNorm's weight is 0.5 to 1.
WIDEST_SPREAD = 10.0
SMALLEST_SCALE = 0.01  # mean absolute weight of a LayerNorm
NAMED = 3  # tensors named in a notice


def suspicions(weights: Mapping[str, Tensor]) -> list[str]:
    """What is implausible about start weights, one sentence each; usually nothing.

    weights: under the apex names, and finite. The right shapes prove nothing about the
    numbers: a model with such weights predicts no better than chance.
    """
    tensors = {
        name: value
        for name, value in untied(weights).items()
        if value.dtype.is_floating_point and value.element_size() > 1
    }
    scales = {name: value for name, value in tensors.items() if name.endswith("LayerNorm.weight")}
    biases = [value for name, value in tensors.items() if name.endswith(".bias")]
    matrices = {name: value for name, value in tensors.items() if value.dim() == 2}
    found = []
    unscaled = scales and all(_only(value, 1.0) for value in scales.values())
    if unscaled and all(_only(value, 0.0) for value in biases):
        found.append(
            "every LayerNorm weight is 1 and every bias is 0, as in a model that was never "
            "trained: the weights are random"
        )
    flat = [name for name, value in matrices.items() if value.numel() > 1 and _constant(value)]
    if flat:
        found.append(f"all numbers are the same in {_named(flat)}: these were never trained")
    wide = [name for name, value in matrices.items() if _spread(value) > WIDEST_SPREAD]
    if wide:
        found.append(
            f"numbers far too large in {_named(wide)}: they may have been scaled, or read with a "
            "wrong type"
        )
    small = [name for name, value in scales.items() if _spread(value) < SMALLEST_SCALE]
    if small:
        found.append(
            f"numbers near 0 in {_named(small)}, which switch their layers off: they may be "
            "offsets from 1, as another program saves them, or moments of an optimizer"
        )
    return found


def _named(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _only(value: Tensor, number: float) -> bool:
    return bool((value == number).all())


def _constant(value: Tensor) -> bool:
    """Whether all numbers of a matrix are the same; its first row mostly tells."""
    first = value[0, 0].item()
    return _only(value[0], first) and _only(value, first)


def _spread(value: Tensor) -> float:
    """The root of the mean square of its numbers; 0 for an empty tensor."""
    if not value.numel():
        return 0.0
    norm = torch.linalg.vector_norm(value, dtype=torch.float32).item()
    return norm / value.numel() ** 0.5
