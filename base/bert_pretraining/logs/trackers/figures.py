"""The names and values that every tracker gets: facts, figures by step, and the final table.

A name has the form "group/name". Values that are not known are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from bert_pretraining.logs.run_folder import versions
from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    EvaluationSetFacts,
    Resumption,
    RunFacts,
    RunOutline,
    RunResult,
    StepFigures,
)
from bert_pretraining.logs.trackers.tracker import Value

# Of a step's values, those with another name here, and those that are no figures to watch.
_NAMES = {"mlm_acc": "mlm_accuracy"}
_LEFT_OUT = ("end_training", "iter_dataloader_idx")


def facts_of_run(run: RunFacts) -> dict[str, Value]:
    """Every setting under its own name; versions/...; run/... : where and on what it runs."""
    here = {"config_path": run.config_path, "device": run.device_name, "ranks": run.world_size}
    return _known(
        dataclasses.asdict(run.config),
        _grouped("versions", versions()),
        _grouped("run", {**here, "folder": str(run.folder)}),
    )


def facts_of_outline(outline: RunOutline) -> dict[str, Value]:
    """model/..., data/... and run/... : what is trained."""
    model = {name: getattr(outline, name) for name in ("parameters", "layers", "hidden_size")}
    data = {name: getattr(outline, name) for name in ("sequences", "shards")}
    run: dict[str, object] = {"kernels": outline.kernels, "precision": outline.precision}
    rate = outline.matrix_rate
    if rate is not None:
        run["matrix_tflop_per_second"] = rate.flop_per_second / 1e12
        run["matrix_rate_of"] = f"{rate.dtype}, {' x '.join(map(str, rate.shape))}"
    return _known(_grouped("model", model), _grouped("data", data), _grouped("run", run))


def facts_of_evaluation_set(facts: EvaluationSetFacts) -> dict[str, Value]:
    """evaluation_set/..."""
    return _known(_grouped("evaluation_set", dataclasses.asdict(facts)))


def facts_of_resumption(resumption: Resumption) -> dict[str, Value]:
    """resumed/... : the checkpoint that the run goes on from."""
    values = {
        "checkpoint": str(resumption.checkpoint),
        "step": resumption.steps,
        "samples": resumption.samples,
        "differences": ", ".join(resumption.differences) or "none",
    }
    return _known(_grouped("resumed", values))


def step_figures(figures: StepFigures) -> dict[str, float]:
    """training/... and, where it is measured, speed/..."""
    values = {
        _NAMES.get(name, name): value
        for name, value in figures.values.items()
        if name not in _LEFT_OUT
    }
    values["samples"] = figures.samples
    values["sequences_per_second"] = figures.sequences_per_second
    speed = figures.speed.named() if figures.speed else {}
    return _known(_grouped("training", values), _grouped("speed", speed))


def skipped_figures(skipped_in_all: int, loss_scale: float) -> dict[str, float]:
    """training/... after updates that were skipped."""
    return {"training/skipped_updates": skipped_in_all, "training/loss_scale": loss_scale}


def evaluation_figures(evaluation: EvaluationFigures) -> dict[str, float]:
    """evaluation/..."""
    values = {
        "loss": evaluation.loss,
        "mlm_accuracy": evaluation.mlm_accuracy,
        "samples": evaluation.samples,
        "sequences": evaluation.num_sequences,
        "seconds": evaluation.seconds,
    }
    return _known(_grouped("evaluation", values))


def result_table(result: RunResult) -> dict[str, Value]:
    """result/... : the final table."""
    values: dict[str, object] = {
        "converged": result.converged,
        "stopped_by": result.reason,
        "steps": result.step,
        "samples": result.samples,
        "loss": result.eval_loss,
        "mlm_accuracy": result.eval_mlm_accuracy,
        "e2e_seconds": result.e2e_time,
        "train_seconds": result.train_time,
        "init_seconds": result.init_time,
        "sequences_per_second": result.sequences_per_second,
        "resumed_from_step": result.resumed_from,
    }
    return _known(_grouped("result", values | result.measured()))


def status_of(result: RunResult) -> str:
    """How a run ended that ended by itself: one of tracker.STATUSES."""
    if result.reason == "an error":
        return "failed"
    return "aborted" if result.reason.startswith("signal") else "finished"


def _grouped(group: str, values: Mapping[str, object]) -> dict[str, object]:
    """A slash would make another group of "tokens/s"."""
    return {f"{group}/{name.replace('/s', '_per_second')}": value for name, value in values.items()}


def _known(*parts: Mapping[str, object]) -> dict[str, Value]:
    """The parts as one, without what is not known."""
    return {name: value for part in parts for name, value in part.items() if value is not None}
