"""Loss scaling for fp16."""

from __future__ import annotations


class LossScale:
    """Dynamic loss scale: halved after an overflow, doubled after `growth_interval` good steps.

    Args:
        initial: the first scale; 1.0 for dtypes that need none.
        dynamic: False keeps the scale as it is.
        growth_interval: good steps in a row before the scale doubles.
    """

    def __init__(self, initial: float, dynamic: bool, growth_interval: int = 2000) -> None:
        self.scale = initial
        self.dynamic = dynamic
        self.growth_interval = growth_interval
        self.good_steps = 0

    def update(self, finite: bool) -> None:
        """Account for a step whose gradients were finite, or not."""
        if not self.dynamic:
            return
        if not finite:
            self.scale /= 2.0
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale *= 2.0
            self.good_steps = 0
