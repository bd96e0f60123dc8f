"""Loss scaling for fp16."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

from bert_pretraining.errors import TrainingError, UserError

INITIAL_SCALE = 2.0**20
MINIMUM_SCALE = 1.0
MAXIMUM_INITIAL_SCALE = 2.0**24
GROWTH_INTERVAL = 2000
MAX_SKIPPED_IN_A_ROW = 30  # at most 24 halvings lead to the least scale


class LossScale:
    """Dynamic loss scale: halved after an overflow, doubled after enough good steps.

    Args:
        initial: the first scale; 1.0 for dtypes that need none.
        dynamic: False keeps the scale as it is.
        growth_interval: good steps in a row before the scale doubles.
    """

    def __init__(
        self, initial: float, dynamic: bool, growth_interval: int = GROWTH_INTERVAL
    ) -> None:
        self.scale = initial
        self.dynamic = dynamic
        self.growth_interval = growth_interval
        self.good_steps = 0
        self.skipped_in_a_row = 0

    @classmethod
    def for_precision(cls, precision: str, fixed: float) -> LossScale:
        """The scale for a run: none but for fp16; `fixed` if that is not 0, else dynamic.

        The environment's INIT_LOSS_SCALE takes the place of 2^20. UserError if it is no
        number from 1 to 2^24.
        """
        if precision != "fp16":
            return cls(1.0, dynamic=False)
        if fixed > 0:
            return cls(fixed, dynamic=False)
        text = os.environ.get("INIT_LOSS_SCALE", str(INITIAL_SCALE))
        try:
            initial = float(text)
        except ValueError:
            initial = math.nan
        if not MINIMUM_SCALE <= initial <= MAXIMUM_INITIAL_SCALE:
            raise UserError(f"INIT_LOSS_SCALE={text}: must be a number from 1 to 2^24")
        return cls(initial, dynamic=True)

    def update(self, finite: bool) -> None:
        """Account for a step whose gradients were finite, or not."""
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if not self.dynamic:
            return
        if not finite:
            self.scale = max(self.scale / 2.0, MINIMUM_SCALE)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= 2.0
            self.good_steps = 0

    def check(self, updates: int, diagnose: Callable[[], str]) -> None:
        """After a step that was not finite: TrainingError if no scale can help.

        diagnose says what was not finite first; it is called only then.
        """
        if not self.dynamic:
            raise TrainingError(
                f"a gradient is not finite after {updates} updates: {diagnose()}; "
                "try a lower --learning_rate or --precision fp32"
            )
        if self.skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"fp16 overflowed {self.skipped_in_a_row} times in a row after {updates} updates, "
                f"at last at loss scale {self.scale:g}: {diagnose()}; the weights or the data are "
                "broken, or try --precision bf16"
            )
