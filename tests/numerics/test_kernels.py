"""Every provider of every operator compared with `reference`: forward, gradients, dropout."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bert_pretraining.kernels import (
    cpu_attention,
    reference,
    select,
    torch_provider,
)
from bert_pretraining.kernels.dropout import dropout, dropout_add, keep_mask, keep_scale

CPU = torch.device("cpu")
OURS = torch.ops.bert_pretraining  # where cuda_attention registers its operators
ATTENTIONS = (
    cpu_attention.cpu_attention,
    cpu_attention.looped_attention,
    cpu_attention.padded_attention,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def compare(ours: object, plain: object, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Compare both functions' outputs, and the gradients of a random projection of them."""
    outputs = ours(*inputs), plain(*inputs)
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)
    direction = random(*outputs[0].shape, seed=99, dtype=outputs[0].dtype).detach()
    direction = direction.to(outputs[0].device)
    ours_gradients, plain_gradients = (
        torch.autograd.grad((output * direction).sum(), inputs) for output in outputs
    )
    for ours_gradient, plain_gradient in zip(ours_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(
            ours_gradient, plain_gradient, rtol=10 * tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [7, 128, 3], [511], [512, 512], [129, 1]])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention(attention: object, lengths: list[int]) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = random(sum(lengths), 3, 2, 8, seed=len(lengths), dtype=torch.float64)
    compare(
        lambda x: attention(x, cu_seqlens, max(lengths), 0.0),
        lambda x: reference.attention(x, cu_seqlens, max(lengths), 0.0),
        [qkv],
        1e-10,
    )


@pytest.mark.parametrize("attention", [*ATTENTIONS, reference.attention])
def test_empty_sequences_and_tokens_of_no_sequence(attention: object) -> None:
    """Tokens after the last sequence give zeros and do not affect other tokens."""
    cu_seqlens = torch.tensor([0, 5, 5, 12, 12], dtype=torch.int32)
    qkv = random(15, 3, 2, 8, dtype=torch.float64)
    poisoned = qkv.detach().clone()
    poisoned[12:] = float("nan")
    poisoned.requires_grad_()
    context = attention(poisoned, cu_seqlens, 7, 0.0)
    assert not context[12:].any()
    plain = reference.attention(qkv[:12], torch.tensor([0, 5, 12]), 7, 0.0)
    torch.testing.assert_close(context[:12], plain, rtol=1e-10, atol=1e-10)
    direction = random(12, 2, 8, seed=9, dtype=torch.float64).detach()
    (gradient,) = torch.autograd.grad((context[:12] * direction).sum(), poisoned)
    (expected,) = torch.autograd.grad((plain * direction).sum(), qkv)
    torch.testing.assert_close(gradient[:12], expected[:12], rtol=1e-9, atol=1e-9)
    assert not gradient[12:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_looped_attention_drops_the_same_weights_forward_and_backward(dtype: torch.dtype) -> None:
    """Each key has a value that marks it, so the context shows which weights were kept."""
    length, probability = 6, 0.4
    qkv = random(length, 3, 1, length, dtype=dtype).detach()
    qkv[:, 2, 0] = torch.eye(length, dtype=dtype)
    qkv.requires_grad_()
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    torch.manual_seed(3)
    context = cpu_attention.looped_attention(qkv, cu_seqlens, length, probability)[:, 0]
    query, key = qkv[:, 0, 0], qkv[:, 1, 0]
    weights = torch.softmax(query @ key.T / length**0.5, dim=-1)
    mask = context.detach() != 0
    assert 0 < mask.sum() < length * length
    expected = weights * mask * keep_scale(probability) @ qkv[:, 2, 0]
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-6)
    direction = random(length, length, seed=5, dtype=dtype).detach()
    ours, theirs = (
        torch.autograd.grad((out * direction).sum(), qkv)[0] for out in (context, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.5, 0.9])
