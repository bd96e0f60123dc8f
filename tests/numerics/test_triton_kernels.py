"""The Triton provider against `reference` in float64: forward, gradients, dropout, edges.

On a GPU the kernels run natively; without one in Triton's interpreter, where a conversion to
bfloat16 truncates, so that its tolerance is two units in the last place of 8 bits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from triton_device import DEVICE, NATIVE  # before the kernels, which it makes for the interpreter

# isort: split
from bert_pretraining.kernels import (
    OPERATORS,
    reference,
    triton_attention,
    triton_bias_gelu,
    triton_cross_entropy,
    triton_embedding,
    triton_layer_norm,
    triton_provider,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2.0**-6}
DTYPES = list(TOLERANCE)
EPSILON = 1e-12
LENGTHS = [[1], [1, 1, 1], [7, 33, 3], [64, 64], [0, 5, 0, 0, 70, 0]]
LONG = [[511], [512, 1, 300]]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def randoms(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [random(*shape, seed=number, dtype=dtype) for number, shape in enumerate(shapes)]


def random_ids(count: int, entries: int, dtype: torch.dtype = torch.int64) -> Tensor:
    generator = torch.Generator().manual_seed(entries)
    return torch.randint(entries, (count,), generator=generator, dtype=dtype).to(DEVICE)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def fixed_seed(number: int = 1) -> Tensor:
    return torch.tensor([12345 * number, 987654321], dtype=torch.int32, device=DEVICE)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference, in units of the largest number expected (or of 1)."""
    assert actual.shape == expected.shape
    if expected.numel():
        scale = max(expected.abs().max().item(), 1.0)
        assert (actual.double() - expected).abs().max().item() <= tolerance * scale


