"""Synthetic runs, reported to RunLog event by event, and MLPerf's compliance checker."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bert_pretraining.config import resolve
from bert_pretraining.logs.run_log import RunLog
from bert_pretraining.logs.sinks import RunFacts
from bert_pretraining.progress import RunState, StepTriggers, evaluation_interval
from helpers import make_model, tiny_config
from log_files import accuracy_at

RULESETS = ("1.0.0", "1.1.0", "2.0.0", "2.1.0", "3.0.0", "3.1.0", "4.0.0", "4.1.0", "5.0.0")
# What the checkers report for a run that did not reach 0.72 and has no other fault.
BELOW_TARGET = ["Failed checks for eval_accuracy : (v['value'] >= 0.720) and v['value'] < 1.0"]
CHECKER = [sys.executable, "-m", "mlperf_logging.compliance_checker", "--usage", "training"]


class Clock:
    """A fake clock, which advances only when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_700_000_000.0
        monkeypatch.setattr(time, "time", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def facts(caches_cleared: bool = False, **flags: object) -> RunFacts:
    """The facts of a run that started at 1,700,000,000.5 and writes no files."""
    resolved = resolve(flags)
    return RunFacts(
        resolved.config, resolved.path, 1_700_000_000.5, caches_cleared, "CPU", 1, folder=None
    )


def parameters(layers: int) -> list[str]:
    """The names of a model's parameters; with 24 layers, those of BERT-large."""
    model = make_model(tiny_config(num_hidden_layers=layers))
    return [name for name, _ in model.named_parameters()]


def triggers_of(batch_size: int, **changes: int) -> StepTriggers:
    """MLPerf's evaluation schedule, with limits that are never reached."""
    values = {
        "max_steps": 8103,
        "max_samples": 14_000_000,
        "log_freq": 0,
        "eval_steps": 0,
        "eval_interval_samples": evaluation_interval(batch_size),
        "check_replicas_every": 0,
        "num_samples_per_checkpoint": 0,
        "min_samples_to_start_checkpoints": 0,
    }
    return StepTriggers(samples_per_step=batch_size, **{**values, **changes})


class Recording:
    """One run of BERT-large, reported to RunLog in the order of train.py."""

    def __init__(
        self,
        clock: Clock,
        output_dir: Path,
        batch_size: int = 448,
        seed: int = 1,
        rank: int = 0,
        **flags: object,
    ) -> None:
        shape = {"train_batch_size": batch_size // 8, "gradient_accumulation_steps": 1}
        values = {"name": "nvidia", "config": "H200x1x8", "max_steps": 8103, **shape, **flags}
        self.clock, self.batch_size = clock, batch_size
        self.state = RunState()
        resolved = resolve({**values, "output_dir": str(output_dir)})
        self.log = RunLog(resolved, rank, "NVIDIA H200", 8)
        clock.wait(5)
        self.triggers = triggers_of(batch_size)
        self.log.hyperparameters(seed, self.triggers)

    def start_clock(self, layers: int = 24) -> None:
        self.log.weights_loaded(parameters(layers))
        self.clock.wait(30)
        self.log.clock_started()

    def evaluate(self, accuracy: float) -> None:
        state = self.state
        self.log.evaluation_started(state)
        self.clock.wait(1)
        self.log.evaluation_stopped(state, accuracy)
        state.eval_loss, state.eval_mlm_accuracy = 4.47 - 4.4 * accuracy, accuracy
        state.eval_sequences = 10_000

    def start_evaluated(self, accuracy: float = 0.341) -> None:
        self.evaluate(accuracy)
        self.log.start_evaluated(self.state, 1.0)

    def train(self, steps: int) -> None:
        self.clock.wait(steps * self.batch_size / 4000)
        samples = self.state.after(steps, self.batch_size)
        self.state.global_steps, self.state.num_trained_samples = samples

    def step_logged(
        self, steps: int, evaluation_seconds: float | None = None, loss_scale: float = 1.0
    ) -> None:
        figures = {"loss": 1.5, "mlm_acc": 0.7, "learning_rate": 3e-4, "epoch": 0}
        figures["loss_scale"] = loss_scale
        self.log.steps(self.state, steps, self.batch_size, figures, evaluation_seconds)

    def train_to_target(self, samples_to_target: int) -> None:
        """Train on MLPerf's schedule until an evaluation reaches 0.72."""
        state = self.state
        while state.eval_mlm_accuracy < 0.72:
            steps = self.triggers.updates_to_evaluation(
                state.global_steps, state.num_trained_samples
            )
            self.train(steps)
            self.evaluate(accuracy_at(state.num_trained_samples, samples_to_target))
            state.converged = state.eval_mlm_accuracy >= 0.72
            self.step_logged(steps, evaluation_seconds=1.0)

    def finish(self, reason: str = "target") -> Path:
        """End the run and return its MLPerf log."""
        self.log.trained(self.state)
        self.log.finished(self.state, reason)
        self.log.close()
        return self.log.folder / "mllog.txt"


def record(clock: Clock, output_dir: Path, samples_to_target: int, **values: object) -> Path:
    """The MLPerf log of a whole run that reaches the target."""
    run = Recording(clock, output_dir, **values)
    run.start_clock()
    run.start_evaluated()
    run.train_to_target(samples_to_target)
    return run.finish()


def failures(log: Path, rulesets: Sequence[str] = RULESETS) -> dict[str, list[str]]:
    """Ruleset -> the checks that fail in the real compliance checker."""
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda ruleset: _failures(log, ruleset), rulesets))
    return dict(zip(rulesets, found, strict=True))


def _failures(log: Path, ruleset: str) -> list[str]:
    done = subprocess.run(
        [*CHECKER, "--ruleset", ruleset, "--log_output", "/dev/null", str(log)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stderr.splitlines()
    found = [line.split(" - ")[-1].strip() for line in lines if "ailed" in line]
    assert bool(found) == bool(done.returncode), done.stderr
    return found
