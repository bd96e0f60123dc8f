"""How the ranks' gradients are averaged, once an update."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bert_pretraining.errors import UserError
from bert_pretraining.model.batch import smallest_batch
from bert_pretraining.optim import Optimizer, ShardedLamb, scale_down
from bert_pretraining.runtime import compat, torch_variables
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime.process_group import Ranks, all_reduce, sends_from_device


class Reduction(Protocol):
    """What the update does around its micro-batches, so that all ranks have the mean gradient.

    Attributes:
        model: what to call in place of the module.
        name: what logs call this reduction; it stays the same if the class is renamed.
        can_follow: whether `finish` does all the work if no micro-batch was in `overlap` with
            last=True, or if it was a captured graph, which calls no hook.
    """

    model: nn.Module
    name: str
    can_follow: bool

    def overlap(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """A context for forward and backward of one micro-batch.

        last: whether it is the update's last one; only then may gradients be sent inside.
        """

    def finish(self, loss_scale: Tensor) -> None:
        """After the last micro-batch: the optimizer can take its step afterwards."""


class NoReduction:
    """One rank: its gradients are the mean already."""

    name = "NoReduction"
    can_follow = True

    def __init__(self, module: nn.Module) -> None:
        self.model = module

    def overlap(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Reduction`."""
        return contextlib.nullcontext()

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""


class DdpReduction:
    """PyTorch's DistributedDataParallel (DDP): all-reduce in buckets while backward goes on.

    For optimizers that do not reduce gradients themselves.

    DDP makes new buckets after the first backward pass, by the order in which gradients
    came. With more than two ranks the buckets decide in which order the ranks' parts of a
    gradient are added, and so its last bit. Two passes that change nothing therefore come before
    training: then the first step of a resumed run uses the buckets of the run it goes on with.

    waits_from_here: is called in backward once this rank's gradients are complete.
    """

    name = "DuringBackward"
    can_follow = False

    def __init__(
        self, module: nn.Module, device: torch.device, waits_from_here: Callable[[], None]
    ) -> None:
        if torch_variables.is_detailed(os.environ) and compat.detail_breaks_ddp():
            raise UserError(
                "TORCH_DISTRIBUTED_DEBUG=DETAIL is set, under which DistributedDataParallel of "
                f"PyTorch {torch.__version__} ends by a segmentation fault",
                "run 'unset TORCH_DISTRIBUTED_DEBUG', or set it to INFO",
            )
        device_ids = None if device.type == "cpu" else [device.index]
        self.model = DistributedDataParallel(
            module, device_ids=device_ids, gradient_as_bucket_view=True
        )
        with devices.generators_kept(device):
            for _ in range(2):  # the new buckets are made as the second pass begins
                sums = self.model(smallest_batch(device))
                sum(task.loss for task in sums.values()).backward()
        module.zero_grad()
        self._is_last = False

        def complete(_: Tensor) -> None:
            if self._is_last:
                waits_from_here()

        # Backward ends at the embeddings. What follows there is that DDP waits for the other ranks.
        last = module.bert.embeddings.word_embeddings.weight
        last.register_post_accumulate_grad_hook(complete)

    def overlap(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Reduction`."""
        self._is_last = last
        return contextlib.nullcontext() if last else self.model.no_sync()

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""


class LateReduction:
    """The gradients are all-reduced one by one after the last backward pass.

    For backends that do not take the device's tensors: each message goes through main memory, so
    that a rank would wait for it in the middle of its backward pass.
    """

    name = "AfterBackward"
    can_follow = True

    def __init__(self, module: nn.Module, optimizer: Optimizer) -> None:
        self.model = module
        self._optimizer = optimizer

    def overlap(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Reduction`."""
        return contextlib.nullcontext()

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""
        gradients = self._optimizer.gradients()
        torch._foreach_mul_(gradients, 1.0 / dist.get_world_size())
        for reduction in [all_reduce(gradient) for gradient in gradients]:
            reduction.wait()


class ClippedReduction(LateReduction):
    """Each rank clips its gradient by its own norm; then the gradients are all-reduced.

    limit: the norm. The mean's norm is not above it, so that the optimizer clips no more.
    """

    name = "AfterClipping"

    def __init__(self, module: nn.Module, optimizer: Optimizer, limit: float) -> None:
        super().__init__(module, optimizer)
        self._limit = limit

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""
        scale_down(self._optimizer.gradients(), self._limit * loss_scale)
        super().finish(loss_scale)


class OptimizerReduction:
    """The optimizer reduces its flat gradient itself, in buckets, while backward goes on.

    limit: as in `ClippedReduction`; None: the optimizer clips the mean. With a limit, the buckets
        are sent after backward.
    """

    can_follow = True

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, limit: float | None, name: str
    ) -> None:
        self.model = module
        self.name = name
        self._optimizer = optimizer
        self._limit = limit

    def overlap(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Reduction`."""
        return self._optimizer.overlap(last and self._limit is None)

    def finish(self, loss_scale: Tensor) -> None:
        """See `Reduction`."""
        self._optimizer.finish_reduction(None if self._limit is None else self._limit * loss_scale)


def make_reduction(
    module: nn.Module,
    optimizer: Optimizer,
    ranks: Ranks,
    clip_first: float | None,
    waits_from_here: Callable[[], None] = lambda: None,
) -> Reduction:
    """The reduction for these ranks and this optimizer.

    clip_first: the norm to clip each rank's gradient to before the reduction, or None.
    waits_from_here: is called where a rank has made its gradients, and begins to wait for those of
        others, inside of the backward pass.
    """
    if ranks.world_size == 1:
        return NoReduction(module)
    if isinstance(optimizer, ShardedLamb):
        return OptimizerReduction(module, optimizer, clip_first, "Sharded")
    if optimizer.reduces_gradients and sends_from_device(ranks.device):
        name = DdpReduction.name if clip_first is None else ClippedReduction.name
        return OptimizerReduction(module, optimizer, clip_first, name)
    if clip_first is not None:
        return ClippedReduction(module, optimizer, clip_first)
    if not sends_from_device(ranks.device):
        return LateReduction(module, optimizer)
    return DdpReduction(module, ranks.device, waits_from_here)
