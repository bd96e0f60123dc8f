"""Notices of runs that go wrong without an error: each once a run, at the time, with the cause.

The limits are wide: a healthy run, also one of a few steps, gets no notice. What is looked for
stands in one module for each kind of figure: `watch_settings`, `watch_start`, `watch_accuracy`,
`watch_loss`, `watch_outputs`. A rank that holds up the others is found by all ranks together, see
`training.held_up`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    EvaluationSetFacts,
    Hyperparameters,
    Resumption,
    RunFacts,
    RunOutline,
    Sink,
    StepFigures,
)
from bert_pretraining.logs.watch_accuracy import Course
from bert_pretraining.logs.watch_loss import LossJumps
from bert_pretraining.logs.watch_outputs import Output, SlowOutputs
from bert_pretraining.logs.watch_settings import faults_of_schedule, no_evaluation
from bert_pretraining.logs.watch_start import faults_of_start
from bert_pretraining.runtime.words import counted

LOW_LOSS_SCALE, USUAL_LOSS_SCALE = 16, 1024
# What is not told any more once one of these was told: it would be the same fault again.
SAME_FAULT = {
    "no_evaluation": {"target_met_at_start"},  # which ends the run at once
    "accuracy_fell": {"accuracy_below_start"},
    "accuracy_below_start": {"accuracy_fell"},
    "loss_jumped": {"accuracy_fell", "accuracy_below_start"},
    "loss_does_not_move": {"learning_rate_zero"},
    "no_progress": {"accuracy_fell", "accuracy_below_start", "loss_does_not_move"},
}


class Watch(Sink):
    """Looks at a run's figures, and tells what is wrong.

    Args:
        notice: called with the kind of the fault, one word for programs, and a line for people.
        chose_evaluations: whether the user has given --eval_steps.
        outputs: where the log of a step is written.
    """

    def __init__(
        self,
        run: RunFacts,
        notice: Callable[[str, str], None],
        chose_evaluations: bool = False,
        outputs: Sequence[Output] = (),
    ) -> None:
        self._config, self._notice = run.config, notice
        self._chose_evaluations = chose_evaluations
        self._told: set[str] = set()
        self._outline: RunOutline | None = None
        self._facts = EvaluationSetFacts(0, 0, 0.0)
        self._course = Course(run.config)
        self._jumps = LossJumps(run.config.global_batch_size)
        self._outputs = SlowOutputs(outputs)
        self._highest_loss_scale = 0.0

    def hyperparameters(self, values: Hyperparameters) -> None:
        self._tell(faults_of_schedule(self._config))

    def outlined(self, outline: RunOutline) -> None:
        self._outline = outline

    def evaluation_set_read(self, facts: EvaluationSetFacts) -> None:
        self._facts = facts
        self._course.evaluation_set_read(facts)

    def start_evaluated(self, evaluation: EvaluationFigures) -> None:
        self._course.started(evaluation)
        self._tell(faults_of_start(self._config, self._outline, self._facts, evaluation))

    def resumed(self, resumption: Resumption) -> None:
        self._course.resumed(resumption.mlm_accuracy)

    def training_began(self) -> None:
        self._outputs.count_anew()
        late = no_evaluation(self._config, self._chose_evaluations)
        self._tell([("no_evaluation", late)] if late else [])

    def skipped(self, step: int, count: int, skipped_in_all: int, loss_scale: float) -> None:
        self._jumps.skipped(skipped_in_all)
        before = loss_scale * 2.0**count
        self._highest_loss_scale = max(self._highest_loss_scale, before)
        if loss_scale <= LOW_LOSS_SCALE and self._highest_loss_scale >= USUAL_LOSS_SCALE:
            text = (
                f"the loss scale fell from {self._highest_loss_scale:g} to {loss_scale:g}, because "
                f"{counted(skipped_in_all, 'update')} overflowed in fp16: small gradients become "
                "0, and the run likely diverges; pass a lower --learning_rate, or --precision bf16"
            )
            self._tell([("loss_scale_collapsed", text)])

    def step_logged(self, figures: StepFigures) -> None:
        self._tell(self._course.logged(figures))
        self._tell(self._jumps.logged(figures))
        self._tell(("slow_output", text) for text in self._outputs.logged())

    def evaluated(self, evaluation: EvaluationFigures) -> None:
        self._outputs.count_anew()
        self._tell(self._course.evaluated(evaluation))

    def _tell(self, notices: Iterable[tuple[str, str]]) -> None:
        for kind, text in notices:
            if not self._told & {kind, *SAME_FAULT.get(kind, ())}:
                self._told.add(kind)
                self._notice(kind, text)
