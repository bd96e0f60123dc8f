"""Batches of constant shape: the same losses and gradients, whatever follows the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bert_pretraining.kernels.reference import IGNORED
from bert_pretraining.training.micro_step import MicroStep, forward_backward
from bert_pretraining.training.static_batch import Budget, StaticBatch, usual_budget
from helpers import make_model, packed, padded_arrays, tiny_config

CPU = torch.device("cpu")
LENGTHS = np.random.RandomState(4).randint(5, 65, 24)
ARRAYS = padded_arrays(LENGTHS.tolist(), 64, 101, seed=2)
FIRST, SECOND = packed(ARRAYS, slice(0, 8)), packed(ARRAYS, slice(8, 16))
WEIGHTS = {"mlm": torch.tensor(0.01), "nsp": torch.tensor(0.2)}


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    taken = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return taken


def tight_budget() -> Budget:
    most = max(FIRST.num_tokens, SECOND.num_tokens)
    return Budget(most + 70, 8, max(FIRST.num_masked, SECOND.num_masked) + 3, 64, dummies=5)


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_a_static_batch_trains_like_the_batch_itself(provider: str) -> None:
    model = make_model(tiny_config(), provider)
    static = StaticBatch(tight_budget(), CPU, IGNORED)
    for batch in (FIRST, SECOND, FIRST):  # each leaves its tokens in the buffers
        expected_sums = forward_backward(model, batch, WEIGHTS)
        expected = gradients(model)
        loaded = static.load(batch)
        assert loaded.num_tokens == static.budget.tokens
        sums = forward_backward(model, loaded, WEIGHTS)
        torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_memory_that_was_never_written_reaches_nothing(provider: str) -> None:
    """Here PyTorch fills every uninitialised tensor with NaN."""
    model = make_model(tiny_config(), provider)
    expected_sums = forward_backward(model, FIRST, WEIGHTS)
    expected = gradients(model)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.empty(3).isnan().all()
        loaded = StaticBatch(tight_budget(), CPU, IGNORED).load(FIRST)
        sums = forward_backward(model, loaded, WEIGHTS)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_fits_a_budget() -> None:
    budget = Budget(tokens=100, sequences=2, masked=10, max_seqlen=60, dummies=1)
    arrays = padded_arrays([30, 10, 60, 39, 60, 41], 64, 101)
    assert budget.fits(packed(arrays, slice(0, 2)))  # 40 tokens, one dummy of 60
    assert not budget.fits(packed(arrays, slice(1, 2)))  # one sequence
    assert not budget.fits(packed(arrays, slice(4, 6)))  # 101 tokens
    few = packed(padded_arrays([30, 9], 64, 101))
    assert not budget.fits(few)  # 61 tokens to fill, more than a dummy may hold
    with pytest.raises(ValueError, match="do not fit"):
        StaticBatch(budget, CPU, IGNORED).load(few)


def test_budgets_of_the_published_data_set() -> None:
    usual = usual_budget(48, 512)
    assert (usual.tokens, usual.masked, usual.max_seqlen) == (12544, 1920, 512)
    for lengths, fits in (([1] * 48, False), ([512] * 48, False), ([256] * 48, True)):
        arrays = padded_arrays(lengths, 512, 101)
        arrays["masked_lm_ids"][:, 38:] = 0  # about the mean of the published data set
        assert usual.fits(packed(arrays)) is fits
    small = usual_budget(4, 64)
    assert small.tokens == 4 * 64


@pytest.mark.parametrize("extra", [0, 1, 70, 3 * 64])
def test_what_fills_a_batch_is_spread_and_follows_from_it(extra: int) -> None:
    budget = Budget(FIRST.num_tokens + extra, 8, FIRST.num_masked + 7, 64, dummies=5)
    fresh, used = (StaticBatch(budget, CPU, IGNORED) for _ in range(2))
    if budget.fits(SECOND):
        used.load(SECOND)
    batch = fresh.load(FIRST)
    for name, tensor in used.load(FIRST).tensors().items():
        assert torch.equal(tensor, getattr(batch, name)), name
    for name in ("input_ids", "position_ids", "segment_ids"):
        filled, own = getattr(batch, name), getattr(FIRST, name)
        assert torch.equal(filled, own.repeat(3)[: len(filled)])
    places = batch.masked_positions[FIRST.num_masked :]
    assert len(set(places.tolist())) == 7
    assert 0 <= places.min() <= places.max() < budget.tokens


def test_a_batch_much_smaller_than_its_budget() -> None:
    budget = Budget(tokens=50, sequences=1, masked=60, max_seqlen=64, dummies=1)
    tiny = packed(padded_arrays([7], 64, 101))
    batch = StaticBatch(budget, CPU, IGNORED).load(tiny)
    assert torch.equal(batch.input_ids, tiny.input_ids.repeat(8)[:50])
    assert batch.masked_positions.max() < 50


def test_a_batch_of_any_size_takes_a_step() -> None:
    """One that fits no budget keeps its own shape."""
    model = make_model(tiny_config())
    step = MicroStep(model, CPU, usual_budget(8, 64, FIRST.num_tokens + 10), graph=False)
    step.prepare(lambda: model.zero_grad(set_to_none=False))
    assert not any(parameter.grad.any() for parameter in model.parameters())
    for batch in (FIRST, packed(padded_arrays([64] * 8, 64, 101)), packed(ARRAYS, slice(16, 19))):
        expected = forward_backward(model, batch, WEIGHTS)
        reference = gradients(model)
        torch.testing.assert_close(step(batch, WEIGHTS), expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(gradients(model), reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
