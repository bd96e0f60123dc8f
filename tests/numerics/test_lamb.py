"""LAMB: every provider that runs on a CPU, compared with formulas in NumPy float64."""

from __future__ import annotations

import dataclasses
import io
import sys

import numpy as np
import pytest
import torch
from torch import nn

from bert_pretraining import optim
from bert_pretraining.config import Config
from bert_pretraining.errors import UserError
from bert_pretraining.optim import (
    OPTIMIZERS,
    OptimizerSettings,
    choose,
    create_optimizer,
    flat_torch,
    has_weight_decay,
    scale_down,
)
from bert_pretraining.optim.lamb import norm_of
from lamb_cases import (
    DECAYED,
    NAMES,
    SETTINGS,
    assert_near,
    assert_same_bits,
    case,
    give,
    make,
    numpy_lamb,
    parameters_of,
    run,
    snapshot,
)

ON_CPU = ("reference", "foreach", "flat")
each_provider = pytest.mark.parametrize("name", ON_CPU)
# Sizes: one element, odd numbers, and just below and above a block and a (small) chunk.
BORDERS = {
    f"{name}.{number}.{kind}": shape
    for number, shape in enumerate([(1,), (1, 1), (3, 5), (1023,), (1024,), (1025,), (2, 1024),
                                    (4096,), (4097,), (3, 4096), (5, 2501), (10_000,)])
    for name, kind in (("dense", "weight"), ("dense", "bias"), ("LayerNorm", "weight"))
}  # fmt: skip


@each_provider
@pytest.mark.parametrize("scale", [1e-3, 0.1, 50.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)]
)  # fmt: skip
def test_equals_the_formulas(name: str, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    weights, gradients, rates = case(seed=int(scale * 1000), scale=scale)
    expected = numpy_lamb(weights, gradients, rates)
    assert_near(run(name, weights, gradients, rates, dtype), expected, tolerance)


@each_provider
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)]
)  # fmt: skip
def test_any_shape(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_torch, "CPU_CHUNK", 4096)
    for seed in range(3):
        names = list(BORDERS)
        np.random.RandomState(seed).shuffle(names)
        shapes = {key: BORDERS[key] for key in names}
        weights, gradients, rates = case(seed, scale=10.0**-seed, steps=5, shapes=shapes)
        decayed = {key for key in shapes if key.startswith("dense") and key.endswith("weight")}
        expected = numpy_lamb(weights, gradients, rates, decayed)
        assert_near(run(name, weights, gradients, rates, dtype), expected, tolerance)


@each_provider
def test_without_and_only_with_weight_decay(name: str) -> None:
    for shapes in ({"a.bias": (5,), "b.bias": (2,)}, {"a.weight": (5,), "b.weight": (2, 2)}):
        weights, gradients, rates = case(seed=1, scale=0.1, shapes=shapes)
        decayed = {key for key in shapes if key.endswith("weight")}
        expected = numpy_lamb(weights, gradients, rates, decayed)
        assert_near(run(name, weights, gradients, rates, torch.float64), expected, 1e-12)


@each_provider
@pytest.mark.parametrize("what", ["gradients", "weights", "both"])
def test_zeros(name: str, what: str) -> None:
    weights, gradients, rates = case(seed=5, scale=0.1)
    if what in ("weights", "both"):
        weights = {key: value * 0 for key, value in weights.items()}
    if what in ("gradients", "both"):
        gradients = [{key: value * 0 for key, value in step.items()} for step in gradients]
    expected = numpy_lamb(weights, gradients, rates)
    assert_near(run(name, weights, gradients, rates, torch.float64), expected, 1e-12)


@each_provider
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(
    name: str, dtype: torch.dtype, bad: float
) -> None:
    weights, gradients, rates = case(seed=7, scale=0.1, steps=4)
    parameters, undisturbed = parameters_of(weights, dtype), parameters_of(weights, dtype)
    optimizer, other = make(name, parameters), make(name, undisturbed)
    for gradient, rate in zip(gradients, rates, strict=True):
        for where in NAMES:
            give(parameters, gradient)
            parameters[where].grad.view(-1)[-1] = bad
            before = snapshot(optimizer)
            finite = optimizer.step(rate)
            assert finite.dtype == torch.bool
            assert finite.shape == ()
            assert not finite
            assert not torch.isfinite(optimizer.gradient_norm)
            assert_same_bits(before, snapshot(optimizer))
        give(parameters, gradient)
        give(undisturbed, gradient)
        assert optimizer.step(rate)
        assert other.step(rate)
        assert_same_bits(snapshot(other), snapshot(optimizer))
    assert optimizer.updates == len(rates)


