"""Whether the tensors of a checkpoint fit a model, and what to say where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from bert_pretraining.checkpoint.names import DECODER, VOCABULARY_ROWS, WORD_EMBEDDING
from bert_pretraining.checkpoint.structure import (
    HEADS,
    NEXT_SENTENCE_HEAD,
    Sizes,
    is_finite,
    same_numbers,
    sizes_of,
    sizes_of_shapes,
    untied,
)
from bert_pretraining.errors import UserError
from bert_pretraining.runtime.words import counted

LISTED_AT_MOST = 40  # tensors of one kind in a report
HEADS_ANEW = "--missing_weights random"


@dataclass(frozen=True)
class Fitting:
    """What of a checkpoint goes into a model.

    weights: by the model's names, in its order. anew: the model's tensors that the checkpoint
    lacks, which keep their random numbers. ignored: the checkpoint's tensors that the model lacks.
    """

    weights: dict[str, Tensor]
    anew: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def fit(
    path: Path,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    vocab_size: int,
    heads_anew: bool = False,
) -> Fitting:
    """The tensors of `weights` for a model of these shapes.

    Tensors with one row for each word piece may have `vocab_size` rows instead of the padded
    number. Where the decoder is missing, it is the word embedding, as in the model. With
    `heads_anew`, tensors of the heads may be missing, and other heads than BERT's may be there.
    Raises UserError if they do not fit: its first line counts the faults and says what to
    do, and every further line names a tensor. Raises it for NaN and infinities too.
    """
    found = dict(weights)
    if WORD_EMBEDDING in found and DECODER in shapes:
        found.setdefault(DECODER, found[WORD_EMBEDDING])
    missing = [name for name in shapes if name not in found]
    unexpected = [name for name in found if name not in shapes]
    anew: list[str] = []
    ignored: list[str] = []
    if heads_anew:
        anew = [name for name in missing if name.startswith(HEADS)]
        ignored = [name for name in unexpected if not name.startswith("bert.")]
    faults = _Faults(
        missing=[f"{name} {shapes[name]}" for name in missing if name not in anew],
        unexpected=[
            f"{name} {tuple(found[name].shape)}" for name in unexpected if name not in ignored
        ],
        wrong_shape=[
            f"{name} is {tuple(value.shape)}, the model's is {shapes[name]}"
            for name, value in found.items()
            if name in shapes and not _fits(name, value, shapes[name], vocab_size)
        ],
        wrong_type=[
            f"{name} is {value.dtype}"
            for name, value in found.items()
            if name in shapes and not (value.dtype.is_floating_point and value.element_size() > 1)
        ],
    )
    if faults.any():
        problem, fix = _told(path, weights, shapes, faults)
        raise UserError(problem, fix)
    fitting = {name: found[name] for name in shapes if name in found}
    require_finite(path, fitting)
    if DECODER in fitting and not same_numbers(found[DECODER], found[WORD_EMBEDDING]):
        raise UserError(
            f"{path}: {DECODER} differs from {WORD_EMBEDDING}, but they are one tensor",
            "export the checkpoint again, with the two tied",
        )
    if DECODER in fitting:
        fitting[DECODER] = fitting[WORD_EMBEDDING]
    return Fitting(fitting, tuple(anew), tuple(ignored))


def _fits(name: str, value: Tensor, shape: tuple[int, ...], vocab_size: int) -> bool:
    rows = (vocab_size, *shape[1:])
    return tuple(value.shape) == shape or (name in VOCABULARY_ROWS and value.shape == rows)


def require_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise UserError that names the tensors, if a number is NaN or infinite."""
    bad = [name for name, value in untied(weights).items() if not is_finite(value)]
    if not bad:
        return
    count = int((~torch.isfinite(weights[bad[0]])).sum())
    more = f", and in {counted(len(bad) - 1, 'more tensor')}" if bad[1:] else ""
    raise UserError(
        f"{path}: {count:,} of {weights[bad[0]].numel():,} numbers of {bad[0]} are NaN or "
        f"infinite{more}: the file's weights are spoiled",
        f"take a checkpoint from before they were ('python -m bert_pretraining checkpoint inspect "
        f"{path}' shows where they are)",
    )


