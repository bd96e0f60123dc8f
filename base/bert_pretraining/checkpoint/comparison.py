"""The differences between two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretraining.checkpoint.formats import Checkpoint
from bert_pretraining.checkpoint.names import VOCABULARY_ROWS
from bert_pretraining.checkpoint.run_order import RUN_NUMBER
from bert_pretraining.checkpoint.structure import untied
from bert_pretraining.runtime.words import counted

SHOWN = 20  # tensors in a description
EXACT_IN_DOUBLE = 2**53
ROWS_AT_A_TIME = 1024

# Keys of the training state that name the launch and the run, and are no result of training.
NAMES_OF_RUN = ("job", RUN_NUMBER)


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs in two checkpoints, a and b.

    differing: how many of its `numbers` differ. largest: the greatest |a - b|.
    relative: `largest` divided by the greatest |a|.
    """

    differing: int
    numbers: int
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """What `checkpoint diff` finds.

    only_in_first, only_in_second: names of tensors. shapes: name -> both shapes, where they
    differ. values: name -> how the numbers differ, where they do.
    """

    first: Checkpoint
    second: Checkpoint
    compared: int
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    values: dict[str, TensorDifference]
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both checkpoints have the same tensors with the same numbers."""
        return not (self.only_in_first or self.only_in_second or self.shapes or self.values)

    def to_json(self) -> dict:
        """Plain data for json.dumps; a difference that is not finite is None."""
        return {
            "first": str(self.first.path),
            "second": str(self.second.path),
            "equal": self.equal,
            "compared": self.compared,
            "only_in_first": self.only_in_first,
            "only_in_second": self.only_in_second,
            "shapes": self.shapes,
            "values": {
                name: {
                    key: number if math.isfinite(number) else None
                    for key, number in vars(difference).items()
                }
                for name, difference in self.values.items()
            },
            "notes": self.notes,
        }

    def describe(self) -> str:
        """The result, then the differences, the largest first."""
        both = f"{self.first.path} and {self.second.path}"
        if self.equal:
            lines = [f"Equal: {both} hold the same numbers, {counted(self.compared, 'tensor')}"]
        else:
            counts = (
                (len(self.values), "tensors differ in value"),
                (len(self.shapes), "in shape"),
                (len(self.only_in_first), f"only in {self.first.path}"),
                (len(self.only_in_second), f"only in {self.second.path}"),
            )
            told = ", ".join(f"{count} {what}" for count, what in counts if count)
            lines = [f"Different: {both}: {told}; {self.compared} compared"]
        lines += [f"Note: {note}" for note in self.notes]
        lines += [f"  only in {self.first.path}: {name}" for name in self.only_in_first[:SHOWN]]
        lines += [f"  only in {self.second.path}: {name}" for name in self.only_in_second[:SHOWN]]
        lines += [
            f"  {name}: shape {one} against {other}"
            for name, (one, other) in list(self.shapes.items())[:SHOWN]
        ]
        ordered = sorted(self.values.items(), key=lambda item: -_rank(item[1].largest))
        for name, value in ordered[:SHOWN]:
            lines.append(
                f"  {name}: {value.differing:,} of {value.numbers:,} numbers, "
                f"by up to {value.largest:.3g} ({value.relative:.2g} of the largest)"
            )
        left = [len(self.values), len(self.shapes), len(self.only_in_first)]
        hidden = sum(max(0, count - SHOWN) for count in [*left, len(self.only_in_second)])
        if hidden:
            lines.append(f"  {hidden} more; --json lists all")
        return "\n".join(lines)


def compare(first: Checkpoint, second: Checkpoint, training_state: bool = False) -> Comparison:
    """Compare all weights as numbers: the dtype and padding rows of 0 make no difference.

    With `training_state`, the states of the optimizer and of the training are compared too,
    under the names `optimizer...` and `state...`.
    """
    ones, others = (_compared(checkpoint, training_state) for checkpoint in (first, second))
    common = [name for name in ones if name in others]
    shapes, values, notes = {}, {}, []
    for name in common:
        one, other = ones[name], others[name]
        rows = min(len(one), len(other)) if name in VOCABULARY_ROWS else None
        for checkpoint, value in ((first, one), (second, other)):
            if rows is not None and len(value) > rows and not value[rows:].any():
                more = len(value) - rows
                notes.append(
                    f"{name}: {checkpoint.path} has {counted(more, 'more row')}, all 0: padding"
                )
                one, other = one[:rows], other[:rows]
        if one.shape != other.shape:
            shapes[name] = (tuple(one.shape), tuple(other.shape))
        elif difference := _difference(one, other):
            values[name] = difference
    return Comparison(
        first,
        second,
        len(common),
        tuple(name for name in ones if name not in others),
        tuple(name for name in others if name not in ones),
        shapes,
        values,
        (*notes, *_notes(first, second, training_state)),
    )


def _notes(first: Checkpoint, second: Checkpoint, training_state: bool) -> Iterator[str]:
    """Further facts that a reader of the result should know."""
    types = [
        sorted({str(value.dtype).removeprefix("torch.") for value in checkpoint.weights.values()})
        for checkpoint in (first, second)
    ]
    if types[0] != types[1]:
        yield f"types: {'/'.join(types[0])} against {'/'.join(types[1])}; compared as numbers"
    if first.step != second.step and None not in (first.step, second.step):
        yield f"steps: {first.step} against {second.step}"
    if not training_state and any((first.optimizer, second.optimizer, first.state, second.state)):
        yield "the weights alone were compared; --training_state compares the rest too"


def _compared(checkpoint: Checkpoint, training_state: bool) -> dict[str, Tensor]:
    tensors = untied(checkpoint.weights)
    if training_state:
        tensors |= _flattened(checkpoint.optimizer or {}, "optimizer")
        state = {
            key: value for key, value in (checkpoint.state or {}).items() if key not in NAMES_OF_RUN
        }
        tensors |= _flattened(state, "state")
    return tensors


def _flattened(content: object, name: str) -> dict[str, Tensor]:
    """Every tensor and value in nested containers: numbers as float64, others as bytes of text."""
    if isinstance(content, Tensor):
        return {name: content}
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if isinstance(content, Mapping):
        parts = [_flattened(value, f"{name}.{key}") for key, value in content.items()]
        return {name: value for part in parts for name, value in part.items()}
    if isinstance(content, float) or (isinstance(content, int) and abs(content) <= EXACT_IN_DOUBLE):
        return {name: torch.tensor(float(content), dtype=torch.float64)}
    return {name: torch.tensor(list(repr(content).encode()), dtype=torch.uint8)}


def _difference(one: Tensor, other: Tensor) -> TensorDifference | None:
    """How two tensors differ; None for equal numbers. NaN equals NaN here."""
    if one.dtype == other.dtype and torch.equal(one, other):
        return None
    differing, largest, greatest = 0, 0.0, 0.0
    if one.dim() == 0:
        one, other = one[None], other[None]
    for a, b in zip(one.split(ROWS_AT_A_TIME), other.split(ROWS_AT_A_TIME), strict=True):
        a, b = a.double(), b.double()
        unequal = (a != b) & ~(a.isnan() & b.isnan())
        differing += int(unequal.sum())
        if unequal.any():
            largest = max(largest, (a - b)[unequal].abs().max().item(), key=_rank)
        if a.numel():
            greatest = max(greatest, a.nan_to_num().abs().max().item())
    if not differing:
        return None
    relative = largest / greatest if greatest else math.inf
    return TensorDifference(differing, one.numel(), largest, relative)


def _rank(number: float) -> float:
    """A sort key that puts NaN above every number."""
    return math.inf if math.isnan(number) else number
