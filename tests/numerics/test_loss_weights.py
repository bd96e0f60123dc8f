"""How losses of micro-batches are averaged, compared with explicit sums."""

from __future__ import annotations

import pytest
import torch

from bert_pretraining.model.losses import mean_loss
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.loss_weights import loss_weights
from helpers import make_model, packed, padded_arrays, tiny_config

ALONE = Ranks(0, 1, torch.device("cpu"))
ARRAYS = padded_arrays([30, 7, 52, 11, 64, 5], 64, 101, seed=3)
ROWS = (slice(0, 1), slice(1, 4), slice(4, 6))


def gradients(normalization: str) -> list[torch.Tensor]:
    """The gradients of an update of three micro-batches, added as in the training loop."""
    model = make_model(tiny_config())
    batches = [packed(ARRAYS, rows) for rows in ROWS]
    for batch, weights in zip(
        batches, loss_weights(batches, model.losses, normalization, ALONE), strict=True
    ):
        sums = model(batch)
        sum(sums[name].loss * weight for name, weight in weights.items()).backward()
    return [parameter.grad for parameter in model.parameters()]


def test_global_is_one_batch_of_all() -> None:
    model = make_model(tiny_config())
    batch = packed(ARRAYS)
    loss = mean_loss(model(batch), batch)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(gradients("global"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_rank_is_the_mean_of_the_micro_batches_means() -> None:
    model = make_model(tiny_config())
    loss = 0.0
    for rows in ROWS:
        batch = packed(ARRAYS, rows)
        loss = loss + mean_loss(model(batch), batch) / 3
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for ours, theirs in zip(gradients("rank"), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalization", ["rank", "global"])
def test_a_batch_without_masked_tokens_divides_by_nothing(normalization: str) -> None:
    arrays = padded_arrays([4, 4], 16, 101)
    arrays["masked_lm_ids"][:] = 0
    (weights,) = loss_weights([packed(arrays)], ("mlm", "nsp"), normalization, ALONE)
    assert {name: float(weight) for name, weight in weights.items()} == {"mlm": 1.0, "nsp": 0.5}
