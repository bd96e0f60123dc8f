"""The Triton kernels of fp8 against PyTorch's casts: the same bits in both orders, the maximum."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import DEVICE, NATIVE, fix_casts, interpreted_engine, random

# isort: split
from bert_pretraining.kernels import fp8, fp8_casts, fp8_engine, triton_fp8
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.kernels.fp8_casts import LARGEST, WEIGHT
from bert_pretraining.kernels.fp8_linear import linear_backward, linear_forward
from bert_pretraining.kernels.fp8_weights import EachWeight
from bert_pretraining.kernels.triton_fp8_weights import AllWeights

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def _fix_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_casts(monkeypatch)


def assert_same_cast(x: Tensor, scale: float, dtype: torch.dtype) -> None:
    given = torch.tensor(scale, device=DEVICE)
    maxima = torch.zeros(2, device=DEVICE).unbind()
    expected = fp8_casts.padded_cast(x, given, dtype, maxima[0])
    found = triton_fp8.cast(x, given, dtype, maxima[1])
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert ours.is_contiguous()
        numbers, wanted = ours.float(), right.float()
        assert torch.equal(numbers.isnan(), wanted.isnan())
        assert torch.equal(numbers.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(*(maximum.nan_to_num(-1.0, -2.0) for maximum in maxima))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(
    ("rows", "columns"), [(0, 16), (1, 1), (16, 16), (37, 100), (130, 260), (64, 128)]
)
def test_cast_transpose_and_maximum(rows: int, columns: int, dtype: torch.dtype) -> None:
    seed = int.from_bytes(os.urandom(3), "little")
    assert_same_cast(random(rows, columns, seed=seed), 20.0, dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_all_dtypes_orders_and_sizes_of_numbers(source: torch.dtype, dtype: torch.dtype) -> None:
    powers = torch.logspace(-16, 4, 48, base=2.0, device=DEVICE)[:, None]
    x = (random(48, 33, seed=1) * powers).to(source)
    assert_same_cast(x, 20.0, dtype)
    assert_same_cast(x.t(), 20.0, dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_become_nan(bad: float, dtype: torch.dtype) -> None:
    x = random(70, 130)
    x[65, 3] = bad
    x[2, 1], x[2, 2] = 1e30, -1e30  # these saturate
    assert_same_cast(x, 20.0, dtype)


def test_zeros_and_the_maximum_of_several_calls() -> None:
    assert_same_cast(torch.zeros(20, 20, device=DEVICE), 1.0, E4M3)
    one, largest = torch.tensor(1.0, device=DEVICE), torch.zeros((), device=DEVICE)
    for factor in (1.0, 3.0, 2.0):
        x = random(130, 130) * factor
        triton_fp8.cast(x, one, E4M3, largest)
    assert largest == (random(130, 130) * 3.0).abs().max()
    triton_fp8.cast(1000.0 * x, one, E4M3, None)  # not recorded
    assert largest == (random(130, 130) * 3.0).abs().max()


def test_all_scales_in_one_launch() -> None:
    table = random(3, 7, 3).abs() + 0.1
    table[2, 0, 0], table[2, 1, 2], table[2, 2, 1] = 0.0, torch.nan, torch.inf
    table[2, 3, 2] = 1e-42
    expected = table.clone()
    fp8_casts.update_scales(expected)
    triton_fp8.update(table)
    torch.testing.assert_close(table, expected, rtol=1e-6, atol=0)
    triton_fp8.update(torch.zeros((3, 0, 3), device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
def test_all_weights_in_one_launch(flat: bool, dtype: torch.dtype) -> None:
    """The same bits and maxima as one cast for each; weights apart in memory or side by side."""
    shapes = [[(48, 16)] * 3, [(130, 260)], [(1, 1)], [(64, 128), (32, 128)]]
    if flat:
        shapes = [[(16, 32)] * 3, [(80, 16)], [(144, 272)]]
    sizes = [rows * columns for parts in shapes for rows, columns in parts]
    memory = random(sum(sizes), seed=int.from_bytes(os.urandom(3), "little")).to(dtype)
    pieces = iter(memory.split(sizes) if flat else [one.clone() for one in memory.split(sizes)])
    weights = [[next(pieces).view(shape) for shape in parts] for parts in shapes]
    weights[0][1][0, 0], weights[-1][0][-1, -1] = torch.inf, 1e30
    tables, kept = [], []
    for made in (EachWeight(weights), AllWeights(weights)):
        table = random(3, len(weights), 3, seed=1).abs()
        table[2] *= 3.0  # some larger than every weight
        for _ in range(2):
            made(table)
        tables.append(table)
        kept.append(made.kept)
    assert torch.equal(*tables)
    for found, expected in zip(*reversed(kept), strict=True):
        for ours, right in zip(found, expected, strict=True):
            assert torch.equal(ours.view(torch.uint8), right.view(torch.uint8))
        assert torch.equal(found.columns.view(torch.uint8), found.rows.view(torch.uint8).t())


def test_weights_that_moved_are_found_again() -> None:
    """An optimizer may move parameters to memory of its own."""
    weight = torch.nn.Parameter(random(16, 32))
    made, table = AllWeights([[weight]]), torch.ones((3, 1, 3), device=DEVICE)
    made(table)
    weight.data = random(16, 32, seed=1)
    made(table)
    expected = fp8_casts.quantise(weight.data, table[0, 0, WEIGHT], E4M3)[0]
    assert torch.equal(made.kept[0].rows.float(), expected.float())


def test_a_layer_with_the_kernels_is_the_layer_without(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for engine in (
        fp8_engine.engine_for(torch.device("cpu")),
        interpreted_engine(),
    ):
        monkeypatch.setattr(fp8, "engine_for", lambda device, engine=engine: engine)
        weight = random(48, 32, seed=1)
        state = Fp8State(["layer"], DEVICE, [[weight]])
        for _ in range(2):  # measured, then delayed
            x, gradient = random(37, 32), random(37, 48, seed=2)
            into_weight = torch.zeros_like(weight)
            y, saved = linear_forward(x, weight, None, state["layer"])
            into_x = linear_backward(gradient, saved, state["layer"], into_weight)
            state.update()
        results.append((y, into_x, into_weight, state.table))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
@pytest.mark.skipif(
    NATIVE and torch.cuda.get_device_capability() < fp8_engine.OLDEST_CAPABILITY,
    reason="no fp8 here",
)
def test_the_products_of_this_gpu() -> None:
    from bert_pretraining.kernels.fp8_linear import check

    check(DEVICE, torch.bfloat16, ((1024, 3072), (1024, 1024), (1024, 4096), (4096, 1024)))


COMPILE = """
import json, sys
sys.path.insert(0, {tests!r})
import triton_compile
for kernel, constants, options in triton_compile.fp8_kernels():
    made = triton_compile.compiled(kernel, constants, options, 90)
    e5m2 = constants.get("E5M2", False)
    print(json.dumps(dict(name=triton_compile.name_of(kernel), e5m2=e5m2,
                          shared=made.metadata.shared, ptx=made.asm["ptx"])))
"""


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """The conversion is the GPU's own, and the only atomic operation is a maximum of integers."""
    tests = Path(__file__).resolve().parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join([str(tests.parent / "base"), *sys.path])
    program = tmp_path / "compile_fp8.py"
    program.write_text(COMPILE.format(tests=str(tests)))
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["e5m2"] for kernel in kernels} == {False, True}
    for kernel in kernels:
        if kernel["name"].endswith("update_kernel"):  # it casts nothing
            continue
        name = "e5m2x2" if kernel["e5m2"] else "e4m3x2"
        assert f"cvt.rn.satfinite.{name}.f32" in kernel["ptx"], kernel["name"]
        assert kernel["shared"] <= 48 * 1024
        atomics = re.findall(r"\b(?:atom|red)\.[\w.:]*", kernel["ptx"])
        assert atomics
        assert all(one.endswith(".max.s32") for one in atomics)
    assert LARGEST == (448.0, 448.0, 57344.0)
