"""Flat LAMB: the layout, and the same bits for any threads, chunks and gradient memory."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.optim import flat_torch
from bert_pretraining.optim.flat import BLOCK, FlatLayout
from lamb_cases import assert_same_bits, case, give, make, parameters_of, snapshot

# Of many blocks, and long enough that PyTorch uses threads (from 32,768 elements on).
SHAPES = {
    "word.weight": (1301, 97),
    "word.bias": (1301,),
    "one.bias": (1,),
    "query.weight": (256, 256),
    "LayerNorm.weight": (1024,),
    "small.weight": (3, 7),
}


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def trained(dtype: torch.dtype, steps: int = 4) -> list[Tensor]:
    """All state after some steps on random gradients."""
    weights, gradients, rates = case(seed=2, scale=0.01, steps=steps, shapes=SHAPES)
    parameters = parameters_of(weights, dtype)
    optimizer = make("flat", parameters)
    for gradient, rate in zip(gradients, rates, strict=True):
        give(parameters, gradient)
        optimizer.step(rate)
    return [optimizer.gradient_norm.clone(), *snapshot(optimizer)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_threads_and_chunks_do_not_change_a_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    expected = trained(dtype)
    for threads in (1, 2, 3, 5, 8):
        torch.set_num_threads(threads)
        assert_same_bits(expected, trained(dtype))
    for chunk in (BLOCK, 5 * BLOCK, 64 * BLOCK):
        monkeypatch.setattr(flat_torch, "CPU_CHUNK", chunk)
        assert_same_bits(expected, trained(dtype))


def test_the_layout() -> None:
    shapes = [torch.Size(shape) for shape in SHAPES.values()]
    for multiple in (BLOCK, 7 * BLOCK):
        layout = FlatLayout(shapes, multiple)
        blocks = [-(-math.prod(shape) // BLOCK) for shape in shapes]
        assert layout.blocks == blocks
        assert layout.length % multiple == 0
        assert 0 <= layout.length - sum(blocks) * BLOCK < multiple
        # The last parameter comes first, and there are no gaps.
        assert layout.offsets[-1] == 0
        for index in range(len(shapes) - 1):
            assert layout.offsets[index] == layout.offsets[index + 1] + blocks[index + 1] * BLOCK
        tensors = [torch.full(shape, index + 1.0) for index, shape in enumerate(shapes)]
        flat = layout.filled(tensors)
        assert_same_bits(tensors, layout.views(flat))
        table = layout.parameter_of_block(torch.device("cpu"))
        used = flat.view(-1, BLOCK)[:, 0]
        assert torch.equal(table, torch.where(used > 0, used - 1, len(shapes)).int())
        sums = layout.sum_by_parameter(flat.view(-1, BLOCK).sum(1), torch.tensor(blocks))
        assert sums.dtype == torch.float64
        assert sums.tolist() == [(index + 1.0) * one.numel() for index, one in enumerate(tensors)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_parameters_are_views_and_padding_stays_zero(dtype: torch.dtype) -> None:
    weights, gradients, rates = case(seed=1, scale=0.1, steps=3, shapes=SHAPES)
    parameters = parameters_of(weights, dtype)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = make("flat", parameters)
    shard, layout = optimizer.shard, optimizer.layout
    home = shard.master if shard.rounded is None else shard.rounded
    assert (shard.rounded is None) == (dtype != torch.float16)
    ends = []
    for (name, parameter), offset in zip(parameters.items(), layout.offsets, strict=True):
        assert torch.equal(parameter, before[name])
        assert parameter.data_ptr() == home.data_ptr() + offset * home.element_size()
        ends.append((offset, offset + parameter.numel()))
    ends.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    for gradient, rate in zip(gradients, rates, strict=True):
        give(parameters, gradient)
        optimizer.step(rate)
    used = torch.zeros(layout.length, dtype=torch.bool)
    for view in layout.views(used):
        view.fill_(True)
    assert used.sum() == sum(parameter.numel() for parameter in parameters.values())
    for flat in (shard.master, shard.first, shard.second, home):
        assert not flat[~used].any()
        assert flat[used].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_may_lie_anywhere(dtype: torch.dtype) -> None:
    expected = trained(dtype)
    weights, gradients, rates = case(seed=2, scale=0.01, steps=4, shapes=SHAPES)
    parameters = parameters_of(weights, dtype)
    optimizer = make("flat", parameters)
    sizes = [parameter.numel() for parameter in parameters.values()]
    # Views of another tensor, at odd offsets.
    bucket = torch.zeros(sum(sizes) + 1, dtype=dtype)[1:]
    for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True)):
        give(parameters, gradient)
        for parameter, part in zip(parameters.values(), bucket.split(sizes), strict=True):
            if number % 2:
                part.copy_(parameter.grad.view(-1))
                parameter.grad = part.view(parameter.shape)
            elif parameter.dim() == 2:
                parameter.grad = parameter.grad.t().contiguous().t()
        optimizer.step(rate)
    assert_same_bits(expected, [optimizer.gradient_norm, *snapshot(optimizer)])


def test_backward_writes_into_the_views_and_tied_weights_are_one() -> None:
    torch.manual_seed(0)
    models = []
    for name in ("reference", "flat"):
        embedding = nn.Embedding(11, 6)
        model = nn.Sequential(embedding, nn.Linear(6, 6), nn.Linear(6, 11, bias=False))
        model[2].weight = embedding.weight
        with torch.no_grad():
            for index, parameter in enumerate(model.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator()
                                            .manual_seed(index)))  # fmt: skip
        assert len(list(model.named_parameters())) == 3
        optimizer = make(name, dict(model.named_parameters()))
        for step in range(5):
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            loss = model(torch.arange(11)).logsumexp(-1).mean()
            loss.backward()
            optimizer.step(0.01)
        assert model[2].weight is embedding.weight
        models.append(model)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


def test_a_copy_of_the_state_outlives_the_next_step() -> None:
    parameters = parameters_of(case(0, 1.0, 1, SHAPES)[0], torch.float32)
    optimizer = make("flat", parameters)
    state = copy.deepcopy(optimizer.state_dict())
    before = snapshot(optimizer)
    give(parameters, case(1, 1.0, 1, SHAPES)[1][0])
    optimizer.step(0.1)
    assert not torch.equal(before[1], snapshot(optimizer)[1])
    optimizer.load_state_dict(state)
    assert_same_bits(before, snapshot(optimizer))


def test_gradients_in_place_are_made_where_they_are_used() -> None:
    parameters = parameters_of(case(0, 1.0, 1, SHAPES)[0], torch.float32)
    optimizer = make("flat", parameters)
    for _ in range(2):
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in parameters.values()).backward()
        start = optimizer.shard.gradient.data_ptr()
        for parameter, offset in zip(parameters.values(), optimizer.layout.offsets, strict=True):
            assert parameter.grad.data_ptr() == start + 4 * offset
            assert torch.equal(parameter.grad, 2 * parameter.detach())
        assert optimizer.step(0.01)


def test_parameters_of_two_kinds_are_refused() -> None:
    mixed = {
        "a.weight": nn.Parameter(torch.ones(2)),
        "b.weight": nn.Parameter(torch.ones(2).half()),
    }
    with pytest.raises(UserError, match=r"one dtype on one device, not torch\.float16 on cpu"):
        make("flat", mixed)
