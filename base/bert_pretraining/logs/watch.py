"""Notices of runs that go wrong without an error: each once a run, at the time, with the cause.

The limits are wide: a healthy run, also one of a few steps, gets no notice.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable

from bert_pretraining.config import Config
from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    EvaluationSetFacts,
    Hyperparameters,
    Resumption,
    RunFacts,
    Sink,
    StepFigures,
)
from bert_pretraining.progress import evaluation_interval

FELL_TO = 1 / 2  # of the best accuracy; on single batches, which are noisy, FELL_TO_ON_BATCHES
FELL_TO_ON_BATCHES = 1 / 3
KNOWS_SOMETHING = 0.02  # below this accuracy there is nothing to lose
IMPOSSIBLE_LOSS = 20.0  # nats; guessing evenly among 250,000 tokens has 13
# The mean over so many logged steps, and at least so many sequences, is compared.
MIN_BATCHES, MIN_SEQUENCES = 5, 256
# The loss does not move: so many evaluations differ from the start's by less than this.
STILL_EVALUATIONS, STILL_ACCURACY, STILL_LOSS = 3, 0.001, 0.005
LOW_LOSS_SCALE, USUAL_LOSS_SCALE = 16, 1024
LONG_RUN = 100  # steps; a shorter run is a trial that needs no evaluation before its end


class Watch(Sink):
    """Looks at a run's figures, and tells what is wrong.

    Args:
        notice: called with the kind of the fault, one word for programs, and a line for people.
        chose_evaluations: whether the user has given --eval_steps.
    """

    def __init__(
        self,
        run: RunFacts,
        notice: Callable[[str, str], None],
        chose_evaluations: bool = False,
    ) -> None:
        self._config, self._notice = run.config, notice
        self._chose_evaluations = chose_evaluations
        self._told: set[str] = set()
        self._commonest = 0.0  # share of the commonest token among those masked
        self._best = 0.0
        self._best_was = ""  # where the best accuracy was found
        self._start: EvaluationFigures | None = None
        self._still = 0  # evaluations since the start without a change
        self._resumed = False
        batches = max(MIN_BATCHES, math.ceil(MIN_SEQUENCES / run.config.global_batch_size))
        self._batches: collections.deque[StepFigures] = collections.deque(maxlen=batches)
        self._highest_loss_scale = 0.0

    def hyperparameters(self, values: Hyperparameters) -> None:
        for kind, text in faults_of_schedule(self._config):
            self._tell(kind, text)

    def evaluation_set_read(self, facts: EvaluationSetFacts) -> None:
        self._commonest = facts.commonest_share

    def start_evaluated(self, evaluation: EvaluationFigures) -> None:
        self._start = evaluation
        self._better(evaluation.mlm_accuracy, "at the start")
        config, accuracy = self._config, evaluation.mlm_accuracy
        if accuracy >= config.target_mlm_accuracy:
            self._tell(
                "target_met_at_start",
                f"the start checkpoint already meets the target ({accuracy:.4f} >= "
                f"{config.target_mlm_accuracy:g}): stopping after one step; to train on, pass a "
                "higher --target_mlm_accuracy",
            )
        elif not self._starts_anew() and (
            accuracy < self._commonest or evaluation.loss > IMPOSSIBLE_LOSS
        ):
            self._tell(
                "start_weights_useless",
                f"the start checkpoint's MLM accuracy is {accuracy:.4f} (loss "
                f"{evaluation.loss:.4g}); always guessing the commonest token has "
                f"{self._commonest:.4f}: its weights are likely damaged, or of another "
                "vocabulary or model; look at it with 'checkpoint inspect', and use the vocab.txt "
                "and bert_config.json that it was trained with",
            )

    def _starts_anew(self) -> bool:
        """Whether what gives the accuracy may be random: all of the model, or its heads."""
        return self._config.init_checkpoint == "random" or self._config.missing_weights == "random"

    def resumed(self, resumption: Resumption) -> None:
        self._resumed = True
        self._better(resumption.mlm_accuracy, "before the run was resumed")

    def training_began(self) -> None:
        late = no_evaluation(self._config, self._chose_evaluations)
        if late and "target_met_at_start" not in self._told:  # which ends the run at once
            self._tell("no_evaluation", late)

    def skipped(self, step: int, count: int, skipped_in_all: int, loss_scale: float) -> None:
        before = loss_scale * 2.0**count
        self._highest_loss_scale = max(self._highest_loss_scale, before)
        if loss_scale <= LOW_LOSS_SCALE and self._highest_loss_scale >= USUAL_LOSS_SCALE:
            self._tell(
                "loss_scale_collapsed",
                f"the loss scale fell from {self._highest_loss_scale:g} to {loss_scale:g}, because "
                f"{skipped_in_all} updates overflowed in fp16: small gradients become 0, and the "
                "run likely diverges; pass a lower --learning_rate, or --precision bf16",
            )

    def step_logged(self, figures: StepFigures) -> None:
        self._batches.append(figures)
        if len(self._batches) < self._batches.maxlen:
            return
        accuracy, loss = (
            sum(batch.values[name] for batch in self._batches) / len(self._batches)
            for name in ("mlm_acc", "loss")
        )
        if self._has_fallen(accuracy, loss, FELL_TO_ON_BATCHES):
            which = f"on the last {len(self._batches)} logged batches"
            self._tell_fall(accuracy, loss, which)

    def evaluated(self, evaluation: EvaluationFigures) -> None:
        accuracy, loss = evaluation.mlm_accuracy, evaluation.loss
        if self._has_fallen(accuracy, loss, FELL_TO):
            self._tell_fall(accuracy, loss, f"after {evaluation.samples:,} sequences")
        self._better(accuracy, f"after {evaluation.samples:,} sequences")
        self._look_for_movement(evaluation)

    def _better(self, accuracy: float, where: str) -> None:
        if accuracy > self._best:
            self._best, self._best_was = accuracy, where

    def _has_fallen(self, accuracy: float, loss: float, share: float) -> bool:
        knew_something = self._best > max(KNOWS_SOMETHING, 2 * self._commonest)
        return loss > IMPOSSIBLE_LOSS or (knew_something and accuracy < share * self._best)

    def _tell_fall(self, accuracy: float, loss: float, where: str) -> None:
        rate = self._config.learning_rate
        cause = (
            f"the learning rate {rate:g} is likely too high; start again with a lower one, such "
            f"as --learning_rate {rate / 10:g}, or with more --warmup_steps"
        )
        if self._resumed:
            cause += "; where only resumed runs do this, compare the checkpoint with an older one"
        fell = f"fell to {accuracy:.4f} {where} (loss {loss:.4g})"
        before = f", from {self._best:.4f} {self._best_was}" if self._best else ""
        self._tell("accuracy_fell", f"MLM accuracy {fell}{before}: {cause}")

    def _look_for_movement(self, evaluation: EvaluationFigures) -> None:
        config, start = self._config, self._start
        if start is None or evaluation.step <= config.start_warmup_step + (
            config.resolved_warmup_steps
        ):
            return
        is_still = (
            abs(evaluation.mlm_accuracy - start.mlm_accuracy) < STILL_ACCURACY
            and abs(evaluation.loss - start.loss) < STILL_LOSS
        )
        self._still = self._still + 1 if is_still else 0
        if self._still >= STILL_EVALUATIONS and config.learning_rate > 0:
            self._tell(
                "loss_does_not_move",
                f"the loss has not moved in {self._still} evaluations: {start.loss:.4f} at the "
                f"start, {evaluation.loss:.4f} after {evaluation.samples:,} sequences: the "
                f"learning rate {config.learning_rate:g} is likely too low; pass a higher "
                "--learning_rate",
            )

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._notice(kind, text)


def faults_of_schedule(config: Config) -> list[tuple[str, str]]:
    """What the settings alone show of the learning rate: the kind and a line for each fault."""
    rate, steps, warmup = config.learning_rate, _steps(config), config.resolved_warmup_steps
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
                f"the warm-up of {warmup:,} steps is {length} the run of {steps:,}: the learning "
                f"rate ends at {rate * max(last, 0) / warmup:.4g}, and never reaches "
                f"{rate:g}; pass fewer --warmup_steps, or more --max_steps",
            )
        )
    return found


def no_evaluation(config: Config, chose_evaluations: bool) -> str | None:
    """A line where only the last step is evaluated, or None.

    chose_evaluations: whether the user has given --eval_steps; else a short run may be without.
    """
    batch, steps = config.global_batch_size, _steps(config)
    every = config.eval_interval_samples or evaluation_interval(batch)
    if config.eval_steps > 0:
        is_late = config.eval_steps > steps
        when = f"eval_steps {config.eval_steps:,} is more than the run's {steps:,} steps"
    else:
        is_late = every >= steps * batch
        when = f"evaluations are due every {every:,} sequences, and the run has {steps * batch:,}"
    if not is_late or (steps < LONG_RUN and not chose_evaluations):
        return None
    return (
        f"{when}: the only evaluation is after the last step, so the run cannot end earlier at its "
        "target; pass a lower --eval_steps"
    )


def _steps(config: Config) -> int:
    """Of the run, if it does not meet its target."""
    return min(
        config.max_steps, math.ceil(config.max_samples_termination / config.global_batch_size)
    )
