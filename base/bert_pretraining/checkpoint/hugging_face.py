"""Reading and writing the model directories of Hugging Face."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from bert_pretraining.checkpoint.torch_file import is_utf8, read_torch_file
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.file_kind import AGAIN, cannot_read
from bert_pretraining.runtime.files import (
    HUGGING_FACE_WEIGHTS,
    PARTIAL_SUFFIX,
    weight_file_kind,
    with_ending,
)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def read_directory(directory: Path) -> tuple[str, dict[str, Tensor]]:
    """The name of the main weight file, and every tensor in it or in the files that it lists.

    The tensors have the names that the files give. Raises UserError for damaged or missing
    files.
    """
    name = next(name for name in HUGGING_FACE_WEIGHTS if (directory / name).is_file())
    path = directory / name
    if not name.endswith(".index.json"):
        return name, read_weight_file(path)
    weights: dict[str, Tensor] = {}
    for part, wanted in _parts(path).items():
        found = read_weight_file(directory / part)
        lacking = sorted(wanted - set(found))
        if lacking:
            raise UserError(
                f"{directory / part}: lacks {lacking[0]}, which {name} says it holds",
                "copy both again",
            )
        weights |= found
    return name, weights


def _parts(index: Path) -> dict[str, set[str]]:
    """The files of a sharded model, each with the names of its tensors."""
    fix = "copy the directory again"
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        parts: dict[str, set[str]] = {}
        for tensor, part in weight_map.items():
            if not isinstance(part, str):
                raise TypeError(f"{part!r} is no file name")
            parts.setdefault(part, set()).add(tensor)
    except OSError as error:
        raise cannot_read(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no index of weights ({error})", fix) from error
    for part in parts:
        if Path(part).name != part:
            raise UserError(f"{index}: names {part!r}, which is no file beside it", fix)
        if not (index.parent / part).is_file():
            raise UserError(f"no {part} beside {index}, which lists it", fix)
    return parts


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or .bin file, memory-mapped."""
    if weight_file_kind(path) == "torch":
        content = read_torch_file(path)
        if not isinstance(content, dict):
            raise UserError(f"{path}: holds no named tensors", AGAIN)
        return content
    try:
        return _read_safetensors(path)
    except OSError as error:
        raise cannot_read(path, error) from error
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or no file of safetensors ({error})", AGAIN) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not is_utf8(path):
        return load(path.read_bytes())
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def write_directory(directory: Path, weights: dict[str, Tensor], config: dict) -> None:
    """Write model.safetensors and config.json, whole or not at all.

    A new directory gets its name when both files are complete. In a directory that exists,
    each file is replaced whole. Raises OSError or SafetensorError; then nothing new is left.
    """
    partial = with_ending(directory, PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(weights, partial / WEIGHTS_NAME, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / CONFIG_NAME).write_text(text, encoding="utf-8")
        # safetensors makes files that only their owner can read.
        (partial / WEIGHTS_NAME).chmod((partial / CONFIG_NAME).stat().st_mode)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
        if directory.is_dir():
            for name in (WEIGHTS_NAME, CONFIG_NAME):
                os.replace(partial / name, directory / name)
        else:
            os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