def compare(
    operator: Callable, exact_operator: Callable, inputs: list[Tensor], tolerance: float
) -> None:
    """Outputs, and the gradients of a random projection of them; the second in float64."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    output, expected = operator(*leaves), exact_operator(*exact)
    assert_near(output, expected, tolerance)
    direction = random(*output.shape, seed=99, dtype=output.dtype)
    gradients = torch.autograd.grad(output, leaves, direction)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    for gradient, leaf, wanted in zip(gradients, leaves, expected_gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, wanted, 2 * tolerance)


# Attention


def check_attention(qkv: Tensor, lengths: list[int], longest: int, tolerance: float) -> None:
    cu_seqlens = bounds(lengths)
    compare(
        lambda x: triton_provider.attention(x, cu_seqlens, longest, 0.0),
        lambda x: reference.attention(x, cu_seqlens, longest, 0.0),
        [qkv],
        tolerance,
    )


@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention(lengths: list[int]) -> None:
    qkv = random(sum(lengths), 3, 2, 8, seed=len(lengths))
    check_attention(qkv, lengths, max(lengths), 1e-5)


@pytest.mark.parametrize("head_size", [20, 32, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_head_sizes_and_dtypes(head_size: int, dtype: torch.dtype) -> None:
    qkv = random(75, 3, 1, head_size, dtype=dtype)
    check_attention(qkv, [5, 70], 70, TOLERANCE[dtype])


@pytest.mark.skipif(not NATIVE, reason="no CUDA device: too slow in the interpreter")
@pytest.mark.parametrize("lengths", LONG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_long_sequences(lengths: list[int], dtype: torch.dtype) -> None:
    qkv = random(sum(lengths), 3, 4, 64, dtype=dtype)
    check_attention(qkv, lengths, 512, TOLERANCE[dtype])

    def gradient() -> Tensor:
        leaf = qkv.detach().requires_grad_()
        torch.manual_seed(3)
        output = triton_provider.attention(leaf, bounds(lengths), 512, 0.1)
        return torch.autograd.grad(output, leaf, output.detach())[0]

    assert torch.equal(gradient(), gradient())


def test_attention_strides() -> None:
    cu_seqlens = bounds([5, 6])
    qkv = random(11, 3, 2, 8)
    expected = triton_provider.attention(qkv, cu_seqlens, 6, 0.0)
    parts_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    numbers_apart = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (parts_first, numbers_apart):
        assert not view.is_contiguous()
        assert torch.equal(triton_provider.attention(view, cu_seqlens, 6, 0.0), expected)
        check_attention(view, [5, 6], 6, 1e-5)
    leaf = qkv.clone().requires_grad_()
    ones = torch.ones_like(expected)
    (wanted,) = torch.autograd.grad(triton_provider.attention(leaf, cu_seqlens, 6, 0.0), leaf, ones)
    # The gradient of a sum is one number with strides of 0.
    triton_provider.attention(leaf, cu_seqlens, 6, 0.0).sum().backward()
    assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize(("longest", "padding"), [(33, 9), (50, 9), (33, 150)])
def test_attention_never_reads_padding(longest: int, padding: int) -> None:
    lengths = [7, 0, 33]
    cu_seqlens = bounds(lengths)
    qkv = random(40 + padding, 3, 2, 8)
    qkv[40:] = float("nan")
    leaf = qkv.clone().requires_grad_()
    output = triton_provider.attention(leaf, cu_seqlens, longest, 0.0)
    direction = random(*output.shape, seed=1)
    direction[40:] = float("nan")
    (gradient,) = torch.autograd.grad(output, leaf, direction)
    assert not output[40:].any()
    assert not gradient[40:].any()
    exact = qkv[:40].double().requires_grad_()
    expected = reference.attention(exact, cu_seqlens, 33, 0.0)
    assert_near(output[:40], expected, 1e-5)
    (wanted,) = torch.autograd.grad(expected, exact, direction[:40].double())
    assert_near(gradient[:40], wanted, 2e-5)


def attention_mask(lengths: list[int], heads: int, seed: Tensor, dropout: float) -> list[Tensor]:
    """Each sequence's kept weights, (heads, queries, keys): what identity matrices as V show."""
    longest = max(lengths)
    qkv = torch.zeros(sum(lengths), 3, heads, longest, device=DEVICE)
    for start, length in zip(bounds(lengths).tolist(), lengths, strict=False):
        qkv[start : start + length, 2] = torch.eye(length, longest, device=DEVICE)[:, None]
    context, _ = triton_attention.packed_attention(qkv, bounds(lengths), longest, seed, dropout)
    return [
        sequence.transpose(0, 1)[:, :, :length] != 0
        for sequence, length in zip(context.split(lengths), lengths, strict=True)
    ]


@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_attention_dropout_forward_and_backward(dropout: float) -> None:
    """Another head size and the backward kernels make the mask that the forward kernel made."""
    lengths, seed = [7, 64, 1, 33], fixed_seed()
    masks = attention_mask(lengths, 2, seed, dropout)
    weights = torch.cat([mask.flatten() for mask in masks])
    deviation = (dropout * (1 - dropout) / weights.numel()) ** 0.5
    assert (~weights).float().mean().item() == pytest.approx(dropout, abs=4 * deviation)
    assert not torch.equal(masks[1][0], masks[1][1])
    assert not torch.equal(masks[1][0, :33, :33], masks[3][0])
    assert not torch.equal(masks[1], attention_mask(lengths, 2, fixed_seed(2), dropout)[1])

    def plain(qkv: Tensor) -> Tensor:
        contexts = []
        for sequence, mask in zip(qkv.split(lengths), masks, strict=True):
            query, key, value = sequence.permute(1, 2, 0, 3)
            scores = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, dim=-1)
            contexts.append((scores * mask / (1 - dropout) @ value).transpose(0, 1))
        return torch.cat(contexts)

    compare(
        lambda x: triton_attention.packed_attention(x, bounds(lengths), 64, seed, dropout)[0],
        plain,
        [random(sum(lengths), 3, 2, 8)],
        1e-5,
    )


# Bias and GELU


