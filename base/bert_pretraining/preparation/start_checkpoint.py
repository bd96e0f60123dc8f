"""Making the start checkpoint of the mini data set, at random or from a training run."""

from __future__ import annotations

from pathlib import Path

import torch

from bert_pretraining.checkpoint import read_weights, write_weights
from bert_pretraining.errors import UserError
from bert_pretraining.kernels import select
from bert_pretraining.model.bert_config import BertConfig
from bert_pretraining.model.heads import BertForPreTraining


def write_random_start(data_dir: Path, checkpoint_name: str, seed: int) -> None:
    """Write random weights for `data_dir/bert_config.json`, in the apex layout."""
    config = BertConfig.load(data_dir / "bert_config.json")
    kernels = select("reference", torch.device("cpu"), torch.float32)
    model = BertForPreTraining(config, kernels, seed)
    write_weights(data_dir / checkpoint_name, model.state_dict())


def package_start(trained_dir: Path, destination: Path) -> None:
    """Write the newest `model.ckpt-<step>.pt` of a run as a start checkpoint."""
    trained = sorted(
        trained_dir.glob("run-*/model.ckpt-*.pt"), key=lambda path: path.stat().st_mtime
    )
    if not trained:
        raise UserError(f"no model.ckpt-<step>.pt in {trained_dir}", "run with --save_checkpoint")
    write_weights(destination, read_weights(trained[-1]))
