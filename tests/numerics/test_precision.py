"""16-bit weights and activations: near float32, and with float32 where it matters."""

from __future__ import annotations

import copy

import pytest
import torch

from bert_pretraining.kernels import reference, torch_provider
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.training.micro_step import forward_backward
from helpers import make_model, packed, padded_arrays, tiny_config

BATCH = packed(padded_arrays([30, 7, 52, 11, 64, 5], 64, 101, seed=3))
WEIGHTS = {"mlm": torch.tensor(1.0 / BATCH.num_masked), "nsp": torch.tensor(1.0 / 6)}


def gradients(model: BertForPreTraining) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_bf16_is_near_float32(provider: str) -> None:
    model = make_model(tiny_config(initializer_range=0.05), provider)
    rounded = copy.deepcopy(model).bfloat16()
    exact_sums = forward_backward(model, BATCH, WEIGHTS)
    sums = forward_backward(rounded, BATCH, WEIGHTS)
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in rounded.parameters())
    for name, exact in exact_sums.items():
        torch.testing.assert_close(sums[name].loss, exact.loss, rtol=0.01, atol=0.01)
    exact, near = gradients(model), gradients(rounded)
    assert torch.nn.functional.cosine_similarity(exact, near, dim=0) > 0.999
    assert near.norm().item() == pytest.approx(exact.norm().item(), rel=0.02)


@pytest.mark.parametrize("provider", [reference, torch_provider])
def test_statistics_and_loss_are_computed_in_float32(provider: object) -> None:
    """In bfloat16 these sums would be wrong: its numbers near 300 are 2 apart."""
    x = torch.full((1, 4096), 0.5, dtype=torch.bfloat16)
    x[0, ::2] = -0.5
    one, zero = torch.ones(4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    out = provider.bias_dropout_residual_layer_norm(x, zero, 0 * x, one, zero, 1e-12, 0.0)
    assert torch.equal(out.abs(), torch.ones_like(out))
    loss, _ = provider.masked_cross_entropy(torch.zeros(300, 1000).bfloat16(), torch.arange(300))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(300 * torch.log(torch.tensor(1000.0)).item(), rel=1e-5)
