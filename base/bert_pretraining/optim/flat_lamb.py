"""LAMB over flat tensors: the code common to all kernels, sharded or not.

The formulas are those of `lamb.py`. Norms are computed in two stages: a kernel sums the squares of
each block, then the blocks of each parameter are added in float64, in an order that depends only on
the parameters' sizes. So the result has the same bits however the work is split among threads,
chunks of memory or ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bert_pretraining.errors import UserError
from bert_pretraining.optim.adam import MOMENTS
from bert_pretraining.optim.buckets import BUCKET, Buckets
from bert_pretraining.optim.flat import (
    BLOCK,
    FlatKernels,
    FlatLayout,
    ParameterTable,
    Request,
    Shard,
)
from bert_pretraining.optim.gradients import FlatGradient
from bert_pretraining.optim.loss_scale import LossScale
from bert_pretraining.optim.norms import scale_down
from bert_pretraining.optim.optimizer import Optimizer, OptimizerSettings
from bert_pretraining.optim.schedule import Schedule
from bert_pretraining.runtime.process_group import InProgress, all_reduce

BLOCKS_AT_A_TIME = 2**13  # blocks in each tensor that `gradients` returns


class FlatLamb(Optimizer):
    """LAMB whose parameters, gradients and state are views of flat tensors.

    With `reduces_gradients` it sums the gradients over the ranks of the default process group: the
    caller wraps each micro-batch in `overlap` and calls `finish_reduction` after the last one.

    Args:
        kernels: the three passes of a step over the flat tensors.
        gradient_dtype: of the flat gradient, in which micro-batches and ranks are summed; None for
            the parameters' own.
        bucket: elements in each message of the reduction, at most.
    """

    SLOTS = MOMENTS

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimizerSettings,
        masters: dict[str, Tensor] | None = None,
        *,
        kernels: FlatKernels,
        gradient_dtype: torch.dtype | None = None,
        reduces_gradients: bool = False,
        bucket: int = BUCKET,
    ) -> None:
        self.kernels = kernels
        self.reduces_gradients = reduces_gradients
        self._gradient_dtype, self._bucket = gradient_dtype, bucket
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
        self._point_parameters_at(master if rounded is None else rounded)
        self._create_gradient(self._bucket)
        self.shard = self._shard_of(self.sink.flat, master, rounded, slice(None))
        self._prepare_sums()
        self.masters = self.layout.views(self.shard.master)
        moments = (self.shard.first, self.shard.second)
        self.slots = dict(zip(MOMENTS, map(self.layout.views, moments), strict=True))

    def _point_parameters_at(self, values: Tensor) -> None:
        """Make the parameters views of `values`."""
        for parameter, view in zip(self.parameters, self.layout.views(values), strict=True):
            parameter.data = view

    def _create_gradient(self, bucket: int) -> None:
        """Create the flat gradient, and what sends it in buckets of this length."""
        self._buckets = None
        if self.reduces_gradients:
            self._buckets = Buckets(self.names, self.layout, bucket, self._send)
        dtype = self._gradient_dtype or self.parameters[0].dtype
        self.sink = FlatGradient(self.parameters, self.layout, dtype, self._buckets)
        self._bucket_views = self.sink.flat.split(bucket)

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
        self._table = ParameterTable.of(self.layout, self.decays, device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `Optimizer.zero_grad`, but the flat gradient always keeps its place."""
        self.sink.zero()

    def gradients(self) -> list[Tensor]:
        """The flat gradient in pieces, (blocks, BLOCK) each, once it holds all gradients."""
        self.sink.collect()
        return list(self.sink.flat.view(-1, BLOCK).split(BLOCKS_AT_A_TIME))

    def gradients_by_name(self) -> dict[str, Tensor]:
        """See `Optimizer`. The tensors are views of the flat gradient."""
        self.sink.collect()
        return dict(zip(self.names, self.sink.views, strict=True))

    def overlap(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """A context for one micro-batch. In the last one, backward sends complete buckets."""
        return self._buckets.overlap(last)

    def _send(self, bucket: int) -> InProgress:
        return all_reduce(self._bucket_views[bucket].mul_(1.0 / dist.get_world_size()))

    def finish_reduction(self, limit: Tensor | None = None) -> None:
        """After the last backward pass, send the remaining buckets and wait for all.

        limit: 0-d; this rank's own gradient is first scaled down to that norm. None for no limit.
        With a limit, `overlap` must not have sent anything.
        """
        # Buckets with a parameter without a gradient were not sent yet; this sets it to zeros.
        self.sink.collect()
        if limit is not None:
            scale_down([self.sink.flat.view(-1, BLOCK)], limit)
        self._buckets.finish()

    def _collect_gradient(self) -> None:
        if not self.reduces_gradients:  # otherwise `finish_reduction` has done it
            self.sink.collect()

    def _of_all_blocks(self, sums: Tensor) -> Tensor:
        """(k, blocks of this shard) -> (k, blocks of the layout)."""
        return sums

    def _publish(self) -> None:
        """After an update, send the new parameters to the other ranks. Unsharded: nothing to do."""

    def step(self, learning_rate: float | Tensor, inverse_scale: float | Tensor = 1.0) -> Tensor:
        return self._step(learning_rate, inverse_scale)

    def scheduled_step(self, schedule: Schedule, loss_scale: LossScale) -> Tensor:
        """See `Optimizer`."""
        if self.kernels.takes_schedules:
            return self._step(schedule, loss_scale)
        return super().scheduled_step(schedule, loss_scale)

    @torch.no_grad()
    def _step(self, rate: float | Tensor | Schedule, scale: float | Tensor | LossScale) -> Tensor:
        self._collect_gradient()
        shard, table, kernels = self.shard, self._table, self.kernels
        kernels.square_sums(shard, self._sums[0])
        squares = self._of_all_blocks(self._sums[:1])[0]
        step = kernels.begin(squares, table, Request(self.settings, self.num_updates, rate, scale))
        self.gradient_norm = step.norm
        if self.may_read and not step.finite:
            return step.finite
        kernels.first_stage(shard, step, self._sums)
        rates = kernels.rates(self._of_all_blocks(self._sums), table, step)
        kernels.second_stage(shard, step, rates)
        self._publish()
        return step.finite

    def _round_masters(self) -> None:
        if self.shard.rounded is not None:
            self.shard.rounded.copy_(self.shard.master)
        self._publish()
