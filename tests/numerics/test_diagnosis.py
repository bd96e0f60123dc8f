"""The diagnosis names the place where a number that is not finite first appears."""

from __future__ import annotations

import pytest
import torch

from bert_pretraining.training.diagnosis import first_non_finite
from helpers import make_model, packed, padded_arrays, tiny_config

BATCH = packed(padded_arrays([30, 7, 52], 64, 101, seed=3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_parameter(bad: float) -> None:
    model = make_model(tiny_config())
    model.bert.encoder.layer[1].intermediate.dense.weight.data[3, 4] = bad
    named = first_non_finite(model, [BATCH]).text
    assert named.startswith("parameter bert.encoder.layer.1.intermediate.dense.weight holds ")
    assert ("1 NaN and 0 infinite of 1,536" if bad != bad else "0 NaN and 1 inf") in named


def test_an_activation() -> None:
    model = make_model(tiny_config())
    # Finite weights whose product is beyond float32.
    model.bert.encoder.layer[1].intermediate.dense.weight.data.fill_(1e38)
    named = first_non_finite(model, [BATCH]).text
    assert named.startswith("the output of bert.encoder.layer.1.intermediate holds ")


def test_a_gradient() -> None:
    model = make_model(tiny_config())
    for parameter in (model.bert.embeddings.LayerNorm.bias, model.cls.predictions.bias):
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    named = first_non_finite(model, [BATCH]).text
    assert named.startswith("parameters and activations are finite; the gradient of cls.pred")


def test_all_finite_leaves_no_hooks() -> None:
    model = make_model(tiny_config())
    assert "were finite when tried again" in first_non_finite(model, [BATCH, BATCH], 4.0).text
    assert not any(module._forward_hooks for module in model.modules())