@each_provider
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_step_that_may_not_look_at_the_norm(name: str, dtype: torch.dtype) -> None:
    """As on a GPU: update first, and undo the update if the norm was not finite."""
    weights, gradients, rates = case(seed=11, scale=0.1, steps=4)
    parameters, looking = parameters_of(weights, dtype), parameters_of(weights, dtype)
    optimizer, other = make(name, parameters), make(name, looking)
    optimizer.may_read = False
    for gradient, rate in zip(gradients, rates, strict=True):
        give(parameters, gradient)
        parameters["cls.predictions.bias"].grad[0] = torch.nan
        before = snapshot(optimizer)
        assert not optimizer.step(torch.tensor(rate, dtype=torch.float64))
        assert_same_bits(before, snapshot(optimizer))
        give(parameters, gradient)
        give(looking, gradient)
        assert optimizer.step(rate)
        other.step(rate)
        assert_same_bits(snapshot(other), snapshot(optimizer))


@each_provider
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
    moved = run(name, weights, gradients, rates, dtype)
    for key, value in moved.items():
        assert value.dtype == dtype
        # A float32 sum may round to the adjacent number if the float64 sum is near a tie.
        exact = torch.tensor(expected[key]).float().to(dtype)
        assert (value != exact).float().mean() < 0.02 or value.numel() < 50, key
        torch.testing.assert_close(value, exact, rtol=2**-7, atol=0)
    before = weights["bert.embeddings.word_embeddings.weight"]
    after = moved["bert.embeddings.word_embeddings.weight"]
    assert not np.array_equal(after.double().numpy(), before)


@each_provider
def test_masters_are_the_weights_before_rounding(name: str) -> None:
    exact = torch.randn(5, 3)
    parameter = nn.Parameter(exact.bfloat16())
    optimizer = make(name, {"a.weight": parameter}, masters={"a.weight": exact.clone()})
    assert torch.equal(optimizer.masters[0], exact)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.0)
    assert torch.equal(parameter, exact.bfloat16())


@each_provider
@pytest.mark.parametrize("as_tensor", [False, True])
def test_inverse_scale_undoes_the_loss_scale(name: str, as_tensor: bool) -> None:
    weights, gradients, rates = case(seed=3, scale=0.1)
    expected = numpy_lamb(weights, gradients, rates)
    parameters = parameters_of(weights, torch.float64)
    optimizer = make(name, parameters)
    for gradient, rate in zip(gradients, rates, strict=True):
        give(parameters, gradient, 1024.0)
        if as_tensor:
            rate = torch.tensor(rate, dtype=torch.float64)
        optimizer.step(rate, torch.tensor(1 / 1024) if as_tensor else 1 / 1024)
        norm = np.sqrt(sum((value**2).sum() for value in gradient.values()))
        assert optimizer.gradient_norm.item() == pytest.approx(norm, rel=1e-12)
    assert_near(parameters, expected, 1e-12)


@each_provider
def test_no_gradient_counts_as_zeros(name: str) -> None:
    weights, gradients, rates = case(seed=4, scale=0.1)
    missing = list(NAMES)[:5:2]
    for step in gradients[4:]:
        for key in missing:
            step[key] *= 0
    parameters = parameters_of(weights, torch.float64)
    optimizer = make(name, parameters)
    for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
        optimizer.zero_grad(set_to_none=number % 2 == 0)
        assert all(p.grad is None or not p.grad.any() for p in parameters.values())
        give(parameters, gradient)
        if number >= 4:
            for key in missing:
                parameters[key].grad = None
        assert optimizer.step(rate)
    assert_near(parameters, numpy_lamb(weights, gradients, rates), 1e-12)


