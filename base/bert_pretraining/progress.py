"""A run's counters, and the rules of when to evaluate, log, save and stop.

The rules are pure functions of numbers that are equal on every rank. So all ranks decide the same
without communication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from bert_pretraining.errors import UserError


@dataclass
class RunState:
    """Counters and latest figures; equal on every rank except between evaluations."""

    global_steps: int = 0
    num_trained_samples: int = 0
    samples_seen: int = 0
    skipped_steps: int = 0
    eval_loss: float = float("nan")
    eval_mlm_accuracy: float = 0.0
    eval_sequences: int = 0
    converged: bool = False

    def account(
        self, updates: int, skipped: int, last_finite: bool, samples_per_step: int
    ) -> int | None:
        """Count the latest steps; returns the step after which something may be due, or None.

        Skipped updates count neither as steps nor as trained sequences. None is returned where the
        latest update was skipped: what was due after the step before it has been done already.
        """
        self.global_steps, self.num_trained_samples = self.after(updates, samples_per_step)
        self.skipped_steps += skipped
        return self.global_steps if last_finite else None

    def after(self, updates: int, samples_per_step: int) -> tuple[int, int]:
        """Steps and trained sequences after `updates` more updates."""
        return self.global_steps + updates, self.num_trained_samples + updates * samples_per_step

    def take_over(self, other: RunState) -> None:
        """Go on from the counters of another run; this run decides itself whether it converged."""
        for field in fields(self):
            setattr(self, field.name, getattr(other, field.name))
        self.converged = False


def check_update(samples_per_step: int, num_sequences: int) -> None:
    """UserError where one update takes more sequences than the training set holds.

    It would see some of them twice; most likely the batch has a digit too many, and the
    machine runs out of memory before the update is done.
    """
    if samples_per_step > num_sequences:
        raise UserError(
            f"an update takes {samples_per_step:,} sequences (train_batch_size x "
            f"gradient_accumulation_steps x ranks), but the training set holds {num_sequences:,}",
            "pass a lower --train_batch_size",
        )


def evaluation_interval(global_batch_size: int) -> int:
    """Samples between evaluations by the MLPerf rules.

    floor(0.05 * (230.23 * global_batch_size + 3000000) / 25000) * 25000
    """
    return int(0.05 * (230.23 * global_batch_size + 3_000_000) / 25_000) * 25_000


@dataclass(frozen=True)
class StepTriggers:
    """What is due after which step: 1, 2, ... A step is an update that was made.

    samples_per_step: sequences of an update, over all ranks. The others are settings of the same
    names; eval_interval_samples is positive. `samples` below are those trained by then.
    """

    samples_per_step: int
    max_steps: int
    max_samples: int
    log_freq: int
    eval_steps: int
    eval_interval_samples: int
    check_replicas_every: int
    num_samples_per_checkpoint: int
    min_samples_to_start_checkpoints: int

    def end_due(self, step: int, samples: int) -> bool:
        """Whether a limit ends the run."""
        return step >= self.max_steps or samples >= self.max_samples

    def evaluation_due(self, step: int, samples: int) -> bool:
        """Every `eval_steps` steps if that is positive, else at MLPerf's samples.

        That is the first step at which the trained samples reach another multiple of the interval:
        with equal steps, step ceil(k * interval / samples_per_step).
        """
        if self.eval_steps > 0:
            return step % self.eval_steps == 0
        return self._passes(samples, self.eval_interval_samples)

    def updates_to_evaluation(self, step: int, samples: int) -> int:
        """How many more updates until an evaluation is due; the last update is evaluated."""
        sequences_left = self.max_samples - samples
        every = self.eval_interval_samples
        updates = [self.max_steps - step, math.ceil(sequences_left / self.samples_per_step)]
        if self.eval_steps > 0:
            updates.append(self.eval_steps - step % self.eval_steps)
        else:
            updates.append(math.ceil((every - samples % every) / self.samples_per_step))
        return max(0, min(updates))

    def checkpoint_due(self, samples: int) -> bool:
        """Whether a checkpoint is written: at multiples, once the least number is reached."""
        started = samples >= self.min_samples_to_start_checkpoints
        return started and self._passes(samples, self.num_samples_per_checkpoint)

    def replica_check_due(self, step: int) -> bool:
        """Whether the ranks' weights are compared; never where check_replicas_every is 0."""
        return self.check_replicas_every > 0 and step % self.check_replicas_every == 0

    def logging_due(self, step: int) -> bool:
        """Whether the step is logged: the first, and every log_freq-th."""
        return step == 1 or (self.log_freq > 0 and step % self.log_freq == 0)

    def anything_due(self, step: int, samples: int) -> bool:
        """Whether the host has anything to do, for which it must know all earlier steps."""
        return (
            self.end_due(step, samples)
            or self.evaluation_due(step, samples)
            or self.checkpoint_due(samples)
            or self.replica_check_due(step)
            or self.logging_due(step)
        )

    def _passes(self, samples: int, interval: int) -> bool:
        """Whether this step reached another multiple of the interval; never of 0."""
        before = samples - self.samples_per_step
        return interval > 0 and samples // interval > before // interval


def stop_reason(
    state: RunState, target_mlm_accuracy: float, max_steps: int, max_samples: int
) -> str | None:
    """Why training ends after this step, or None.

    "target" wins over the limits when both hold.
    """
    if state.eval_mlm_accuracy >= target_mlm_accuracy:
        return "target"
    if state.global_steps >= max_steps:
        return "max_steps"
    if state.num_trained_samples >= max_samples:
        return "max_samples_termination"
    return None
