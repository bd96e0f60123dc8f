"""Losses by name, from the heads to the log: "mlm" (masked language model), "nsp" (next sentence).

A batch gives sums, not means, so that any mean over batches and ranks can be formed from them.
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
    correct: scalar, int64, how many predictions were right.
    """

    loss: Tensor
    correct: Tensor


def mean_loss(sums: Mapping[str, LossSum], batch: PackedBatch) -> Tensor:
    """The training loss of one batch, 0-d: the sum of its losses' means."""
    return sum(part.loss / max(batch.num_predictions(name), 1) for name, part in sums.items())


@dataclass(frozen=True)
class LossMeans:
    """What sums over batches and ranks come to.

    mean, accuracy: by the loss's name; nats, and the share of right predictions.
    counts: how many predictions they are means over.
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
        """sums: (3 k,), what `LossTotals.flat` gave, added up over any number of ranks."""
        count = len(names)
        predictions = dict(zip(names, sums[_COLUMNS * count :], strict=True))
        divisors = {name: max(predictions[name], 1) for name in names}
        return cls(
            {name: sums[_COLUMNS * i] / divisors[name] for i, name in enumerate(names)},
            {name: sums[_COLUMNS * i + 1] / divisors[name] for i, name in enumerate(names)},
            {name: int(predictions[name]) for name in names},
        )


class LossTotals:
    """Adds up one rank's batches on the device; nothing waits for it.

    names: of the losses, in the order of every tensor here.
    """

    def __init__(
        self, names: Sequence[str], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.names = tuple(names)
        self._sums = torch.zeros(len(names), _COLUMNS, device=device, dtype=dtype)
        self._counts = dict.fromkeys(names, 0)

    def add(self, sums: Mapping[str, LossSum], batch: PackedBatch) -> None:
        """sums: what the model gave for `batch`, whose predictions are counted."""
        added = [part.to(self._sums.dtype) for name in self.names for part in sums[name]]
        self._sums += torch.stack(added).view_as(self._sums)
        for name in self.names:
            self._counts[name] += batch.num_predictions(name)

    @staticmethod
    def columns(names: Sequence[str]) -> int:
        """The length of what `flat` gives."""
        return (_COLUMNS + 1) * len(names)

    def write_to(self, row: Tensor) -> None:
        """Fill (3 k,) for k losses: loss and correct predictions of each, then all counts."""
        sums = self._sums.view(-1)
        row[: len(sums)] = sums
        for place, name in enumerate(self.names, len(sums)):
            row[place] = self._counts[name]

    def flat(self) -> Tensor:
        """What `write_to` writes, to be added up over ranks."""
        row = self._sums.new_empty(self.columns(self.names))
        self.write_to(row)
        return row
