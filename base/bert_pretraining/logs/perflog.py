"""`[PerfLog]` lines, as tooling for DeepSparkHub's logs reads them."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence

from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    EvaluationSetFacts,
    Resumption,
    RunFacts,
    RunOutline,
    RunResult,
    Sink,
    StepFigures,
)
from bert_pretraining.logs.source import calling_frame

PREFIX = "[PerfLog] "


class PerfLog(Sink):
    """One JSON event a line: {"event", "value", "metadata": {file, lineno, time_ms, rank}}.

    Args:
        writers: called with each line.
        rank: for the metadata.
        file: gets each line first, and is closed with this sink.
    """

    def __init__(
        self, writers: Sequence[Callable[[str], None]], rank: int, file: LineFile | None = None
    ) -> None:
        self._writers = [file.line, *writers] if file else writers
        self._file = file
        self._rank = rank

    def log(self, event: str, value: dict | None = None) -> None:
        """Write one event; a float that is not finite becomes null, as JSON has none.

        The metadata names the place in the trainer that told it.
        """
        caller, _ = calling_frame()
        record = {
            "event": event,
            "value": None if value is None else {key: _plain(item) for key, item in value.items()},
            "metadata": {
                "file": caller.f_code.co_filename,
                "lineno": caller.f_lineno,
                "time_ms": int(time.time() * 1000),
                "rank": self._rank,
            },
        }
        line = PREFIX + json.dumps(record)
        for write in self._writers:
            write(line)

    def launched(self, run: RunFacts) -> None:
        config = run.config
        self.log("LAUNCH_TRAINING", {"other": "Launch training"})
        # "submmiter" is how upstream spells it, and what its tooling reads.
        submitted = {"submmiter": config.name, "model": "bert", "config_path": run.config_path}
        self.log("SUBMITTED_INFO", {**submitted, "config": dataclasses.asdict(config)})

    def init_started(self) -> None:
        self.log("INIT_START")

    def built(self, event: str, values: dict[str, object]) -> None:
        self.log(event, values)

    def outlined(self, outline: RunOutline) -> None:
        self.log("RUN_OUTLINE", dataclasses.asdict(outline))

    def evaluation_set_read(self, facts: EvaluationSetFacts) -> None:
        self.log("EVALUATION_SET", dataclasses.asdict(facts))

    def noticed(self, kind: str, text: str) -> None:
        self.log("NOTICE", {"kind": kind, "text": text})

    def start_evaluated(self, evaluation: EvaluationFigures) -> None:
        self.log("INIT_EVALUATION", _evaluation(evaluation))

    def resumed(self, resumption: Resumption) -> None:
        counters = {"global_steps": resumption.steps, "num_trained_samples": resumption.samples}
        origin = {"checkpoint": str(resumption.checkpoint), "differences": resumption.differences}
        self.log("RESUMED", {**counters, **origin})

    def training_began(self) -> None:
        self.log("INIT_END", {"other": "Finish initialization"})
        self.log("TRAIN_BEGIN")

    def epoch_began(self, epoch: int) -> None:
        self.log("EPOCH_BEGIN", {"epoch": epoch})

    def epoch_ended(self, epoch: int) -> None:
        self.log("EPOCH_END", {"epoch": epoch})

    def skipped(self, step: int, count: int, skipped_in_all: int, loss_scale: float) -> None:
        counters = {"skipped": count, "skipped_in_all": skipped_in_all}
        self.log("STEPS_SKIPPED", {**counters, "loss_scale": loss_scale})

    def step_logged(self, figures: StepFigures) -> None:
        counters = {
            "num_trained_samples": figures.samples,
            "global_steps": figures.step,
            "seq/s": figures.sequences_per_second,
            "step": figures.step,
        }
        speed = figures.speed.named() if figures.speed else {}
        self.log("STEP_END", {**figures.values, **counters, **speed})

    def evaluated(self, evaluation: EvaluationFigures) -> None:
        self.log("EVALUATION", {"global_steps": evaluation.step, **_evaluation(evaluation)})

    def training_ended(self, samples: int, eval_samples: int, converged: bool) -> None:
        self.log("TRAIN_END")

    def finished(self, result: RunResult) -> None:
        finished = {
            "e2e_time": result.e2e_time,
            "training_sequences_per_second": result.sequences_per_second,
            "converged": result.converged,
            "final_loss": result.eval_loss,
            "final_mlm_accuracy": result.eval_mlm_accuracy,
            "raw_train_time": result.train_time,
            "init_time": result.init_time,
        }
        finished |= result.measured()
        if result.resumed_from is not None:
            finished["resumed_from_step"] = result.resumed_from
        self.log("FINISHED", finished)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _evaluation(evaluation: EvaluationFigures) -> dict[str, object]:
    return {
        "eval_loss": evaluation.loss,
        "eval_mlm_accuracy": evaluation.mlm_accuracy,
        "time": evaluation.seconds,
    }


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
