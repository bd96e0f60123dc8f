"""How the ranks' gradients become one: their mean, exchanged once an update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bert_pretraining.model.batch import smallest_batch
from bert_pretraining.optim import Lamb, ShardedLamb, scale_down
from bert_pretraining.runtime.process_group import Ranks


class Reduction(Protocol):
    """What stands around the micro-batches of an update.

    Attributes:
        model: what to call in place of the module.
    """

    model: nn.Module

    def during(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients travel in the last one."""

    def finish(self, loss_scale: Tensor) -> None:
        """After the last one: the optimizer can take its step."""


class NoReduction:
    """One rank: its gradients are those of the update."""

    def __init__(self, module: nn.Module) -> None:
        self.model = module

    def during(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Reduction`."""
        return contextlib.nullcontext()

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""


class DuringBackward:
    """torch's DistributedDataParallel: all-reduce in buckets while backward goes on.

    It cuts its buckets anew after the first backward, by the order in which gradients came. With
    more than two ranks, in which order a gradient's parts are added depends on the buckets. So a
    pass that nobody counts comes first, lest a resumed run's first step differ in the last bit.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        device_ids = [device.index] if device.type == "cuda" else None
        self.model = DistributedDataParallel(
            module, device_ids=device_ids, gradient_as_bucket_view=True
        )
        with torch.random.fork_rng(devices=device_ids or []):
            for _ in range(2):  # new buckets are made as the second pass begins
                out = self.model(smallest_batch(device))
                (out.mlm_loss + out.next_sentence_loss).backward()
        module.zero_grad()

    def during(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Reduction`."""
        return contextlib.nullcontext() if last else self.model.no_sync()

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""


class AfterClipping:
    """Each rank's gradient is clipped by its own norm, and only then all-reduced.

    limit: the norm. The mean's norm is not above it, so that the optimizer clips no more.
    """

    def __init__(self, module: nn.Module, optimizer: Lamb, limit: float) -> None:
        self.model = module
        self._optimizer = optimizer
        self._limit = limit

    def during(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Reduction`."""
        return contextlib.nullcontext()

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""
        gradients = self._optimizer.gradients()
        scale_down(gradients, self._limit * loss_scale)
        torch._foreach_mul_(gradients, 1.0 / dist.get_world_size())
        works = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
        for work in works:
            work.wait()


class Sharded:
    """The optimizer reduces, each rank getting its share.

    limit: as in `AfterClipping`; None clips the mean, in the optimizer.
    """

    def __init__(self, module: nn.Module, optimizer: ShardedLamb, limit: float | None) -> None:
        self.model = module
        self._optimizer = optimizer
        self._limit = limit

    @contextlib.contextmanager
    def during(self, last: bool) -> Iterator[None]:
        """See `Reduction`."""
        with self._optimizer.during(last and self._limit is None):
            yield

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""
        self._optimizer.finish(None if self._limit is None else self._limit * loss_scale)


def make_reduction(
    module: nn.Module, optimizer: Lamb, ranks: Ranks, clip_first: float | None
) -> Reduction:
    """The reduction for these ranks and this optimizer.

    clip_first: the norm to clip each rank's gradient to before the reduction, or None.
    """
    if ranks.world_size == 1:
        return NoReduction(module)
    if isinstance(optimizer, ShardedLamb):
        return Sharded(module, optimizer, clip_first)
    if clip_first is not None:
        return AfterClipping(module, optimizer, clip_first)
    return DuringBackward(module, ranks.device)
