"""The model compared with the reference's recorded numbers, and with a padded model."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bert_pretraining.checkpoint import load_weights
from bert_pretraining.commands import checkpoint
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import mean_loss
from bert_pretraining.preparation.examples import (
    ExampleSettings,
    create_examples,
    pick,
    to_arrays,
)
from bert_pretraining.preparation.vocabulary import Vocabulary
from helpers import REFERENCE, make_model, needs_reference, packed, padded_arrays, tiny_config

TF1 = REFERENCE / "checkpoint/tf1/model.ckpt-28252"
PROVIDERS = ("reference", "torch")


@pytest.fixture(scope="module")
def eval_1k() -> dict[str, np.ndarray]:
    """The reference's part_eval_1k, made from its text (tests/unit checks the bytes)."""
    vocab = Vocabulary.load(REFERENCE / "vocab.txt")
    text = (REFERENCE / "text" / "eval.txt").read_text(encoding="utf-8")
    settings = ExampleSettings()
    examples = create_examples(vocab.documents(text), vocab, settings, random.Random(12345))
    return pick(to_arrays(examples, settings), 1000)


@pytest.fixture(scope="module")
def numerics() -> dict:
    return json.loads((REFERENCE / "model_numerics.json").read_text())


@pytest.fixture(params=PROVIDERS)
def reference_model(request: pytest.FixtureRequest) -> BertForPreTraining:
    model = make_model(BertConfig.load(REFERENCE / "checkpoint/bert_config.json"), request.param)
    load_weights(model, REFERENCE / "checkpoint/model.ckpt-28252.apex.pt")
    return model.eval()


def loss_of(model: BertForPreTraining, arrays: dict, rows: slice) -> tuple[torch.Tensor, float]:
    """Upstream's loss (MLM mean + NSP mean) and accuracy of one batch."""
    batch = packed(arrays, rows)
    sums = model(batch)
    return mean_loss(sums, batch), sums["mlm"].correct.item() / batch.num_masked


@needs_reference
def test_losses_and_accuracies_of_batches(
    reference_model: BertForPreTraining, eval_1k: dict, numerics: dict
) -> None:
    for recorded in numerics["eval_batches_of_20"]:
        rows = slice(*recorded["rows"])
        with torch.no_grad():
            loss, accuracy = loss_of(reference_model, eval_1k, rows)
        assert packed(eval_1k, rows).num_masked == recorded["masked_tokens"]
        assert loss.item() == pytest.approx(recorded["loss"], rel=1e-4)
        assert accuracy == pytest.approx(recorded["mlm_accuracy"], rel=1e-4)


@pytest.mark.slow
@needs_reference
def test_loss_and_accuracy_of_all_1000(
    reference_model: BertForPreTraining, eval_1k: dict, numerics: dict
) -> None:
    losses, accuracies, weights = [], [], []
    for start in range(0, 1000, 20):
        with torch.no_grad():
            loss, accuracy = loss_of(reference_model, eval_1k, slice(start, start + 20))
        losses.append(loss.item())
        accuracies.append(accuracy)
        weights.append(packed(eval_1k, slice(start, start + 20)).num_masked)
    recorded = numerics["eval_all_1000"]
    assert sum(weights) == recorded["masked_tokens"]
    assert np.average(losses, weights=weights) == pytest.approx(recorded["eval_loss"], rel=1e-4)
    assert np.average(accuracies, weights=weights) == pytest.approx(
        recorded["eval_mlm_accuracy"], rel=1e-4
    )


@needs_reference
def test_every_gradient_norm(
    reference_model: BertForPreTraining, eval_1k: dict, numerics: dict
) -> None:
    assert_recorded_gradients(reference_model, eval_1k, numerics)


