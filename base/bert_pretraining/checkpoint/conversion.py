"""Weights of one layout written in another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bert_pretraining.checkpoint import hugging_face
from bert_pretraining.checkpoint.formats import Checkpoint
from bert_pretraining.checkpoint.names import DECODER, VOCABULARY_ROWS, WORD_EMBEDDING
from bert_pretraining.checkpoint.save import save_checkpoint, write_weights
from bert_pretraining.checkpoint.structure import Sizes, expected_shapes, fit, padded
from bert_pretraining.errors import UserError

TARGETS = ("apex", "hf", "resume")
NOT_IN_SOURCE = "optimizer moments, loss scale, random states and data position"


@dataclass(frozen=True)
class Model:
    """The model whose weights are converted.

    sizes: with `vocab_size` before padding. hugging_face: its config.json without that size,
    or None where nothing but the sizes is known.
    """

    sizes: Sizes
    hugging_face: dict | None


def convert(
    checkpoint: Checkpoint,
    destination: Path,
    target: str,
    model: Model,
    trim_vocabulary: bool = False,
) -> list[str]:
    """Write the checkpoint's weights as one of TARGETS; returns what was done, in lines.

    All three hold the trainer's model, its vocabulary padded to a multiple of 8 with rows of
    0; `trim_vocabulary` leaves the padding out, for "hf" alone.
    Raises UserError if the weights are not that model's, or the destination cannot be
    written; nothing is left of it then.
    """
    weights = _complete(checkpoint, model.sizes)
    lines = [_vocabulary_line(checkpoint, model.sizes)]
    if target == "hf":
        write = _hugging_face_writer(destination, weights, model, trim_vocabulary, lines)
    elif target == "resume":
        state = _training_state(checkpoint, lines)

        def write() -> None:
            save_checkpoint(destination, weights, {}, state)
    else:

        def write() -> None:
            write_weights(destination, weights)

    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:  # RuntimeError: torch.save's
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {destination} ({reason}); nothing was left there") from error
    for what, names in checkpoint.left_out.items():
        lines.append(f"Left out: {what}, {len(names)} entries of the source")
    return [f"Wrote {destination}: {len(weights)} tensors of {checkpoint.format}", *lines]


def _complete(checkpoint: Checkpoint, sizes: Sizes) -> dict[str, Tensor]:
    """Every tensor of the trainer's model, padded, each in memory of its own size."""
    rows = padded(sizes.vocab_size)
    shapes = expected_shapes(Sizes(**{**vars(sizes), "vocab_size": rows}))
    fitting = fit(checkpoint.path, checkpoint.weights, shapes, sizes.vocab_size)
    weights = {}
    for name, value in fitting.items():
        if name == DECODER:
            value = weights[WORD_EMBEDDING]  # one tensor in the file too
        elif len(value) < shapes[name][0]:
            value = torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])
        elif not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            value = value.contiguous().clone()
        weights[name] = value
    return weights


def _vocabulary_line(checkpoint: Checkpoint, sizes: Sizes) -> str:
    found, rows = len(checkpoint.weights[WORD_EMBEDDING]), padded(sizes.vocab_size)
    if found == rows:
        return f"Vocabulary: {rows} rows, as in the source"
    return f"Vocabulary: {found} rows, padded to {rows} with rows of 0"


def _hugging_face_writer(
    destination: Path, weights: dict[str, Tensor], model: Model, trim: bool, lines: list[str]
) -> Callable[[], None]:
    if model.hugging_face is None:
        raise UserError(
            f"no bert_config.json beside the source: the weights do not tell the number of "
            f"attention heads that {hugging_face.CONFIG_NAME} needs; pass --bert_config FILE"
        )
    rows = model.sizes.vocab_size
    if trim and rows < padded(rows):
        for name in VOCABULARY_ROWS:
            weights[name] = weights[name][:rows].clone()
        lines[:] = [
            f"Vocabulary: {rows} rows, without padding; losses differ a little from the "
            f"trainer's, whose softmax has {padded(rows)} entries"
        ]
    del weights[DECODER]  # tied: Hugging Face takes the word embedding
    config = {
        **model.hugging_face,
        "vocab_size": len(weights[WORD_EMBEDDING]),
        "dtype": str(weights[WORD_EMBEDDING].dtype).removeprefix("torch."),
    }
    return lambda: hugging_face.write_directory(destination, weights, config)


def _training_state(checkpoint: Checkpoint, lines: list[str]) -> dict:
    """What the training goes on from; says what is there and what starts fresh."""
    if "master" in (checkpoint.optimizer or {}):
        raise UserError(f"{checkpoint.path}: is a resume file of this package already; copy it")
    if checkpoint.state is None:
        told = f" (the source's step, {checkpoint.step}, is not taken over)"
        lines.append(f"In it: the weights alone{told if checkpoint.step else ''}")
        lines.append(f"Starts fresh: step 0, {NOT_IN_SOURCE}")
        return {"global_steps": 0}
    state = {
        key: value
        for key, value in checkpoint.state.items()
        if isinstance(value, bool | int | float | str)
    }
    lines.append(f"In it: the weights and {', '.join(f'{k} {v}' for k, v in state.items())}")
    why = " (another program's optimizer state cannot be taken over)"
    lines.append(f"Starts fresh: {NOT_IN_SOURCE}{why if checkpoint.optimizer else ''}")
    return state
