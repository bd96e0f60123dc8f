"""Weights from a file, strictly: every tensor there, none too many, every shape right."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.files import OTHER_CHECKPOINT, require_checkpoint

DECODER = "cls.predictions.decoder.weight"
WORD_EMBEDDING = "bert.embeddings.word_embeddings.weight"


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in the apex layout, bare or under a `model` key.

    Only tensors and plain containers are unpickled (`weights_only=True`).
    Raises UserError for a missing, damaged or foreign file.
    """
    require_checkpoint(path)
    try:
        # mmap: tensors are read where they are used; files of PyTorch before 1.6 cannot.
        in_place = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: not a checkpoint of PyTorch, or one with more than tensors in it, which is "
            "not safe to read; copy it again, or export its tensors alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(f"{path}: damaged or no checkpoint of PyTorch; copy it again") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise UserError(
            f"{path}: holds no named tensors, bare or under a 'model' key; export the model's "
            f"state_dict() alone, or {OTHER_CHECKPOINT}"
        )
    return {name.removeprefix("module."): value for name, value in weights.items()}


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy a checkpoint's weights into `model`.

    Raises UserError that names the first missing, unexpected or misshapen tensor and how
    many there are of each.
    """
    weights = read_weights(path)
    if WORD_EMBEDDING in weights:
        weights.setdefault(DECODER, weights[WORD_EMBEDDING])
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    misshapen = [
        f"{name} is {tuple(weights[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    faults = []
    for what, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            faults.append(f"{what}: {names[0]}{more}")
    if misshapen:
        more = f", and {len(misshapen) - 1} more" if len(misshapen) > 1 else ""
        faults.append(f"wrong shape: {misshapen[0]}{more}")
    if faults:
        raise UserError(
            f"{path} does not fit the model of bert_config.json: {'; '.join(faults)}; "
            "pass the checkpoint and bert_config.json of one model"
        )
    if not torch.equal(weights[DECODER], weights[WORD_EMBEDDING]):
        raise UserError(
            f"{path}: {DECODER} differs from {WORD_EMBEDDING}, but they are one tensor; "
            "export the checkpoint again, with the two tied"
        )
    model.load_state_dict(weights)
