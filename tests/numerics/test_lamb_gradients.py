"""The flat gradient: autograd adds to it, and so does code that computes gradients by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.optim import OPTIMIZERS, Optimizer
from bert_pretraining.training.micro_step import forward_backward
from bert_pretraining.training.step_proof import difference, sample_batch
from helpers import make_model, tiny_config
from lamb_cases import assert_near, assert_same_bits, case, give, make, numpy_lamb, parameters_of

SHAPES = {"word.weight": (37, 29), "word.bias": (37,), "one.bias": (1,), "query.weight": (64, 48)}
DECAYED = {"word.weight", "query.weight"}
# The parameters' dtype and that of their flat gradient.
KINDS = [
    (torch.float64, None),
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


def gradients_of(micro_batch: int, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    (gradients,) = case(100 + micro_batch, scale, 1, SHAPES)[1]
    return {name: torch.tensor(value).to(dtype) for name, value in gradients.items()}


def by_autograd(parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
    sum((parameters[name] * value).sum() for name, value in gradients.items()).backward()


def by_hand(
    optimizer: Optimizer, parameters: dict[str, Tensor], gradients: dict[str, Tensor]
) -> None:
    for name, value in gradients.items():
        target = optimizer.sink.target(parameters[name])
        assert target.shape == value.shape
        target.add_(value)
    optimizer.sink.arrived([parameters[name] for name in gradients])


def split(gradients: dict[str, Tensor], micro_batch: int) -> tuple[dict, dict]:
    """Gradients that take one way and those that take the other: each takes both in turn."""
    names = sorted(gradients)
    ours = {name for place, name in enumerate(names) if (place + micro_batch) % 2}
    return (
        {name: value for name, value in gradients.items() if name in ours},
        {name: value for name, value in gradients.items() if name not in ours},
    )


@pytest.mark.parametrize(("dtype", "gradient_dtype"), KINDS)
@pytest.mark.parametrize("zeroed", [True, False])
def test_both_ways_lead_to_the_same_sums(
    dtype: torch.dtype, gradient_dtype: torch.dtype | None, zeroed: bool
) -> None:
    weights, _, rates = case(seed=3, scale=1.0, steps=3, shapes=SHAPES)
    results = []
    for way in ("autograd", "by hand", "both"):
        parameters = parameters_of(weights, dtype)
        optimizer = make("flat", parameters, gradient_dtype=gradient_dtype)
        for step, rate in enumerate(rates):
            if zeroed or step:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            for micro_batch in range(3 * step, 3 * step + 3):
                gradients = gradients_of(micro_batch, dtype)
                ours, theirs = split(gradients, micro_batch)
                if way != "both":
                    ours = gradients if way == "by hand" else {}
                    theirs = gradients if way == "autograd" else {}
                if theirs:
                    by_autograd(parameters, theirs)
                if ours:
                    by_hand(optimizer, parameters, ours)
            sums = [value.clone() for value in optimizer.gradients_by_name().values()]
            assert optimizer.step(rate)
            results.append((way, step, [*sums, *(one.detach() for one in optimizer.masters)]))
    for way, step, values in results:
        expected = next(found for _, other, found in results if other == step)
        for name, one, other in zip(list(SHAPES) * 2, expected, values, strict=True):
            assert torch.equal(one, other), (way, step, name)


@pytest.mark.parametrize("gradient_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_float32_keep_what_16_bits_lose(
    dtype: torch.dtype, gradient_dtype: torch.dtype | None
) -> None:
    parameters = parameters_of(case(1, 1.0, 1, SHAPES)[0], dtype)
    optimizer = make("flat", parameters, gradient_dtype=gradient_dtype)
    optimizer.zero_grad()
    exact = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for micro_batch in range(64):
        gradients = gradients_of(micro_batch, dtype)
        by_autograd(parameters, gradients)
        for name, value in gradients.items():
            exact[name] += value.double()
    assert all(
        (parameter.grad is None) == (gradient_dtype is not None)
        for parameter in parameters.values()
    )
    for name, found in optimizer.gradients_by_name().items():
        assert found.dtype == (gradient_dtype or dtype)
        error = (found.double() - exact[name]).abs().max()
        # 64 roundings of sums of some tens; a 16-bit sum has errors far above float32's.
        if gradient_dtype is not None:
            assert error < 64 * 64 * 2.0**-24
        elif name != "one.bias":
            assert error > 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_from_float32_sums_are_the_formulas(dtype: torch.dtype) -> None:
    weights, _, rates = case(seed=5, scale=1.0, steps=4, shapes=SHAPES)
    weights = {name: torch.tensor(w).to(dtype).double().numpy() for name, w in weights.items()}
    parameters = parameters_of(weights, dtype)
    optimizer = make("flat", parameters, gradient_dtype=torch.float32)
    sums = []
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        total = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
        for micro_batch in range(4 * step, 4 * step + 4):
            gradients = gradients_of(micro_batch, dtype)
            by_autograd(parameters, gradients)
            total = {name: value + gradients[name].double() for name, value in total.items()}
        sums.append({name: value.numpy() for name, value in total.items()})
        assert optimizer.step(rate)
    masters = dict(zip(optimizer.names, optimizer.masters, strict=True))
    assert_near(masters, numpy_lamb(weights, sums, rates, DECAYED), 4e-6)


def test_gradients_set_by_hand_count_too() -> None:
    """Without a backward pass, as tools and tests do it."""
    weights, gradients, rates = case(seed=6, scale=1.0, steps=2, shapes=SHAPES)
    results = []
    for gradient_dtype in (None, torch.float32):
        parameters = parameters_of(weights, torch.bfloat16)
        optimizer = make("flat", parameters, gradient_dtype=gradient_dtype)
        for gradient, rate in zip(gradients, rates, strict=True):
            optimizer.zero_grad()
            give(parameters, gradient)
            parameters["word.bias"].grad = None
            assert optimizer.step(rate)
        results.append([one.clone() for one in optimizer.masters])
    assert_same_bits(*results)


@pytest.mark.parametrize("hidden", [32, 64, 96])
@pytest.mark.parametrize("gradient_dtype", [None, torch.float32])
def test_weights_given_one_after_the_other_lie_side_by_side(
    hidden: int, gradient_dtype: torch.dtype | None
) -> None:
    """So that query, key and value are one matrix, where the size of each is whole blocks."""
    shapes = {
        "output.weight": (5, 7),
        **{f"{name}.weight": (hidden, hidden) for name in ("value", "key", "query")},
        "first.weight": (3,),
    }
    weights = case(2, 1.0, 1, shapes)[0]
    parameters = parameters_of(weights, torch.bfloat16)
    optimizer = make("flat", parameters, gradient_dtype=gradient_dtype)
    optimizer.zero_grad()
    for tensors in (parameters, optimizer.gradients_by_name()):
        query, key, value = (tensors[f"{name}.weight"] for name in ("query", "key", "value"))
        size = query.numel() * query.element_size()
        assert key.data_ptr() == query.data_ptr() + size
        assert value.data_ptr() == key.data_ptr() + size
        joined = query.detach().as_strided((3 * hidden, hidden), (hidden, 1))
        assert torch.equal(joined, torch.cat([one.detach() for one in (query, key, value)]))
    assert list(optimizer.state_dict()["master"]) == list(shapes)


def test_only_flat_optimizers_have_a_sink_and_another_dtype() -> None:
    parameters = parameters_of(case(1, 1.0, 1, SHAPES)[0], torch.bfloat16)
    for name in ("reference", "foreach", "adamw"):
        assert not OPTIMIZERS[name].flat
        assert make(name, parameters).sink is None
        with pytest.raises(UserError, match=f"{name} sums gradients in .* pass --gradient_dtype"):
            make(name, parameters, gradient_dtype=torch.float32)
        assert make(name, parameters, gradient_dtype=torch.bfloat16).sink is None


@pytest.mark.parametrize("name", ["reference", "flat"])
def test_the_sums_so_far_by_name(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    optimizer = make(name, dict(model.named_parameters()))
    optimizer.zero_grad()
    for _ in range(2):
        model[0](torch.ones(1, 3)).sum().backward()
    found = optimizer.gradients_by_name()
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert torch.equal(found["0.weight"], torch.full((2, 3), 2.0))
    assert not found["1.weight"].any()


@pytest.mark.parametrize("gradient_dtype", [None, torch.float32])
def test_the_proof_of_a_step_looks_at_the_flat_gradient(
    gradient_dtype: torch.dtype | None,
) -> None:
    model = make_model(tiny_config(), dtype=torch.bfloat16).eval()  # without dropout
    optimizer = make("flat", dict(model.named_parameters()), gradient_dtype=gradient_dtype)
    batch = sample_batch(3, 32, 11, torch.device("cpu"))
    weights = {name: torch.tensor(0.1) for name in ("mlm", "nsp")}

    def right() -> dict:
        return forward_backward(model, batch, weights)

    def wrong() -> dict:
        sums = right()
        optimizer.sink.target(model.cls.predictions.bias).mul_(100.0)
        return sums

    arguments = (optimizer.zero_grad, optimizer.sink.target)
    assert difference(model, right, right, *arguments) is None
    assert "the gradient of cls.predictions.bias differs" in difference(
        model, right, wrong, *arguments
    )
