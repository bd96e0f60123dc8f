"""Evaluation: the sums of the batches, whatever they lie on and whoever has them."""

from __future__ import annotations

import pytest
import torch

from bert_pretraining.data import loader
from bert_pretraining.data.loader import EvaluationSet
from bert_pretraining.model.losses import LossMeans
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.evaluate import evaluate
from helpers import make_model, packed, padded_arrays, tiny_config

CPU = torch.device("cpu")
LENGTHS = [[9, 16, 3], [4], [16, 16, 5, 7]]
BATCHES = [packed(padded_arrays(lengths, 16, 101, seed=7)) for lengths in LENGTHS]


@pytest.mark.parametrize("losses", [("mlm", "nsp"), ("mlm",)], ids="+".join)
def test_the_means_are_those_of_all_predictions(losses: tuple[str, ...]) -> None:
    model = make_model(tiny_config(hidden_dropout_prob=0.5))  # which evaluation leaves out
    model.losses = losses
    evaluation_set = EvaluationSet(5, [(1, BATCHES[0]), (2, BATCHES[1]), (4, BATCHES[2])])
    found = evaluate(model, evaluation_set, Ranks(0, 1, CPU))
    assert model.training
    model.eval()
    with torch.no_grad():
        results = [model(batch) for batch in BATCHES]
    parts = [[float(part) for name in losses for part in sums[name]] for sums in results]
    counts = [[float(batch.num_predictions(name)) for name in losses] for batch in BATCHES]
    sums = [sum(column) for column in zip(*parts, strict=True)]
    sums += [sum(column) for column in zip(*counts, strict=True)]
    assert found.losses == LossMeans.of(losses, sums)
    assert found.num_sequences == 8
    assert 0.0 < found.loss < 20.0


def test_a_rank_without_batches() -> None:
    model = make_model(tiny_config())
    assert evaluate(model, EvaluationSet(2, []), Ranks(3, 1, CPU)).num_sequences == 0


def test_only_a_small_set_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.device("meta")
    few = EvaluationSet(3, list(enumerate(BATCHES)))
    tokens, masked, sequences = (
        sum(getattr(batch, what) for batch in BATCHES)
        for what in ("num_tokens", "num_masked", "num_sequences")
    )
    assert few.num_bytes == 12 * tokens + 4 * (sequences + 3) + 12 * masked + 8 * sequences
    near = few.near(there)
    assert [number for number, _ in near.batches] == [0, 1, 2]
    for batch, same in zip(near.on(there), near.batches, strict=True):
        assert batch is same[1]
        assert batch.input_ids.device.type == "meta"
    monkeypatch.setattr(loader, "STAYING_BYTES", few.num_bytes - 1)
    assert few.near(there) is few
    shapes = [batch.input_ids.shape for batch in few.on(there)]
    assert shapes == [batch.input_ids.shape for batch in BATCHES]