@pytest.mark.parametrize("shape", [(1, 12), (33, 64), (300, 100), (2, 3, 5000), (0, 12)])
def test_bias_gelu(shape: tuple[int, ...]) -> None:
    inputs = randoms([shape, shape[-1:]])
    compare(triton_provider.bias_gelu, reference.bias_gelu, inputs, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gelu_dtypes_and_strides(dtype: torch.dtype) -> None:
    x, bias = random(64, 33, dtype=dtype).T, random(64, seed=1)
    compare(triton_provider.bias_gelu, reference.bias_gelu, [x, bias], TOLERANCE[dtype])
    leaf = x.detach().requires_grad_()
    triton_provider.bias_gelu(leaf, bias).sum().backward()
    exact = x.detach().double().requires_grad_()
    reference.bias_gelu(exact, bias.double()).sum().backward()
    assert_near(leaf.grad, exact.grad, TOLERANCE[dtype])


def test_bias_gelu_of_large_numbers() -> None:
    x = torch.tensor([[-1e30, -1e4, -11.0, 11.0, 1e4, 1e30]], device=DEVICE, requires_grad=True)
    output = triton_provider.bias_gelu(x, torch.zeros(6, device=DEVICE))
    output.sum().backward()
    expected = torch.tensor([[0, 0, 0, 11, 1e4, 1e30]], device=DEVICE)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, (expected > 0).float(), rtol=0, atol=1e-6)


# Residual LayerNorm


def norm_inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    row, vector = (rows, columns), (columns,)
    return randoms([row, vector, row, vector, vector], dtype)


def check_norm(inputs: list[Tensor], tolerance: float) -> None:
    compare(
        lambda *x: triton_provider.bias_dropout_residual_layer_norm(*x, EPSILON, 0.0),
        lambda *x: reference.bias_dropout_residual_layer_norm(*x, EPSILON, 0.0),
        inputs,
        tolerance,
    )


@pytest.mark.parametrize("columns", [12, 64, 100, 1100])
@pytest.mark.parametrize("rows", [0, 1, 5, 33])
def test_residual_layer_norm(rows: int, columns: int) -> None:
    check_norm(norm_inputs(rows, columns), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_layer_norm_dtypes_and_strides(dtype: torch.dtype) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(33, 64, dtype)
    check_norm([x, bias, residual, weight, norm_bias], 2 * TOLERANCE[dtype])
    # As under autocast: 16-bit activations, float32 parameters.
    check_norm([x, bias.float(), residual, weight.float(), norm_bias.float()], 2 * TOLERANCE[dtype])
    apart = [x.T.contiguous().T, bias, residual.T.contiguous().T, weight, norm_bias]
    check_norm(apart, 2 * TOLERANCE[dtype])


def test_residual_layer_norm_sums_over_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_layer_norm, "_BACKWARD_PROGRAMS", 3)
    check_norm(norm_inputs(150, 12), 1e-5)


@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_residual_layer_norm_dropout_forward_and_backward(dropout: float) -> None:
    x, bias, residual, weight, norm_bias = norm_inputs(70, 100)
    x, seed = x.sign() * (x.abs() + 0.1) - bias, fixed_seed()
    arguments = (seed, EPSILON, dropout)
    inputs = [x, bias, residual, weight, norm_bias]
    summed = triton_layer_norm.residual_layer_norm(*inputs, *arguments)[1]
    mask = summed != residual

    def plain(x: Tensor, bias: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        summed = residual + (x + bias) * mask / (1 - dropout)
        return reference.layer_norm(summed, *parameters, EPSILON)

    compare(
        lambda *x: triton_layer_norm.residual_layer_norm(*x, *arguments)[0], plain, inputs, 1e-5
    )


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.75])
def test_dropout_masks_look_random(dropout: float) -> None:
    """Totals, rows, columns and neighbours, each within five standard deviations."""
    rows, columns = 256, 512
    ones, zeros = torch.ones(rows, columns, device=DEVICE), torch.zeros(columns, device=DEVICE)
    arguments = (ones, zeros, torch.zeros_like(ones), zeros, zeros)
    kept = [
        triton_layer_norm.residual_layer_norm(*arguments, fixed_seed(number), EPSILON, dropout)[1]
        for number in (1, 2)
    ]
    assert kept[0].unique().tolist() == pytest.approx([0, 1 / (1 - dropout)])
    first, second = ((each != 0).double() - (1 - dropout) for each in kept)
    variance = dropout * (1 - dropout)
    for sums, terms in (
        (first.sum(), rows * columns),
        (first.sum(0), rows),
        (first.sum(1), columns),
    ):
        assert sums.abs().max().item() < 5 * (terms * variance) ** 0.5
    products = (
        first[:, 1:] * first[:, :-1],
        first[1:] * first[:-1],
        first[1:, 1:] * first[:-1, :-1],
        first * second,
    )
    for product in products:
        assert product.sum().abs().item() < 5 * product.numel() ** 0.5 * variance


