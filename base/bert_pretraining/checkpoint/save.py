"""Writing checkpoints: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def checkpoint_path(folder: Path, global_steps: int) -> Path:
    """`model.ckpt-<step>.pt`, as upstream names it."""
    return folder / f"model.ckpt-{global_steps}.pt"


def save_checkpoint(path: Path, model: dict, optimizer: dict, state: dict) -> None:
    """Write {"model", "optimizer", "state"}: plain tensors and numbers only."""
    _write(path, {"model": model, "optimizer": optimizer, "state": state})


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a start checkpoint in the apex layout: {"model": named tensors}."""
    _write(path, {"model": weights})


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
