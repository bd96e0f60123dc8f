"""LAMB over flat tensors: the code common to all kernels, sharded or not.

The formulas are those of `lamb.py`. Norms are computed in two stages: a kernel sums the squares of
each block, then the blocks of each parameter are added in float64, in an order that depends only on
the parameters' sizes. So the result has the same bits however the work is split among threads,
chunks of memory or ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.optim.adam import MOMENTS
from bert_pretraining.optim.flat import BLOCK, FlatKernels, FlatLayout, Shard, Step
from bert_pretraining.optim.optimizer import Optimizer, OptimizerSettings

BLOCKS_AT_A_TIME = 2**13  # blocks in each tensor that `gradients` returns


class FlatLamb(Optimizer):
    """LAMB whose parameters, gradients and state are views of flat tensors.

    Args:
        kernels: the three passes of a step over the flat tensors.
        gradients_in_place: whether `zero_grad` makes the parameters' gradients views of the flat
            tensor, so that backward adds to it. False if DistributedDataParallel owns the
            gradients: each step then copies them.
    """

    SLOTS = MOMENTS

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimizerSettings,
        masters: dict[str, Tensor] | None = None,
        *,
        kernels: FlatKernels,
        gradients_in_place: bool = True,
    ) -> None:
        self.kernels = kernels
        self._gradients_in_place = gradients_in_place
        super().__init__(named_parameters, settings, masters)

    def _create_state(self, masters: list[Tensor]) -> None:
        kinds = sorted({f"{one.dtype} on {one.device}" for one in self.parameters})
        if len(kinds) > 1:
            raise UserError(
                f"flat LAMB needs parameters of one dtype on one device, not {', '.join(kinds)}",
                "pass --optimizer foreach",
            )
        self.layout = FlatLayout([parameter.shape for parameter in self.parameters])
        master = self.layout.filled(masters)
        dtype = self.parameters[0].dtype
        rounded = None if dtype == master.dtype else master.to(dtype)
        self._gradient = torch.zeros_like(master if rounded is None else rounded)
        self._point_parameters_at(master if rounded is None else rounded)
        self.shard = self._shard_of(self._gradient, master, rounded, slice(None))
        self._prepare_sums()
        self.masters = self.layout.views(self.shard.master)
        moments = (self.shard.first, self.shard.second)
        self.slots = dict(zip(MOMENTS, map(self.layout.views, moments), strict=True))

    def _point_parameters_at(self, values: Tensor) -> None:
        """Make the parameters views of `values`, and create their views of the flat gradient."""
        for parameter, view in zip(self.parameters, self.layout.views(values), strict=True):
            parameter.data = view
        self._gradient_views = self.layout.views(self._gradient)

    def _shard_of(
        self, gradient: Tensor, master: Tensor, rounded: Tensor | None, blocks: slice | Tensor
    ) -> Shard:
        """The shard that this rank updates. blocks: its blocks in the layout."""
        parameter_of_block = self.layout.parameter_of_block(master.device)[blocks]
        decay = self.settings.weight_decay
        # One more entry, for blocks that belong to no parameter.
        decays = master.new_tensor([decay * decays for decays in [*self.decays, False]])
        return Shard(
            gradient,
            master,
            torch.zeros_like(master),
            torch.zeros_like(master),
            rounded,
            parameter_of_block,
            decays[parameter_of_block.long()],
        )

    def _prepare_sums(self) -> None:
        device = self.shard.master.device
        self._sums = self.shard.master.new_zeros(2, len(self.shard.parameter_of_block))
        self._blocks_of = torch.tensor(self.layout.blocks, device=device)
        self._has_ratio = torch.tensor(self.decays, device=device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `Optimizer.zero_grad`, but gradients in place are always set to zero, not to None."""
        if not self._gradients_in_place:
            super().zero_grad(set_to_none)
            return
        self._gradient.zero_()
        for parameter, view in zip(self.parameters, self._gradient_views, strict=True):
            parameter.grad = view

    def gradients(self) -> list[Tensor]:
        """The flat gradient in pieces, (blocks, BLOCK) each, once it holds all gradients."""
        self._collect_gradient()
        for parameter, view in zip(self.parameters, self._gradient_views, strict=True):
            parameter.grad = view
        return list(self._gradient.view(-1, BLOCK).split(BLOCKS_AT_A_TIME))

    def _collect_gradient(self) -> None:
        """Copy gradients that are not in place into the flat gradient; zeros for None."""
        views, gradients = [], []
        for parameter, view in zip(self.parameters, self._gradient_views, strict=True):
            if parameter.grad is None:
                view.zero_()
            elif parameter.grad.data_ptr() != view.data_ptr():
                views.append(view)
                gradients.append(parameter.grad)
        if views:
            torch._foreach_copy_(views, gradients)

    def _of_all_blocks(self, sums: Tensor) -> Tensor:
        """(k, blocks of this shard) -> (k, blocks of the layout)."""
        return sums

    def _publish(self) -> None:
        """After an update, send the new parameters to the other ranks. Unsharded: nothing to do."""

    def _sum_by_parameter(self, sums: Tensor) -> list[Tensor]:
        """(k, blocks of this shard) -> k times (parameters,) float64."""
        return [
            self.layout.sum_by_parameter(row, self._blocks_of) for row in self._of_all_blocks(sums)
        ]

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor, inverse_scale: float | Tensor = 1.0) -> Tensor:
        self._collect_gradient()
        shard, settings, kernels = self.shard, self.settings, self.kernels
        kernels.square_sums(shard, self._sums[0])
        (squares,) = self._sum_by_parameter(self._sums[:1])
        norm = squares.sum().sqrt() * inverse_scale
        self.gradient_norm = norm.to(shard.master.dtype)
        finite = torch.isfinite(self.gradient_norm)
        if self.may_read and not finite:
            return finite
        self.num_updates += finite
        factor = inverse_scale / torch.clamp(norm / settings.max_gradient_norm, min=1.0)
        step = Step(settings, factor, self.num_updates, finite)
        kernels.first_stage(shard, step, self._sums)
        weights, updates = self._sum_by_parameter(self._sums)
        both = self._has_ratio & (weights > 0) & (updates > 0)
        rates = torch.where(both, (weights / updates).sqrt(), 1.0) * learning_rate
        rates = torch.cat([rates, rates.new_zeros(1)]).to(shard.master.dtype)
        kernels.second_stage(shard, step, rates[shard.parameter_of_block.long()])
        self._publish()
        return finite

    def _round_masters(self) -> None:
        if self.shard.rounded is not None:
            self.shard.rounded.copy_(self.shard.master)
        self._publish()