# Embeddings

TABLES = [(50, 12), (20, 12), (2, 12), (12,), (12,)]


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_embedding_layer_norm(tokens: int, id_dtype: torch.dtype) -> None:
    ids = [random_ids(tokens, size, id_dtype) for size in (50, 20, 2)]
    compare(
        lambda *x: triton_provider.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        lambda *x: reference.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        randoms(TABLES),
        1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embedding_layer_norm_dtypes_and_strides(dtype: torch.dtype) -> None:
    ids = [random_ids(2 * 20, size)[::2] for size in (50, 20, 2)]
    tables = [each.T.contiguous().T for each in randoms(TABLES[:3], dtype)]
    compare(
        lambda *x: triton_provider.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        lambda *x: reference.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        [*tables, *randoms(TABLES[3:])],
        2 * TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_embedding_dropout_forward_and_backward(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_layer_norm, "_BACKWARD_PROGRAMS", 3)
    ids = [random_ids(150, size) for size in (50, 20, 2)]
    inputs, arguments = randoms(TABLES), (fixed_seed(), EPSILON, dropout)
    mask = triton_embedding.embedding_layer_norm(*ids, *inputs, *arguments)[0] != 0
    assert (~mask).float().mean().item() == pytest.approx(dropout, abs=0.05)

    def plain(*inputs: Tensor) -> Tensor:
        output = reference.embedding_layer_norm_dropout(*ids, *inputs, EPSILON, 0.0)
        return output * mask / (1 - dropout)

    compare(
        lambda *x: triton_embedding.embedding_layer_norm(*ids, *x, *arguments)[0],
        plain,
        inputs,
        1e-5,
    )


# Cross-entropy


@pytest.mark.parametrize(("rows", "columns"), [(0, 30), (1, 2), (37, 30), (5, 5000)])
def test_masked_cross_entropy(rows: int, columns: int) -> None:
    logits, labels = 3 * random(rows, columns), random_ids(rows, columns)
    if rows:
        labels[0] = logits[0].argmax()
    compare(
        lambda x: triton_provider.masked_cross_entropy(x, labels)[0],
        lambda x: reference.masked_cross_entropy(x, labels)[0],
        [logits],
        1e-6,
    )
    correct = triton_provider.masked_cross_entropy(logits, labels)[1]
    assert correct.dtype == torch.int64
    assert correct == reference.masked_cross_entropy(logits, labels)[1]
    assert correct > 0 or not rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_cross_entropy_dtypes_and_strides(dtype: torch.dtype) -> None:
    labels = random_ids(2 * 7, 30)[::2]
    for logits in (random(7, 60, dtype=dtype)[:, :30], random(30, 7, dtype=dtype).T):
        leaf = logits.detach().requires_grad_()
        exact = logits.detach().double().requires_grad_()
        ours, _ = triton_provider.masked_cross_entropy(leaf, labels)
        plain, _ = reference.masked_cross_entropy(exact, labels)
        assert_near(ours, plain, 1e-6)
        (3 * ours).backward()
        (3 * plain).backward()
        assert_near(leaf.grad, exact.grad, TOLERANCE[dtype])


def test_masked_cross_entropy_ties_go_to_the_lowest_index() -> None:
    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[1, 4500:] = 1.0
    logits[2, 3] = float("nan")
    labels = torch.tensor([0, 4500, 0, 1], device=DEVICE)
    assert triton_provider.masked_cross_entropy(logits, labels)[1] == 2
    assert triton_provider.masked_cross_entropy(logits[:2], labels[:2] + 1)[1] == 0


def test_masked_cross_entropy_ignores_negative_labels() -> None:
    logits, labels = random(5, 30), torch.tensor([3, -1, 7, -1, -100], device=DEVICE)
    logits[labels < 0] = float("nan")
    leaf = logits.clone().requires_grad_()
    loss, correct = triton_provider.masked_cross_entropy(leaf, labels)
    loss.backward()
    assert not leaf.grad[labels < 0].any()
    counted = labels >= 0
    exact = logits[counted].double().requires_grad_()
    expected, expected_correct = reference.masked_cross_entropy(exact, labels[counted])
    expected.backward()
    assert_near(loss, expected, 1e-6)
    assert correct == expected_correct
    assert_near(leaf.grad[counted], exact.grad, 1e-6)


def test_masked_cross_entropy_of_excluded_entries() -> None:
    logits, labels = random(2, 5000), torch.tensor([4999, 4990], device=DEVICE)
    logits[:, :4200] = float("-inf")
    compare(
        lambda x: triton_provider.masked_cross_entropy(x, labels)[0],
        lambda x: reference.masked_cross_entropy(x, labels)[0],
        [logits],
        1e-6,
    )


def test_a_label_beyond_the_vocabulary_shows_in_the_loss() -> None:
    """And is not looked up in the memory behind the row."""
    logits, labels = random(2, 60)[:, :30], torch.tensor([3, 40], device=DEVICE)
    assert triton_provider.masked_cross_entropy(logits, labels)[0] == float("inf")


# All operators


def dropping_calls(dropout: float) -> dict[str, Callable[[], Tensor]]:
    """The operators that drop, on fixed inputs that need gradients."""
    ids = [random_ids(40, size) for size in (50, 20, 2)]
    qkv, cu_seqlens = random(40, 3, 2, 8).requires_grad_(), bounds([7, 33])
    norm = [each.requires_grad_() for each in norm_inputs(40, 12)]
    tables = [each.requires_grad_() for each in randoms(TABLES)]
    return {
        "attention": lambda: triton_provider.attention(qkv, cu_seqlens, 33, dropout),
        "norm": lambda: triton_provider.bias_dropout_residual_layer_norm(*norm, EPSILON, dropout),
        "embedding": lambda: triton_provider.embedding_layer_norm_dropout(
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
        triton_provider.bias_gelu(random(2, 3).double(), random(3))
    with pytest.raises(ValueError, match="head size 136"):
        triton_provider.attention(random(2, 3, 1, 136), bounds([2]), 2, 0.0)


def test_every_operator_is_here() -> None:
    assert all(callable(getattr(triton_provider, operator)) for operator in OPERATORS)


def test_operators_keep_what_pytorch_asks_of_them() -> None:
    """Schemas, shapes of fake tensors, autograd: what torch.compile and graphs rely on."""
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
        hidden = triton_provider.embedding_layer_norm_dropout(
            *ids, *parameters[:5], EPSILON, dropout
        )
        qkv = (hidden @ parameters[5]).view(40, 3, 2, 6)
        context = triton_provider.attention(qkv, cu_seqlens, 33, dropout).view(40, 12)
        context = triton_provider.bias_gelu(context, parameters[4])
        hidden = triton_provider.bias_dropout_residual_layer_norm(
            context, parameters[4], hidden, *parameters[3:5], EPSILON, dropout
        )
        return triton_provider.masked_cross_entropy(hidden, labels)[0]

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


def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """The interpreter takes what the compiler refuses; the compiler needs no GPU."""
    tests = Path(__file__).resolve().parents[1]
    base = Path(reference.__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    path = [str(base), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, str(tests / "triton_compile.py"), "80", "90"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({kernel["kernel"] for kernel in kernels}) == 11
    for kernel in kernels:
        assert kernel["shared_bytes"] <= {80: 163, 90: 227}[kernel["capability"]] * 1024
        assert kernel["tensor_cores"] == ("attention" in kernel["kernel"])
        assert not kernel["atomics"]
