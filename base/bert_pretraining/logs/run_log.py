"""A run's life, event by event: PerfLog, MLPerf log, terminal and TensorBoard in step.

On rank 0 it makes `output_dir/run-<UTC time>/` with `perflog.txt`, `mllog.txt`,
`config.json` and `versions.json`; on the other ranks nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from pathlib import Path

from bert_pretraining.config import Resolved
from bert_pretraining.logs.console import Console, LineFile, clock, duration, results_table
from bert_pretraining.logs.mlperf import MlperfLog, run_status
from bert_pretraining.logs.perflog import PerfLog
from bert_pretraining.logs.run_folder import make_run_folder
from bert_pretraining.logs.tensor_names import mlperf_tensor_names
from bert_pretraining.logs.tensorboard import TensorBoard
from bert_pretraining.progress import RunState, StepTriggers
from bert_pretraining.runtime.lock import FolderLock


class RunLog:
    """The outputs of one run. UserError if its folder cannot be made or is in use."""

    def __init__(self, resolved: Resolved, rank: int, device_name: str, world_size: int) -> None:
        self.config, self._sources = resolved.config, resolved.sources
        self.started = float(os.environ.get("BERT_PRETRAINING_STARTED", time.time()))
        self._device_name, self._world_size = device_name, world_size
        self._init_started = self._train_started = self._window_started = self.started
        self._init_time = self._train_time = self._evaluation_time = 0.0
        self._window_samples = 0
        self._resumed_from: tuple[int, int] | None = None  # steps, sequences
        self._triggers: StepTriggers | None = None
        self._latest = ""  # figures beside the bar
        self.folder: Path | None = None
        self._files: list[LineFile] = []
        self.console = Console(rank == 0, self.config.max_steps)
        self._lock: FolderLock | None = None
        self._tensorboard: TensorBoard | None = None
        sinks: list[list] = [[], []]
        if rank == 0:
            output_dir = Path(self.config.resolved_output_dir)
            self._lock = FolderLock(output_dir)
            self.folder = make_run_folder(output_dir, self.config)
            names = ("perflog.txt", "mllog.txt")
            self._files = [LineFile(self.folder / name) for name in names]
            sinks = [[file.line, self.console.line] for file in self._files]
            if self.config.tensorboard_dir:
                shown = Path(self.config.tensorboard_dir) / output_dir.name / self.folder.name
                self._tensorboard = TensorBoard(shown)
        self.perf = PerfLog(sinks[0], rank)
        self.mlperf = MlperfLog(sinks[1])
        self._launched(resolved.path)

    def say(self, text: str) -> None:
        """A line for people, on rank 0's terminal."""
        self.console.line(text)

    def _launched(self, config_path: str) -> None:
        config = self.config
        self.perf.log("LAUNCH_TRAINING", {"other": "Launch training"})
        # "submmiter" is how upstream spells it, and what its tooling reads.
        submitted = {"submmiter": config.name, "model": "bert", "config_path": config_path}
        self.perf.log("SUBMITTED_INFO", {**submitted, "config": dataclasses.asdict(config)})
        # `submission run` drops the page caches where it may, and says whether it did.
        dropped = os.environ.get("BERT_PRETRAINING_CACHES_DROPPED") == "1"
        self.mlperf.init_start(self.started, caches_cleared=dropped)
        self.mlperf.submission(
            config.submission_division,
            config.submission_org,
            config.submission_platform,
            config.submission_status,
        )
        self._init_started = time.time()
        self.perf.log("INIT_START")

    def hyperparameters(self, seed: int, triggers: StepTriggers) -> None:
        """The seed and what the closed division wants to know."""
        config, self._triggers = self.config, triggers
        self.mlperf.hyperparameters(
            seed,
            {
                "global_batch_size": triggers.samples_per_step,
                "gradient_accumulation_steps": config.gradient_accumulation_steps,
                "opt_base_learning_rate": config.learning_rate,
                "opt_epsilon": config.opt_lamb_epsilon,
                "opt_lamb_epsilon": config.opt_lamb_epsilon,
                "opt_lamb_beta_1": config.opt_lamb_beta_1,
                "opt_lamb_beta_2": config.opt_lamb_beta_2,
                "opt_lamb_weight_decay_rate": config.weight_decay_rate,
                "opt_learning_rate_training_steps": config.max_steps,
                "opt_learning_rate_warmup_steps": config.resolved_warmup_steps,
                "num_warmup_steps": config.resolved_warmup_steps,
                "start_warmup_step": config.start_warmup_step,
            },
        )

    def built(self, event: str, thing: object, **more: object) -> None:
        """CONVERT_MODEL, CREATE_OPTIMIZER or MODEL_TO_DDP: the class that was made, and more."""
        made = {"type": type(thing).__name__, "module": type(thing).__module__, **more}
        self.perf.log(event, made, depth=2)

    def weights_loaded(self, parameters: Iterable[str]) -> None:
        """These parameters, by their names in the model, have a start checkpoint's weights."""
        self.mlperf.weights_initialized(mlperf_tensor_names(parameters))

    def start_evaluated(
        self, loss: float, accuracy: float, num_sequences: int, seconds: float
    ) -> None:
        """The start checkpoint's figures; training begins after this."""
        self.perf.log(
            "INIT_EVALUATION",
            {"eval_loss": loss, "eval_mlm_accuracy": accuracy, "time": seconds},
        )
        target = self.config.target_mlm_accuracy
        wanted = self.config.num_eval_examples
        # The default is MLPerf's number; who asks for one of their own hears that it was not met.
        if num_sequences < wanted and self._sources["num_eval_examples"] != "default":
            self.say(
                f"Notice: num_eval_examples {wanted:,}, but the evaluation set holds "
                f"{num_sequences:,} sequences; each evaluation uses them all"
            )
        self.console.highlight(
            f"Start: MLM accuracy {accuracy:.4f} on {num_sequences:,} sequences, loss {loss:.4f}, "
            f"target {target:g}"
        )
        if accuracy >= target:
            self.say(
                f"The start checkpoint already meets the target ({accuracy:.4f} >= {target:g}): "
                "stopping after one step"
            )
        self._show({"evaluation/loss": loss, "evaluation/mlm_accuracy": accuracy}, 0)
        self._begin_training()

    def resumed(self, path: Path, state: RunState, differences: list[str]) -> None:
        """The run goes on from a checkpoint; training begins after this.

        differences: what is not as it was; with none, the run goes on bit for bit.

        Time and throughput are of the part that is trained here, and the MLPerf log says that
        it is only a part.
        """
        steps, samples = self._resumed_from = state.global_steps, state.num_trained_samples
        counters = {"global_steps": steps, "num_trained_samples": samples}
        self.perf.log("RESUMED", {**counters, "checkpoint": str(path), "differences": differences})
        self.mlperf.resumed(steps, samples)
        self.console.begin_at(steps)
        self.say(f"Resumed: {path}, step {steps}, {samples:,} sequences")
        if differences:
            self.say(
                f"Notice: not bit-identical to the run without a stop: {', '.join(differences)}"
            )
        self._begin_training()

    def _begin_training(self) -> None:
        self.perf.log("INIT_END", {"other": "Finish initialization"})
        self._init_time = time.time() - self._init_started
        self.perf.log("TRAIN_BEGIN")
        self._train_started = self._window_started = time.time()

    def skipped(self, state: RunState, count: int, loss_scale: float) -> None:
        """So many of the latest updates were skipped."""
        self.say(
            f"Skipped {count} {'update' if count == 1 else 'updates'} before step "
            f"{state.global_steps + 1}: overflow in fp16; loss scale now {loss_scale:g}"
        )
        skipped = {"skipped": count, "skipped_in_all": state.skipped_steps}
        self.perf.log("STEPS_SKIPPED", {**skipped, "loss_scale": loss_scale}, depth=2)

    def steps(
        self,
        state: RunState,
        count: int,
        samples_per_step: int,
        figures: dict | None,
        evaluation_seconds: float | None,
    ) -> None:
        """`count` steps are done.

        figures, if any, go into the last one's STEP_END. evaluation_seconds, if an evaluation
        followed it, does not count in `seq/s`.
        """
        self._window_samples += count * samples_per_step
        self._window_started += evaluation_seconds or 0.0
        self._evaluation_time += evaluation_seconds or 0.0
        ahead = self._seconds_to_evaluation(state)
        if figures is not None:
            self._step_logged(state, figures, ahead)
        short = "" if ahead is None else f", eval in {clock(ahead)}"
        self.console.advance(count, self._latest + short)
        if evaluation_seconds is not None:
            self._evaluated(state, evaluation_seconds)

    def _step_logged(self, state: RunState, figures: dict, ahead: float | None) -> None:
        now = time.time()
        speed = self._window_samples / max(now - self._window_started, 1e-9)
        self._window_samples, self._window_started = 0, now
        counters = {
            "num_trained_samples": state.num_trained_samples,
            "global_steps": state.global_steps,
            "seq/s": speed,
            "step": state.global_steps,
        }
        self.perf.log("STEP_END", {**figures, **counters}, depth=3)
        loss, accuracy, rate = (figures[name] for name in ("loss", "mlm_acc", "learning_rate"))
        # Of a terminal's 80 columns, some are left for the bar itself.
        self._latest = f"loss {loss:.3f}, MLM acc {accuracy:.3f}, lr {rate:.2e}, {speed:,.0f} seq/s"
        if self.console.wants_step_lines:
            words = "" if ahead is None else f", evaluation in {duration(ahead)}"
            self.say(
                f"Step {state.global_steps}/{self.config.max_steps}: loss {loss:.4f}, MLM accuracy "
                f"{accuracy:.4f}, learning rate {rate:.4g}, {speed:,.0f} sequences/s{words}"
            )
        shown = {
            "training/loss": loss,
            "training/mlm_accuracy": accuracy,
            "training/learning_rate": rate,
            "training/sequences_per_second": speed,
        }
        self._show(shown, state.global_steps)

    def _seconds_to_evaluation(self, state: RunState) -> float | None:
        """At this run's mean speed; None where no update is left."""
        updates = self._triggers.updates_to_evaluation(
            state.global_steps, state.num_trained_samples
        )
        trained = self._trained_here(state)
        if not updates or not trained:
            return None
        training = time.time() - self._train_started - self._evaluation_time
        return updates * self._triggers.samples_per_step * max(training, 0.0) / trained

    def _trained_here(self, state: RunState) -> int:
        """Sequences that this process trained; of a resumed run, the part after the resumption."""
        return state.num_trained_samples - (self._resumed_from[1] if self._resumed_from else 0)

    def _evaluated(self, state: RunState, seconds: float) -> None:
        loss, accuracy = state.eval_loss, state.eval_mlm_accuracy
        counters = {"global_steps": state.global_steps}
        figures = {"eval_loss": loss, "eval_mlm_accuracy": accuracy, "time": seconds}
        self.perf.log("EVALUATION", {**counters, **figures}, depth=3)
        self.console.highlight(
            f"Evaluation: MLM accuracy {accuracy:.4f}, target {self.config.target_mlm_accuracy:g}, "
            f"loss {loss:.4f}, after {state.num_trained_samples:,} sequences"
        )
        shown = {"evaluation/loss": loss, "evaluation/mlm_accuracy": accuracy}
        self._show(shown, state.global_steps)

    def _show(self, figures: dict[str, float], step: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.scalars(step, figures)

    def trained(self, state: RunState, eval_samples: int) -> None:
        """The last step and its evaluation are done: both clocks stop."""
        self.mlperf.run_stop(run_status(state.converged), state.num_trained_samples, eval_samples)
        self.perf.log("TRAIN_END")
        self._train_time = time.time() - self._train_started

    def finished(self, state: RunState, reason: str) -> None:
        """The figures of the whole run, for tooling and as a table."""
        e2e_time = time.time() - self.started
        speed = self._trained_here(state) / max(self._train_time, 1e-9)
        finished = {
            "e2e_time": e2e_time,
            "training_sequences_per_second": speed,
            "converged": state.converged,
            "final_loss": state.eval_loss,
            "final_mlm_accuracy": state.eval_mlm_accuracy,
            "raw_train_time": self._train_time,
            "init_time": self._init_time,
        }
        if self._resumed_from is not None:
            finished["resumed_from_step"] = self._resumed_from[0]
        self.perf.log("FINISHED", finished)
        self.console.close()
        config = self.config
        outcome = "reached" if state.converged else f"not reached (stopped by {reason})"
        self.console.highlight(
            f"Target {config.target_mlm_accuracy:g} {outcome} after {state.global_steps} steps, "
            f"{state.num_trained_samples} sequences"
        )
        if self._resumed_from is not None:
            self.say(
                f"Resumed from step {self._resumed_from[0]}: times and sequences per second are of "
                "what came after it; MLPerf has no resumed runs"
            )
        self.say(f"Logs: {self.folder}\n")
        table = {
            "Model": f"BERT {config.name} {config.config}",
            "GPUs": f"{self._device_name} x{self._world_size}",
            "E2E": f"{e2e_time:.2f}s",
            "MLM Accuracy": f"{state.eval_mlm_accuracy:.3f}",
            "training_sequences_per_second": f"{speed:.3f}",
            "final_loss": f"{state.eval_loss:.3f}",
        }
        self.console.highlight(results_table(table))

    def aborted(self, state: RunState) -> None:
        """The run ends by an error or from outside: the MLPerf log says so, once."""
        status = run_status(state.converged, failed=True)
        self.mlperf.run_stop(status, state.num_trained_samples, state.eval_sequences)

    def close(self) -> None:
        self.console.close()
        for file in self._files:
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._lock is not None:
            self._lock.release()
