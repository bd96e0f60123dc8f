"""Faults that a run's settings alone show, before any figure."""

from __future__ import annotations

import math

from bert_pretraining.config import Config
from bert_pretraining.progress import evaluation_interval
from bert_pretraining.runtime.words import counted

LONG_RUN = 100  # steps; a shorter run is a trial that needs no evaluation before its end


def faults_of_schedule(config: Config) -> list[tuple[str, str]]:
    """What the settings alone show of the learning rate: the kind and a line for each fault."""
    rate, steps, warmup = config.learning_rate, planned_steps(config), config.resolved_warmup_steps
    found = []
    if rate == 0:
        text = "learning_rate 0: no weight will change; pass a --learning_rate above 0"
        found.append(("learning_rate_zero", text))
    last = steps - 1 - config.start_warmup_step  # updates of the warm-up before the last update
    if warmup and last < warmup:
        length = "longer than" if warmup > steps else "as long as"
        found.append(
            (
                "warmup_too_long",
                f"the warm-up of {counted(warmup, 'step')} is {length} the run of {steps:,}: the "
                f"learning rate ends at {rate * max(last, 0) / warmup:.4g}, and never reaches "
                f"{rate:g}; pass fewer --warmup_steps, or more --max_steps",
            )
        )
    return found


def no_evaluation(config: Config, chose_evaluations: bool) -> str | None:
    """A line where only the last step is evaluated, or None.

    chose_evaluations: whether the user has given --eval_steps; else a short run may be without.
    """
    batch, steps = config.global_batch_size, planned_steps(config)
    every = config.eval_interval_samples or evaluation_interval(batch)
    if config.eval_steps > 0:
        is_late = config.eval_steps > steps
        when = f"eval_steps {config.eval_steps:,} is more than the run's {counted(steps, 'step')}"
    else:
        is_late = every >= steps * batch
        when = f"evaluations are due every {counted(every, 'sequence')}, "
        when += f"and the run has {steps * batch:,}"
    if not is_late or (steps < LONG_RUN and not chose_evaluations):
        return None
    return (
        f"{when}: the only evaluation is after the last step, so the run cannot end earlier at its "
        "target; pass a lower --eval_steps"
    )


def planned_steps(config: Config) -> int:
    """Of the run, if it does not meet its target."""
    return min(
        config.max_steps, math.ceil(config.max_samples_termination / config.global_batch_size)
    )
