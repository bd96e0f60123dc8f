"""A run's life, event by event: PerfLog, MLPerf log and terminal in step.

On rank 0 it makes `output_dir/run-<UTC time>/` with `perflog.txt`, `mllog.txt`,
`config.json` and `versions.json`; on the other ranks nothing is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path

from bert_pretraining.config import Resolved
from bert_pretraining.errors import UserError
from bert_pretraining.lock import FolderLock
from bert_pretraining.logs.console import Console, LineFile, results_table
from bert_pretraining.logs.mlperf import MlperfLog, run_status
from bert_pretraining.logs.perflog import PerfLog
from bert_pretraining.state import RunState

PACKAGES = ("torch", "numpy", "h5py", "mlperf-logging", "tokenizers", "tqdm")


class RunLog:
    """The three outputs of one run. UserError if its folder cannot be made or is in use."""

    def __init__(self, resolved: Resolved, rank: int, device_name: str, world_size: int) -> None:
        self.config, self._sources = resolved.config, resolved.sources
        self.started = float(os.environ.get("BERT_PRETRAINING_STARTED", time.time()))
        self._device_name, self._world_size = device_name, world_size
        self._init_started = self._train_started = self._window_started = self.started
        self._init_time = self._train_time = 0.0
        self._window_samples = self._resumed_samples = 0
        self.folder: Path | None = None
        self._files: list[LineFile] = []
        self.console = Console(rank == 0, self.config.max_steps)
        sinks: list[list] = [[], []]
        self._lock: FolderLock | None = None
        if rank == 0:
            self._lock = FolderLock(Path(self.config.resolved_output_dir))
            self.folder = make_run_folder(Path(self.config.resolved_output_dir))
            for name, content in (
                ("config.json", dataclasses.asdict(self.config)),
                ("versions.json", versions()),
            ):
                (self.folder / name).write_text(json.dumps(content, indent=2) + "\n")
            self._files = [
                LineFile(self.folder / "perflog.txt"),
                LineFile(self.folder / "mllog.txt"),
            ]
            sinks = [[file.line, self.console.line] for file in self._files]
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

    def hyperparameters(self, seed: int, samples_per_step: int) -> None:
        """The seed and what the closed division wants to know."""
        config = self.config
        self.mlperf.hyperparameters(
            seed,
            {
                "global_batch_size": samples_per_step,
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
        self.say(
            f"Start: MLM accuracy {accuracy:.4f} on {num_sequences:,} sequences, loss {loss:.4f}, "
            f"target {target:g}"
        )
        if accuracy >= target:
            self.say(
                f"The start checkpoint already meets the target ({accuracy:.4f} >= {target:g}): "
                "stopping after one step"
            )
        self.perf.log("INIT_END", {"other": "Finish initialization"})
        self._init_time = time.time() - self._init_started
        self.perf.log("TRAIN_BEGIN")
        self._train_started = self._window_started = time.time()

    def resumed(self, path: Path, state: RunState, differences: list[str]) -> None:
        """The run goes on from a checkpoint; training begins after this.

        differences: what is not as it was; with none, the run goes on bit for bit.
        """
        self.say(
            f"Resumed: {path}, step {state.global_steps}, {state.num_trained_samples:,} sequences"
        )
        if differences:
            self.say(
                f"Notice: not bit-identical to the run without a stop: {', '.join(differences)}"
            )
        self.perf.log("INIT_END", {"other": "Finish initialization"})
        self._init_time = time.time() - self._init_started
        self.perf.log("TRAIN_BEGIN")
        self._train_started = self._window_started = time.time()
        self._resumed_samples = state.num_trained_samples

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
        shown = {}
        if figures is not None:
            now = time.time()
            speed = self._window_samples / max(now - self._window_started, 1e-9)
            self._window_samples, self._window_started = 0, now
            counters = {
                "num_trained_samples": state.num_trained_samples,
                "global_steps": state.global_steps,
                "seq/s": speed,
                "step": state.global_steps,
            }
            self.perf.log("STEP_END", {**figures, **counters}, depth=2)
            shown = {
                "loss": f"{figures['loss']:.3f}",
                "mlm_acc": f"{figures['mlm_acc']:.3f}",
                "eval": f"{state.eval_mlm_accuracy:.3f}",
                "seq/s": f"{speed:.0f}",
            }
        self.console.advance(count, **shown)
        if evaluation_seconds is not None:
            evaluation = {
                "global_steps": state.global_steps,
                "eval_loss": state.eval_loss,
                "eval_mlm_accuracy": state.eval_mlm_accuracy,
                "time": evaluation_seconds,
            }
            self.perf.log("EVALUATION", evaluation, depth=2)

    def trained(self, state: RunState, eval_samples: int) -> None:
        """The last step and its evaluation are done: both clocks stop."""
        self.mlperf.run_stop(run_status(state.converged), state.num_trained_samples, eval_samples)
        self.perf.log("TRAIN_END")
        self._train_time = time.time() - self._train_started

    def finished(self, state: RunState, reason: str) -> None:
        """The figures of the whole run, for tooling and as a table."""
        e2e_time = time.time() - self.started
        # Of a resumed run, the part that was trained here.
        trained_here = state.num_trained_samples - self._resumed_samples
        speed = trained_here / max(self._train_time, 1e-9)
        self.perf.log(
            "FINISHED",
            {
                "e2e_time": e2e_time,
                "training_sequences_per_second": speed,
                "converged": state.converged,
                "final_loss": state.eval_loss,
                "final_mlm_accuracy": state.eval_mlm_accuracy,
                "raw_train_time": self._train_time,
                "init_time": self._init_time,
            },
        )
        self.console.close()
        config = self.config
        outcome = "reached" if state.converged else f"not reached (stopped by {reason})"
        self.say(
            f"Target {config.target_mlm_accuracy:g} {outcome} after {state.global_steps} steps, "
            f"{state.num_trained_samples} sequences"
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
        self.say(results_table(table))

    def aborted(self, state: RunState) -> None:
        """The run ends by an error: the MLPerf log says so."""
        self.mlperf.run_stop("aborted", state.num_trained_samples, 0)

    def close(self) -> None:
        self.console.close()
        for file in self._files:
            file.close()
        if self._lock is not None:
            self._lock.release()


def make_run_folder(output_dir: Path) -> Path:
    """A new folder `run-<UTC time>` in `output_dir`, never one that was there."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            folder = output_dir / (f"run-{stamp}" + (f"-{attempt}" if attempt else ""))
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue
    except OSError as error:
        raise UserError(
            f"cannot write to output_dir {output_dir} ({error.strerror}); pass --output_dir"
        ) from error
    raise UserError(f"{output_dir} holds 1000 runs of this second; pass another --output_dir")


def versions() -> dict[str, str]:
    """Versions of Python, the machine and the packages that matter, for the record."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    found["cpus_allowed"] = str(len(os.sched_getaffinity(0)))
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
