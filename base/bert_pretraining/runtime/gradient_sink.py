"""Where code that computes gradients without autograd puts them: the model's side of an optimizer.

The model adds gradients to a sink, and an optimizer that keeps all gradients in memory of its own
is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn


class GradientSink(Protocol):
    """A place for the gradients of parameters that autograd does not handle."""

    def target(self, parameter: nn.Parameter) -> Tensor:
        """What to add the parameter's gradient to; of its shape, maybe of a wider dtype."""

    def arrived(self, parameters: Sequence[nn.Parameter]) -> None:
        """The targets of these parameters have all that this micro-batch adds to them.

        Call it once a micro-batch for each parameter that autograd does not handle.
        """
