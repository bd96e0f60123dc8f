"""The content of a checkpoint, as text and as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretraining.checkpoint.fitting import HEADS_ANEW
from bert_pretraining.checkpoint.formats import OPTIMIZER_STATE, Checkpoint
from bert_pretraining.checkpoint.plausibility import suspicions
from bert_pretraining.checkpoint.structure import absent_heads, sizes_of, untied
from bert_pretraining.runtime.words import counted

NUMBERS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class TensorFigures:
    """One tensor: `norm` is its Euclidean norm, `non_finite` counts NaN and infinities."""

    shape: tuple[int, ...]
    dtype: str
    norm: float
    non_finite: int


@dataclass(frozen=True)
class Inspection:
    """Everything that `checkpoint inspect` shows.

    optimizer: the parts of the optimizer's state, each described in a few words.
    state: the plain values of the training state; other values described in a few words.
    suspicions: what is implausible about the weights of a BERT.
    """

    checkpoint: Checkpoint
    tensors: dict[str, TensorFigures]
    optimizer: dict[str, str] | None
    state: dict[str, object] | None
    suspicions: list[str]

    def to_json(self) -> dict:
        """Plain data for json.dumps; a norm that is not finite is None."""
        checkpoint, sizes = self.checkpoint, sizes_of(self.checkpoint.weights)
        return {
            "path": str(checkpoint.path),
            "format": checkpoint.format,
            "step": checkpoint.step,
            "sizes": vars(sizes) if sizes else None,
            "tensors": {
                name: {
                    **vars(figures),
                    "norm": figures.norm if math.isfinite(figures.norm) else None,
                }
                for name, figures in self.tensors.items()
            },
            "has_optimizer_state": checkpoint.has_optimizer_state,
            "optimizer": self.optimizer,
            "state": self.state,
            "left_out": checkpoint.left_out,
            "suspicions": self.suspicions,
        }

    def describe(self) -> str:
        """Text with one line for each property, then one for each tensor."""
        checkpoint, sizes = self.checkpoint, sizes_of(self.checkpoint.weights)
        own = untied(checkpoint.weights)
        count = sum(value.numel() for value in own.values())
        size = sum(value.nbytes for value in own.values())
        tied = "; the decoder is the word embedding" if len(own) < len(self.tensors) else ""
        dtypes = sorted({figures.dtype for figures in self.tensors.values()})
        step = "not stored" if checkpoint.step is None else str(checkpoint.step)
        lines = [
            f"Checkpoint: {checkpoint.path}",
            f"Format: {checkpoint.format}",
            f"Model: {sizes or 'unknown; the tensors are no BERT, or not all of one'}",
            f"Weights: {counted(len(self.tensors), 'tensor')}, {counted(count, 'number')}, "
            f"{size / 2**20:,.1f} MiB, {', '.join(dtypes) or 'no type'}{tied}",
            f"Step: {step}",
            f"Optimizer state: {self._optimizer_in_words()}",
            f"Training state: {_listed(self.state)}",
        ]
        absent = absent_heads(checkpoint.weights) if sizes else []
        if absent:
            lines.append(
                f"Heads of pretraining that it lacks: {'*, '.join(absent)}*; to train from it, "
                f"pass {HEADS_ANEW}"
            )
        for what, names in checkpoint.left_out.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"Left out, {what}: {', '.join(names[:3])}{more}")
        bad = [name for name, figures in self.tensors.items() if figures.non_finite]
        if bad:
            lines.append(f"Warning: numbers that are not finite in {', '.join(bad)}")
        lines += [f"Warning: {what}" for what in self.suspicions]
        widths = [max(map(len, self.tensors), default=4), 16, 8]
        lines += ["", _row(widths, "name", "shape", "type", "norm")]
        for name, figures in self.tensors.items():
            shape = " x ".join(map(str, figures.shape)) or "number"
            lines.append(_row(widths, name, shape, figures.dtype, f"{figures.norm:.6g}"))
        return "\n".join(lines)

    def _optimizer_in_words(self) -> str:
        variables = self.checkpoint.left_out.get(OPTIMIZER_STATE)
        if variables:
            return f"{counted(len(variables), 'variable')}, which are left out"
        return _listed(self.optimizer)


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Read every tensor once and describe the checkpoint."""
    return Inspection(
        checkpoint,
        {name: _figures(value) for name, value in checkpoint.weights.items()},
        _in_words(checkpoint.optimizer),
        _in_words(checkpoint.state),
        suspicions(checkpoint.weights) if sizes_of(checkpoint.weights) else [],
    )


def _figures(value: Tensor) -> TensorFigures:
    # A transposed matrix has the same norm as the one in the file, which is contiguous.
    flat = (value.mT if value.dim() == 2 and not value.is_contiguous() else value).reshape(-1)
    pieces = flat.split(NUMBERS_AT_A_TIME)
    if not value.dtype.is_floating_point or value.element_size() == 1:
        pieces = [piece.double() for piece in pieces]
    norm = math.hypot(
        *(torch.linalg.vector_norm(piece, dtype=torch.float64).item() for piece in pieces)
    )
    non_finite = 0
    if not math.isfinite(norm):
        non_finite = sum(int((~torch.isfinite(piece)).sum()) for piece in pieces)
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorFigures(tuple(value.shape), dtype, norm, non_finite)


def _in_words(content: Mapping | None) -> dict[str, object] | None:
    """Plain values unchanged, and anything larger described in a few words."""
    if content is None:
        return None
    return {str(key): _value_in_words(value) for key, value in content.items()}


def _value_in_words(value: object) -> object:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}".replace("torch.", "")
    if isinstance(value, Mapping | list | tuple):
        parts = value.values() if isinstance(value, Mapping) else value
        tensors = sum(isinstance(part, Tensor) for part in parts)
        return counted(tensors, "tensor") if tensors else counted(len(value), "entry")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


def _listed(words: dict[str, object] | None) -> str:
    if words is None:
        return "none"
    return ", ".join(f"{key}: {value}" for key, value in words.items()) or "empty"


def _row(widths: list[int], *cells: str) -> str:
    padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=False)]
    return "  ".join([*padded, *cells[len(widths) :]])
