"""Operators that cast their result against the operator and a cast after it: the same bits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import reference_pairs

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import (
    DEVICE,
    EPSILON,
    assert_near,
    fix_casts,
    fixed_seed,
    interpreted_engine,
    norm_inputs,
    random,
)

# isort: split
from bert_pretraining.kernels import fp8, triton_fp8
from bert_pretraining.kernels.fp8_casts import Cast, Quantised, padded_cast
from bert_pretraining.kernels.triton_pairs import PAIRS
from bert_pretraining.kernels.triton_sums import add_partial_sums
from bert_pretraining.model.layer_form import FusedForm
from bert_pretraining.model.parameter_memory import OwnGradients
from bert_pretraining.training.micro_step import forward_backward
from helpers import make_model, packed, padded_arrays, tiny_config

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
GELU, NORM = PAIRS.bias_gelu, PAIRS.bias_dropout_residual_layer_norm
SIZES = [(0, 16), (1, 16), (16, 48), (37, 100), (150, 130)]
# With 1,100 columns a block has one row. Triton 3.0's interpreter does not know masks of one
# element and would write behind the last row; so there the rows fill all programs.
NORM_SIZES = [(0, 16), (1, 16), (37, 12), (70, 260), (33, 600), (32, 1100)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _fix_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_casts(monkeypatch)


@pytest.fixture
def seed() -> int:
    """Fresh random input in every run of the tests."""
    return int.from_bytes(os.urandom(3), "little")


def some_cast(dtype: torch.dtype, records: bool = True) -> Cast:
    scale = torch.tensor(60.0, device=DEVICE)  # so that some numbers saturate
    return Cast(scale, dtype, torch.zeros((), device=DEVICE) if records else None)


def assert_cast_of(found: Quantised, how: Cast, x: Tensor) -> None:
    """found and how.amax are what a cast of x would give, by PyTorch and by the kernel."""
    for cast in (padded_cast, triton_fp8.cast):
        amax = torch.zeros((), device=DEVICE)
        expected = cast(x, how.scale, how.dtype, amax)
        for ours, right in zip(found, expected, strict=True):
            assert ours.is_contiguous()
            numbers, wanted = ours.float(), right.float()
            assert torch.equal(numbers.isnan(), wanted.isnan())
            assert torch.equal(numbers.nan_to_num(), wanted.nan_to_num())
        if how.amax is not None:
            assert torch.equal(how.amax.nan_to_num(-1.0), amax.nan_to_num(-1.0))


def some_sums(count: int, columns: int) -> list[Tensor]:
    return [random(columns, seed=50 + number) for number in range(count)]


def assert_same_sums(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other.double(), 1e-5)


@pytest.mark.parametrize("bad", [None, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_gelu(rows: int, columns: int, dtype: torch.dtype, bad: float | None, seed: int) -> None:
    x, bias = random(rows, columns, seed=seed).to(dtype), random(columns, seed=1).to(dtype)
    if bad is not None and rows:
        x[-1, -1] = bad
    how = some_cast(E4M3)
    assert_cast_of(GELU.casting.forward(x, bias, how), how, GELU.forward(x, bias))
    gradient = random(rows, columns, seed=seed + 1).to(dtype)
    (found_sum,), (expected_sum,) = some_sums(1, columns), some_sums(1, columns)
    how = some_cast(E5M2)
    given = gradient, x, bias
    found = GELU.casting.backward(*given, found_sum, add_partial_sums, how)
    assert_cast_of(found, how, GELU.backward(*given, expected_sum, add_partial_sums))
    if bad is None:
        assert_same_sums([found_sum], [expected_sum])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), NORM_SIZES)
def test_layer_norm(rows: int, columns: int, dtype: torch.dtype, dropout: float, seed: int) -> None:
    inputs = norm_inputs(rows, columns, dtype)
    inputs[0] = random(rows, columns, seed=seed).to(dtype)
    given = (*inputs, EPSILON, dropout, fixed_seed() if dropout else None)
    how = some_cast(E4M3)
    output, saved, cast = NORM.casting.forward(*given, how)
    expected, expected_saved = NORM.forward(*given)
    assert torch.equal(output, expected)
    assert all(map(torch.equal, saved, expected_saved))
    assert_cast_of(cast, how, expected)
    gradient = random(rows, columns, seed=seed + 1).to(dtype)
    back = gradient, inputs[3], dropout, given[-1], saved
    found_sums, expected_sums = some_sums(3, columns), some_sums(3, columns)
    how = some_cast(E5M2)
    cast, residual = NORM.casting.backward(*back, *found_sums, add_partial_sums, how)
    x_gradient, expected = NORM.backward(*back, *expected_sums, add_partial_sums)
    assert torch.equal(residual, expected)
    assert_cast_of(cast, how, x_gradient)
    assert_same_sums(found_sums, expected_sums)


def test_numbers_that_are_not_finite_reach_the_copies_of_a_layer_norm() -> None:
    inputs = norm_inputs(37, 40)
    inputs[0][35, 3] = torch.inf
    how = some_cast(E4M3)
    output, _, cast = NORM.casting.forward(*inputs, EPSILON, 0.0, None, how)
    assert output[35].isnan().all()
    assert_cast_of(cast, how, output)


def test_an_evaluation_records_nothing() -> None:
    x, bias = random(20, 32), random(32, seed=1)
    how = some_cast(E4M3, records=False)
    assert_cast_of(GELU.casting.forward(x, bias, how), how, GELU.forward(x, bias))
    given = (*norm_inputs(20, 32), EPSILON, 0.0, None)
    output, _, cast = NORM.casting.forward(*given, how)
    assert_cast_of(cast, how, output)


def test_a_maximum_is_raised_and_never_lowered() -> None:
    x, bias = random(100, 32), random(32, seed=1)
    largest = GELU.forward(x, bias).abs().max()
    for before, after in ((0.5, largest), (1000.0, torch.tensor(1000.0, device=DEVICE))):
        amax = torch.tensor(before, device=DEVICE)
        GELU.casting.forward(x, bias, Cast(torch.tensor(1.0, device=DEVICE), E4M3, amax))
        assert amax == after


@pytest.mark.parametrize("recompute", [False, True])
def test_layers_whose_operators_cast_are_layers_with_casts_apart(
    monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """The same bits of losses, scales and maxima; fewer casts of their own."""
    layers = 2
    model = make_model(tiny_config(num_hidden_layers=layers))
    pairs = dataclasses.replace(PAIRS, attention=reference_pairs.PAIRS.attention)
    model.bert.encoder.checkpoint_activations = recompute
    batches = [packed(padded_arrays([9, 3], 16, 101, seed=seed)) for seed in (1, 2)]
    weights = {name: torch.tensor(0.1) for name in model.losses}
    results, casts = [], []
    for fuses in (False, True):
        number = 0

        def counted(*arguments: object) -> Quantised:
            nonlocal number
            number += 1
            return triton_fp8.cast(*arguments)

        engine = interpreted_engine()._replace(fuses=fuses, cast=counted)
        monkeypatch.setattr(fp8, "engine_for", lambda device, engine=engine: engine)
        state = fp8.Fp8State.of(model.bert.encoder, DEVICE)
        found = []
        model.zero_grad()
        with model.layers_as(FusedForm(model.bert.encoder.layer, pairs, OwnGradients())):
            for _ in range(2):  # measured, then delayed
                found += [forward_backward(model, batch, weights) for batch in batches]
                found.append(state.table.clone())
                state.update()
            number = 0
            forward_backward(model, batches[0], weights)
            casts.append(number)
            state.update()
            with torch.no_grad():
                found.append(model(batches[0]))
        gradients = {name: one.grad for name, one in model.named_parameters()}
        results.append((found, {name: one.clone() for name, one in gradients.items()}))
    (apart, apart_gradients), (fused, fused_gradients) = results
    torch.testing.assert_close(fused, apart, rtol=0.0, atol=0.0)
    torch.testing.assert_close(fused_gradients, apart_gradients, rtol=1e-5, atol=1e-7)
    # Apart: of each layer 4 inputs and 4 gradients. Fused: of each layer the context and the
    # gradient of qkv, and of the first one the embeddings. A layer that is computed again, and
    # stands for itself then, casts its input too.
    expected = [8 * layers, 2 * layers + 1]
    assert casts == ([12 * layers, 5 * layers] if recompute else expected)
