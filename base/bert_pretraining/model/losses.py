"""Losses by name, from the heads to the log: "mlm" (masked language model), "nsp" (next sentence).

A batch gives sums, not means, so that means over any batches and ranks can be computed from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bert_pretraining.model.batch import PackedBatch

OBJECTIVES = {"mlm_nsp": ("mlm", "nsp"), "mlm": ("mlm",)}  # --objective -> its losses
_COLUMNS = 2  # loss and correct predictions


class LossSum(NamedTuple):
    """One loss over a batch.

    loss: scalar, float32, the sum of the predictions' losses in nats.
    correct: scalar, int64, the number of correct predictions.
    """

    loss: Tensor
    correct: Tensor


def mean_loss(sums: Mapping[str, LossSum], batch: PackedBatch) -> Tensor:
    """The training loss of one batch, 0-d: the sum of its losses' means."""
    return sum(part.loss / max(batch.num_predictions(name), 1) for name, part in sums.items())


@dataclass(frozen=True)
class LossMeans:
    """Mean losses over batches and ranks, by the loss's name.

    mean: in nats. accuracy: the fraction of correct predictions.
    counts: the number of predictions over which the means are taken.
    """

    mean: dict[str, float]
    accuracy: dict[str, float]
    counts: dict[str, int]

    @property
    def loss(self) -> float:
        """The training loss: the sum of the losses' means."""
        return sum(self.mean.values())

    @classmethod
    def of(cls, names: Sequence[str], sums: Sequence[float]) -> LossMeans:
        """sums: (3 k,) for k losses, the results of `LossTotals.flat` summed over any ranks."""
        count = len(names)
        predictions = dict(zip(names, sums[_COLUMNS * count :], strict=True))
        divisors = {name: max(predictions[name], 1) for name in names}
        return cls(
            {name: sums[_COLUMNS * i] / divisors[name] for i, name in enumerate(names)},
            {name: sums[_COLUMNS * i + 1] / divisors[name] for i, name in enumerate(names)},
            {name: int(predictions[name]) for name in names},
        )


class LossTotals:
    """Sums one rank's losses over batches on the device, without waiting for it.

    names: the losses, in the order in which every tensor here holds them.
    """

    def __init__(
        self, names: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.names = tuple(names)
        self._sums = torch.zeros(len(names), _COLUMNS, device=device, dtype=dtype)
        self._counts = dict.fromkeys(names, 0)

    def add(self, sums: Mapping[str, LossSum], batch: PackedBatch) -> None:
        """Add one batch. sums: what the model returned for it."""
        added = [part.to(self._sums.dtype) for name in self.names for part in sums[name]]
        self._sums += torch.stack(added).view_as(self._sums)
        for name in self.names:
            self._counts[name] += batch.num_predictions(name)

    @staticmethod
    def columns(names: Sequence[str]) -> int:
        """The length of the tensor that `flat` returns."""
        return (_COLUMNS + 1) * len(names)

    def flat(self) -> Tensor:
        """(3 k,) for k losses: loss and correct predictions of each, then all counts."""
        row = self._sums.new_empty(self.columns(self.names))
        sums = self._sums.view(-1)
        row[: len(sums)] = sums
        for place, name in enumerate(self.names, len(sums)):
            row[place].fill_(self._counts[name])  # row[place] = x would wait for a GPU
        return row