def test_dropout_masks(probability: float) -> None:
    torch.manual_seed(0)
    masks = [keep_mask((501, 403), probability) for _ in range(2)]
    assert not torch.equal(*masks)
    for mask in masks:
        assert 1 - mask.double().mean().item() == pytest.approx(probability, abs=0.004)
        # Adjacent elements share a random number, but are independent.
        flat = mask.flatten().double()
        for distance in (1, 2, 3, 4):
            both = (flat[distance:] * flat[:-distance]).mean().item()
            assert both == pytest.approx((1 - probability) ** 2, abs=0.006)
    torch.manual_seed(0)
    assert torch.equal(keep_mask((501, 403), probability), masks[0])
    assert keep_mask((0, 3), probability).shape == (0, 3)


@pytest.mark.parametrize("shape", [(1, 3), (7, 12), (33, 5)])
@pytest.mark.parametrize("probability", [0.0, 0.3])
def test_dropout_and_residual(shape: tuple[int, int], probability: float) -> None:
    x, residual = random(*shape, dtype=torch.float64), random(*shape, seed=1, dtype=torch.float64)
    bias = random(shape[1], seed=2, dtype=torch.float64)
    torch.manual_seed(5)
    mask = keep_mask(shape, probability) if probability else torch.ones(shape, dtype=torch.bool)
    scale = keep_scale(probability)

    def seeded(function: object) -> object:
        def run(*inputs: torch.Tensor) -> torch.Tensor:
            torch.manual_seed(5)
            return function(*inputs, probability)

        return run

    compare(
        seeded(dropout_add),
        lambda x, bias, residual: residual + (x + bias) * mask * scale,
        [x, bias, residual],
        1e-12,
    )
    compare(seeded(dropout), lambda x: x * mask * scale, [x], 1e-12)


@pytest.mark.parametrize("attention", [*ATTENTIONS, reference.attention])
def test_attention_dropout_keeps_the_mean_and_follows_the_seed(attention: object) -> None:
    lengths = [40, 3, 21]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv = random(64, 3, 2, 8).detach()

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return attention(qkv, cu_seqlens, 40, 0.1)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    mean = torch.stack([draw(seed) for seed in range(400)]).mean(0)
    plain = reference.attention(qkv, cu_seqlens, 40, 0.0)
    assert (mean - plain).abs().max() < 0.15
    assert (mean - plain).abs().mean() < 0.02


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_bias_gelu(rows: int) -> None:
    inputs = [random(rows, 12, dtype=torch.float64), random(12, seed=1, dtype=torch.float64)]
    compare(torch_provider.bias_gelu, reference.bias_gelu, inputs, 1e-12)


@pytest.mark.parametrize("rows", [1, 5, 33])
def test_bias_dropout_residual_layer_norm(rows: int) -> None:
    shapes = [(rows, 12), (12,), (rows, 12), (12,), (12,)]
    inputs = [random(*shape, seed=n, dtype=torch.float64) for n, shape in enumerate(shapes)]
    compare(
        lambda *x: torch_provider.bias_dropout_residual_layer_norm(*x, 1e-12, 0.0),
        lambda *x: reference.bias_dropout_residual_layer_norm(*x, 1e-12, 0.0),
        inputs,
        1e-10,
    )


@pytest.mark.parametrize("tokens", [1, 40])
def test_embedding_layer_norm_dropout(tokens: int) -> None:
    ids = [torch.randint(0, size, (tokens,)) for size in (50, 20, 2)]
    shapes = [(50, 12), (20, 12), (2, 12), (12,), (12,)]
    inputs = [random(*shape, seed=n, dtype=torch.float64) for n, shape in enumerate(shapes)]
    compare(
        lambda *x: torch_provider.embedding_layer_norm_dropout(*ids, *x, 1e-12, 0.0),
        lambda *x: reference.embedding_layer_norm_dropout(*ids, *x, 1e-12, 0.0),
        inputs,
        1e-10,
    )


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 37])
def test_masked_cross_entropy(rows: int, ignored: float) -> None:
    labels = torch.randint(0, 30, (rows,))
    labels[torch.rand(rows) < ignored] = reference.IGNORED
    logits = random(rows, 30)
    ours = torch_provider.masked_cross_entropy(logits, labels)
    plain = reference.masked_cross_entropy(logits, labels)
    assert ours[1].item() == plain[1].item()
    compare(
        lambda x: torch_provider.masked_cross_entropy(x, labels)[0],
        lambda x: reference.masked_cross_entropy(x, labels)[0],
        [logits],
        1e-5,
    )


