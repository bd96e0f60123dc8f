"""LAMB's formulas in NumPy float64, and random cases to compare every provider with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from bert_pretraining.optim import Optimizer, OptimizerSettings, create_optimizer

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
SETTINGS = OptimizerSettings(0.9, 0.999, 1e-6, 0.01, max_gradient_norm=1.0)
Arrays = dict[str, np.ndarray]


def numpy_lamb(
    weights: Arrays, gradients: list[Arrays], rates: list[float], decayed: set[str] = DECAYED
) -> Arrays:
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
            if name in decayed:
                u = u + 0.01 * weights[name]
                p_norm, u_norm = np.linalg.norm(weights[name]), np.linalg.norm(u)
                ratio = p_norm / u_norm if p_norm > 0 and u_norm > 0 else 1.0
            weights[name] = weights[name] - rate * ratio * u
    return weights


def case(
    seed: int, scale: float, steps: int = 12, shapes: dict[str, tuple] = NAMES
) -> tuple[Arrays, list[Arrays], list[float]]:
    """Weights, gradients of each step, learning rates."""
    random = np.random.RandomState(seed)
    weights = {name: random.randn(*shape) for name, shape in shapes.items()}
    gradients = [
        {name: scale * random.randn(*shape) for name, shape in shapes.items()} for _ in range(steps)
    ]
    return weights, gradients, list(random.uniform(0.001, 0.02, steps))


def parameters_of(weights: Arrays, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    return {
        name: nn.Parameter(torch.tensor(value, dtype=dtype, device=device))
        for name, value in weights.items()
    }


def give(parameters: dict[str, Tensor], gradients: Arrays, factor: float = 1.0) -> None:
    """Set the gradients, in the parameters' dtype."""
    for name, parameter in parameters.items():
        value = torch.tensor(gradients[name] * factor)
        parameter.grad = value.to(dtype=parameter.dtype, device=parameter.device)


def make(name: str, parameters: dict[str, Tensor], **arguments: object) -> Optimizer:
    return create_optimizer(name, parameters.items(), SETTINGS, **arguments)


def run(
    name: str,
    weights: Arrays,
    gradients: list[Arrays],
    rates: list[float],
    dtype: torch.dtype,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The weights after all steps."""
    parameters = parameters_of(weights, dtype, device)
    optimizer = make(name, parameters)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.zero_grad()
        give(parameters, gradient)
        assert optimizer.step(rate)
    assert optimizer.updates == len(rates)
    return {key: parameter.detach().cpu() for key, parameter in parameters.items()}


def assert_near(found: dict[str, Tensor], expected: Arrays, tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, value in found.items():
        np.testing.assert_allclose(
            value.detach().double().cpu().numpy(),
            expected[name],
            rtol=tolerance,
            atol=tolerance,
            err_msg=name,
        )


def snapshot(optimizer: Optimizer) -> list[Tensor]:
    """Copies of everything that a skipped step must not change."""
    tensors = [
        *optimizer.parameters,
        *optimizer.masters,
        *optimizer.slots["first_moment"],
        *optimizer.slots["second_moment"],
    ]
    return [torch.tensor(optimizer.updates), *(tensor.detach().clone() for tensor in tensors)]


def assert_same_bits(some: list[Tensor], others: list[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.dtype == other.dtype
        # Bytes are compared, because == accepts -0.0 for 0.0 and rejects an unchanged NaN.
        one, other = (tensor.detach().cpu().contiguous() for tensor in (one, other))
        assert one.shape == other.shape
        assert torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))
