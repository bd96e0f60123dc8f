"""Checkpoints: strict, safe, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bert_pretraining.checkpoint import load_weights, read_weights, save_checkpoint, write_weights
from bert_pretraining.errors import UserError
from bert_pretraining.model.heads import BertForPreTraining
from helpers import REFERENCE, make_model, needs_reference, tiny_config


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: value + 1 for name, value in make_model(tiny_config()).state_dict().items()}


@pytest.fixture
def model() -> BertForPreTraining:
    return make_model(tiny_config())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: w.pop("bert.pooler.dense.bias"), r"\n  missing: bert.pooler.dense.bias \(32,\)"),
        (lambda w: w.update(extra=torch.ones(1)), r"\n  unexpected: extra \(1,\)"),
        (
            lambda w: w.update({"bert.pooler.dense.bias": torch.ones(3)}),
            r"\n  wrong shape: bert.pooler.dense.bias is \(3,\), the model's is \(32,\)",
        ),
        (
            lambda w: w.update({"cls.predictions.decoder.weight": torch.zeros(104, 32)}),
            "decoder.weight differs from",
        ),
    ],
)
def test_unfit_weights_are_named_and_nothing_is_loaded(
    tmp_path: Path, model: BertForPreTraining, weights: dict, spoil: object, words: str
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spoil(weights)
    write_weights(tmp_path / "start.pt", weights)
    with pytest.raises(UserError, match=words):
        load_weights(model, tmp_path / "start.pt")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_other_contents(tmp_path: Path) -> None:
    torch.save({1: torch.ones(1)}, tmp_path / "numbers.pt")
    fix = r"holds no named tensors.*; export .*state_dict\(\).*--init_checkpoint"
    with pytest.raises(UserError, match=fix):
        read_weights(tmp_path / "numbers.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no named tensors"):
        read_weights(tmp_path / "list.pt")
    with pytest.raises(UserError, match="no checkpoint at"):
        read_weights(tmp_path / "absent.pt")


def test_saving_replaces_whole_files_only(tmp_path: Path, weights: dict) -> None:
    path = tmp_path / "output" / "model.ckpt-1.pt"
    save_checkpoint(path, weights, {"updates": 1}, {"global_steps": 1})
    assert [file.name for file in path.parent.iterdir()] == ["model.ckpt-1.pt"]
    content = torch.load(path, weights_only=True)
    assert set(content) == {"model", "optimizer", "state"}


@needs_reference
def test_the_reference_checkpoint_fits_its_config() -> None:
    from bert_pretraining.model.bert_config import BertConfig

    model = make_model(BertConfig.load(REFERENCE / "checkpoint/bert_config.json"))
    load_weights(model, REFERENCE / "checkpoint/model.ckpt-28252.apex.pt")
    assert model.bert.embeddings.word_embeddings.weight.shape == (30528, 64)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"not valid JSON .*; correct it \(docs/data.md shows one\), or take the file of the"),
        ("{}", "no keys 'vocab_size', 'hidden_size', 'num_hidden_layers', .* needs; correct it"),
        ("[1]", "must hold a JSON object, not list; correct it"),
        ('{"vocab_size": "64"}', "'vocab_size' must be a positive integer, not '64'"),
        ('{"vocab_size": Infinity}', "'vocab_size' must be a positive integer"),
        ('{"vocab_size": 0}', "'vocab_size' must be a positive integer"),
        ('{"vocab_size": 8.5}', "'vocab_size' must be a positive integer"),
        ('{"hidden_dropout_prob": 3}', "'hidden_dropout_prob' must be from 0 to below 1"),
        ('{"hidden_size": 7}', "hidden_size 7 is not divisible by num_attention_heads 2"),
        ('{"hidden_act": "relu"}', "hidden_act 'relu' is not supported"),
    ],
)
def test_bad_bert_config(tmp_path: Path, text: str, words: str) -> None:
    from bert_pretraining.model.bert_config import BertConfig

    if text.startswith('{"'):
        good = {
            "vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 8, "max_position_embeddings": 8.0,
        }  # fmt: skip
        (tmp_path / "bert_config.json").write_text(json.dumps(good))
        assert isinstance(
            BertConfig.load(tmp_path / "bert_config.json").max_position_embeddings, int
        )
        text = json.dumps({**good, **json.loads(text)})
    (tmp_path / "bert_config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        BertConfig.load(tmp_path / "bert_config.json")
    with pytest.raises(UserError, match="cannot read"):
        BertConfig.load(tmp_path / "absent.json")
