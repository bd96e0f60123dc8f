"""Loss scaling for fp16. Its state is on the device, so that no step waits for the device."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from bert_pretraining.errors import UserError

INITIAL_SCALE = 2.0**20
MINIMUM_SCALE = 1.0
MAXIMUM_INITIAL_SCALE = 2.0**24
GROWTH_INTERVAL = 2000
MAX_SKIPPED_IN_A_ROW = 30  # at most 24 halvings reach MINIMUM_SCALE

_STATE = ("scale", "good_steps", "skipped_in_a_row")


class LossScale:
    """Dynamic loss scale: halved after an overflow, doubled after enough finite steps in a row.

    A fixed scale becomes NaN after a step whose gradients were not finite. Then every later step is
    not finite either, so that the weights do not change until the host reads the result.

    Attributes:
        initial: the scale at the start.
        scale: 0-d float32 on the device. good_steps, skipped_in_a_row: 0-d int64 there.
    """

    def __init__(
        self,
        initial: float,
        dynamic: bool,
        growth_interval: int = GROWTH_INTERVAL,
        device: torch.device | None = None,
    ) -> None:
        """growth_interval: finite steps in a row before the scale doubles."""
        self.initial, self.dynamic = initial, dynamic
        self.growth_interval = growth_interval
        self.scale = torch.tensor(initial, dtype=torch.float32, device=device)
        self.good_steps = torch.tensor(0, device=device)
        self.skipped_in_a_row = torch.tensor(0, device=device)

    @classmethod
    def for_precision(
        cls, precision: str, fixed: float, device: torch.device | None = None
    ) -> LossScale:
        """The scale for a run: 1 unless precision is fp16; `fixed` if that is not 0, else dynamic.

        The environment variable INIT_LOSS_SCALE replaces the initial scale 2^20. Raises UserError
        if it is not a number from 1 to 2^24.
        """
        if precision != "fp16":
            return cls(1.0, dynamic=False, device=device)
        if fixed > 0:
            return cls(fixed, dynamic=False, device=device)
        text = os.environ.get("INIT_LOSS_SCALE", str(INITIAL_SCALE))
        try:
            initial = float(text)
        except ValueError:
            initial = math.nan
        if not MINIMUM_SCALE <= initial <= MAXIMUM_INITIAL_SCALE:
            raise UserError(
                f"INIT_LOSS_SCALE={text}: must be a number from 1 to 2^24",
                "correct the variable, or unset it",
            )
        return cls(initial, dynamic=True, device=device)

    def update(self, finite: Tensor) -> None:
        """Adapt the scale after a step. finite: 0-d bool on the device, of its gradients."""
        self.skipped_in_a_row = torch.where(finite, 0, self.skipped_in_a_row + 1)
        if not self.dynamic:
            self.scale = torch.where(finite, self.scale, torch.nan)
            return
        self.good_steps = torch.where(finite, self.good_steps + 1, 0)
        grows = self.good_steps >= self.growth_interval
        grown = torch.where(grows, self.scale * 2.0, self.scale)
        halved = torch.clamp(self.scale / 2.0, min=MINIMUM_SCALE)
        self.scale = torch.where(finite, grown, halved)
        self.good_steps = torch.where(grows, 0, self.good_steps)

    def state_dict(self) -> dict[str, float]:
        """The scale and both counts as numbers. Waits for the device."""
        return {name: getattr(self, name).item() for name in _STATE}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned. A fixed scale keeps its value."""
        for name in _STATE if self.dynamic else ():
            getattr(self, name).fill_(state[name])
