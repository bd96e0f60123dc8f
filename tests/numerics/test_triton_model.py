"""The whole model with all Triton kernels, and with one of them among reference operators."""

from __future__ import annotations

import pytest
import torch

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import DEVICE

# isort: split
from bert_pretraining.kernels import OPERATORS, select
from bert_pretraining.kernels.reference import IGNORED
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.training.micro_step import forward_backward
from bert_pretraining.training.static_batch import Budget, StaticBatch
from helpers import packed, padded_arrays, tiny_config

CONFIG = tiny_config(num_hidden_layers=1, max_position_embeddings=64)
BATCH = packed(padded_arrays([9, 1, 20], 64, 101, seed=3)).to(DEVICE)
WEIGHTS = {
    "mlm": torch.tensor(0.01, device=DEVICE),
    "nsp": torch.tensor(0.2, device=DEVICE),
}


def step(
    provider: str, static: bool = False, per_operator: dict | None = None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sums, and all gradients."""
    kernels = select(provider, DEVICE, torch.float32, CONFIG.head_size, per_operator)
    model = BertForPreTraining(CONFIG, kernels, seed=1).to(DEVICE)
    batch = BATCH
    if static:
        budget = Budget(BATCH.num_tokens + 30, 3, BATCH.num_masked + 2, 64, dummies=2)
        batch = StaticBatch(budget, DEVICE, IGNORED).load(BATCH)
    sums = forward_backward(model, batch, WEIGHTS)
    return sums, [parameter.grad for parameter in model.parameters()]


def assert_same(ours: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-4)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_all_operators_together(static: bool) -> None:
    assert_same(step("triton", static), step("reference"))


def test_one_operator_alone() -> None:
    chosen = step("reference", per_operator={"bias_gelu": "triton"})
    assert_same(chosen, step("reference"))
    kernels = select("triton", DEVICE, torch.float32, CONFIG.head_size)
    assert kernels.choice == dict.fromkeys(OPERATORS, "triton")