@pytest.mark.parametrize("source", ON_CPU)
@pytest.mark.parametrize("target", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_goes_from_any_provider_to_any(source: str, target: str, dtype: torch.dtype) -> None:
    weights, gradients, rates = case(seed=6, scale=0.1)
    parameters = parameters_of(weights, dtype)
    optimizer = make(source, parameters)
    for gradient, rate in zip(gradients[:6], rates[:6], strict=True):
        give(parameters, gradient)
        optimizer.step(rate)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["updates"] == 6
    assert {key: tuple(value.shape) for key, value in state["master"].items()} == NAMES

    others = parameters_of({key: value * 0 for key, value in weights.items()}, dtype)
    other = make(target, others)
    other.load_state_dict(state)
    assert_same_bits(snapshot(optimizer), snapshot(other))
    for gradient, rate in zip(gradients[6:], rates[6:], strict=True):
        for optimizer_, parameters_ in ((optimizer, parameters), (other, others)):
            give(parameters_, gradient)
            optimizer_.step(rate)
    if source == target:
        assert_same_bits(snapshot(optimizer), snapshot(other))
    if dtype == torch.float64:
        assert_near(others, numpy_lamb(weights, gradients, rates), 1e-12)


@each_provider
def test_a_state_of_another_model_is_refused(name: str) -> None:
    parameters = {"a.weight": nn.Parameter(torch.ones(3)), "a.bias": nn.Parameter(torch.ones(2))}
    optimizer = make(name, parameters)
    before = snapshot(optimizer)
    for change, message in (
        ({"a.weight": torch.zeros(3)}, "'a.bias' is missing in first_moment"),
        (
            {"a.weight": torch.zeros(3), "a.bias": torch.zeros(2), "c": torch.zeros(1)},
            "'c' is unknown here in first_moment",
        ),
        (
            {"a.weight": torch.zeros(4), "a.bias": torch.zeros(2)},
            r"first_moment of 'a.weight' is \(4,\), not \(3,\)",
        ),
    ):
        state = {**optimizer.state_dict(), "updates": 5, "first_moment": change}
        with pytest.raises(UserError, match=message):
            optimizer.load_state_dict(state)
        assert_same_bits(before, snapshot(optimizer))
    state = optimizer.state_dict()
    del state["updates"]
    with pytest.raises(UserError, match="lacks its number of updates"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_long_tensors_lose_nothing(dtype: torch.dtype) -> None:
    """A CPU's own float32 norm of 2^25 numbers is too small by a thousandth or more."""
    long = torch.randn(2**25, generator=torch.Generator().manual_seed(0)).view(-1, 1024).to(dtype)
    exact = sum(row.double().square().sum() for row in long.split(1024)).sqrt().item()
    assert norm_of(long).item() == pytest.approx(exact, rel=1e-6)
    assert abs(long.flatten().norm().item() / exact - 1) > 1e-4 or dtype != torch.float32
    for shape in ((), (1,), (7,), (2, 3, 5), (0, 4)):
        values = torch.randn(shape).to(dtype)
        assert norm_of(values).item() == pytest.approx(values.double().norm().item(), rel=1e-6)


def test_scaling_down_to_a_norm() -> None:
    def scaled(values: list[float], limit: float) -> list[float]:
        gradients = [torch.tensor(values[:1]), torch.tensor(values[1:])]
        scale_down(gradients, torch.tensor(limit))
        return torch.cat(gradients).tolist()

    assert scaled([3.0, 0.0, 4.0], 10.0) == [3.0, 0.0, 4.0]
    assert scaled([3.0, 0.0, 4.0], 1.0) == pytest.approx([0.6, 0.0, 0.8])
    assert scaled([0.0, 0.0], 1.0) == [0.0, 0.0]
    # Not zeros: the update of all ranks must be skipped.
    assert np.isnan(scaled([np.inf, 1.0], 1.0)).all()
    assert np.isnan(scaled([1.0, 1e20, 1e20], 1.0)).all()


@each_provider
def test_without_weight_decay_a_gradient_of_zeros_moves_nothing(name: str) -> None:
    """The norm of the update is then 0, and the trust ratio 1."""
    settings = OptimizerSettings(weight_decay=0.0)
    parameters = parameters_of(case(1, 1.0)[0], torch.float64)
    before = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = create_optimizer(name, parameters.items(), settings)
    for _ in range(3):
        optimizer.zero_grad()
        assert optimizer.step(0.1)
    for key, value in parameters.items():
        assert torch.equal(value, before[key])


def test_the_settings_offer_every_optimizer() -> None:
    (setting,) = (one for one in dataclasses.fields(Config) if one.name == "optimizer")
    assert setting.metadata["choices"] == ("auto", *OPTIMIZERS)


def test_which_parameters_decay() -> None:
    assert {name for name in NAMES if has_weight_decay(name)} == DECAYED


def test_the_choice_and_its_reason() -> None:
    cpu = torch.device("cpu")
    assert choose("auto", cpu).describe() == "flat (the fastest on a CPU)"
    assert choose("foreach", cpu).describe() == "foreach (as asked)"
    optimizer = create_optimizer("auto", [("a.weight", nn.Parameter(torch.ones(3)))], SETTINGS)
    assert optimizer.choice == "flat (the fastest on a CPU)"
    with pytest.raises(UserError, match=f"one of auto, {', '.join(OPTIMIZERS)}"):
        choose("adam", cpu)
    with pytest.raises(
        UserError, match=r"foreach cannot shard its state .* pass --optimizer auto, flat or"
    ):
        choose("foreach", cpu, sharded=True)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "bert_pretraining.optim.flat_triton"
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(optim, "flat_triton", raising=False)
    gpu = torch.device("cuda")
    try:
        choice, reason = choose("auto", gpu)
        assert choice == "flat"
        assert reason == "triton is not available: the package 'triton' is not installed"
        with pytest.raises(UserError, match=r"'triton' is not installed; .*-m pip install triton"):
            choose("triton", gpu)
    finally:
        # The module that found no Triton must not be found by later tests.
        sys.modules.pop(name, None)
        vars(optim).pop("flat_triton", None)


def test_settings_reach_every_provider() -> None:
    settings = OptimizerSettings(0.8, 0.95, 1e-3, 0.1, max_gradient_norm=0.25)
    weights, gradients, rates = case(seed=8, scale=0.3)
    results = {}
    for name in ON_CPU:
        parameters = parameters_of(weights, torch.float64)
        optimizer = create_optimizer(name, parameters.items(), settings)
        for gradient, rate in zip(gradients, rates, strict=True):
            give(parameters, gradient)
            optimizer.step(rate)
        results[name] = {key: value.detach().numpy() for key, value in parameters.items()}
        assert_near(parameters, results["reference"], 1e-12)
    wrong = numpy_lamb(weights, gradients, rates)
    assert not np.allclose(wrong["cls.predictions.bias"], results["flat"]["cls.predictions.bias"])
