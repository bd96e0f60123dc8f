"""fp8 in PyTorch: casts and their bounds, delayed scaling, a linear layer, state."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from bert_pretraining.errors import UserError
from bert_pretraining.kernels import fp8, fp8_casts, fp8_engine, fp8_linear
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.kernels.fp8_casts import FORMATS, GRADIENT, INPUT, LARGEST, WEIGHT
from bert_pretraining.kernels.fp8_weights import EachWeight

CPU = torch.device("cpu")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def seed() -> int:
    """Fresh random input in every run of the tests."""
    return int.from_bytes(os.urandom(3), "little")


def one_layer() -> tuple[Fp8State, fp8.Scaling]:
    state = Fp8State(["layer"], CPU)
    return state, state["layer"]


def exact_of(x: Tensor, scaling: fp8.Scaling, which: int) -> Tensor:
    """The numbers, in float64, that the fp8 copy of x stands for."""
    rows, _ = fp8_casts.quantise(x, scaling.scales[which], FORMATS[which])
    return rows.double() * scaling.inverses[which].double()


# Casts


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cast_is_within_half_the_distance_of_neighbours(
    dtype: torch.dtype, source: torch.dtype, seed: int
) -> None:
    """Over 30 powers of two, down to where the format flushes to zero."""
    x = random(4000, seed=seed) * torch.logspace(-18, 0, 4000, base=2.0)
    x = x.to(source)
    largest = torch.finfo(dtype).max
    scale = largest / x.abs().max().float()
    found, amax = fp8_casts.quantise(x, scale, dtype)
    assert found.dtype == dtype
    assert amax == x.abs().max()
    back = found.double() / scale.double()
    bound = fp8_casts.cast_bound(x.double(), scale, dtype)
    assert ((back - x.double()).abs() <= bound).all(), f"seed {seed}"
    # The bound is reached: no cast is much better than the format.
    assert ((back - x.double()).abs() / bound).max() > 0.9


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_bound_holds_halfway_between_two_numbers(dtype: torch.dtype) -> None:
    """There the error is as large as it can be, and the rounding of the scale comes to it."""
    largest = torch.finfo(dtype).max
    numbers = torch.linspace(1.0, 2.0, 257).bfloat16()
    for maximum in torch.linspace(2.0, 4.0, 257).bfloat16().float():
        scale = fp8_casts.scale_for(maximum, largest, torch.ones(()))
        cast = fp8_casts.quantise(numbers, scale, dtype)[0].double() * (1.0 / scale).double()
        away = (cast - numbers.double()).abs()
        assert (away <= fp8_casts.cast_bound(numbers.double(), scale, dtype)).all(), maximum


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_cast_rounds_to_the_nearest_number_of_the_format(dtype: torch.dtype) -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    numbers = numbers[numbers.isfinite()].unique()
    x = random(500, seed=3) * 50.0
    found, _ = fp8_casts.quantise(x, torch.tensor(1.0), dtype)
    away = (x.double()[:, None] - numbers[None, :]).abs()
    assert torch.equal((found.double() - x.double()).abs(), away.min(1).values)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_too_large_numbers_saturate_and_those_not_finite_become_nan(dtype: torch.dtype) -> None:
    """PyTorch's own casts differ between versions: NaN, infinity or the largest number."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([1e30, -3e38, largest, torch.inf, -torch.inf, torch.nan])
    found, amax = fp8_casts.quantise(x, torch.tensor(1e5), dtype)
    assert found.float()[:3].tolist() == [largest, -largest, largest]
    assert found.float()[3:].isnan().all()
    assert not amax.isfinite()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 5)])
def test_zeros_and_empty_tensors(shape: tuple[int, int]) -> None:
    found, amax = fp8_casts.quantise(torch.zeros(shape), torch.tensor(1.0), E4M3)
    assert found.shape == shape
    assert amax == 0.0
    assert not found.float().any()


