"""Faults that accuracies and losses show in the course of a run: it falls, or it does not learn."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator

from bert_pretraining.config import Config
from bert_pretraining.logs.sinks import EvaluationFigures, EvaluationSetFacts, StepFigures
from bert_pretraining.logs.watch_settings import planned_steps
from bert_pretraining.logs.watch_start import IMPOSSIBLE_LOSS, MIN_MASKED_TOKENS
from bert_pretraining.runtime.words import counted

FELL_TO = 1 / 2  # of the best accuracy; on single batches, which are noisy, FELL_TO_ON_BATCHES
FELL_TO_ON_BATCHES = 1 / 3
KNOWS_SOMETHING = 0.02  # below this accuracy there is nothing to lose
# The mean over so many logged steps, and at least so many sequences, is compared.
MIN_BATCHES, MIN_SEQUENCES = 5, 256
# Below the start: by so many standard errors of the difference, in so many evaluations in a row.
BELOW_ERRORS, BELOW_EVALUATIONS = 3, 2
# The loss does not move: so many evaluations differ from the start's by less than this.
STILL_EVALUATIONS, STILL_ACCURACY, STILL_LOSS = 3, 0.001, 0.005
# No progress: so many evaluations in a row beat the commonest token by no more than this share.
# A healthy run from random weights stays there for long, but its loss falls. So, too, the loss has
# fallen by less than IDLE_LOSS over so many steps and this share of the run; or it goes on so for
# LATE_STEPS and LATE_SHARE.
IDLE_EVALUATIONS, IDLE_ACCURACY = 10, 0.005
IDLE_STEPS, IDLE_SHARE, IDLE_LOSS = 200, 0.1, 0.01
LATE_STEPS, LATE_SHARE = 500, 0.5


class Course:
    """Compares each evaluation, and training batches, with what was there before.

    Every method that returns notices returns the kind and a line for each fault.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._facts = EvaluationSetFacts(0, 0, 0.0)
        self._best = 0.0
        self._best_was = ""  # where the best accuracy was found
        self._start: EvaluationFigures | None = None
        self._still = 0  # evaluations since the start without a change
        self._below: list[EvaluationFigures] = []  # the latest ones, below the start
        self._idle: collections.deque[EvaluationFigures] = collections.deque(
            maxlen=IDLE_EVALUATIONS
        )
        self._idle_since: EvaluationFigures | None = None
        self._resumed = False
        batches = max(MIN_BATCHES, math.ceil(MIN_SEQUENCES / config.global_batch_size))
        self._batches: collections.deque[StepFigures] = collections.deque(maxlen=batches)

    def evaluation_set_read(self, facts: EvaluationSetFacts) -> None:
        """What the evaluation set asks for."""
        self._facts = facts

    def started(self, evaluation: EvaluationFigures) -> None:
        """The figures of the start weights."""
        self._start = evaluation
        self._better(evaluation.mlm_accuracy, "at the start")

    def resumed(self, accuracy: float) -> None:
        """In place of `started`: the last accuracy before."""
        self._resumed = True
        self._better(accuracy, "before the run was resumed")

    def logged(self, figures: StepFigures) -> Iterator[tuple[str, str]]:
        """Notices after a logged step."""
        self._batches.append(figures)
        if len(self._batches) < self._batches.maxlen:
            return
        accuracy, loss = (
            sum(batch.values[name] for batch in self._batches) / len(self._batches)
            for name in ("mlm_acc", "loss")
        )
        if self._has_fallen(accuracy, loss, FELL_TO_ON_BATCHES):
            which = f"on the last {len(self._batches)} logged batches"
            yield self._fall(accuracy, loss, which)

    def evaluated(self, evaluation: EvaluationFigures) -> Iterator[tuple[str, str]]:
        """Notices after an evaluation."""
        accuracy, loss = evaluation.mlm_accuracy, evaluation.loss
        if self._has_fallen(accuracy, loss, FELL_TO):
            yield self._fall(accuracy, loss, _where(evaluation))
        self._better(accuracy, _where(evaluation))
        config = self._config
        # In the warm-up, a healthy run may stand still or get a little worse.
        if evaluation.step > config.start_warmup_step + config.resolved_warmup_steps:
            yield from self._below_the_start(evaluation)
            yield from self._without_movement(evaluation)
            yield from self._without_progress(evaluation)

    def _better(self, accuracy: float, where: str) -> None:
        if accuracy > self._best:
            self._best, self._best_was = accuracy, where

    def _knows_something(self, accuracy: float) -> bool:
        return accuracy > max(KNOWS_SOMETHING, 2 * self._facts.commonest_share)

    def _has_fallen(self, accuracy: float, loss: float, share: float) -> bool:
        fell = self._knows_something(self._best) and accuracy < share * self._best
        return loss > IMPOSSIBLE_LOSS or fell

    def _fall(self, accuracy: float, loss: float, where: str) -> tuple[str, str]:
        cause = self._rate_too_high()
        if self._resumed:
            cause += "; where only resumed runs do this, compare the checkpoint with an older one"
        fell = f"fell to {accuracy:.4f} {where} (loss {loss:.4g})"
        before = f", from {self._best:.4f} {self._best_was}" if self._best else ""
        return "accuracy_fell", f"MLM accuracy {fell}{before}: {cause}"

    def _rate_too_high(self) -> str:
        rate = self._config.learning_rate
        return (
            f"the learning rate {rate:g} is likely too high; start again with a lower one, such "
            f"as --learning_rate {rate / 10:g}, or with more --warmup_steps"
        )

    def _below_the_start(self, evaluation: EvaluationFigures) -> Iterator[tuple[str, str]]:
        start = self._start
        if start is None or not self._knows_something(start.mlm_accuracy):
            return
        share, tokens = start.mlm_accuracy, max(self._facts.masked_tokens, 1)
        noise = BELOW_ERRORS * math.sqrt(2 * share * (1 - share) / tokens)
        before = self._below[-1].mlm_accuracy if self._below else share
        # One that gets better again is on its way back.
        if evaluation.mlm_accuracy >= share - noise or evaluation.mlm_accuracy > before + noise / 2:
            self._below.clear()
        if evaluation.mlm_accuracy >= share - noise:
            return
        self._below.append(evaluation)
        if len(self._below) == BELOW_EVALUATIONS:
            values = " and ".join(f"{each.mlm_accuracy:.4f} {_where(each)}" for each in self._below)
            yield (
                "accuracy_below_start",
                f"MLM accuracy is below the start's {share:.4f} in {BELOW_EVALUATIONS} "
                f"evaluations in a row: {values}: {self._rate_too_high()}",
            )

    def _without_movement(self, evaluation: EvaluationFigures) -> Iterator[tuple[str, str]]:
        start, rate = self._start, self._config.learning_rate
        if start is None:
            return
        is_still = (
            abs(evaluation.mlm_accuracy - start.mlm_accuracy) < STILL_ACCURACY
            and abs(evaluation.loss - start.loss) < STILL_LOSS
        )
        self._still = self._still + 1 if is_still else 0
        if self._still >= STILL_EVALUATIONS:
            yield (
                "loss_does_not_move",
                f"the loss has not moved in {self._still} evaluations: {start.loss:.4f} at the "
                f"start, {evaluation.loss:.4f} {_where(evaluation)}: the learning rate {rate:g} "
                "is likely too low; pass a higher --learning_rate",
            )

    def _without_progress(self, evaluation: EvaluationFigures) -> Iterator[tuple[str, str]]:
        share, tokens = self._facts.commonest_share, self._facts.masked_tokens
        if evaluation.mlm_accuracy > share + IDLE_ACCURACY or tokens < MIN_MASKED_TOKENS:
            self._idle.clear()
            self._idle_since = None
            return
        self._idle.append(evaluation)
        self._idle_since = self._idle_since or evaluation
        if len(self._idle) < IDLE_EVALUATIONS:
            return
        planned, first = planned_steps(self._config), self._idle[0]
        is_flat = first.loss - min(each.loss for each in self._idle) < IDLE_LOSS and (
            evaluation.step - first.step >= max(IDLE_STEPS, IDLE_SHARE * planned)
        )
        late = max(LATE_STEPS, LATE_SHARE * planned)
        if is_flat or evaluation.step - self._idle_since.step >= late:
            since = first if is_flat else self._idle_since
            yield (
                "no_progress",
                f"no better than guessing: MLM accuracy is {evaluation.mlm_accuracy:.4f} "
                f"{_where(evaluation)}, and always guessing the commonest token has {share:.4f}; "
                f"the loss is {evaluation.loss:.4f}, and was {since.loss:.4f} {_where(since)}: "
                f"pass another --learning_rate (it is {self._config.learning_rate:g}) or more "
                "--warmup_steps, and look at the data with 'python -m bert_pretraining data "
                "verify'",
            )


def _where(evaluation: EvaluationFigures) -> str:
    return f"after {counted(evaluation.samples, 'sequence')}"
