"""Which tensors a model has, and whether the tensors of a checkpoint fit it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bert_pretraining.checkpoint.names import (
    DECODER,
    DECODER_BIAS,
    OUTPUT_BIAS,
    VOCABULARY_ROWS,
    WORD_EMBEDDING,
)
from bert_pretraining.errors import UserError

# Tensors that only a model with the next-sentence loss has.
NEXT_SENTENCE_HEAD = ("bert.pooler.", "cls.seq_relationship.")
LISTED_AT_MOST = 40  # tensors of one kind in a report


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model. `vocab_size` may or may not include the padding."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    type_vocab_size: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, hidden {self.hidden_size}, "
            f"intermediate {self.intermediate_size}, vocabulary {self.vocab_size}, "
            f"positions {self.max_position_embeddings}"
        )


def sizes_of(weights: Mapping[str, Tensor]) -> Sizes | None:
    """The sizes that these tensors (with apex names) have; None where some are missing."""
    layers = [re.match(r"bert\.encoder\.layer\.(\d+)\.", name) for name in weights]
    numbers = {int(match[1]) for match in layers if match}
    wanted = (
        WORD_EMBEDDING,
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
    )
    tables = [weights.get(name) for name in wanted]
    if any(table is None or table.dim() != 2 for table in tables):
        return None
    words, positions, types, inner = (tuple(table.shape) for table in tables)
    return Sizes(max(numbers) + 1, words[1], inner[0], words[0], positions[0], types[0])


def expected_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of the apex layout, in its order."""
    hidden, inner, words = sizes.hidden_size, sizes.intermediate_size, sizes.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        WORD_EMBEDDING: (words, hidden),
        "bert.embeddings.position_embeddings.weight": (sizes.max_position_embeddings, hidden),
        "bert.embeddings.token_type_embeddings.weight": (sizes.type_vocab_size, hidden),
        **_layer_norm("bert.embeddings.LayerNorm", hidden),
    }
    for number in range(sizes.num_layers):
        layer = f"bert.encoder.layer.{number}"
        for projection in ("query", "key", "value"):
            shapes |= _dense(f"{layer}.attention.self.{projection}", hidden, hidden)
        shapes |= _dense(f"{layer}.attention.output.dense", hidden, hidden)
        shapes |= _layer_norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= _dense(f"{layer}.intermediate.dense", inner, hidden)
        shapes |= _dense(f"{layer}.output.dense", hidden, inner)
        shapes |= _layer_norm(f"{layer}.output.LayerNorm", hidden)
    return {
        **shapes,
        **_dense("bert.pooler.dense", hidden, hidden),
        OUTPUT_BIAS: (words,),
        **_dense("cls.predictions.transform.dense", hidden, hidden),
        **_layer_norm("cls.predictions.transform.LayerNorm", hidden),
        DECODER: (words, hidden),
        **_dense("cls.seq_relationship", 2, hidden),
    }


def _dense(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _layer_norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def fit(
    path: Path,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    vocab_size: int,
) -> dict[str, Tensor]:
    """The tensors of `weights` for a model of these shapes, in the model's order.

    Tensors with one row for each word piece may have `vocab_size` rows instead of the padded
    number. Where the decoder is missing, it is the word embedding, as in the model.
    Raises UserError if they do not fit: its first line counts the faults and says what to
    do, and every further line names a tensor.
    """
    found = dict(weights)
    if WORD_EMBEDDING in found:
        found.setdefault(DECODER, found[WORD_EMBEDDING])
    lines = {
        "missing": [f"{name} {shapes[name]}" for name in shapes if name not in found],
        "unexpected": [
            f"{name} {tuple(found[name].shape)}" for name in found if name not in shapes
        ],
        "wrong shape": [
            f"{name} is {tuple(value.shape)}, the model's is {shapes[name]}"
            for name, value in found.items()
            if name in shapes and not _fits(name, value, shapes[name], vocab_size)
        ],
        "wrong type": [
            f"{name} is {value.dtype}"
            for name, value in found.items()
            if name in shapes and not value.dtype.is_floating_point
        ],
    }
    if any(lines.values()):
        raise UserError(_problem(path, weights, lines), _fix(lines))
    if not torch.equal(found[DECODER], found[WORD_EMBEDDING]):
        raise UserError(
            f"{path}: {DECODER} differs from {WORD_EMBEDDING}, but they are one tensor",
            "export the checkpoint again, with the two tied",
        )
    found[DECODER] = found[WORD_EMBEDDING]
    return {name: found[name] for name in shapes}


def _fits(name: str, value: Tensor, shape: tuple[int, ...], vocab_size: int) -> bool:
    rows = (vocab_size, *shape[1:])
    return tuple(value.shape) == shape or (name in VOCABULARY_ROWS and value.shape == rows)


def _problem(path: Path, weights: Mapping[str, Tensor], lines: dict[str, list[str]]) -> str:
    counts = ", ".join(f"{len(those)} {what}" for what, those in lines.items() if those)
    sizes = sizes_of(weights)
    holds = f" (it holds {sizes})" if sizes else ""
    return f"{path} does not fit the model of bert_config.json{holds}: tensors {counts}"


def _fix(lines: dict[str, list[str]]) -> str:
    """What to do, and below it the tensors, one on each line."""
    report = ["pass the checkpoint and bert_config.json of one model"]
    missing = lines["missing"]
    others = sum(len(those) for those in lines.values()) - len(missing)
    if not others and all(line.startswith(NEXT_SENTENCE_HEAD) for line in missing):
        report = ["it has no next-sentence head: pass --objective mlm to train without one"]
    for what, those in lines.items():
        report += [f"  {what}: {line}" for line in those[:LISTED_AT_MOST]]
        if len(those) > LISTED_AT_MOST:
            report.append(f"  {what}: {len(those) - LISTED_AT_MOST} more")
    return "\n".join(report)


def tie_output_bias(path: Path, weights: dict[str, Tensor]) -> None:
    """Keep one of the two names that Hugging Face has for the output bias.

    Raises UserError if the two tensors differ.
    """
    if DECODER_BIAS not in weights:
        return
    bias = weights.pop(DECODER_BIAS)
    if not torch.equal(weights.setdefault(OUTPUT_BIAS, bias), bias):
        raise UserError(
            f"{path}: {DECODER_BIAS} differs from {OUTPUT_BIAS}, but they are one tensor",
            "export the checkpoint again, with the two tied",
        )


def untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without the decoder, where it equals the word embedding."""
    decoder, embedding = weights.get(DECODER), weights.get(WORD_EMBEDDING)
    if decoder is None or embedding is None or not torch.equal(decoder, embedding):
        return dict(weights)
    return {name: value for name, value in weights.items() if name != DECODER}
