"""LAMB: the readable version and the fast one against formulas in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bert_pretraining.optim import OPTIMIZERS, LambSettings
from bert_pretraining.optim.lamb import has_weight_decay

NAMES = {
    "bert.embeddings.word_embeddings.weight": (17, 6),
    "bert.encoder.layer.0.attention.self.query.weight": (6, 6),
    "bert.encoder.layer.0.attention.self.query.bias": (6,),
    "bert.encoder.layer.0.output.LayerNorm.weight": (6,),
    "bert.encoder.layer.0.output.LayerNorm.bias": (6,),
    "cls.predictions.bias": (1,),
    "cls.seq_relationship.weight": (2, 3),
}
DECAYED = {
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.attention.self.query.weight",
    "cls.seq_relationship.weight",
}
SETTINGS = LambSettings(0.9, 0.999, 1e-6, 0.01, max_gradient_norm=1.0)


def numpy_lamb(weights: dict, gradients: list[dict], rates: list[float]) -> dict:
    """The update from its published formulas, independent of the code under test."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    m = {name: np.zeros_like(value) for name, value in weights.items()}
    v = {name: np.zeros_like(value) for name, value in weights.items()}
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        total = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = g.astype(np.float64) / max(1.0, total / 1.0)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            u = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-6)
            ratio = 1.0
            if name in DECAYED:
                u = u + 0.01 * weights[name]
                p_norm, u_norm = np.linalg.norm(weights[name]), np.linalg.norm(u)
                ratio = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
            weights[name] = weights[name] - rate * ratio * u
    return weights


def case(seed: int, scale: float, steps: int = 12) -> tuple[dict, list[dict], list[float]]:
    random = np.random.RandomState(seed)
    weights = {name: random.randn(*shape) for name, shape in NAMES.items()}
    gradients = [
        {name: scale * random.randn(*shape) for name, shape in NAMES.items()} for _ in range(steps)
    ]
    return weights, gradients, list(random.uniform(0.001, 0.02, steps))


def run(
    name: str, weights: dict, gradients: list[dict], rates: list[float], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    parameters = {
        key: nn.Parameter(torch.tensor(value, dtype=dtype)) for key, value in weights.items()
    }
    optimizer = OPTIMIZERS[name](parameters.items(), SETTINGS)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.zero_grad()
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient[key], dtype=dtype)
        assert optimizer.step(rate)
    return {key: parameter.detach() for key, parameter in parameters.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scale", [1e-3, 0.1, 50.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)]
)  # fmt: skip
def test_equals_the_formulas(name: str, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    weights, gradients, rates = case(seed=int(scale * 1000), scale=scale)
    expected = numpy_lamb(weights, gradients, rates)
    for key, value in run(name, weights, gradients, rates, dtype).items():
        np.testing.assert_allclose(
            value.double().numpy(), expected[key], rtol=tolerance, atol=tolerance, err_msg=key
        )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("what", ["gradients", "weights", "both"])
def test_zeros(name: str, what: str) -> None:
    weights, gradients, rates = case(seed=5, scale=0.1)
    if what in ("weights", "both"):
        weights = {key: value * 0 for key, value in weights.items()}
    if what in ("gradients", "both"):
        gradients = [{key: value * 0 for key, value in step.items()} for step in gradients]
    expected = numpy_lamb(weights, gradients, rates)
    for key, value in run(name, weights, gradients, rates, torch.float64).items():
        np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, bad: float) -> None:
    parameters = {"a.weight": nn.Parameter(torch.ones(3)), "a.bias": nn.Parameter(torch.ones(2))}
    optimizer = OPTIMIZERS[name](parameters.items(), SETTINGS)
    parameters["a.weight"].grad = torch.tensor([0.0, bad, 1.0])
    parameters["a.bias"].grad = torch.ones(2)
    assert optimizer.step(0.1) is False
    assert optimizer.updates == 0
    assert parameters["a.weight"].tolist() == [1.0, 1.0, 1.0]
    assert not any(moment.any() for moment in optimizer.first_moments)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_round_a_float32_master(name: str, dtype: torch.dtype) -> None:
    weights, gradients, _ = case(seed=9, scale=0.01, steps=200)
    weights = {
        key: torch.tensor(value).to(dtype).double().numpy() for key, value in weights.items()
    }
    gradients = [
        {key: torch.tensor(value).to(dtype).double().numpy() for key, value in step.items()}
        for step in gradients
    ]
    rates = [1e-5] * 200  # each step alone is far below a 16-bit rounding step
    expected = numpy_lamb(weights, gradients, rates)
    for key, value in run(name, weights, gradients, rates, dtype).items():
        assert torch.equal(value, torch.tensor(expected[key]).float().to(dtype)) or torch.allclose(
            value.double(), torch.tensor(expected[key]), rtol=2**-7, atol=1e-5
        ), key
    moved = run(name, weights, gradients, rates, dtype)["bert.embeddings.word_embeddings.weight"]
    before = weights["bert.embeddings.word_embeddings.weight"]
    assert not np.array_equal(moved.double().numpy(), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masters_are_the_weights_before_rounding(name: str) -> None:
    exact = torch.randn(5, 3)
    parameter = nn.Parameter(exact.bfloat16())
    optimizer = OPTIMIZERS[name]([("a.weight", parameter)], SETTINGS, {"a.weight": exact.clone()})
    assert torch.equal(optimizer.masters[0], exact)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0)
    assert torch.equal(parameter, exact.bfloat16())


def test_inverse_scale_undoes_the_loss_scale() -> None:
    weights, gradients, rates = case(seed=3, scale=0.1)
    plain = run("foreach", weights, gradients, rates, torch.float64)
    parameters = {key: nn.Parameter(torch.tensor(value)) for key, value in weights.items()}
    optimizer = OPTIMIZERS["foreach"](parameters.items(), SETTINGS)
    for gradient, rate in zip(gradients, rates, strict=True):
        for key, parameter in parameters.items():
            parameter.grad = torch.tensor(gradient[key]) * 1024
        optimizer.step(rate, inverse_scale=1 / 1024)
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), plain[key], rtol=1e-12, atol=0)


def test_which_parameters_decay() -> None:
    assert {name for name in NAMES if has_weight_decay(name)} == DECAYED


def test_gradients_are_forgotten_in_place_or_freed() -> None:
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    memory = parameter.grad.data_ptr()
    optimizer = OPTIMIZERS["reference"]([("a.weight", parameter)], SETTINGS)
    optimizer.zero_grad(keep_memory=True)
    assert parameter.grad.data_ptr() == memory
    assert not parameter.grad.any()
    optimizer.zero_grad()
    assert parameter.grad is None
    optimizer.zero_grad(keep_memory=True)
    assert parameter.grad is None
