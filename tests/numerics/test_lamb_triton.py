"""LAMB in Triton: on a GPU if there is one, else tiny shapes in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton reads this when it is imported and when a kernel is defined.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
# ruff: noqa: E402  the lines above must come first

from bert_pretraining.errors import UserError
from bert_pretraining.optim import LossScale, Optimizer, Schedule, choose, flat
from helpers import ROOT
from lamb_cases import (
    Arrays,
    assert_near,
    assert_same_bits,
    case,
    give,
    make,
    numpy_lamb,
    parameters_of,
    snapshot,
)

# With blocks of 16: one element, a full block, one more, several; with and without decay.
SHAPES = {
    "word.weight": (5, 7),
    "word.bias": (17,),
    "query.weight": (4, 4),
    "LayerNorm.weight": (3,),
    "one.weight": (1,),
}
DECAYED = {"word.weight", "query.weight", "one.weight"}
# The interpreter truncates float32 to bfloat16 where a GPU rounds.
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(flat, "BLOCK", 16)


def triton_lamb(weights: Arrays, dtype: torch.dtype) -> tuple[Optimizer, dict[str, Tensor]]:
    parameters = parameters_of(weights, dtype, DEVICE)
    return make("triton", parameters), parameters


@pytest.mark.parametrize("scale", [1e-3, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_formulas(scale: float, dtype: torch.dtype) -> None:
    weights, gradients, rates = case(seed=int(scale), scale=scale, steps=4, shapes=SHAPES)

    def rounded(arrays: Arrays) -> Arrays:
        return {key: torch.tensor(a).to(dtype).double().numpy() for key, a in arrays.items()}

    weights, gradients = rounded(weights), [rounded(step) for step in gradients]
    expected = numpy_lamb(weights, gradients, rates, DECAYED)
    optimizer, parameters = triton_lamb(weights, dtype)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.zero_grad()
        give(parameters, gradient)
        finite = optimizer.step(rate)
        assert finite.dtype == torch.bool
        assert finite.shape == ()
        assert finite
        norm = np.sqrt(sum((value**2).sum() for value in gradient.values()))
        assert optimizer.gradient_norm.item() == pytest.approx(norm, rel=1e-6)
    assert optimizer.updates == 4
    masters = dict(zip(optimizer.names, optimizer.masters, strict=True))
    assert_near(masters, expected, 2e-6)
    for name, parameter in parameters.items():
        assert parameter.dtype == dtype
        torch.testing.assert_close(
            parameter.detach().float(), masters[name], rtol=ROUNDING[dtype], atol=0
        )
    used = torch.zeros(optimizer.layout.length, dtype=torch.bool, device=DEVICE)
    for view in optimizer.layout.views(used):
        view.fill_(True)
    assert not optimizer.shard.master[~used].any()
    assert not optimizer.shard.second[~used].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    weights, gradients, rates = case(seed=3, scale=0.1, steps=2, shapes=SHAPES)
    optimizer, parameters = triton_lamb(weights, torch.float16)
    other, undisturbed = triton_lamb(weights, torch.float16)
    for gradient, rate in zip(gradients, rates, strict=True):
        give(parameters, gradient)
        parameters["word.bias"].grad[-1] = bad
        before = snapshot(optimizer)
        assert not optimizer.step(rate)
        assert_same_bits(before, snapshot(optimizer))
        give(parameters, gradient)
        give(undisturbed, gradient)
        assert optimizer.step(rate)
        other.step(rate)
        assert_same_bits(snapshot(other), snapshot(optimizer))


def test_zeros_scales_and_missing_gradients() -> None:
    weights, gradients, rates = case(seed=4, scale=0.1, steps=3, shapes=SHAPES)
    weights["query.weight"] *= 0  # the weight norm is 0, so the ratio is 1
    for step in gradients:
        step["one.weight"] *= 0
    for name in gradients[2]:
        gradients[2][name] *= 0
    optimizer, parameters = triton_lamb(weights, torch.float32)
    for gradient, rate in zip(gradients, rates, strict=True):
        give(parameters, gradient, 1024.0)
        parameters["one.weight"].grad = None
        rate = torch.tensor(rate, device=DEVICE)
        optimizer.step(rate, torch.tensor(1 / 1024, device=DEVICE))
    assert_near(parameters, numpy_lamb(weights, gradients, rates, DECAYED), 2e-6)


def test_state_from_foreach_and_back() -> None:
    weights, gradients, rates = case(seed=6, scale=0.1, steps=3, shapes=SHAPES)
    parameters = parameters_of(weights, torch.bfloat16, DEVICE)
    foreach = make("foreach", parameters)
    for gradient, rate in zip(gradients, rates, strict=True):
        give(parameters, gradient)
        foreach.step(rate)
    optimizer, _ = triton_lamb({key: value * 0 for key, value in weights.items()}, torch.bfloat16)
    optimizer.load_state_dict(foreach.state_dict())
    assert_same_bits(snapshot(foreach), snapshot(optimizer))
    foreach.load_state_dict(optimizer.state_dict())
    assert_same_bits(snapshot(foreach), snapshot(optimizer))


def test_the_same_bits_twice() -> None:
    results = []
    for _ in range(2):
        weights, gradients, rates = case(seed=7, scale=0.1, steps=2, shapes=SHAPES)
        optimizer, parameters = triton_lamb(weights, torch.float32)
        for gradient, rate in zip(gradients, rates, strict=True):
            give(parameters, gradient)
            optimizer.step(rate)
        results.append(snapshot(optimizer))
    assert_same_bits(*results)


def test_what_triton_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="triton does not support float64"):
        triton_lamb(case(0, 1.0, 1, SHAPES)[0], torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="triton: Triton's kernels need a GPU, not device cpu"):
        choose("triton", torch.device("cpu"))
    name, reason = choose("auto", torch.device("cuda"))
    assert name == "triton"
    assert reason == "the fewest bytes moved on a GPU"


def test_a_scheduled_step_is_the_step_with_rate_and_scale() -> None:
    """The schedule and the loss scale are computed in a kernel, with the same bits."""
    shapes = {"word.weight": (5, 7), "word.bias": (3,)}
    weights, gradients, _ = case(seed=9, scale=0.1, steps=8, shapes=shapes)
    schedules = {
        Schedule(1e-2, 5, 3): (2.0, True),
        Schedule(7e-3, 100, 5, 2): (1000.0, False),
        Schedule(0.1, 4, 0, 3): (1.0, False),
    }
    for schedule, (initial, dynamic) in schedules.items():
        ours, theirs = (
            LossScale(initial, dynamic, growth_interval=3, device=torch.device(DEVICE))
            for _ in range(2)
        )
        optimizer, parameters = triton_lamb(weights, torch.float32)
        other, its_parameters = triton_lamb(weights, torch.float32)
        for number, gradient in enumerate(gradients):
            broken = number in (0, 5, 6) and dynamic
            for given, scale in ((parameters, ours), (its_parameters, theirs)):
                give(given, gradient, scale.scale.item())
                if broken:
                    given["word.bias"].grad[-1] = torch.inf
            finite = optimizer.scheduled_step(schedule, ours)
            inverse = theirs.scale.double().reciprocal()
            assert other.step(schedule.at(other.num_updates), inverse) == finite
            theirs.update(finite)
            assert finite.item() is not broken
            assert_same_bits(snapshot(other), snapshot(optimizer))
            assert ours.state_dict() == theirs.state_dict()
            assert ours.scale.dtype == torch.float32
    # A fixed scale that overflowed stays NaN, so that no later step changes a weight.
    give(parameters, gradients[0])
    parameters["word.bias"].grad[-1] = torch.nan
    fixed = LossScale(8.0, dynamic=False, device=torch.device(DEVICE))
    before = snapshot(optimizer)
    for skipped in (1, 2):
        assert not optimizer.scheduled_step(schedule, fixed)
        assert fixed.scale.isnan()
        assert fixed.skipped_in_a_row.item() == skipped
        give(parameters, gradients[0])
        assert_same_bits(before, snapshot(optimizer))


@pytest.mark.parametrize("updates", [0, 1, 2, 999, 7037, 2**20 - 1, 2**31 - 2])
def test_the_bias_corrections_at_any_update(updates: int) -> None:
    weights, (gradient,), _ = case(seed=2, scale=0.1, steps=1, shapes=SHAPES)
    results = []
    for name in ("triton", "foreach"):
        parameters = parameters_of(weights, torch.float32, DEVICE)
        optimizer = make(name, parameters)
        optimizer.num_updates.fill_(updates)
        give(parameters, gradient)
        assert optimizer.step(0.01)
        assert optimizer.updates == updates + 1
        results.append({name: value.detach().cpu().numpy() for name, value in parameters.items()})
    for name, value in results[1].items():
        np.testing.assert_allclose(results[0][name], value, rtol=2e-6, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_gradients_of_16_bit_parameters(dtype: torch.dtype) -> None:
    weights, gradients, rates = case(seed=11, scale=0.1, steps=3, shapes=SHAPES)
    weights = {name: torch.tensor(w).to(dtype).double().numpy() for name, w in weights.items()}
    parameters = parameters_of(weights, dtype, DEVICE)
    optimizer = make("triton", parameters, gradient_dtype=torch.float32)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.zero_grad()
        for name, value in gradient.items():
            optimizer.sink.target(parameters[name]).add_(torch.tensor(value, device=DEVICE))
        optimizer.sink.arrived(list(parameters.values()))
        assert optimizer.step(rate)
    masters = dict(zip(optimizer.names, optimizer.masters, strict=True))
    assert_near(masters, numpy_lamb(weights, gradients, rates, DECAYED), 2e-6)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from bert_pretraining.optim import flat_triton
from triton_compile import ast_source

types = dict.fromkeys("master first second sums rates decay_of_block norm_ptr scale_ptr".split(),
                      "*fp32")
types |= dict.fromkeys("squares constants given scalars".split(), "*fp64")
types |= dict.fromkeys("updates_ptr good_ptr skipped_ptr".split(), "*i64")
types |= dict.fromkeys("finite finite_ptr has_ratio".split(), "*u8")
types |= dict.fromkeys("parameter_of_block first_blocks".split(), "*i32")
types |= dict.fromkeys("parameters all_blocks".split(), "i32")
types |= dict.fromkeys("beta_1 gain_1 beta_2 gain_2 epsilon".split(), "fp32")
types |= {"gradient": sys.argv[2], "rounded": "*bf16", "out": "*fp64"}
constants = {"BLOCK": 1024, "ROUND": True, "SIZE": 512, "TILE": 4096, "SCHEDULED": True,
             "DYNAMIC": True}
by_block = ("square_sums", "first_stage", "second_stage")
for name in (*by_block, "parameter_sums", "begin", "parameter_rates"):
    kernel = getattr(flat_triton, name)
    types["blocks"] = "*i32" if name.startswith("parameter_") else "i32"
    given = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: types[name] for name in kernel.arg_names if name not in given}
    aligned = [name for name, type in signature.items() if type.startswith("*")]
    source = ast_source(kernel, signature, given, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32))
    assert "st.global" in compiled.asm["ptx"]
    assert "atom" not in compiled.asm["ptx"], kernel
    assert "red.global" not in compiled.asm["ptx"], kernel
    # The compiler is told that addresses are aligned from Triton 3.3 on.
    if name in by_block and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3):
        assert ".v4.b32" in compiled.asm["ptx"], kernel
print("compiled")
"""


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("gradient", ["*bf16", "*fp32"])
def test_the_kernels_compile_for_a_gpu_and_use_no_atomics(
    tmp_path: Path, capability: int, gradient: str
) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "base"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), gradient],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "compiled\n", done.stderr


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("name", ["reference", "foreach", "flat", "triton"])
def test_no_step_waits_for_the_gpu(name: str) -> None:
    weights, gradients, rates = case(seed=8, scale=0.1, steps=3, shapes=SHAPES)
    parameters = parameters_of(weights, torch.float32, DEVICE)
    optimizer = make(name, parameters)
    for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
        for bad in (True, False):
            give(parameters, gradient)
            if bad:
                parameters["word.bias"].grad[-1] = torch.nan
            before = snapshot(optimizer)
            if number == 0:
                finite = optimizer.step(rate)  # compiles
            else:
                torch.cuda.set_sync_debug_mode("error")
                try:
                    finite = optimizer.step(rate)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            assert finite.item() is not bad
            if bad:
                assert_same_bits(before, snapshot(optimizer))
    assert_near(parameters, numpy_lamb(weights, gradients, rates, DECAYED), 2e-6)
