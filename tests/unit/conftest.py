"""Fixtures of the tests of `checkpoint ...`: a small checkpoint, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bert_pretraining import __main__ as command_line
from bert_pretraining.checkpoint import write_weights
from helpers import distinct_weights, tiny_config

SIZES = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 512, "type_vocab_size": 2,
}  # fmt: skip


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """Of a vocabulary of 101, padded with rows of 0 to 104."""
    made = distinct_weights(tiny_config())
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        made[name][101:] = 0.0
    return made


@pytest.fixture
def source(tmp_path: Path, weights: dict) -> Path:
    write_weights(tmp_path / "source.pt", weights)
    (tmp_path / "bert_config.json").write_text(json.dumps(SIZES))
    return tmp_path / "source.pt"


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process."""
    words = ["bert_pretraining", "checkpoint", *(str(part) for part in arguments)]
    monkeypatch.setattr("sys.argv", words)
    code = command_line.main()
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def run_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    return lambda *arguments: run(monkeypatch, capsys, *arguments)
