"""The learning rate as a pure function of the number of updates done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretraining.runtime import device as devices


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then linear decay to 0 at `max_steps`.

    As in MLPerf's TensorFlow reference: after s updates, the rate is
    `learning_rate * (s - start_warmup_step) / warmup_steps` while that quotient is below 1
    (and 0 where it is negative), else `learning_rate * (1 - s / max_steps)`. The decay is counted
    from update 0, not from the end of the warm-up.
    """

    learning_rate: float
    max_steps: int
    warmup_steps: int = 0
    start_warmup_step: int = 0

    def __call__(self, updates: int) -> float:
        """The learning rate of the next update, once `updates` of them are done."""
        since_start = updates - self.start_warmup_step
        if self.warmup_steps and since_start < self.warmup_steps:
            return self.learning_rate * max(since_start, 0) / self.warmup_steps
        return self.learning_rate * (1.0 - min(updates / self.max_steps, 1.0))

    def at(self, updates: Tensor) -> Tensor:
        """The same rate for a number of updates as a 0-d tensor: 0-d, of the dtype `devices.wide`.

        Bit for bit the same where that is float64.
        """
        made = updates.to(devices.wide(updates.device))
        since_start = made - self.start_warmup_step
        rate = self.learning_rate * (1.0 - torch.clamp(made / self.max_steps, max=1.0))
        if not self.warmup_steps:
            return rate
        warming = self.learning_rate * torch.clamp(since_start, min=0.0) / self.warmup_steps
        return torch.where(since_start < self.warmup_steps, warming, rate)
