"""LAMB whose state is sharded over the ranks (ZeRO stage 1, Rajbhandari et al. 2020).

The flat tensors are split into buckets of equal length, and each bucket into one piece per rank. A
rank's shard is its piece of every bucket: it holds masters and moments of these elements only.

    backward       as soon as a bucket's gradients are complete, it is reduce-scattered while
                   backward is still running; each rank gets the mean of its piece
    step           runs the passes of flat LAMB over the shard; one all-gather of the blocks' sums
                   gives every rank the norms of all parameters
    end of step    an all-gather of the updated pieces gives every rank all parameters

Sums of blocks are added in the order that `flat_lamb.py` describes, which does not depend on ranks.
So the update has the same bits as the unsharded one if the reduced gradients have the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bert_pretraining.optim.buckets import PendingCollectives
from bert_pretraining.optim.flat import BLOCK, FlatLayout
from bert_pretraining.optim.flat_lamb import FlatLamb
from bert_pretraining.optim.optimizer import OptimizerSettings
from bert_pretraining.runtime.process_group import (
    InProgress,
    all_gather,
    reduce_scatter,
)


class ShardedLamb(FlatLamb):
    """`FlatLamb` sharded over the default process group; all ranks must make every call.

    It always reduces the gradients itself. It has no `masters` and `slots`, only this rank's shard
    of them. `state_dict` returns the whole state on rank 0; `load_state_dict` needs the whole state
    on every rank.

    Args:
        arguments: as for `FlatLamb`. `bucket` is rounded up to a multiple of ranks x BLOCK.
    """

    waits_in_step = True

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimizerSettings,
        masters: dict[str, Tensor] | None = None,
        **arguments: Any,
    ) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        super().__init__(named_parameters, settings, masters, reduces_gradients=True, **arguments)

    def _create_state(self, masters: list[Tensor]) -> None:
        shapes = [parameter.shape for parameter in self.parameters]
        bucket = bucket_length(FlatLayout(shapes).length, self._bucket, self._world_size)
        self.layout = FlatLayout(shapes, bucket)
        self._count = self.layout.length // bucket
        full = self.layout.filled(masters)
        values = full.to(self.parameters[0].dtype)
        self._point_parameters_at(values)
        self._create_gradient(bucket)
        self._values = values.view(self._count, self._world_size, -1)
        master = self._own_pieces(full)
        indices = torch.arange(self.layout.length // BLOCK)
        self.shard = self._shard_of(
            torch.zeros_like(self._own_pieces(self.sink.flat)),
            master,
            None if values.dtype == master.dtype else master.to(values.dtype),
            self._own_pieces(indices).to(master.device),
        )
        self._prepare_sums()

    def _own_pieces(self, flat: Tensor) -> Tensor:
        """(n,) this rank's pieces of a flat tensor with one entry per element, or per block."""
        pieces = flat.view(self._count, self._world_size, -1)
        return pieces[:, self._rank].reshape(-1)

    def _send(self, bucket: int) -> InProgress:
        gradient = self._bucket_views[bucket].mul_(1.0 / self._world_size)
        return reduce_scatter(self.shard.gradient.view(self._count, -1)[bucket], gradient)

    def _of_all_blocks(self, sums: Tensor) -> Tensor:
        rows = sums.new_empty(self._world_size, *sums.shape)
        all_gather(rows.view(-1), sums.contiguous().view(-1)).wait()
        # (ranks, k, buckets, blocks of a piece) -> (k, buckets, ranks, blocks of a piece)
        rows = rows.view(self._world_size, len(sums), self._count, -1).permute(1, 2, 0, 3)
        return rows.reshape(len(sums), -1)

    def _publish(self) -> None:
        shard = self.shard.master if self.shard.rounded is None else self.shard.rounded
        pending = PendingCollectives()
        for values, piece in zip(self._values, shard.view(self._count, -1), strict=True):
            pending.add(all_gather(values.view(-1), piece))
        pending.wait()

    def state_dict(self) -> dict:
        """As `Optimizer.state_dict`, on the CPU of rank 0; an empty one on the other ranks."""
        state: dict[str, object] = {"updates": self.updates}
        for key, shard in self._state_shards().items():
            flat = self._gather(shard)
            if flat is not None:
                state[key] = dict(zip(self.names, self.layout.views(flat), strict=True))
        return state if self._rank == 0 else {}

    def _state_shards(self) -> dict[str, Tensor]:
        shard = self.shard
        return {
            "master": shard.master,
            "first_moment": shard.first,
            "second_moment": shard.second,
        }

    def _gather(self, shard: Tensor) -> Tensor | None:
        """The whole flat tensor on rank 0's CPU, gathered bucket by bucket to save memory.

        Every rank receives a bucket and drops it, see `process_group.gather_to_main`.
        """
        flat = torch.empty(self.layout.length, dtype=shard.dtype) if self._rank == 0 else None
        received = shard.new_empty(self.layout.length // self._count)
        for bucket, piece in enumerate(shard.view(self._count, -1)):
            all_gather(received, piece).wait()
            if flat is not None:
                flat.view(self._count, -1)[bucket].copy_(received)
        return flat

    def _copy_state(self, state: dict) -> None:
        for key, shard in self._state_shards().items():
            tensors = [state[key][name] for name in self.names]
            shard.copy_(self._own_pieces(self.layout.filled(tensors)))


def bucket_length(length: int, wanted: int, world_size: int) -> int:
    """Length of equal buckets: at most `wanted`, then up to a multiple of ranks x BLOCK."""
    equal = -(-length // -(-length // wanted))
    smallest = world_size * BLOCK
    return -(-equal // smallest) * smallest
