"""AdamW compared with PyTorch's, its weight decay, and its state saved and restored."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bert_pretraining.optim import OptimizerSettings, create_optimizer

SETTINGS = OptimizerSettings(0.8, 0.95, 1e-6, weight_decay=0.1, max_gradient_norm=0.5)
SHAPES = {"a.weight": (3, 5), "a.bias": (7,), "b.LayerNorm.weight": (1,), "c.weight": (2, 1, 4)}


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients(step: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [scale * torch.randn(shape, generator=generator).double() for shape in SHAPES.values()]


def theirs(named: dict[str, nn.Parameter]) -> torch.optim.AdamW:
    """PyTorch's AdamW, one parameter at a time, in float64."""
    decayed = [named["a.weight"], named["c.weight"]]
    others = [named["a.bias"], named["b.LayerNorm.weight"]]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False
    )


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_it_is_pytorchs(dtype: torch.dtype, bound: float) -> None:
    ours, expected = parameters(dtype), parameters(torch.float64)
    for one, other in zip(expected.values(), ours.values(), strict=True):
        one.data.copy_(other.data)
    optimizer, reference = create_optimizer("adamw", ours.items(), SETTINGS), theirs(expected)
    for step in range(6):
        rate = 0.1 / (step + 1)
        found = gradients(step, scale=10.0**-step)  # clipped at first, not later
        norm = float(torch.cat([gradient.view(-1) for gradient in found]).norm())
        for parameter, gradient in zip(ours.values(), found, strict=True):
            parameter.grad = (4.0 * gradient).to(dtype)
        for parameter, gradient in zip(expected.values(), found, strict=True):
            parameter.grad = gradient / max(1.0, norm / 0.5)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        assert optimizer.step(rate, inverse_scale=0.25)
        assert optimizer.gradient_norm.item() == pytest.approx(norm, rel=1e-5)
        for one, other in zip(ours.values(), expected.values(), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=bound, atol=bound)
    assert optimizer.updates == 6


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    named = parameters(torch.float32)
    optimizer = create_optimizer("adamw", named.items(), SETTINGS)
    before = [parameter.clone() for parameter in named.values()]
    for parameter in named.values():
        parameter.grad = torch.full_like(parameter, torch.inf)
    assert not optimizer.step(0.1)
    assert optimizer.updates == 0
    for one, other in zip(before, named.values(), strict=True):
        assert torch.equal(one, other)


def test_its_state_goes_on_bit_for_bit() -> None:
    first, second = parameters(torch.float32), parameters(torch.float32, seed=9)
    optimizer = create_optimizer("adamw", first.items(), SETTINGS)
    resumed = create_optimizer("adamw", second.items(), SETTINGS)
    for step in range(4):
        if step == 2:
            resumed.load_state_dict(optimizer.state_dict())
        for named in (first, second):
            for parameter, gradient in zip(named.values(), gradients(step), strict=True):
                parameter.grad = gradient.float()
        optimizer.step(0.01)
        resumed.step(0.01)
    for one, other in zip(first.values(), second.values(), strict=True):
        assert torch.equal(one, other)
    assert list(optimizer.state_dict()) == ["updates", "master", "first_moment", "second_moment"]