@dataclass(frozen=True)
class _Faults:
    """Tensors that do not fit, each in words, by kind."""

    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[str]
    wrong_type: list[str]

    def kinds(self) -> list[tuple[str, list[str]]]:
        """(kind, tensors) of each kind that there is."""
        pairs = [
            (field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self)
        ]
        return [(kind, lines) for kind, lines in pairs if lines]

    def any(self) -> bool:
        return bool(self.kinds())

    def listed(self) -> list[str]:
        """One line for each tensor, LISTED_AT_MOST of each kind."""
        lines = []
        for kind, those in self.kinds():
            lines += [f"  {kind}: {line}" for line in those[:LISTED_AT_MOST]]
            if len(those) > LISTED_AT_MOST:
                lines.append(f"  {kind}: {len(those) - LISTED_AT_MOST} more")
        return lines


def _told(
    path: Path,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    faults: _Faults,
) -> tuple[str, str]:
    """Problem and fix of weights that do not fit; the fix ends with the list of tensors."""
    cause, fix = _cause(weights, shapes, faults)
    counts = ", ".join(
        f"{len(those)} {kind} ({those[0]}{', ...' if those[1:] else ''})"
        for kind, those in faults.kinds()
    )
    problem = f"{path} does not fit the model of bert_config.json: {cause}tensors {counts}"
    return problem, "\n".join([fix, *faults.listed()])


def _cause(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], faults: _Faults
) -> tuple[str, str]:
    """The likely reason why they do not fit, in words with ': ' or ', ' at the end, and the fix."""
    if not any(name.startswith(("bert.", "cls.")) for name in weights):
        first = next(iter(weights), "").split(".")[0]
        return (
            f"none of its names is BERT's (they begin with '{first}'), ",
            "pass a checkpoint of BERT",
        )
    differing = _differing_sizes(weights, shapes, faults)
    if differing:
        return (
            f"it has {', '.join(differing)}, ",
            "pass the --bert_config_path of this checkpoint's model, or another checkpoint",
        )
    if faults.wrong_type and not faults.wrong_shape:
        return (
            "its numbers are quantized, or are no weights, ",
            "pass the checkpoint from before it was quantized, in 16 bits or more",
        )
    if faults.wrong_shape:
        return "", "pass the checkpoint and bert_config.json of one model"
    if all(line.startswith(HEADS) for line in faults.missing) and not any(
        line.startswith("bert.") for line in faults.unexpected
    ):
        return _cause_in_heads(faults)
    own = sizes_of(weights)
    return (
        f"it holds {own}, " if own else "",
        "pass the checkpoint and bert_config.json of one model",
    )


def _differing_sizes(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], faults: _Faults
) -> list[str]:
    """The checkpoint's sizes that are not the model's, in words, where all are known."""
    own, wanted = sizes_of(weights), sizes_of_shapes(shapes)
    if own is None or wanted is None:
        return []
    pairs = {
        field.name: (getattr(own, field.name), getattr(wanted, field.name))
        for field in fields(Sizes)
    }
    if not any(line.startswith(WORD_EMBEDDING) for line in faults.wrong_shape):
        del pairs["vocab_size"]  # padded or not, it fits
    return [
        f"{name.replace('num_layers', 'num_hidden_layers')} {one} instead of {other}"
        for name, (one, other) in pairs.items()
        if one != other
    ]


def _cause_in_heads(faults: _Faults) -> tuple[str, str]:
    """The same, where only heads differ."""
    if not faults.missing:
        return (
            "it has tensors of another task, ",
            f"pass {HEADS_ANEW} to leave them out, or export BERT's own tensors alone",
        )
    if all(line.startswith(NEXT_SENTENCE_HEAD) for line in faults.missing):
        return (
            "it has no next-sentence head, or a part of it, ",
            f"pass --objective mlm to train without one, or {HEADS_ANEW} to start with a random "
            "one",
        )
    return (
        "it lacks heads of pretraining, as BertModel alone or a classifier does, ",
        f"pass {HEADS_ANEW} to start with random ones, or a checkpoint of BertForPreTraining",
    )
