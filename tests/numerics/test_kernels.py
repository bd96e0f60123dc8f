"""Every provider of every operator against `reference`: forward, gradients, dropout."""

from __future__ import annotations

import pytest
import torch

from bert_pretraining.errors import UserError
from bert_pretraining.kernels import OPERATORS, reference, select, torch_provider

CPU = torch.device("cpu")
ATTENTIONS = (
    torch_provider.cpu_attention,
    torch_provider.looped_attention,
    torch_provider.padded_attention,
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def compare(ours: object, plain: object, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Both functions' outputs, and the gradients of a random projection of them."""
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


@pytest.mark.parametrize("rows", [0, 1, 37])
def test_masked_cross_entropy(rows: int) -> None:
    labels = torch.randint(0, 30, (rows,))
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


@pytest.mark.parametrize("provider", ["auto", "reference", "torch"])
def test_every_operator_has_a_provider_and_the_choice_is_told(provider: str) -> None:
    kernels = select(provider, CPU, torch.float32)
    assert set(kernels.choice) == set(OPERATORS)
    for operator in OPERATORS:
        assert callable(getattr(kernels, operator))
        assert f"{operator}=" in kernels.describe()


def test_unknown_provider() -> None:
    with pytest.raises(UserError, match="--kernels cuda: no such provider"):
        select("cuda", CPU, torch.float32)


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


def test_an_attention_that_is_refused_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which is no CPU, as on a GPU without flash attention."""

    def refuse(*_: object) -> None:
        raise RuntimeError("no kernel for this device")

    meta = torch.device("meta")
    monkeypatch.setattr(torch_provider, "flash_attention", refuse)
    monkeypatch.setattr(torch_provider, "efficient_attention", refuse)
    tried = []
    monkeypatch.setattr(torch_provider, "_try_attention", lambda *given: tried.append(given[0]) or (
        refuse() if given[0] is refuse else None))  # fmt: skip
    attention, why = torch_provider.attention_for(meta, torch.float16, 64)
    assert attention is torch_provider.padded_attention
    assert why.startswith("padded; flash refused: no kernel for this device; memory-efficient")
    monkeypatch.setattr(torch_provider, "padded_attention", refuse)
    with pytest.raises(UserError, match="no attention runs on meta"):
        torch_provider.attention_for(meta, torch.float16, 64)
