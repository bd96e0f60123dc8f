"""The Triton attention against `reference` in float64: forward, gradients, dropout, padding.

On a GPU the kernels run natively, otherwise in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

# Imported first: it selects Triton's interpreter before any kernel is defined.
from triton_helpers import (
    DEVICE,
    DTYPES,
    NATIVE,
    TOLERANCE,
    assert_near,
    bounds,
    compare,
    fixed_seed,
    random,
)

# isort: split
from bert_pretraining.kernels import (
    reference,
    triton_attention,
    triton_attention_tilings,
    triton_operators,
)
from bert_pretraining.kernels.triton_attention_tilings import Problem, Tiling, Tilings

LENGTHS = [[1], [1, 1, 1], [7, 33, 3], [64, 64], [0, 5, 0, 0, 70, 0]]
LONG = [[511], [512, 1, 300]]


def check_attention(qkv: Tensor, lengths: list[int], longest: int, tolerance: float) -> None:
    cu_seqlens = bounds(lengths)
    compare(
        lambda x: triton_operators.attention(x, cu_seqlens, longest, 0.0),
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
        output = triton_operators.attention(leaf, bounds(lengths), 512, 0.1)
        return torch.autograd.grad(output, leaf, output.detach())[0]

    assert torch.equal(gradient(), gradient())


def test_attention_strides() -> None:
    cu_seqlens = bounds([5, 6])
    qkv = random(11, 3, 2, 8)
    expected = triton_operators.attention(qkv, cu_seqlens, 6, 0.0)
    parts_first = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    numbers_apart = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (parts_first, numbers_apart):
        assert not view.is_contiguous()
        assert torch.equal(triton_operators.attention(view, cu_seqlens, 6, 0.0), expected)
        check_attention(view, [5, 6], 6, 1e-5)
    leaf = qkv.clone().requires_grad_()
    ones = torch.ones_like(expected)
    (wanted,) = torch.autograd.grad(
        triton_operators.attention(leaf, cu_seqlens, 6, 0.0), leaf, ones
    )
    # The gradient of a sum is one number, expanded with strides of 0.
    triton_operators.attention(leaf, cu_seqlens, 6, 0.0).sum().backward()
    assert torch.equal(leaf.grad, wanted)


@pytest.mark.parametrize(("longest", "padding"), [(33, 9), (50, 9), (33, 150)])
def test_attention_never_reads_padding(longest: int, padding: int) -> None:
    lengths = [7, 0, 33]
    cu_seqlens = bounds(lengths)
    qkv = random(40 + padding, 3, 2, 8)
    qkv[40:] = float("nan")
    leaf = qkv.clone().requires_grad_()
    output = triton_operators.attention(leaf, cu_seqlens, longest, 0.0)
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
    """Each sequence's kept weights, (heads, queries, keys), shown by identity matrices as V."""
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
    """Calls with another head size and the backward kernels recompute the forward mask."""
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


# Block sizes


def seconds_of(numbers: list[float]) -> Callable[[Callable[[], object]], float]:
    """A stopwatch that runs nothing, and gives these times, one after the other."""
    times = iter(numbers)
    return lambda _: next(times)


@pytest.mark.parametrize("sizes", [(16, 32), (32, 16)])
def test_other_block_sizes_drop_the_same_weights(sizes: tuple[int, int]) -> None:
    """Results differ by rounding alone."""
    lengths, seed = [7, 40], fixed_seed()
    qkv, direction = random(47, 3, 2, 8), random(47, 2, 8, seed=9)
    inputs = (qkv, bounds(lengths), 40, 0.4, seed)
    problem = triton_attention.problem_of(qkv, 40)

    def run() -> list[Tensor]:
        context, saved = triton_attention.forward(*inputs)
        return [context, triton_attention.backward(direction, *inputs, context, saved)]

    expected = run()
    try:
        triton_attention_tilings.use(problem, Tilings(*[Tiling(*sizes, 4, 1)] * 3))
        found = run()
    finally:
        triton_attention_tilings.use(problem, None)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_measurement_changes_no_block_sizes() -> None:
    """Otherwise a resumed run would not give the bits of one that was not interrupted."""
    qkv = random(5, 3, 1, 16, dtype=torch.bfloat16)
    problem = triton_attention.problem_of(qkv, 5)
    kernels = ("forward", "query_gradient", "key_value_gradient")
    count = [len(triton_attention_tilings.candidates(kernel, problem)) for kernel in kernels]
    found = triton_attention.tune(
        seconds_of(list(range(sum(count)))), qkv, bounds([5]), 5, 0.1, fixed_seed()
    )
    assert [len(found[kernel]) for kernel in kernels] == count
    for kernel in kernels:
        assert next(iter(found[kernel])) == getattr(triton_attention_tilings.fixed(problem), kernel)
    assert triton_attention_tilings.tilings(problem) == triton_attention_tilings.fixed(problem)


def test_block_sizes_are_chosen_for_a_class_of_lengths() -> None:
    classes = [triton_attention_tilings.length_class(length) for length in (1, 64, 65, 256, 512)]
    assert classes == [0, 0, 1, 2, 3]
    short, long = (Problem(64, torch.bfloat16, False, one) for one in (0, 3))
    other = Tilings(*[Tiling(128, 64, 8, 2)] * 3)
    try:
        triton_attention_tilings.use(long, other)
        assert triton_attention_tilings.tilings(long) == other
        assert triton_attention_tilings.tilings(short) == triton_attention_tilings.fixed(short)
    finally:
        triton_attention_tilings.use(long, None)


@pytest.mark.parametrize(("allowed", "dtype", "expected"), [
    (True, torch.float32, True), (True, torch.bfloat16, False), (False, torch.float32, False),
])  # fmt: skip
def test_tf32_only_where_it_is_allowed(
    allowed: bool, dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention.arithmetic, "multiplies_in_tf32", lambda _: allowed)
    qkv = random(5, 3, 1, 16, dtype=dtype)
    assert triton_attention.problem_of(qkv, 5).tf32 == expected
    output = triton_operators.attention(qkv, bounds([5]), 5, 0.0)
    exact = reference.attention(qkv.double(), bounds([5]), 5, 0.0)
    assert_near(output, exact, TOLERANCE[torch.float16] if expected else TOLERANCE[dtype])
