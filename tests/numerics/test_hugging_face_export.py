"""What `checkpoint convert --to hf` writes, loaded by Hugging Face itself."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_pretraining.checkpoint import load_weights, write_weights
from bert_pretraining.commands import checkpoint
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import mean_loss
from helpers import REFERENCE, make_model, needs_reference, packed, padded_arrays

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

CHECKPOINT = REFERENCE / "checkpoint"
LENGTHS = [30, 1, 52, 11, 64, 5]


def load_quietly(directory: Path) -> torch.nn.Module:
    """Load with from_pretrained, which must not report anything; dropout is off."""
    said: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = transformers.logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, report = transformers.BertForPreTraining.from_pretrained(
                directory, output_loading_info=True
            )
    finally:
        logger.removeHandler(handler)
    assert said == []
    assert not any(report.values()), report
    return model.eval()


def their_loss(model: torch.nn.Module, arrays: dict[str, np.ndarray]) -> torch.Tensor:
    labels = np.full(arrays["input_ids"].shape, -100)
    for row, (positions, ids) in enumerate(
        zip(arrays["masked_lm_positions"], arrays["masked_lm_ids"], strict=True)
    ):
        labels[row, positions[ids != 0]] = ids[ids != 0]
    padded = {
        "input_ids": arrays["input_ids"],
        "attention_mask": arrays["input_mask"],
        "token_type_ids": arrays["segment_ids"],
        "labels": labels,
        "next_sentence_label": arrays["next_sentence_labels"],
    }
    with torch.no_grad():
        return model(**{key: torch.tensor(value).long() for key, value in padded.items()}).loss


def our_loss(model: BertForPreTraining, arrays: dict[str, np.ndarray]) -> torch.Tensor:
    batch = packed(arrays)
    with torch.no_grad():
        return mean_loss(model.eval()(batch), batch)


@needs_reference
@pytest.mark.parametrize("name", ["model.ckpt-28252.apex.pt", "tf1/model.ckpt-28252"])
def test_the_reference_checkpoint_exported(tmp_path: Path, name: str) -> None:
    config = CHECKPOINT / "bert_config.json"
    flags = ["--to", "hf", "--bert_config", str(config)]
    checkpoint.convert([str(CHECKPOINT / name), str(tmp_path / "hf"), *flags])
    theirs = load_quietly(tmp_path / "hf")
    assert theirs.config.vocab_size == 30528
    assert theirs.config.layer_norm_eps == 1e-12
    ours = make_model(BertConfig.load(config))
    load_weights(ours, CHECKPOINT / name)
    arrays = padded_arrays(LENGTHS, 64, 30522, seed=3)
    expected = our_loss(ours, arrays)
    torch.testing.assert_close(their_loss(theirs, arrays), expected, rtol=1e-5, atol=1e-5)
    # With other weights the loss differs, so the comparison can fail.
    theirs.cls.predictions.bias.data[100:200] += 1.0
    assert abs(their_loss(theirs, arrays) - expected) > 1e-3


@needs_reference
def test_an_export_without_padding_loses_its_share_of_the_softmax_alone(tmp_path: Path) -> None:
    config = CHECKPOINT / "bert_config.json"
    flags = ["--to", "hf", "--bert_config", str(config), "--trim_vocab"]
    source = CHECKPOINT / "model.ckpt-28252.apex.pt"
    checkpoint.convert([str(source), str(tmp_path / "hf"), *flags])
    theirs = load_quietly(tmp_path / "hf")
    assert theirs.config.vocab_size == 30522
    ours = make_model(BertConfig.load(config))
    load_weights(ours, source)
    ours.cls.predictions.bias.data[30522:] = -1e4  # this removes the padding from the softmax
    arrays = padded_arrays(LENGTHS, 64, 30522, seed=3)
    torch.testing.assert_close(
        their_loss(theirs, arrays), our_loss(ours, arrays), rtol=1e-5, atol=1e-5
    )


def test_bf16_weights_stay_bf16(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "bert_config.json").write_text(str(sizes).replace("'", '"'))
    ours = make_model(BertConfig(**sizes), dtype=torch.bfloat16)
    write_weights(tmp_path / "start.pt", ours.state_dict())
    checkpoint.convert([str(tmp_path / "start.pt"), str(tmp_path / "hf"), "--to", "hf"])
    theirs = load_quietly(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    arrays = padded_arrays(LENGTHS, 64, 101, seed=3)
    torch.testing.assert_close(
        their_loss(theirs, arrays).float(), our_loss(ours, arrays).float(), rtol=2e-2, atol=2e-2
    )
