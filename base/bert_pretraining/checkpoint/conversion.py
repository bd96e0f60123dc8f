"""Writing the weights of a checkpoint in another layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bert_pretraining.checkpoint import hugging_face
from bert_pretraining.checkpoint.fitting import HEADS_ANEW, fit
from bert_pretraining.checkpoint.formats import OTHER_HEADS, Checkpoint
from bert_pretraining.checkpoint.names import DECODER, OUTPUT_BIAS, WORD_EMBEDDING
from bert_pretraining.checkpoint.save import save_checkpoint, write_weights
from bert_pretraining.checkpoint.structure import (
    MASKED_TOKEN_HEAD,
    NEXT_SENTENCE_HEAD,
    Sizes,
    absent_heads,
    expected_shapes,
)
from bert_pretraining.errors import UserError
from bert_pretraining.model.bert_config import padded_rows
from bert_pretraining.runtime.words import counted

NOT_IN_SOURCE = "optimizer moments, loss scale, random states and data position"


@dataclass(frozen=True)
class Model:
    """The model whose weights are converted.

    sizes: with `vocab_size` before padding. hugging_face: the config.json without the size of
    the vocabulary, or None where only the sizes are known.
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
    """Write the checkpoint's weights as "apex", "hf" or "resume".

    All three hold the trainer's model, with a vocabulary that rows of 0 pad to a multiple of
    8. With "hf", `trim_vocabulary` leaves the padding out. A head that the checkpoint lacks is
    lacking in the result too, and tensors of other tasks are left out.
    Returns lines that say what was done. Raises UserError if the weights do not fit the
    model, or if the destination cannot be written; then no part of it is left.
    """
    checkpoint = _without_other_tasks(checkpoint)
    weights = _complete(checkpoint, model.sizes)
    notes = [_vocabulary_note(checkpoint, model.sizes)]
    absent = absent_heads(checkpoint.weights)
    if target == "hf":
        config = _hugging_face_config(model, weights)
        if absent:
            lacks_mlm = set(MASKED_TOKEN_HEAD) <= set(absent)
            config["architectures"] = ["BertModel" if lacks_mlm else "BertForMaskedLM"]
        if trim_vocabulary:
            notes = _trim(weights, config, model.sizes.vocab_size)
        write = partial(hugging_face.write_directory, destination, weights, config)
    elif target == "resume":
        state, told = _training_state(checkpoint)
        notes += told
        write = partial(save_checkpoint, destination, weights, {}, state)
    else:
        write = partial(write_weights, destination, weights)
    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"cannot write {destination} ({reason}), and nothing was left there",
            "free disk space, or name another DST",
        ) from error
    if set(absent) == set(NEXT_SENTENCE_HEAD):
        notes.append("No next-sentence head in the source: a checkpoint for --objective mlm")
    elif absent:
        notes.append(
            f"Not in the source: {'*, '.join(absent)}*; to train from it, pass {HEADS_ANEW}"
        )
    notes += [
        f"Left out: {what}, {counted(len(names), 'entry')} of the source"
        for what, names in checkpoint.left_out.items()
    ]
    return [
        f"Wrote {destination}: {counted(len(weights), 'tensor')} of {checkpoint.format}",
        *notes,
    ]


def _without_other_tasks(checkpoint: Checkpoint) -> Checkpoint:
    others = [name for name in checkpoint.weights if not name.startswith(("bert.", "cls."))]
    if not others or len(others) == len(checkpoint.weights):
        return checkpoint
    kept = {name: value for name, value in checkpoint.weights.items() if name not in others}
    left_out = {**checkpoint.left_out, OTHER_HEADS: tuple(others)}
    return replace(checkpoint, weights=kept, left_out=left_out)


def _complete(checkpoint: Checkpoint, sizes: Sizes) -> dict[str, Tensor]:
    """Every tensor of the trainer's model, padded; none is a view of a larger one.

    Heads that the checkpoint lacks as a whole are not among them.
    """
    rows = padded_rows(sizes.vocab_size)
    absent = tuple(absent_heads(checkpoint.weights))
    shapes = {
        name: shape
        for name, shape in expected_shapes(replace(sizes, vocab_size=rows)).items()
        if not name.startswith(absent)
    }
    fitting = fit(checkpoint.path, checkpoint.weights, shapes, sizes.vocab_size).weights
    weights = {}
    for name, value in fitting.items():
        if name == DECODER:
            value = weights[WORD_EMBEDDING]  # one tensor in the file too
        elif len(value) < shapes[name][0]:
            value = torch.cat([value, value.new_zeros(rows - len(value), *value.shape[1:])])
        elif not value.is_contiguous() or value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone(memory_format=torch.contiguous_format)
        weights[name] = value
    return weights


def _vocabulary_note(checkpoint: Checkpoint, sizes: Sizes) -> str:
    found, rows = len(checkpoint.weights[WORD_EMBEDDING]), padded_rows(sizes.vocab_size)
    if found == rows:
        return f"Vocabulary: {rows} rows, as in the source"
    return f"Vocabulary: {found} rows, padded to {rows} with rows of 0"


def _hugging_face_config(model: Model, weights: dict[str, Tensor]) -> dict:
    """The config.json of these weights. Removes the decoder, which Hugging Face ties itself."""
    if model.hugging_face is None:
        raise UserError(
            "no bert_config.json beside the source, and the weights do not show the number of "
            f"attention heads that {hugging_face.CONFIG_NAME} needs",
            "pass --bert_config FILE",
        )
    weights.pop(DECODER, None)
    embedding = weights[WORD_EMBEDDING]
    dtype = str(embedding.dtype).removeprefix("torch.")
    return {**model.hugging_face, "vocab_size": len(embedding), "dtype": dtype}


def _trim(weights: dict[str, Tensor], config: dict, vocab_size: int) -> list[str]:
    """Remove the padding from the weights and the config; returns lines on what that changes."""
    rows = len(weights[WORD_EMBEDDING])
    if rows == vocab_size:
        return [f"Vocabulary: {rows} rows; by bert_config.json none of them is padding"]
    config["vocab_size"] = vocab_size
    for name in {WORD_EMBEDDING, OUTPUT_BIAS} & set(weights):
        weights[name] = weights[name][:vocab_size].clone()
    return [
        f"Vocabulary: {vocab_size} rows, without padding; losses differ a little from the "
        f"trainer's, whose softmax has {rows} entries"
    ]


def _training_state(checkpoint: Checkpoint) -> tuple[dict, list[str]]:
    """The state from which training resumes, and lines on what is in it and what starts fresh."""
    if "master" in (checkpoint.optimizer or {}):
        raise UserError(
            f"{checkpoint.path}: is a resume file of this package already", "use it as it is"
        )
    if checkpoint.state is None:
        told = f" (the source's step, {checkpoint.step}, is not taken over)"
        return {"global_steps": 0}, [
            f"In it: the weights alone{'' if checkpoint.step is None else told}",
            f"Starts fresh: step 0, {NOT_IN_SOURCE}",
        ]
    state = {
        key: value
        for key, value in checkpoint.state.items()
        if isinstance(value, bool | int | float | str)
    }
    why = " (another program's optimizer state cannot be taken over)"
    return state, [
        f"In it: the weights and {', '.join(f'{key} {value}' for key, value in state.items())}",
        f"Starts fresh: {NOT_IN_SOURCE}{why if checkpoint.optimizer else ''}",
    ]
