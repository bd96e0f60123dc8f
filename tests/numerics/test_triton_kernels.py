"""The Triton kernels of whole rows against `reference` in float64: forward, gradients, dropout.

On a GPU the kernels run natively, otherwise in Triton's interpreter. Attention has its own file.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import (
    DEVICE,
    DTYPES,
    EPSILON,
    TABLES,
    TOLERANCE,
    assert_near,
    compare,
    fixed_seed,
    norm_inputs,
    random,
    random_ids,
    randoms,
)

# isort: split
from bert_pretraining.kernels import (
    reference,
    triton_embedding,
    triton_layer_norm,
    triton_operators,
)

# Bias and GELU


@pytest.mark.parametrize("shape", [(1, 12), (33, 64), (300, 100), (2, 3, 5000), (0, 12)])
def test_bias_gelu(shape: tuple[int, ...]) -> None:
    inputs = randoms([shape, shape[-1:]])
    compare(triton_operators.bias_gelu, reference.bias_gelu, inputs, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_gelu_dtypes_and_strides(dtype: torch.dtype) -> None:
    x, bias = random(64, 33, dtype=dtype).T, random(64, seed=1)
    compare(triton_operators.bias_gelu, reference.bias_gelu, [x, bias], TOLERANCE[dtype])
    leaf = x.detach().requires_grad_()
    triton_operators.bias_gelu(leaf, bias).sum().backward()
    exact = x.detach().double().requires_grad_()
    reference.bias_gelu(exact, bias.double()).sum().backward()
    assert_near(leaf.grad, exact.grad, TOLERANCE[dtype])


def test_bias_gelu_of_large_numbers() -> None:
    x = torch.tensor([[-1e30, -1e4, -11.0, 11.0, 1e4, 1e30]], device=DEVICE, requires_grad=True)
    output = triton_operators.bias_gelu(x, torch.zeros(6, device=DEVICE))
    output.sum().backward()
    expected = torch.tensor([[0, 0, 0, 11, 1e4, 1e30]], device=DEVICE)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, (expected > 0).float(), rtol=0, atol=1e-6)


# Residual LayerNorm


def check_norm(inputs: list[Tensor], tolerance: float) -> None:
    compare(
        lambda *x: triton_operators.bias_dropout_residual_layer_norm(*x, EPSILON, 0.0),
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
    # As with autocast: 16-bit activations, float32 parameters.
    check_norm([x, bias.float(), residual, weight.float(), norm_bias.float()], 2 * TOLERANCE[dtype])
    apart = [x.T.contiguous().T, bias, residual.T.contiguous().T, weight, norm_bias]
    check_norm(apart, 2 * TOLERANCE[dtype])


def test_residual_layer_norm_sums_over_many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_layer_norm, "BACKWARD_PROGRAMS", 3)
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
    """Totals, rows, columns and adjacent elements, each within five standard deviations."""
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


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_embedding_layer_norm(tokens: int, id_dtype: torch.dtype) -> None:
    ids = [random_ids(tokens, size, id_dtype) for size in (50, 20, 2)]
    compare(
        lambda *x: triton_operators.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        lambda *x: reference.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        randoms(TABLES),
        1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_embedding_layer_norm_dtypes_and_strides(dtype: torch.dtype) -> None:
    ids = [random_ids(2 * 20, size)[::2] for size in (50, 20, 2)]
    tables = [each.T.contiguous().T for each in randoms(TABLES[:3], dtype)]
    compare(
        lambda *x: triton_operators.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        lambda *x: reference.embedding_layer_norm_dropout(*ids, *x, EPSILON, 0.0),
        [*tables, *randoms(TABLES[3:])],
        2 * TOLERANCE[dtype],
    )


@pytest.mark.parametrize("dropout", [0.1, 0.6])
def test_embedding_dropout_forward_and_backward(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_layer_norm, "BACKWARD_PROGRAMS", 3)
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
        lambda x: triton_operators.masked_cross_entropy(x, labels)[0],
        lambda x: reference.masked_cross_entropy(x, labels)[0],
        [logits],
        1e-6,
    )
    correct = triton_operators.masked_cross_entropy(logits, labels)[1]
    assert correct.dtype == torch.int64
    assert correct == reference.masked_cross_entropy(logits, labels)[1]
    assert correct > 0 or not rows


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masked_cross_entropy_dtypes_and_strides(dtype: torch.dtype) -> None:
    labels = random_ids(2 * 7, 30)[::2]
    for logits in (random(7, 60, dtype=dtype)[:, :30], random(30, 7, dtype=dtype).T):
        leaf = logits.detach().requires_grad_()
        exact = logits.detach().double().requires_grad_()
        ours, _ = triton_operators.masked_cross_entropy(leaf, labels)
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
    assert triton_operators.masked_cross_entropy(logits, labels)[1] == 2
    assert triton_operators.masked_cross_entropy(logits[:2], labels[:2] + 1)[1] == 0


def test_masked_cross_entropy_ignores_negative_labels() -> None:
    logits, labels = random(5, 30), torch.tensor([3, -1, 7, -1, -100], device=DEVICE)
    logits[labels < 0] = float("nan")
    leaf = logits.clone().requires_grad_()
    loss, correct = triton_operators.masked_cross_entropy(leaf, labels)
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
        lambda x: triton_operators.masked_cross_entropy(x, labels)[0],
        lambda x: reference.masked_cross_entropy(x, labels)[0],
        [logits],
        1e-6,
    )


def test_a_label_beyond_the_vocabulary_shows_in_the_loss() -> None:
    """The kernel does not read the memory after the row."""
    logits, labels = random(2, 60)[:, :30], torch.tensor([3, 40], device=DEVICE)
    assert triton_operators.masked_cross_entropy(logits, labels)[0] == float("inf")