def test_dropout_of_the_other_operators_keeps_the_mean() -> None:
    x, bias = torch.ones(2000, 16), torch.zeros(16)
    weight, zero = torch.ones(16), torch.zeros(16)
    ids = torch.zeros(2000, dtype=torch.long)
    tables = [torch.randn(3, 16) for _ in range(3)]
    for provider in (reference, torch_provider):
        torch.manual_seed(0)
        out = provider.embedding_layer_norm_dropout(
            ids, ids, ids, *tables, weight, zero, 1e-12, 0.1
        )
        plain = provider.embedding_layer_norm_dropout(
            ids, ids, ids, *tables, weight, zero, 1e-12, 0.0
        )
        assert (out == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
        assert (out.mean(0) - plain[0]).abs().max() < 0.1
        noisy = provider.bias_dropout_residual_layer_norm(x, bias, x, weight, zero, 1e-12, 0.1)
        assert noisy.std() > 0.5  # without dropout all rows are constant: their norm is 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [7, 128, 3], [512, 511, 1]])
def test_cuda_attention(dtype: torch.dtype, lengths: list[int]) -> None:
    device = torch.device("cuda", 0)
    attention, _ = torch_provider.attention_for(device, dtype, 64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    qkv = random(sum(lengths), 3, 2, 64).detach().to(device, dtype).requires_grad_()
    compare(
        lambda x: attention(x, cu_seqlens, max(lengths), 0.0),
        lambda x: reference.attention(x, cu_seqlens, max(lengths), 0.0),
        [qkv],
        {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype],
    )
    plain = reference.attention(qkv, cu_seqlens, max(lengths), 0.0)
    mean = torch.stack([attention(qkv, cu_seqlens, max(lengths), 0.1) for _ in range(200)]).mean(0)
    assert (mean - plain).abs().mean() < 0.1


def test_cuda_operators_have_shape_functions() -> None:
    """What torch.compile needs, tested without a GPU: shapes and dtypes of the operators."""
    mode = FakeTensorMode()
    with mode:
        qkv = torch.empty(40, 3, 4, 64, dtype=torch.float16, device="meta")
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="meta")
        for forward, backward in (
            (OURS.flash_attention, OURS.flash_attention_backward),
            (OURS.efficient_attention, OURS.efficient_attention_backward),
        ):
            context, log_sum_exp, seed, offset = forward(qkv, cu_seqlens, 20, 0.1)
            assert (context.shape, context.dtype) == ((40, 4, 64), torch.float16)
            assert log_sum_exp.dtype == torch.float32
            given = (context, qkv, context, log_sum_exp, cu_seqlens, 20, 0.1, seed, offset)
            assert backward(*given).shape == qkv.shape


def test_the_caller_keeps_its_gradient() -> None:
    """With one head, the transposed gradient shares memory with the caller's gradient."""
    qkv = random(6, 3, 1, 8)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
    context = cpu_attention.looped_attention(qkv, cu_seqlens, 6, 0.5)
    gradient = torch.ones_like(context)
    torch.autograd.grad(context, qkv, gradient)
    assert torch.equal(gradient, torch.ones_like(gradient))


def test_operators_that_draw_masks_say_so() -> None:
    """Otherwise a compiled model that recomputes a layer would draw other masks."""
    for operator in (OURS.flash_attention, OURS.efficient_attention):
        assert torch.Tag.nondeterministic_seeded in operator.default.tags


def test_the_summary_names_the_provider_of_most_operators_first() -> None:
    kernels = select("torch", CPU, torch.float32)
    assert kernels.summary() == "torch"
    mixed = {"attention": "torch (one by one)", "bias_gelu": "triton", "layer": "triton (fast)"}
    mixed_kernels = dataclasses.replace(kernels, choice=mixed)
    assert mixed_kernels.summary() == "triton; torch for attention"
