"""The output of a run that tells its trackers."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bert_pretraining.errors import UserError
from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    EvaluationSetFacts,
    Hyperparameters,
    Resumption,
    RunFacts,
    RunOutline,
    RunResult,
    Sink,
    StepFigures,
)
from bert_pretraining.logs.trackers import figures as tracked
from bert_pretraining.logs.trackers.process import USUAL, Patience, TrackerProcess, encode
from bert_pretraining.logs.trackers.tracker import TrackedRun, Value

LOG_NAME = "tracker_{}.log"  # in the run's folder, only where a tracker has failed


class Trackers(Sink):
    """Passes a run's facts and figures to the trackers that its configuration asks for.

    A tracker's run begins where training begins: until then facts are gathered.

    Args:
        run: with a folder.
        notice: called with a kind, one word for programs, and a line for people, where a tracker
            fails.
        say: called with a line for people, where the end of the run waits for a tracker.
        patience: how long it waits.

    Raises:
        UserError: `tensorboard_dir` cannot be written to.
    """

    def __init__(
        self,
        run: RunFacts,
        notice: Callable[[str, str], None],
        say: Callable[[str], None],
        patience: Patience = USUAL,
    ) -> None:
        self._run = _tracked(run)
        self._facts: dict[str, Value] = tracked.facts_of_run(run)
        self._texts: list[tuple[str, str]] = []  # told before training begins
        self._step = 0
        self._has_begun = self._has_ended = False

        def failed_as(name: str) -> Callable[[str], None]:
            return lambda text: notice(f"tracker_{name}_failed", text)

        self._processes = [
            TrackerProcess(name, run.folder / LOG_NAME.format(name), failed_as(name), say, patience)
            for name in run.config.trackers
        ]

    def hyperparameters(self, values: Hyperparameters) -> None:
        self._facts["seed"] = values.seed

    def outlined(self, outline: RunOutline) -> None:
        self._facts.update(tracked.facts_of_outline(outline))

    def evaluation_set_read(self, facts: EvaluationSetFacts) -> None:
        self._facts.update(tracked.facts_of_evaluation_set(facts))

    def start_evaluated(self, evaluation: EvaluationFigures) -> None:
        self._begin()
        self.evaluated(evaluation)

    def resumed(self, resumption: Resumption) -> None:
        self._step = resumption.steps
        self._facts.update(tracked.facts_of_resumption(resumption))
        self._begin()

    def skipped(self, step: int, count: int, skipped_in_all: int, loss_scale: float) -> None:
        self._tell_figures(step, tracked.skipped_figures(skipped_in_all, loss_scale))

    def step_logged(self, figures: StepFigures) -> None:
        self._tell_figures(figures.step, tracked.step_figures(figures))

    def evaluated(self, evaluation: EvaluationFigures) -> None:
        self._tell_figures(evaluation.step, tracked.evaluation_figures(evaluation))

    def noticed(self, kind: str, text: str) -> None:
        if not self._has_begun:
            self._texts.append((kind, text))
        elif not self._has_ended:
            self._call("text", self._step, kind, text)

    def finished(self, result: RunResult) -> None:
        self._step = result.step
        self._end(tracked.status_of(result), tracked.result_table(result))

    def aborted(self, samples: int, eval_samples: int) -> None:
        # It is called while the error is handled. Ctrl-C and the like are no Exception.
        by_error = isinstance(sys.exc_info()[1], Exception)
        self._end("failed" if by_error else "aborted", {"result/samples": samples})

    def close(self) -> None:
        ended = time.monotonic()
        for process in self._processes:
            process.end_calls(ended)
        for process in self._processes:
            process.wait(ended)

    def _begin(self) -> None:
        self._has_begun = True
        self._call("start", dataclasses.asdict(self._run), self._facts)
        for kind, text in self._texts:
            self._call("text", self._step, kind, text)

    def _tell_figures(self, step: int, values: dict[str, float]) -> None:
        self._step = step
        self._call("figures", step, values)

    def _end(self, status: str, table: dict[str, Value]) -> None:
        """Once, and only of a run that has begun."""
        if self._has_begun and not self._has_ended:
            self._has_ended = True
            self._call("finish", self._step, status, table)

    def _call(self, method: str, *arguments: object) -> None:
        line = encode(method, *arguments)
        for process in self._processes:
            process.call(line)


def _tracked(run: RunFacts) -> TrackedRun:
    """The run as trackers name it. TensorBoard's own folder is made here: the user named it."""
    output_dir = Path(run.config.resolved_output_dir)
    tensorboard_dir = run.folder / "tensorboard"
    if run.config.tensorboard_dir:
        given = Path(run.config.tensorboard_dir)
        tensorboard_dir = given / output_dir.name / run.folder.name
        try:
            tensorboard_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot write to tensorboard_dir {given} ({error.strerror})",
                "pass another --tensorboard_dir",
            ) from error
    return TrackedRun(
        name=run.folder.name,
        group=output_dir.resolve().name,
        folder=str(run.folder.resolve()),
        output_dir=str(output_dir.resolve()),
        tensorboard_dir=str(tensorboard_dir.resolve()),
    )
