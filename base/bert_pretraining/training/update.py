"""One update: forward and backward of each micro-batch, reduction, optimizer, loss scale.

Nothing here waits for the device. Whether an update was made, or skipped because its gradients
were not finite, stays on the device until `read`. The loop calls `read` only when something is
due, so that the host can be some steps ahead of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bert_pretraining.errors import TrainingError
from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import LossTotals
from bert_pretraining.optim import LossScale, Optimizer, Schedule
from bert_pretraining.optim.loss_scale import MAX_SKIPPED_IN_A_ROW
from bert_pretraining.runtime import device as devices
from bert_pretraining.runtime import process_group
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.diagnosis import first_non_finite
from bert_pretraining.training.gradient_reduction import Reduction
from bert_pretraining.training.loss_weights import loss_weights
from bert_pretraining.training.micro_step import MicroStep

# Updates that the host may be ahead of a GPU. Fewer than MAX_SKIPPED_IN_A_ROW, so that a series of
# skipped updates is noticed. No more than a few, because a signal to stop is acted on only after
# `read`.
MAX_UNREAD = 10


@dataclass(frozen=True)
class UpdateResult:
    """What became of the steps since the last `read`.

    updates, skipped: how many were made, and how many were not finite.
    last_finite: whether the latest of them was made.
    loss_scale: the present one.
    """

    updates: int
    skipped: int
    last_finite: bool
    loss_scale: float


class Update:
    """Called with the micro-batches of one update, on every rank.

    Args:
        module: the bare model, in which `read` looks for what is not finite.
        normalization: see `loss_weights`.
        fp8: the scales of layers that compute in fp8, to be updated with the weights.
    """

    def __init__(
        self,
        *,
        module: BertForPreTraining,
        micro_step: MicroStep,
        reduction: Reduction,
        optimizer: Optimizer,
        schedule: Schedule,
        loss_scale: LossScale,
        normalization: str,
        ranks: Ranks,
        fp8: Fp8State | None = None,
    ) -> None:
        self._fp8 = fp8
        self._module, self._micro_step, self._reduction = module, micro_step, reduction
        self._optimizer, self._schedule, self._loss_scale = optimizer, schedule, loss_scale
        self._normalization, self._ranks = normalization, ranks
        self._unread: list[tuple[Tensor, list[PackedBatch]]] = []

    @property
    def num_unread(self) -> int:
        """Updates of which the host does not know yet whether they were finite."""
        return len(self._unread)

    @property
    def must_read(self) -> bool:
        """Whether `read` must come now: after each update on a CPU, where reading costs nothing."""
        return self.num_unread >= (1 if self._ranks.device.type == "cpu" else MAX_UNREAD)

    def __call__(self, micro_batches: list[PackedBatch]) -> LossTotals:
        """Train on one update's micro-batches; returns this rank's loss sums over them."""
        losses, scale = self._module.losses, self._loss_scale.scale
        weights = loss_weights(micro_batches, losses, self._normalization, self._ranks, scale)
        totals = LossTotals(losses, self._ranks.device)
        captured = self._micro_step.captured
        self._optimizer.zero_grad(set_to_none=not captured)
        for number, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True), 1):
            last = number == len(micro_batches) and not captured
            with self._reduction.overlap(last):
                totals.add(self._micro_step(batch, weight), batch)
        self._reduction.finish(scale)
        finite = self._optimizer.scheduled_step(self._schedule, self._loss_scale)
        if self._fp8 is not None:
            self._fp8.update()
        self._unread.append((finite, micro_batches))
        return totals

    def read(self, updates_before: int) -> UpdateResult:
        """What became of the unread steps; waits for the device.

        updates_before: made before these, for the message. Raises TrainingError, on every rank,
        where a step was not finite and no loss scale can help; it names what was not finite
        first.
        """
        flags = [finite for finite, _ in self._unread]
        batches = [micro_batches for _, micro_batches in self._unread]
        self._unread = []
        scale = self._loss_scale
        figures = [*flags, scale.skipped_in_a_row, scale.scale]
        dtype = devices.wide(self._ranks.device)
        *finite, in_a_row, value = torch.stack([one.to(dtype) for one in figures]).tolist()
        made = int(sum(finite))
        if not scale.dynamic and made < len(flags):
            fix = "--learning_rate or --precision fp32"
            if scale.initial != 1.0:
                fix = "--loss_scale, or 0 for a dynamic one"
            raise TrainingError(
                f"a gradient is not finite after {updates_before + made} updates: "
                f"{self._diagnose(batches[made], scale.initial)}; try a lower {fix}"
            )
        if in_a_row > MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"fp16 overflowed {int(in_a_row)} times in a row after {updates_before + made} "
                f"updates, at last at loss scale {value:g}: {self._diagnose(batches[-1], value)}; "
                "the weights or the data are broken, or try --precision bf16"
            )
        return UpdateResult(made, len(flags) - made, bool(finite[-1]), value)

    def _diagnose(self, micro_batches: list[PackedBatch], loss_scale: float) -> str:
        """What was not finite first, on the rank that can tell best; the same on every rank."""
        found = process_group.gather(first_non_finite(self._module, micro_batches, loss_scale))
        rank = min(range(len(found)), key=lambda rank: found[rank].place)
        return found[rank].text if len(found) == 1 else f"rank {rank}: {found[rank].text}"
