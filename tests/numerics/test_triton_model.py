"""The whole model with all Triton kernels, and with one of them among reference operators."""

from __future__ import annotations

import dataclasses

import pytest
import torch

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import DEVICE

# isort: split
from bert_pretraining.kernels import OPERATORS, select, triton_operators, triton_pairs
from bert_pretraining.kernels.reference import IGNORED
from bert_pretraining.model import layer_form
from bert_pretraining.model.fused_layer import SEEDS
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.layer_form import PLAIN, FusedForm, LayerForm
from bert_pretraining.model.parameter_memory import OwnGradients
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fused_layers_drop_the_same_elements_and_give_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Both forms get the same seeds; their masks and so their results must then be equal."""
    config = dataclasses.replace(
        CONFIG,
        num_hidden_layers=2,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.3,
    )
    kernels = select("triton", DEVICE, torch.float32, config.head_size)
    model = BertForPreTraining(config, kernels, seed=1).to(DEVICE)
    generator = torch.Generator().manual_seed(5)
    shape = (config.num_hidden_layers, SEEDS, 2)
    drawn = torch.randint(0, 2**31 - 1, shape, generator=generator, dtype=torch.int32).to(DEVICE)
    of_embedding = torch.tensor([3, 4], dtype=torch.int32, device=DEVICE)

    def run(form: LayerForm) -> tuple:
        model.zero_grad()
        sums = []
        with model.layers_as(form):
            for _ in range(accumulate):
                seeds = iter([of_embedding, *drawn.flatten(0, 1)])
                monkeypatch.setattr(
                    triton_operators, "draw_seed", lambda *_, seeds=seeds: next(seeds)
                )
                sums += forward_backward(model, BATCH, WEIGHTS).values()
        return sums, [parameter.grad for parameter in model.parameters()]

    expected = run(PLAIN)
    monkeypatch.setattr(layer_form, "draw_seeds", lambda *_: [tuple(one) for one in drawn])
    form = FusedForm(model.bert.encoder.layer, kernels.pairs, OwnGradients())
    assert_same(run(form), expected)


@pytest.mark.parametrize("parts", [(3, 70, 1, 2), (0, 1, 0, 130)])
def test_sums_of_a_layer_are_those_of_its_operators(parts: tuple[int, ...]) -> None:
    """Also where one has no rows, and for more operators than one launch takes."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 40), (33,), (3, 40), (1, 200), (2, 16)]
    sums = triton_pairs.PAIRS.sums()
    targets, expected = [], []
    for count, shape in zip((*parts, 4), shapes, strict=True):
        partial = torch.randn(count, *shape, generator=generator)
        rows = partial.double().sum(0).view(-1, shape[-1])
        dtypes = (torch.bfloat16, torch.float32, torch.float32)[: len(rows)]
        outputs = [torch.randn(shape[-1], generator=generator).to(dtype) for dtype in dtypes]
        expected += [out.double() + row for out, row in zip(outputs, rows, strict=True)]
        targets += [out.to(DEVICE) for out in outputs]
        sums(partial.to(DEVICE), targets[-len(outputs) :])
    sums.finish()
    for target, exact in zip(targets, expected, strict=True):
        tolerance = 2.0**-7 if target.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(target.double().cpu(), exact, rtol=tolerance, atol=tolerance)
