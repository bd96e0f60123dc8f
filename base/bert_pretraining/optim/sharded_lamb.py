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

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bert_pretraining.optim.flat import BLOCK, FlatKernels, FlatLayout
from bert_pretraining.optim.flat_lamb import FlatLamb
from bert_pretraining.optim.norms import scale_down
from bert_pretraining.optim.optimizer import OptimizerSettings
from bert_pretraining.runtime.process_group import (
    InProgress,
    all_gather,
    reduce_scatter,
    sendable,
)

BUCKET = 2**23  # elements; 16 or 32 MiB per collective
AT_A_TIME = 3  # collectives that gloo may have pending, because it copies what it sends


class _PendingCollectives:
    """Collectives in progress, at most `limit` at a time: gloo keeps a copy of what each sends."""

    def __init__(self, limit: int | None) -> None:
        self.started = 0
        self._works: deque[InProgress] = deque()
        self._limit = limit

    def add(self, work: InProgress) -> None:
        self.started += 1
        self._works.append(work)
        if self._limit is not None and len(self._works) > self._limit:
            self._works.popleft().wait()

    def wait(self) -> None:
        while self._works:
            self._works.popleft().wait()
        self.started = 0


class ShardedLamb(FlatLamb):
    """`FlatLamb` sharded over the default process group; all ranks must make every call.

    It reduces the gradients itself: the caller wraps each micro-batch in `overlap` and calls
    `finish_reduction` after the last one. It has no `masters` and `slots`, only this rank's shard
    of them. `state_dict` returns the whole state on rank 0; `load_state_dict` needs the whole state
    on every rank.

    Args:
        bucket: elements of a bucket at most, before rounding up to a multiple of ranks x BLOCK.
    """

    reduces_gradients = True

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimizerSettings,
        masters: dict[str, Tensor] | None = None,
        *,
        kernels: FlatKernels,
        bucket: int = BUCKET,
    ) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._bucket = bucket
        super().__init__(named_parameters, settings, masters, kernels=kernels)

    def _create_state(self, masters: list[Tensor]) -> None:
        shapes = [parameter.shape for parameter in self.parameters]
        bucket = _bucket_length(FlatLayout(shapes).length, self._bucket, self._world_size)
        self.layout = FlatLayout(shapes, bucket)
        self._buckets = self.layout.length // bucket
        full = self.layout.filled(masters)
        values = full.to(self.parameters[0].dtype)
        self._gradient = torch.zeros_like(values)
        self._point_parameters_at(values)
        self._values = values.view(self._buckets, self._world_size, -1)
        self._full_gradient = self._gradient.view(self._buckets, self._world_size, -1)
        master = self._own_pieces(full)
        indices = torch.arange(self.layout.length // BLOCK)
        self.shard = self._shard_of(
            torch.zeros_like(self._own_pieces(values)),
            master,
            None if values.dtype == master.dtype else master.to(values.dtype),
            self._own_pieces(indices).to(master.device),
        )
        self._prepare_sums()
        self._prepare_hooks()

    def _own_pieces(self, flat: Tensor) -> Tensor:
        """(n,) this rank's pieces of a flat tensor with one entry per element, or per block."""
        pieces = flat.view(self._buckets, self._world_size, -1)
        return pieces[:, self._rank].reshape(-1)

    def _prepare_hooks(self) -> None:
        """Count the gradients that each bucket waits for, and register hooks that report them."""
        length = self.layout.length // self._buckets
        self._waits_for = [0] * self._buckets
        for offset, parameter, view in zip(
            self.layout.offsets, self.parameters, self._gradient_views, strict=True
        ):
            last = offset + max(parameter.numel(), 1) - 1
            buckets = range(offset // length, last // length + 1)
            for bucket in buckets:
                self._waits_for[bucket] += 1

            def arrived(one: Tensor, buckets: range = buckets, view: Tensor = view) -> None:
                if one.grad.data_ptr() != view.data_ptr():
                    # The gradient was set to None after `zero_grad`, and backward made a new one.
                    one.grad = view.copy_(one.grad)
                if self._overlapping:
                    for bucket in buckets:
                        self._missing[bucket] -= 1
                    self._reduce_complete_buckets()

            parameter.register_post_accumulate_grad_hook(arrived)
        self._overlapping = False
        self._missing: list[int] = []
        self._pending = _PendingCollectives(AT_A_TIME if dist.get_backend() == "gloo" else None)

    @contextlib.contextmanager
    def overlap(self, last: bool) -> Iterator[None]:
        """A context for one micro-batch. In the last one, backward sends complete buckets."""
        self._missing = list(self._waits_for)
        self._overlapping = last
        try:
            yield
        finally:
            self._overlapping = False

    def _reduce_complete_buckets(self) -> None:
        # Every rank sends buckets in the same order, whatever the order of its gradients.
        while self._pending.started < self._buckets and not self._missing[self._pending.started]:
            self._reduce(self._pending.started)

    def _reduce(self, bucket: int) -> None:
        gradient = self._full_gradient[bucket].mul_(1.0 / self._world_size)
        shard = self.shard.gradient.view(self._buckets, -1)[bucket]
        self._pending.add(reduce_scatter(shard, gradient.view(-1)))

    def finish_reduction(self, limit: Tensor | None = None) -> None:
        """After the last backward pass, send the remaining buckets and wait for all.

        limit: 0-d; this rank's own gradient is first scaled down to that norm. None for no limit.
        With a limit, `overlap` must not have sent anything.
        """
        # Buckets with a parameter without a gradient were not sent yet; this sets it to zeros.
        super()._collect_gradient()
        if limit is not None:
            scale_down([self._gradient.view(-1, BLOCK)], limit)
        while self._pending.started < self._buckets:
            self._reduce(self._pending.started)
        self._pending.wait()

    def _collect_gradient(self) -> None:
        """Nothing to do: `finish_reduction` has collected and reduced the gradient."""

    def _of_all_blocks(self, sums: Tensor) -> Tensor:
        rows = sums.new_empty(self._world_size, *sums.shape)
        all_gather(rows.view(-1), sums.contiguous().view(-1)).wait()
        # (ranks, k, buckets, blocks of a piece) -> (k, buckets, ranks, blocks of a piece)
        rows = rows.view(self._world_size, len(sums), self._buckets, -1).permute(1, 2, 0, 3)
        return rows.reshape(len(sums), -1)

    def _publish(self) -> None:
        shard = self.shard.master if self.shard.rounded is None else self.shard.rounded
        for values, piece in zip(self._values, shard.view(self._buckets, -1), strict=True):
            self._pending.add(all_gather(values.view(-1), piece))
        self._pending.wait()

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
        """The whole flat tensor on rank 0's CPU, gathered bucket by bucket to save memory."""
        flat = torch.empty(self.layout.length, dtype=shard.dtype) if self._rank == 0 else None
        for bucket, piece in enumerate(map(sendable, shard.view(self._buckets, -1))):
            pieces = [torch.empty_like(piece) for _ in range(self._world_size)]
            dist.gather(piece, pieces if self._rank == 0 else None)
            if flat is not None:
                flat.view(self._buckets, -1)[bucket].copy_(torch.cat(pieces))
        return flat

    def _copy_state(self, state: dict) -> None:
        for key, shard in self._state_shards().items():
            tensors = [state[key][name] for name in self.names]
            shard.copy_(self._own_pieces(self.layout.filled(tensors)))


def _bucket_length(length: int, wanted: int, world_size: int) -> int:
    """Length of equal buckets: at most `wanted`, then up to a multiple of ranks x BLOCK."""
    equal = -(-length // -(-length // wanted))
    smallest = world_size * BLOCK
    return -(-equal // smallest) * smallest