@needs_reference
@pytest.mark.parametrize("form", ["TensorFlow 1", "Hugging Face"])
def test_the_same_from_every_form_of_the_checkpoint(
    tmp_path: Path, eval_1k: dict, numerics: dict, form: str
) -> None:
    config, source = REFERENCE / "checkpoint/bert_config.json", TF1
    if form == "Hugging Face":
        source = tmp_path / "exported"
        flags = ["--to", "hf", "--bert_config", str(config)]
        checkpoint.convert([str(TF1), str(source), *flags])
    model = make_model(BertConfig.load(config), "torch")
    assert load_weights(model, source).format.startswith(form)
    model.eval()
    for recorded in numerics["eval_batches_of_20"][:3]:
        with torch.no_grad():
            loss, accuracy = loss_of(model, eval_1k, slice(*recorded["rows"]))
        assert loss.item() == pytest.approx(recorded["loss"], rel=1e-4)
        assert accuracy == pytest.approx(recorded["mlm_accuracy"], rel=1e-4)
    assert_recorded_gradients(model, eval_1k, numerics)


def assert_recorded_gradients(model: BertForPreTraining, eval_1k: dict, numerics: dict) -> None:
    recorded = numerics["train_batch_rows_0_8_no_dropout"]
    loss, _ = loss_of(model, eval_1k, slice(0, 8))
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss"], rel=1e-4)
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert set(norms) <= set(recorded["grad_l2"])
    for name, norm in norms.items():
        # A key's bias shifts all scores of a query equally: its true gradient is 0.
        assert norm == pytest.approx(recorded["grad_l2"][name], rel=1e-4, abs=1e-7), name


def padded_loss(model: BertForPreTraining, arrays: dict) -> torch.Tensor:
    """The same model in its textbook form, over padded (B, S) input."""
    ids = torch.tensor(arrays["input_ids"], dtype=torch.long)
    mask = torch.tensor(arrays["input_mask"], dtype=torch.bool)
    table, config = model.bert.embeddings, model.config
    hidden = (
        table.word_embeddings(ids)
        + table.position_embeddings(torch.arange(ids.shape[1]))
        + table.token_type_embeddings(torch.tensor(arrays["segment_ids"], dtype=torch.long))
    )

    def norm(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, 1e-12)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)

    hidden = norm(hidden, table.LayerNorm)
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        query, key, value = (
            heads(f(hidden)) for f in (attention.query, attention.key, attention.value)
        )
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
        context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        out = layer.attention.output
        hidden = norm(out.dense(context) + hidden, out.LayerNorm)
        inner = F.gelu(layer.intermediate.dense(hidden), approximate="tanh")
        hidden = norm(layer.output.dense(inner) + hidden, layer.output.LayerNorm)
    pooled = torch.tanh(model.bert.pooler.dense(hidden[:, 0]))
    head = model.cls.predictions
    inner = norm(F.gelu(head.transform.dense(hidden), approximate="tanh"), head.transform.LayerNorm)
    logits = inner @ head.decoder.weight.T + head.bias
    labels = torch.zeros_like(ids)
    row, column = np.nonzero(arrays["masked_lm_ids"])
    labels[row, arrays["masked_lm_positions"][row, column].astype(int)] = torch.tensor(
        arrays["masked_lm_ids"][row, column], dtype=torch.long
    )
    mlm = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)
    next_labels = torch.tensor(arrays["next_sentence_labels"], dtype=torch.long)
    return mlm + F.cross_entropy(model.cls.seq_relationship(pooled), next_labels)


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [64], [64] * 3, [1, 33, 64, 2, 17], [200, 3]])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_packed_is_padded_in_float64(lengths: list[int], provider: str) -> None:
    model = make_model(tiny_config(), provider, torch.float64)
    arrays = padded_arrays(lengths, max(lengths), 101, seed=sum(lengths))
    if provider == "torch":
        model.float()  # its cross-entropy is float32
    expected = padded_loss(model, arrays)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss, _ = loss_of(model, arrays, slice(None))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    tolerance = 1e-9 if provider == "reference" else 2e-5
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for name, ours, theirs in zip(
        dict(model.named_parameters()), gradients, expected_gradients, strict=True
    ):
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=10 * tolerance,
            atol=tolerance,
            msg=lambda text, n=name: f"{n}: {text}",
        )


def test_initial_weights_follow_the_seed_alone() -> None:
    config = tiny_config()
    first, second = make_model(config), make_model(config, "torch")
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two), name
    embedding = first.bert.embeddings.word_embeddings.weight
    assert embedding.shape[0] == 104
    assert not embedding[101:].any()
    assert embedding[:101].std().item() == pytest.approx(0.2, rel=0.1)
