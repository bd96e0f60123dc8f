"""Which tensors a model has, and which of them are one."""

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
    WORD_EMBEDDING,
)
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.words import counted

# Tensors that only a model with the next-sentence loss has.
NEXT_SENTENCE_HEAD = ("bert.pooler.", "cls.seq_relationship.")
MASKED_TOKEN_HEAD = ("cls.predictions.",)
HEADS = (*NEXT_SENTENCE_HEAD, *MASKED_TOKEN_HEAD)  # all that `--missing_weights random` starts anew


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
            f"{counted(self.num_layers, 'layer')}, hidden {self.hidden_size}, "
            f"intermediate {self.intermediate_size}, vocabulary {self.vocab_size}, "
            f"positions {self.max_position_embeddings}"
        )


def sizes_of(weights: Mapping[str, Tensor]) -> Sizes | None:
    """The sizes that these tensors (with apex names) have; None where some are missing."""
    return sizes_of_shapes({name: tuple(value.shape) for name, value in weights.items()})


def sizes_of_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Sizes | None:
    """The same, from the shape of each tensor."""
    layers = [re.match(r"bert\.encoder\.layer\.(\d+)\.", name) for name in shapes]
    numbers = {int(match[1]) for match in layers if match}
    wanted = (
        WORD_EMBEDDING,
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.layer.0.intermediate.dense.weight",
    )
    tables = [shapes.get(name, ()) for name in wanted]
    if any(len(table) != 2 for table in tables):
        return None
    words, positions, types, inner = tables
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


def absent_heads(weights: Mapping[str, Tensor]) -> list[str]:
    """The beginnings of names in HEADS with which no tensor begins."""
    return [head for head in HEADS if not any(name.startswith(head) for name in weights)]


def tie_output_bias(path: Path, weights: dict[str, Tensor]) -> None:
    """Keep one of the two names that Hugging Face has for the output bias.

    Raises UserError if the two tensors differ.
    """
    if DECODER_BIAS not in weights:
        return
    bias = weights.pop(DECODER_BIAS)
    if not same_numbers(weights.setdefault(OUTPUT_BIAS, bias), bias):
        raise UserError(
            f"{path}: {DECODER_BIAS} differs from {OUTPUT_BIAS}, but they are one tensor",
            "export the checkpoint again, with the two tied",
        )


def untied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without the decoder, where it equals the word embedding."""
    decoder, embedding = weights.get(DECODER), weights.get(WORD_EMBEDDING)
    if decoder is None or embedding is None or not same_numbers(decoder, embedding):
        return dict(weights)
    return {name: value for name, value in weights.items() if name != DECODER}


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal; NaN equals NaN here."""
    if one.dtype == other.dtype and one.element_size() == 1:
        one, other = one.view(torch.uint8), other.view(torch.uint8)  # not all are comparable
    if one is other or torch.equal(one, other):
        return True
    if one.shape != other.shape or is_finite(one):
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def is_finite(value: Tensor) -> bool:
    """Whether no number is NaN or infinite; no copy of the tensor is made."""
    if not value.numel() or not value.dtype.is_floating_point:
        return True
    low, high = torch.aminmax(value)
    return bool(torch.isfinite(low) and torch.isfinite(high))
