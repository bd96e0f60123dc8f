"""All Triton operators: dropout's generator, errors, torch.compile, CUDA graphs, GPU limits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import (
    EPSILON,
    NATIVE,
    TABLES,
    bounds,
    fixed_seed,
    norm_inputs,
    random,
    random_ids,
    randoms,
)

# isort: split
from bert_pretraining.kernels import (
    OPERATORS,
    reference,
    triton_attention,
    triton_bias_gelu,
    triton_cross_entropy,
    triton_embedding,
    triton_layer_norm,
    triton_operators,
)


def dropping_calls(dropout: float) -> dict[str, Callable[[], Tensor]]:
    """The operators with dropout, on fixed inputs that require gradients."""
    ids = [random_ids(40, size) for size in (50, 20, 2)]
    qkv, cu_seqlens = random(40, 3, 2, 8).requires_grad_(), bounds([7, 33])
    norm = [each.requires_grad_() for each in norm_inputs(40, 12)]
    tables = [each.requires_grad_() for each in randoms(TABLES)]
    return {
        "attention": lambda: triton_operators.attention(qkv, cu_seqlens, 33, dropout),
        "norm": lambda: triton_operators.bias_dropout_residual_layer_norm(*norm, EPSILON, dropout),
        "embedding": lambda: triton_operators.embedding_layer_norm_dropout(
            *ids, *tables, EPSILON, dropout
        ),
    }


@pytest.mark.parametrize("operator", ["attention", "norm", "embedding"])
def test_dropout_follows_the_generator_and_keeps_the_mean(operator: str) -> None:
    draw = dropping_calls(0.2)[operator]
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)
    if operator == "norm":  # the mean of a LayerNorm's output is fixed, whatever was dropped
        return
    with torch.no_grad():
        mean = torch.stack([draw() for _ in range(40)]).mean(0)
    assert (mean - dropping_calls(0.0)[operator]()).abs().mean() < 0.1


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
@pytest.mark.parametrize("operator", ["attention", "norm", "embedding"])
def test_impossible_dropout_is_refused(operator: str, dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout must be in"):
        dropping_calls(dropout)[operator]()


def test_what_the_kernels_cannot_do_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        triton_operators.bias_gelu(random(2, 3).double(), random(3))
    with pytest.raises(ValueError, match="head size 136"):
        triton_operators.attention(random(2, 3, 1, 136), bounds([2]), 2, 0.0)


def test_every_operator_is_here() -> None:
    assert all(callable(getattr(triton_operators, operator)) for operator in OPERATORS)


def test_operators_keep_what_pytorch_asks_of_them() -> None:
    """torch.compile and CUDA graphs need correct schemas, fake shapes and autograd."""
    ids = [random_ids(5, size) for size in (50, 20, 2)]
    norm = [each.requires_grad_() for each in norm_inputs(5, 12)]
    tables = [each.requires_grad_() for each in randoms(TABLES)]
    qkv, logits = random(5, 3, 2, 8).requires_grad_(), random(5, 30).requires_grad_()
    for seed, dropout in ((None, 0.0), (fixed_seed(), 0.1)):
        calls = (
            (triton_attention.packed_attention, (qkv, bounds([2, 3]), 3, seed, dropout)),
            (triton_layer_norm.residual_layer_norm, (*norm, seed, EPSILON, dropout)),
            (
                triton_embedding.embedding_layer_norm,
                (*ids, *tables, seed, EPSILON, dropout),
            ),
        )
        for operator, arguments in calls:
            torch.library.opcheck(operator, arguments)
    torch.library.opcheck(triton_bias_gelu.bias_gelu, (norm[0], norm[1]))
    torch.library.opcheck(triton_cross_entropy.cross_entropy, (logits, random_ids(5, 30)))


def test_operators_compile_into_one_graph() -> None:
    ids = [random_ids(40, size) for size in (50, 20, 2)]
    cu_seqlens, labels = bounds([7, 33]), random_ids(40, 12)

    def network(dropout: float, *parameters: Tensor) -> Tensor:
        hidden = triton_operators.embedding_layer_norm_dropout(
            *ids, *parameters[:5], EPSILON, dropout
        )
        qkv = (hidden @ parameters[5]).view(40, 3, 2, 6)
        context = triton_operators.attention(qkv, cu_seqlens, 33, dropout).view(40, 12)
        context = triton_operators.bias_gelu(context, parameters[4])
        hidden = triton_operators.bias_dropout_residual_layer_norm(
            context, parameters[4], hidden, *parameters[3:5], EPSILON, dropout
        )
        return triton_operators.masked_cross_entropy(hidden, labels)[0]

    parameters = [each.requires_grad_() for each in randoms([*TABLES, (12, 36)])]
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for dropout in (0.0, 0.1):
        results = []
        for run in (network, compiled):
            torch.manual_seed(5)
            loss = run(dropout, *parameters)
            results.append([loss, *torch.autograd.grad(loss, parameters)])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(eager, graph, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
@pytest.mark.parametrize("operator", ["attention", "norm", "embedding"])
def test_a_cuda_graph_draws_new_masks_on_every_replay(operator: str) -> None:
    draw = dropping_calls(0.5)[operator]
    draw().sum().backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = draw()
        output.sum().backward()
    drawn = []
    for _ in range(2):
        graph.replay()
        drawn.append(output.clone())
    assert not torch.equal(*drawn)


def kernels_of_the_package() -> set[str]:
    """module.kernel of all Triton kernels of the operators; those of fp8 have their own test."""
    return {
        f"{path.stem}.{name}"
        for path in Path(reference.__file__).parent.glob("triton_*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
        if not path.stem.startswith("triton_fp8")
    }


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_kernels_compile_for_gpus(tmp_path: Path, capability: int) -> None:
    """The interpreter takes what the compiler refuses; the compiler needs no GPU."""
    tests = Path(__file__).resolve().parents[1]
    base = Path(reference.__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    path = [str(base), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, str(tests / "triton_compile.py"), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == kernels_of_the_package()
    for kernel in kernels:
        assert kernel["shared_bytes"] <= {80: 163, 90: 227}[capability] * 1024
        products = ("attention" in kernel["kernel"]) or ("entry_sums" in kernel["kernel"])
        assert kernel["tensor_cores"] == products
        # Capability 9.0 has its own instruction for products of whole groups of warps.
        assert kernel["wgmma"] == (products and capability == 90)
        assert not kernel["atomics"]
