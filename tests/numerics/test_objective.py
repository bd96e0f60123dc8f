"""Training without next-sentence prediction, and losses by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import load_weights, write_weights
from bert_pretraining.config import FIELDS
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import select
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import OBJECTIVES, LossMeans, LossTotals, mean_loss
from bert_pretraining.training.micro_step import forward_backward
from helpers import distinct_weights, packed, padded_arrays, tiny_config

CPU = torch.device("cpu")
BATCH = packed(padded_arrays([30, 7, 52], 64, 101, seed=3))


def model(*losses: str) -> BertForPreTraining:
    kernels = select("torch", CPU, torch.float32)
    return BertForPreTraining(tiny_config(), kernels, seed=1, losses=losses)


def test_without_nsp_the_mlm_loss_and_its_gradients_are_the_same(tmp_path: Path) -> None:
    write_weights(tmp_path / "start.pt", distinct_weights(tiny_config()))
    both, alone = model("mlm", "nsp"), model("mlm")
    load_weights(both, tmp_path / "start.pt")
    found = load_weights(alone, tmp_path / "start.pt")
    assert "left out: next-sentence head (4)" in found.summary()
    assert set(both.state_dict()) - set(alone.state_dict()) == {
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
        *("cls.seq_relationship.weight", "cls.seq_relationship.bias"),
    }
    weight, none = torch.tensor(0.5), torch.tensor(0.0)
    sums = forward_backward(both, BATCH, {"mlm": weight, "nsp": none})
    assert list(sums) == ["mlm", "nsp"]
    only = forward_backward(alone, BATCH, {"mlm": weight})
    assert list(only) == ["mlm"]
    assert torch.equal(only["mlm"].loss, sums["mlm"].loss)
    gradients = {name: parameter.grad for name, parameter in both.named_parameters()}
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-8)


def test_a_checkpoint_without_the_head_starts_mlm_alone(tmp_path: Path) -> None:
    weights = model("mlm").state_dict()
    write_weights(tmp_path / "start.pt", weights)
    load_weights(model("mlm"), tmp_path / "start.pt")
    with pytest.raises(
        UserError,
        match=r"no next-sentence head, .*, tensors 4 missing .*; pass --objective mlm to train",
    ) as caught:
        load_weights(model("mlm", "nsp"), tmp_path / "start.pt")
    assert "missing: bert.pooler.dense.weight (32, 32)" in str(caught.value)
    del weights["bert.embeddings.LayerNorm.bias"]
    write_weights(tmp_path / "less.pt", weights)
    with pytest.raises(UserError, match=r"pass the checkpoint and bert_config\.json of one model"):
        load_weights(model("mlm", "nsp"), tmp_path / "less.pt")


@pytest.mark.parametrize("losses", [("mlm", "nsp"), ("mlm",)])
def test_totals_over_batches_and_ranks(losses: tuple[str, ...]) -> None:
    batches = [packed(padded_arrays([9, 16], 16, 101, seed=seed)) for seed in range(3)]
    trained = model(*losses)
    ranks = [LossTotals(losses, CPU), LossTotals(losses, CPU)]
    with torch.no_grad():
        sums = [trained(batch) for batch in batches]
    for total, which in ((ranks[0], (0, 2)), (ranks[1], (1,))):
        for index in which:
            total.add(sums[index], batches[index])
    means = LossMeans.of(losses, (ranks[0].flat() + ranks[1].flat()).tolist())
    masked = sum(batch.num_masked for batch in batches)
    assert means.counts == {"mlm": masked, "nsp": 6} if "nsp" in losses else {"mlm": masked}
    expected = sum(float(one["mlm"].loss) for one in sums) / masked
    assert means.mean["mlm"] == pytest.approx(expected, rel=1e-6)
    assert means.accuracy["mlm"] == sum(int(one["mlm"].correct) for one in sums) / masked
    assert means.loss == pytest.approx(sum(means.mean.values()))


def test_no_prediction_makes_a_mean_of_zero() -> None:
    arrays = padded_arrays([4, 4], 16, 101)
    arrays["masked_lm_ids"][:] = 0
    batch = packed(arrays)
    sums = model("mlm")(batch)
    assert mean_loss(sums, batch).item() == 0.0
    totals = LossTotals(("mlm",), CPU)
    totals.add(sums, batch)
    assert LossMeans.of(totals.names, totals.flat().tolist()).mean == {"mlm": 0.0}


def test_every_objective_is_a_choice() -> None:
    assert FIELDS["objective"].metadata["choices"] == tuple(OBJECTIVES)
