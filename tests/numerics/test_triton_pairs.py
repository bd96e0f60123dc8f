"""Operators as plain functions, forward and backward, against `reference` in float64.

A backward function adds the gradients of parameters to what the given tensors hold.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import (
    DEVICE,
    EPSILON,
    NATIVE,
    TABLES,
    TOLERANCE,
    assert_near,
    bounds,
    fixed_seed,
    norm_inputs,
    random,
    random_ids,
    randoms,
)

# isort: split
from bert_pretraining.kernels import (
    cuda_attention,
    reference,
    triton_attention,
    triton_bias_gelu,
    triton_cross_entropy,
    triton_embedding,
    triton_layer_norm,
    triton_operators,
)
from bert_pretraining.kernels.pairs import Pair
from bert_pretraining.kernels.triton_pairs import PAIRS
from bert_pretraining.kernels.triton_sums import add_partial_sums, column_sum, stack

GRADIENT_DTYPES = [torch.float32, torch.bfloat16]


def exact_gradients(
    operator: Callable, inputs: list[Tensor], direction: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The operator's output, and the gradients of its product with the direction, in float64."""
    exact = [each.detach().double().requires_grad_() for each in inputs]
    output = operator(*exact)
    return output.detach(), torch.autograd.grad(output, exact, direction.double())


def some_gradients(count: int, columns: int, dtype: torch.dtype) -> tuple[list[Tensor], list]:
    """Gradients that are not zero, and a copy of each in float64."""
    gradients = [random(columns, seed=50 + number, dtype=dtype) for number in range(count)]
    return gradients, [each.double() for each in gradients]


# Sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(0, 12), (1, 12), (7, 1030), (300, 100)])
def test_column_sum_is_added(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, out = random(rows, columns), random(columns, seed=1, dtype=dtype)
    expected = out.double() + x.double().sum(0)
    column_sum(x, out)
    assert_near(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_three_tensors_are_stacked_and_summed(rows: int) -> None:
    parts, sums = randoms([(rows, 2, 7)] * 3), random(42, seed=9)
    stacked = torch.stack(parts, 1)
    expected = sums.double() + stacked.double().flatten(1).sum(0)
    assert torch.equal(stack(parts, sums), stacked)
    assert_near(sums, expected, 2e-5)


@pytest.mark.parametrize("parts", [0, 1, 64, 70])
def test_partial_sums_of_any_number_of_rows_and_dtypes(parts: int) -> None:
    partial = random(parts, 5, 33)
    outputs = [random(33), random(33, seed=1, dtype=torch.float16), random(3, 33, seed=2)]
    sums = partial.double().sum(0)
    terms = (sums[0], sums[1], sums[2:])
    before = [each.double() for each in outputs]
    add_partial_sums(partial, outputs)
    for output, old, term in zip(outputs, before, terms, strict=True):
        assert_near(output, old + term, TOLERANCE[output.dtype])
    add_partial_sums(partial, outputs, add=False)
    for output, term in zip(outputs, terms, strict=True):
        assert_near(output, term, TOLERANCE[output.dtype])


# The pairs of a layer


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
@pytest.mark.parametrize("shape", [(0, 12), (1, 12), (150, 100), (3, 1500)])
def test_bias_gelu_pair(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, bias, direction = randoms([shape, shape[1:], shape])
    expected, (x_gradient, bias_gradient) = exact_gradients(
        reference.bias_gelu, [x, bias], direction
    )
    assert_near(PAIRS.bias_gelu.forward(x, bias), expected, 1e-5)
    (gradient,), (before,) = some_gradients(1, shape[1], dtype)
    assert_near(PAIRS.bias_gelu.backward(direction, x, bias, gradient), x_gradient, 1e-5)
    assert_near(gradient, before + bias_gradient, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("rows", "columns"), [(0, 12), (1, 12), (33, 100), (5, 1100)])
def test_norm_pair(rows: int, columns: int, dropout: float, dtype: torch.dtype) -> None:
    pair = PAIRS.bias_dropout_residual_layer_norm
    x, bias, residual, weight, norm_bias = norm_inputs(rows, columns)
    x = x.sign() * (x.abs() + 0.1) - bias  # so that x + bias is not near 0
    seed = fixed_seed() if dropout else None
    output, saved = pair.forward(x, bias, residual, weight, norm_bias, EPSILON, dropout, seed)
    mask = saved[0] != residual  # of the forward pass
    if dropout and rows > 1:
        assert 0 < mask.sum() < mask.numel()

    def plain(x: Tensor, bias: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        summed = residual + (x + bias) * mask / (1 - dropout)
        return reference.layer_norm(summed, *parameters, EPSILON)

    direction = random(rows, columns, seed=9)
    inputs = [x, bias, residual, weight, norm_bias]
    expected, (x_gradient, *wanted) = exact_gradients(plain, inputs, direction)
    assert_near(output, expected, 2e-5)
    gradients, before = some_gradients(3, columns, dtype)
    both = pair.backward(direction, weight, dropout, seed, saved, *gradients)
    assert_near(both[0], x_gradient, 2e-5)
    assert_near(both[1], wanted.pop(1), 2e-5)
    for gradient, old, term in zip(gradients, before, wanted, strict=True):
        assert_near(gradient, old + term, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("lengths", [[1], [7, 33, 0, 3]])
def test_attention_pair(lengths: list[int]) -> None:
    check_attention(PAIRS.attention, lengths, torch.float32, 1e-5)


def check_attention(pair: Pair, lengths: list[int], dtype: torch.dtype, tolerance: float) -> None:
    cu_seqlens, longest = bounds(lengths), max(lengths)
    qkv = random(sum(lengths), 3, 2, 16, dtype=dtype)
    direction = random(sum(lengths), 2, 16, seed=9, dtype=dtype)
    expected, (wanted,) = exact_gradients(
        lambda x: reference.attention(x, cu_seqlens, longest, 0.0), [qkv], direction
    )
    context, saved = pair.forward(qkv, cu_seqlens, longest, 0.0, None)
    assert_near(context, expected, tolerance)
    inputs = (direction, qkv, cu_seqlens, longest, 0.0, None)
    bias_gradient = random(96, seed=8)
    before = bias_gradient.double()
    gradient = pair.backward(*inputs, context, saved, bias_gradient, add_partial_sums)
    assert gradient.is_contiguous()
    assert_near(gradient, wanted, 2 * tolerance)
    assert_near(bias_gradient, before + wanted.flatten(1).sum(0), 8 * tolerance)


@pytest.mark.skipif(not NATIVE, reason="no CUDA device")
@pytest.mark.parametrize("pair", [cuda_attention.FLASH, cuda_attention.EFFICIENT])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_pairs_of_pytorch(pair: Pair, dtype: torch.dtype) -> None:
    check_attention(pair, [7, 130, 33, 3], dtype, TOLERANCE[dtype])


def test_attention_pair_drops_the_same_weights_in_both_passes() -> None:
    """The gradient of the values is linear in the mask, and the context shows the mask."""
    lengths, seed, dropout = [5, 20], fixed_seed(), 0.4
    cu_seqlens = bounds(lengths)
    qkv = torch.zeros(25, 3, 1, 32, device=DEVICE)  # equal weights: 1 / length
    for start, length in ((0, 5), (5, 20)):
        qkv[start : start + length, 2, 0] = torch.eye(length, 32, device=DEVICE)
    context, saved = PAIRS.attention.forward(qkv, cu_seqlens, 20, dropout, seed)
    # Query i's direction marks it, so that the gradient of a value shows which queries used it.
    inputs = (qkv[:, 2].contiguous(), qkv, cu_seqlens, 20, dropout, seed)
    bias_gradient = torch.zeros(96, device=DEVICE)
    gradient = PAIRS.attention.backward(*inputs, context, saved, bias_gradient)[:, 2, 0]
    for start, length in ((0, 5), (5, 20)):
        kept = context[start : start + length, 0, :length]
        assert 0 < (kept == 0).sum() < kept.numel()
        torch.testing.assert_close(gradient[start : start + length, :length], kept.T)


def test_seeds_may_be_rows_of_one_tensor() -> None:
    seeds = torch.stack([fixed_seed(1), fixed_seed(2)])
    inputs = norm_inputs(3, 12)
    for row, alone in zip(seeds, (fixed_seed(1), fixed_seed(2)), strict=True):
        outputs = [
            PAIRS.bias_dropout_residual_layer_norm.forward(*inputs, EPSILON, 0.5, seed)[0]
            for seed in (row, alone)
        ]
        assert torch.equal(*outputs)


# Embeddings: entries of one token, of many tokens, and across the ends of chunks


def embedding_ids(tokens: int, repeated: int) -> tuple[Tensor, ...]:
    """Random ids; the last `repeated` tokens are filler: one word at one position."""
    ids = tuple(random_ids(tokens, size, torch.int32) for size in (50, 20, 2))
    for each in ids[:2]:
        each[tokens - repeated :] = 0
    return ids


@pytest.mark.parametrize("dtype", GRADIENT_DTYPES)
@pytest.mark.parametrize(("tokens", "repeated"), [(0, 0), (1, 0), (90, 0), (600, 500)])
def test_embedding_adds_to_all_gradients(tokens: int, repeated: int, dtype: torch.dtype) -> None:
    ids, inputs = embedding_ids(tokens, repeated), randoms(TABLES)
    tables, (weight, norm_bias) = tuple(inputs[:3]), inputs[3:]
    direction = random(tokens, 12, seed=9)
    expected, wanted = exact_gradients(
        lambda *x: reference.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        inputs,
        direction,
    )
    output, saved = triton_embedding.forward(ids, tables, weight, norm_bias, EPSILON, 0.0, None)
    assert_near(output, expected, 1e-5)
    gradients = [random(*each.shape, seed=3, dtype=dtype) for each in inputs]
    before = [each.double() for each in gradients]
    given = (direction, ids, tables, weight, 0.0, None, saved)
    triton_embedding.backward(*given, tuple(gradients[:3]), *gradients[3:])
    for gradient, old, term in zip(gradients, before, wanted, strict=True):
        assert_near(gradient, old + term, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("tokens", [64, 65, 128])
def test_embedding_gradients_at_the_ends_of_chunks(tokens: int) -> None:
    """All tokens have one word, one position and one segment: the sums are the column sums."""
    ids = tuple(torch.ones(tokens, dtype=torch.int32, device=DEVICE) for _ in range(3))
    leaves = [each.requires_grad_() for each in randoms(TABLES)]
    output = triton_operators.embedding_layer_norm_dropout(*ids, *leaves, EPSILON, 0.0)
    direction = random(tokens, 12, seed=9)
    found = torch.autograd.grad(output, leaves, direction)
    _, wanted = exact_gradients(
        lambda *x: reference.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        leaves,
        direction,
    )
    for gradient, exact in zip(found, wanted, strict=True):
        assert_near(gradient, exact, 2e-5)


# Autograd functions and custom operators launch the same kernels


def both_ways() -> dict[str, tuple[Callable, Callable, list[Tensor]]]:
    """For each operator: the autograd function, the custom operator, and the leaves."""
    ids, seed = embedding_ids(40, 10), fixed_seed()
    cu_seqlens, labels = bounds([7, 33]), random_ids(40, 12)
    labels[3] = -1
    tail = (seed, EPSILON, 0.3)
    return {
        "attention": (
            lambda x: triton_attention.PackedAttention.apply(x, cu_seqlens, 33, seed, 0.3),
            lambda x: triton_attention.packed_attention(x, cu_seqlens, 33, seed, 0.3)[0],
            [random(40, 3, 2, 8)],
        ),
        "gelu": (
            triton_bias_gelu.BiasGelu.apply,
            triton_bias_gelu.bias_gelu,
            randoms([(40, 12), (12,)]),
        ),
        "norm": (
            lambda *x: triton_layer_norm.ResidualLayerNorm.apply(*x, *tail),
            lambda *x: triton_layer_norm.residual_layer_norm(*x, *tail)[0],
            norm_inputs(40, 12),
        ),
        "embedding": (
            lambda *x: triton_embedding.EmbeddingLayerNorm.apply(*ids, *x, *tail),
            lambda *x: triton_embedding.embedding_layer_norm(*ids, *x, *tail)[0],
            randoms(TABLES),
        ),
        "cross_entropy": (
            lambda x: triton_cross_entropy.CrossEntropy.apply(x, labels)[0],
            lambda x: triton_cross_entropy.cross_entropy(x, labels)[0],
            [random(40, 12)],
        ),
    }


@pytest.mark.parametrize("name", ["attention", "gelu", "norm", "embedding", "cross_entropy"])
def test_both_ways_give_the_same_bits(name: str) -> None:
    plain, operator, leaves = both_ways()[name]
    results = []
    for run in (plain, operator):
        inputs = [each.clone().requires_grad_() for each in leaves]
        output = run(*inputs)
        direction = random(*output.shape, seed=9)
        results.append([output, *torch.autograd.grad(output, inputs, direction)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