@pytest.mark.parametrize("rows", [1, 15, 16, 37])
def test_columns_are_the_padded_transpose(rows: int) -> None:
    x = random(rows, 6)
    amax = torch.zeros(())
    for dtype in (E4M3, E5M2):
        found = fp8_casts.padded_cast(x, torch.tensor(10.0), dtype, amax)
        assert found.columns.shape == (6, -(-rows // 16) * 16)
        assert found.columns.is_contiguous()
        assert torch.equal(found.columns.float()[:, :rows], found.rows.float().t())
        assert not found.columns.float()[:, rows:].any()
    assert amax == x.abs().max()


# Scales


def test_a_scale_follows_the_largest_number_of_the_update_before() -> None:
    state, scaling = one_layer()
    small, large = random(8, 16), 10.0 * random(8, 16, seed=1)
    for which in (INPUT, WEIGHT, GRADIENT):
        scaling.cast(small, which, record=True)
        scaling.cast(large, which, record=True)  # a second micro-batch
        scaling.cast(100.0 * small, which, record=False)  # an evaluation
    state.update()
    for which, largest in enumerate(LARGEST):
        assert scaling.scales[which] == pytest.approx(largest / large.abs().max().item(), rel=1e-6)
        assert scaling.scales[which] * scaling.inverses[which] == pytest.approx(1.0, rel=1e-6)
    before = scaling.scales[INPUT].item()
    found = scaling.cast(2.0 * large, INPUT, record=True)
    assert scaling.scales[INPUT].item() == before  # it is delayed
    assert found.rows.float().abs().max() == LARGEST[INPUT]
    state.update()
    assert scaling.scales[INPUT].item() == pytest.approx(before / 2.0, rel=1e-6)


@pytest.mark.parametrize("last", [0.0, torch.inf, torch.nan])
def test_a_maximum_that_says_nothing_keeps_the_scale(last: float) -> None:
    state, scaling = one_layer()
    scaling.cast(random(4, 4), INPUT, record=True)
    state.update()
    before = state.table[0].clone()
    scaling.cast(torch.full((4, 4), last), INPUT, record=True)
    state.update()
    assert torch.equal(state.table[0], before)
    assert not state.table[2].any()


def test_scales_of_tiny_numbers_stay_finite() -> None:
    state, scaling = one_layer()
    scaling.cast(torch.full((2, 2), 1e-42), GRADIENT, record=True)
    state.update()
    assert state.table.isfinite().all()
    assert (state.table[1] > torch.finfo(torch.float32).tiny).all()


def test_the_first_update_measures_before_it_casts() -> None:
    """Gradients of 1e-6 would vanish at scale 1."""
    _, scaling = one_layer()
    gradient = 1e-6 * random(8, 16)
    found = scaling.cast(gradient, GRADIENT, record=True).rows.float()
    assert found.abs().max() == LARGEST[GRADIENT]
    assert (found == 0.0).float().mean() < 0.01


def test_warm_up_and_capture_leave_no_trace() -> None:
    state, scaling = one_layer()
    with state.as_calibrated():
        scaling.cast(1000.0 * random(8, 16), INPUT, record=True)
        assert scaling.scales[INPUT] == 1.0
    assert not state.calibrated
    assert not state.table[2].any()


# A linear layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(37, 24, 40), (1, 16, 16), (64, 128, 32)])
def test_products_of_fp8_numbers_are_exact(
    dtype: torch.dtype, shape: tuple[int, int, int], seed: int
) -> None:
    """Against float64 products of the same fp8 numbers: what is left is float32 and one rounding.

    eps / 2 of the dtype for the result, and the error of a float32 sum of n terms, n * 2^-24 of
    the sum of absolute terms.
    """
    rows, inputs, outputs = shape
    x = random(rows, inputs, seed=seed, dtype=dtype)
    weight = random(outputs, inputs, seed=seed + 1, dtype=dtype)
    bias = random(outputs, seed=seed + 2, dtype=dtype)
    gradient = random(rows, outputs, seed=seed + 3, dtype=dtype)
    _, scaling = one_layer()
    y, saved = fp8_linear.linear_forward(x, weight, bias, scaling)
    into_weight = torch.full((outputs, inputs), 0.5, dtype=torch.float32)
    into_x = fp8_linear.linear_backward(gradient, saved, scaling, into_weight)
    assert (y.dtype, into_x.dtype) == (dtype, dtype)
    a, w, g = (
        exact_of(tensor, scaling, which)
        for which, tensor in ((INPUT, x), (WEIGHT, weight), (GRADIENT, gradient))
    )
    for found, left, right, added in (
        (y, a, w.t(), bias.double()),
        (into_x, g, w, torch.zeros(())),
        (into_weight, g.t(), a, torch.full((), 0.5)),
    ):
        exact = left @ right + added
        terms = left.shape[1] + 2
        bound = terms * 2.0**-24 * (left.abs() @ right.abs() + added.abs())
        bound = bound + 0.51 * torch.finfo(found.dtype).eps * exact.abs()
        assert ((found.double() - exact).abs() <= bound).all(), f"seed {seed}"


def test_the_error_of_a_product_is_that_of_the_format() -> None:
    """Rounding errors are independent, evenly spread within half a distance of neighbours.

    Each factor's relative error has then a root mean square of about 2^-4 / sqrt(3) * 0.72 (e4m3;
    0.72: a mantissa is in [1, 2)), 2.6 %, twice that in e5m2. A sum of products keeps it.
    """
    x, weight, gradient = random(256, 128), random(64, 128, seed=1), random(256, 64, seed=2)
    _, scaling = one_layer()
    y, saved = fp8_linear.linear_forward(x, weight, None, scaling)
    into_weight = torch.zeros(64, 128)
    into_x = fp8_linear.linear_backward(gradient, saved, scaling, into_weight)

    def relative(found: Tensor, exact: Tensor) -> float:
        return ((found - exact).norm() / exact.norm()).item()

    factor, wide = 2.0**-4 / 3.0**0.5 * 0.72, 2.0**-3 / 3.0**0.5 * 0.72
    assert relative(y, x @ weight.t()) == pytest.approx(2.0**0.5 * factor, rel=0.15)
    both = (factor**2 + wide**2) ** 0.5
    assert relative(into_x, gradient @ weight) == pytest.approx(both, rel=0.15)
    assert relative(into_weight, gradient.t() @ x) == pytest.approx(both, rel=0.15)


def test_one_outlier_costs_the_small_numbers_their_digits_and_no_more() -> None:
    """448 stands for the outlier; what is below 2^-10 of the grid's unit becomes 0."""
    x, weight = random(32, 64), random(16, 64, seed=1)
    x[3, 5] = 1e6
    _, scaling = one_layer()
    y, _ = fp8_linear.linear_forward(x, weight, None, scaling)
    assert y.isfinite().all()
    bound = fp8_casts.cast_bound(x, scaling.scales[INPUT], E4M3) @ weight.abs().t()
    bound += x.abs() @ fp8_casts.cast_bound(weight, scaling.scales[WEIGHT], E4M3).t()
    assert ((y - x @ weight.t()).abs() <= 1.1 * bound).all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_gradients_that_are_not_finite_reach_the_optimizer(bad: float) -> None:
    """Saturation must not hide an overflow in fp16 from the loss scale."""
    x, weight = random(8, 16).requires_grad_(), random(32, 16, seed=1).requires_grad_()
    state, scaling = one_layer()
    for number in range(2):  # measured, then delayed
        gradient = random(8, 32, seed=2)
        gradient[1, 2] = bad
        x.grad = weight.grad = None
        fp8_linear.fp8_linear(x, weight, None, scaling).backward(gradient)
        assert not weight.grad[2].isfinite().any(), number
        assert not x.grad[1].isfinite().any(), number
        assert x.grad[0].isfinite().all(), number
        state.update()
        assert state.table.isfinite().all()


class CountedWeights(EachWeight):
    """Says how often the weights were cast."""

    times = 0

    def __call__(self, table: Tensor) -> None:
        CountedWeights.times += 1
        super().__call__(table)


def test_weights_are_cast_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """For two micro-batches and an evaluation; the same bits as from a cast in each of them."""
    engine = fp8_engine.engine_for(CPU)._replace(weights=CountedWeights)
    monkeypatch.setattr(fp8, "engine_for", lambda device: engine)
    monkeypatch.setattr(CountedWeights, "times", 0)
    parts = [random(32, 16, seed=1), random(16, 16, seed=2)]
    keeps, casts = Fp8State(["a"], CPU, [parts]), Fp8State(["a"], CPU)
    for update in range(3):
        for batch in range(3):
            x, record = random(5, 16, seed=batch), batch < 2
            found, expected = (
                fp8_linear.linear_forward(x, torch.cat(parts), None, state["a"], record)[0]
                for state in (keeps, casts)
            )
            assert torch.equal(found, expected)
        assert torch.equal(keeps.table, casts.table)
        assert CountedWeights.times == update
        for part in parts:  # the optimizer's step
            part.mul_(1.7)
        keeps.update()
        casts.update()


def test_copies_of_weights_are_made_again_where_scales_are_loaded_or_were_tried() -> None:
    weight = random(32, 16)
    state = Fp8State(["a"], CPU, [[weight]])
    with state.as_calibrated():  # a new run: scale 1
        kept = state["a"].cast_weight(weight, record=True)
        assert torch.equal(kept.rows.float(), weight.to(E4M3).float())
    state["a"].cast_weight(weight, record=True)
    state.update()
    kept = state["a"].cast_weight(weight, record=True)
    before, memory = state.table.clone(), kept.rows.data_ptr()
    with state.as_calibrated():
        pass
    assert torch.equal(state.table, before), "the weights' maxima were lost"
    saved = state.state_dict()
    weight.mul_(3.0)
    state.load_state_dict(saved)
    kept = state["a"].cast_weight(weight, record=True)
    expected, largest = fp8_casts.quantise(weight, before[0, 0, WEIGHT], E4M3)
    assert torch.equal(kept.rows.float(), expected.float())
    assert torch.equal(kept.columns.float(), expected.float().t())
    assert state.table[2, 0, WEIGHT] == largest
    assert kept.rows.data_ptr() == memory, "a captured graph would read old memory"


def test_autograd_gives_what_the_plain_functions_give() -> None:
    x, weight, bias = random(20, 16), random(24, 16, seed=1), random(24, seed=2)
    gradient = random(24, 20, seed=3).t()  # in another order in memory
    _, scaling = one_layer()
    y, saved = fp8_linear.linear_forward(x, weight, bias, scaling)
    into_weight = torch.zeros(24, 16)
    into_x = fp8_linear.linear_backward(gradient, saved, scaling, into_weight)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    output = fp8_linear.fp8_linear(*leaves, scaling)
    assert torch.equal(output, y)
    output.backward(gradient)
    for leaf, expected in zip(leaves, (into_x, into_weight, gradient.sum(0)), strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-6)


def test_no_tokens_give_no_gradient() -> None:
    x, weight = torch.zeros(0, 16, requires_grad=True), random(32, 16).requires_grad_()
    state, scaling = one_layer()
    y = fp8_linear.fp8_linear(x, weight, None, scaling)
    y.sum().backward()
    assert y.shape == (0, 32)
    assert x.grad.shape == (0, 16)
    assert not weight.grad.any()
    into_weight = torch.ones(32, 16)
    _, saved = fp8_linear.linear_forward(x, weight, None, scaling)
    assert fp8_linear.linear_backward(y, saved, scaling, into_weight).shape == (0, 16)
    assert (into_weight == 1.0).all()
    state.update()
    assert state.table.isfinite().all()


def test_an_evaluation_does_not_move_the_scales() -> None:
    state, scaling = one_layer()
    x, weight = random(8, 16), random(32, 16, seed=1)
    fp8_linear.fp8_linear(x, weight, None, scaling)
    state.update()
    with torch.no_grad():
        fp8_linear.fp8_linear(50.0 * x, weight, None, scaling)
    assert not state.table[2].any()


def test_the_check_passes_here_and_refuses_odd_sizes() -> None:
    fp8_linear.check(CPU, torch.bfloat16, ((64, 192), (64, 256), (256, 64)))
    with pytest.raises(UserError, match="24 features are no multiple of 16"):
        fp8_linear.check(CPU, torch.bfloat16, ((64, 24),))


def test_the_check_finds_a_wrong_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_scale(left: Tensor, right: Tensor, *others: object) -> Tensor:
        one = torch.ones(())
        return fp8_engine.emulated_product(left, right, one, one, torch.bfloat16, None)

    wrong = fp8_engine.engine_for(CPU)._replace(product=without_scale)
    monkeypatch.setattr(fp8, "engine_for", lambda device: wrong)
    with pytest.raises(UserError, match="the output differs by"):
        fp8_linear.check(CPU, torch.bfloat16, ((64, 64),))
