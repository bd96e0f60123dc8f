"""The model compared with Hugging Face's BertForPreTraining, whose input is padded."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from bert_pretraining.model.losses import mean_loss
from helpers import make_model, packed, padded_arrays, tiny_config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

LENGTHS = [30, 1, 52, 11, 64, 5]


def hugging_face_model(ours: torch.nn.Module) -> torch.nn.Module:
    sizes = ours.config
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=sizes.padded_vocab_size,
            hidden_size=sizes.hidden_size,
            num_hidden_layers=sizes.num_hidden_layers,
            num_attention_heads=sizes.num_attention_heads,
            intermediate_size=sizes.intermediate_size,
            max_position_embeddings=sizes.max_position_embeddings,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=sizes.layer_norm_epsilon,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
        )
    ).to(torch.float32)
    weights = ours.state_dict()
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    report = theirs.load_state_dict(weights, strict=False)
    assert report.unexpected_keys == []
    assert all("position_ids" in key for key in report.missing_keys)
    return theirs


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_loss_and_all_gradients(provider: str) -> None:
    ours = make_model(tiny_config(max_position_embeddings=64), provider)
    theirs = hugging_face_model(ours)
    arrays = padded_arrays(LENGTHS, 64, 101, seed=3)
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
    expected = theirs(**{key: torch.tensor(value).long() for key, value in padded.items()}).loss
    expected.backward()

    batch = packed(arrays)
    loss = mean_loss(ours(batch), batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = {name: value.grad for name, value in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
