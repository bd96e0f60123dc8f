"""The gradients of all parameters in one flat tensor, and the two ways in which they get there.

Autograd adds to a parameter's `grad`. Code that computes gradients by itself adds to
`target(parameter)` and says with `arrived` that it is done. A parameter may take one way in one
micro-batch and the other in the next.

If the flat tensor has the parameters' dtype, each `grad` is a view of it, and autograd adds in
place. Otherwise a hook adds each gradient to the flat tensor and frees it, so that sums over
micro-batches are made in the flat tensor's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bert_pretraining.optim.buckets import Buckets
from bert_pretraining.optim.flat import FlatLayout


class FlatGradient:
    """A `GradientSink` over a flat tensor; autograd's gradients get there too.

    Attributes:
        flat: (layout.length,) of `dtype`.
        views: the part of `flat` that belongs to each parameter, in its shape.

    Args:
        buckets: is told whose gradients are complete; None if nobody sends them.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        layout: FlatLayout,
        dtype: torch.dtype,
        buckets: Buckets | None,
    ) -> None:
        self._parameters, self._buckets = parameters, buckets
        self.flat = torch.zeros(layout.length, dtype=dtype, device=parameters[0].device)
        self.views = layout.views(self.flat)
        self._index = {id(parameter): index for index, parameter in enumerate(parameters)}
        # Autograd gives a gradient the dtype of its parameter, and PyTorch accepts no other one.
        self._in_place = dtype == parameters[0].dtype
        self._point_at_views()
        if buckets is not None or not self._in_place:
            for index, parameter in enumerate(parameters):
                hook = functools.partial(self._accumulated, index)
                parameter.register_post_accumulate_grad_hook(hook)

    def target(self, parameter: nn.Parameter) -> Tensor:
        """See `runtime/gradient_sink.py`."""
        return self.views[self._index[id(parameter)]]

    def arrived(self, parameters: Sequence[nn.Parameter]) -> None:
        """See `runtime/gradient_sink.py`."""
        for parameter in parameters:
            index = self._index[id(parameter)]
            if self._in_place and parameter.grad is None:
                parameter.grad = self.views[index]
            if self._buckets is not None:
                self._buckets.arrived(index)

    def zero(self) -> None:
        """Before an update's first micro-batch."""
        self.flat.zero_()
        self._point_at_views()

    def collect(self) -> None:
        """Bring in gradients that somebody has put into `grad` without a backward pass.

        If gradients are in place, a `grad` of None counts as zeros, and another tensor replaces
        what is here. Otherwise None changes nothing, and another tensor is added.
        """
        views, gradients = [], []
        for parameter, view in zip(self._parameters, self.views, strict=True):
            gradient = parameter.grad
            if gradient is view:
                continue
            if gradient is not None and gradient.data_ptr() != view.data_ptr():
                views.append(view)
                gradients.append(gradient)
            elif gradient is None and self._in_place:
                view.zero_()
        if views and self._in_place:
            torch._foreach_copy_(views, gradients)
        elif views:
            torch._foreach_add_(views, [gradient.to(self.flat.dtype) for gradient in gradients])
        self._point_at_views()

    def _point_at_views(self) -> None:
        for parameter, view in zip(self._parameters, self.views, strict=True):
            gradient = view if self._in_place else None
            if parameter.grad is not gradient:  # setting takes far longer than looking
                parameter.grad = gradient

    def _accumulated(self, index: int, parameter: nn.Parameter) -> None:
        """Autograd has added to the parameter's `grad`."""
        view = self.views[index]
        if not self._in_place:
            view.add_(parameter.grad)
            parameter.grad = None
        elif parameter.grad.data_ptr() != view.data_ptr():
            # The gradient was set to None after `zero`, and backward made a new one.
            parameter.grad = view.copy_(parameter.grad)
        if self._buckets is not None:
            self._buckets.arrived(index)
