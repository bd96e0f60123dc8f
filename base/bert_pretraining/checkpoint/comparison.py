"""What differs between the weights of two checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretraining.checkpoint.formats import Checkpoint
from bert_pretraining.checkpoint.names import VOCABULARY_ROWS
from bert_pretraining.checkpoint.structure import untied

SHOWN = 20  # tensors in a description
ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class TensorDifference:
    """largest: the greatest |a - b|; relative: that over the greatest |a|, both of one tensor."""

    differing: int
    numbers: int
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """only_in_first, only_in_second: names; shapes: name -> both shapes, where they differ."""

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
        """Whether all weights are the same numbers."""
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
        """The verdict, then the largest differences first."""
        both = f"{self.first.path} and {self.second.path}"
        if self.equal:
            lines = [f"Equal: {both} hold the same weights, {self.compared} tensors"]
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


def compare(first: Checkpoint, second: Checkpoint) -> Comparison:
    """Compare all weights as numbers: neither the type nor padding rows of 0 make a difference."""
    ones, others = untied(first.weights), untied(second.weights)
    shapes, values, notes = {}, {}, []
    common = [name for name in ones if name in others]
    for name in common:
        one, other = ones[name], others[name]
        if name in VOCABULARY_ROWS and one.shape[1:] == other.shape[1:]:
            rows = min(len(one), len(other))
            longer = one if len(one) > rows else other
            if len(longer) > rows and not longer[rows:].any():
                whose = first.path if longer is one else second.path
                notes.append(f"{name}: {whose} has {len(longer) - rows} more rows, all 0: padding")
                one, other = one[:rows], other[:rows]
        if one.shape != other.shape:
            shapes[name] = (tuple(one.shape), tuple(other.shape))
        elif difference := _difference(one, other):
            values[name] = difference
    types = [{str(value.dtype) for value in weights.values()} for weights in (ones, others)]
    if types[0] != types[1]:
        told = " against ".join("/".join(sorted(kinds)).replace("torch.", "") for kinds in types)
        notes.append(f"types: {told}; compared as numbers")
    if first.step != second.step and None not in (first.step, second.step):
        notes.append(f"steps: {first.step} against {second.step}")
    if first.optimizer or second.optimizer:
        notes.append("weights alone were compared, not the optimizer's and the training's state")
    return Comparison(
        first,
        second,
        len(common),
        tuple(name for name in ones if name not in others),
        tuple(name for name in others if name not in ones),
        shapes,
        values,
        tuple(notes),
    )


def _difference(one: Tensor, other: Tensor) -> TensorDifference | None:
    """None for equal numbers; NaN is equal to NaN. A difference from NaN is NaN."""
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
    """Orders NaN above everything."""
    return math.inf if math.isnan(number) else number
