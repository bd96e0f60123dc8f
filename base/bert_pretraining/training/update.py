"""One update: forward and backward of each micro-batch, reduction, optimizer, loss scale.

Nothing here waits for the device. Whether an update was made, or skipped because its gradients
were not finite, stays on the device; `outcomes` reads it.
"""

from __future__ import annotations

from contextlib import nullcontext

from bert_pretraining.kernels.fp8 import Fp8State
from bert_pretraining.model.batch import PackedBatch
from bert_pretraining.model.heads import BertForPreTraining
from bert_pretraining.model.losses import LossTotals
from bert_pretraining.optim import LossScale, Optimizer, Schedule
from bert_pretraining.runtime.process_group import Ranks
from bert_pretraining.training.gradient_reduction import Reduction
from bert_pretraining.training.loss_weights import loss_weights
from bert_pretraining.training.micro_step import MicroStep
from bert_pretraining.training.outcomes import Outcomes
from bert_pretraining.training.step_clock import StepClock


class Update:
    """Called with the micro-batches of one update, on every rank.

    Args:
        module: the bare model.
        normalization: see `loss_weights`.
        clock: measures the parts of the update.
        fp8: the scales of layers that compute in fp8, to be updated with the weights.

    Attributes:
        outcomes: of the updates so far.
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
        clock: StepClock,
        fp8: Fp8State | None = None,
    ) -> None:
        self._clock = clock
        self._fp8 = fp8
        self._module, self._micro_step, self._reduction = module, micro_step, reduction
        self._optimizer, self._schedule, self._loss_scale = optimizer, schedule, loss_scale
        self._normalization, self._ranks = normalization, ranks
        self._asks_others = normalization == "global" and ranks.world_size > 1
        self.outcomes = Outcomes(module, optimizer, loss_scale, ranks)

    def __call__(self, micro_batches: list[PackedBatch]) -> LossTotals:
        """Train on one update's micro-batches; returns this rank's loss sums over them."""
        losses, scale = self._module.losses, self._loss_scale.scale
        part = self._clock.part
        with part("reduction") if self._asks_others else nullcontext():
            weights = loss_weights(micro_batches, losses, self._normalization, self._ranks, scale)
        totals = LossTotals(losses, self._ranks.device)
        captured = self._micro_step.captured
        with part("forward_backward"):
            self._optimizer.zero_grad(set_to_none=not captured)
            for number, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True), 1):
                last = number == len(micro_batches) and not captured
                with self._reduction.overlap(last):
                    totals.add(self._micro_step(batch, weight), batch)
        with part("reduction"):
            self._reduction.finish(scale)
        with part("optimizer"):
            finite = self._optimizer.scheduled_step(self._schedule, self._loss_scale)
            if self._fp8 is not None:
                self._fp8.update()
        self._clock.count(micro_batches)
        self.outcomes.add(finite, micro_batches)
        return totals
