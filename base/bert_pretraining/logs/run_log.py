"""A run's events and times, told to every output.

On rank 0 the outputs are the terminal, `console.txt`, `perflog.txt` and `mllog.txt` in the run's
folder, and the trackers that are asked for; on the other ranks there are none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from bert_pretraining.config import Config, Resolved
from bert_pretraining.errors import UserError
from bert_pretraining.logs import energy_sampler
from bert_pretraining.logs.console import Console
from bert_pretraining.logs.energy import RunEnergy, measure
from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.mlperf import MlperfLog
from bert_pretraining.logs.perflog import PerfLog
from bert_pretraining.logs.run_folder import make_run_folder
from bert_pretraining.logs.sinks import (
    EvaluationFigures,
    EvaluationSetFacts,
    Hyperparameters,
    Resumption,
    RunFacts,
    RunOutline,
    RunResult,
    Sink,
    Speed,
    StepFigures,
    Throughputs,
    Work,
)
from bert_pretraining.logs.terminal import Terminal
from bert_pretraining.logs.trackers.sink import Trackers
from bert_pretraining.logs.watch import Watch
from bert_pretraining.progress import RunState, StepTriggers
from bert_pretraining.runtime.lock import FolderLock


def _raise(error: UserError) -> None:
    raise error


class RunLog:
    """Keeps a run's times, and tells its sinks.

    A sink that cannot write is told nothing more.

    Args:
        failed: called with the error where a sink cannot write; by default it is raised.

    UserError if its folder cannot be made or is in use.

    Attributes:
        folder: of this run; None on ranks other than 0.
    """

    def __init__(
        self,
        resolved: Resolved,
        rank: int,
        device_name: str,
        world_size: int,
        failed: Callable[[UserError], None] = _raise,
    ) -> None:
        self._failed = failed
        self.config, self._sources = resolved.config, resolved.sources
        self._started = float(os.environ.get("BERT_PRETRAINING_STARTED", time.time()))
        self._init_started = self._train_started = self._window_started = self._started
        self._init_time = self._train_time = self._evaluation_time = 0.0
        self._window_samples = self._skipped_samples = 0
        self._matrix_rate: float | None = None
        self._loss_scale: float | None = None
        self._resumption: Resumption | None = None
        self._triggers: StepTriggers | None = None
        self._rank, self._energy, self._trains = rank, RunEnergy(), False
        self._sinks: list[Sink] = []
        self.folder: Path | None = None
        with contextlib.ExitStack() as closing:  # what was opened is closed if the rest fails
            if rank == 0:
                output_dir = Path(self.config.resolved_output_dir)
                closing.callback(FolderLock(output_dir).release)
                self.folder = make_run_folder(output_dir, self.config)
            facts = RunFacts(
                self.config,
                resolved.path,
                self._started,
                # `submission run` drops the page caches where it may, and says whether it did.
                os.environ.get("BERT_PRETRAINING_CACHES_DROPPED") == "1",
                device_name,
                world_size,
                self.folder,
            )
            if self.folder is not None:
                for sink in self.make_sinks(facts, self.folder):
                    closing.callback(self._call, sink, sink.close)
                    self._sinks.append(sink)
            self._closing = closing.pop_all()
        self._tell(Sink.launched, facts)
        self._init_started = time.time()
        self._tell(Sink.init_started)

    def make_sinks(self, facts: RunFacts, folder: Path) -> Iterator[Sink]:
        """Every output of this run, one after the other; a new kind of output is added here."""
        config = facts.config
        terminal = Terminal(config.max_steps)
        printed = {"on": True, "off": False, "auto": not terminal.is_watched}[config.machine_lines]
        writers = [terminal.line] if printed else []
        yield PerfLog(writers, rank=0, file=(perflog := LineFile(folder / "perflog.txt")))
        yield MlperfLog(writers, file=LineFile(folder / "mllog.txt"))
        yield Console(terminal, facts, console := LineFile(folder / "console.txt"))
        chose_evaluations = self._sources["eval_steps"] == "flag"
        yield Watch(facts, self.notice, chose_evaluations, [terminal, perflog, console])
        if config.trackers:
            yield Trackers(facts, self.notice, self.say)

    def _tell(self, event: Callable, *details: object) -> None:
        """Call the method of `Sink` that `event` is on every sink."""
        for sink in list(self._sinks):
            self._call(sink, getattr(sink, event.__name__), *details)

    def _call(self, sink: Sink, method: Callable, *details: object) -> None:
        """Call a method of a sink; where it cannot write, leave the sink out from now on."""
        try:
            method(*details)
        except OSError as error:
            if sink in self._sinks:
                self._sinks.remove(sink)
            where = error.filename or f"the output of {type(sink).__name__}"
            self._failed(
                UserError(
                    f"cannot write {where} ({error.strerror or error})",
                    "free disk space or mend that disk, then go on with --resume auto",
                )
            )

    def say(self, text: str) -> None:
        """A line for people, on rank 0's terminal."""
        self._tell(Sink.said, text)

    def notice(self, kind: str, text: str) -> None:
        """The run goes wrong, or not as its user may expect; see `Sink.noticed`."""
        self._tell(Sink.noticed, kind, text)

    def measure_energy(self, device: torch.device) -> None:
        """Begin to count the energy that all machines take; see `measure`. A collective."""
        setting, folder = self.config.energy, self.folder
        self._energy = measure(setting, self._rank, device, folder, self.say)
        self._closing.callback(self._energy.close)

    def hyperparameters(self, seed: int, triggers: StepTriggers) -> None:
        """The seed and what the closed division asks for."""
        self._triggers = triggers
        self._tell(Sink.hyperparameters, Hyperparameters(seed, mlperf_hyperparameters(self.config)))

    def built(self, event: str, thing: object, **more: object) -> None:
        """CONVERT_MODEL, CREATE_OPTIMIZER or MODEL_TO_DDP: the class that was made, and more."""
        made = {"type": type(thing).__name__, "module": type(thing).__module__, **more}
        self._tell(Sink.built, event, made)

    def precision(self, precision: str, tf32: bool) -> None:
        """The weights and activations have this precision; tf32: their products are in TF32."""
        values = {"fp16": precision == "fp16", "precision": precision}
        if tf32:
            values["tf32"] = True
            self.say("Products of fp32 matrices are computed in TF32")
        self._tell(Sink.built, "MODEL_TO_FP16", values)

    def weights_loaded(self, parameters: Iterable[str]) -> None:
        """These parameters, by their names in the model, have a start checkpoint's weights."""
        self._tell(Sink.weights_loaded, list(parameters))

    def outlined(self, outline: RunOutline) -> None:
        """Everything is built."""
        rate = outline.matrix_rate
        self._matrix_rate = rate.flop_per_second if rate else None
        if rate:
            products = " x ".join(map(str, rate.shape))
            self.say(
                f"Matrix rate: {rate.flop_per_second / 1e12:.3g} TFLOP/s in {rate.dtype} (products "
                f"of {products}, on all ranks at once)"
            )
        self._tell(Sink.outlined, outline)

    def clock_started(self) -> None:
        """MLPerf's clock starts: from here on sequences are read."""
        self._energy.mark(energy_sampler.CLOCK_STARTED)
        self._tell(Sink.clock_started)

    def evaluation_set_read(self, facts: EvaluationSetFacts) -> None:
        """The evaluation set is in memory."""
        self._tell(Sink.evaluation_set_read, facts)

    def evaluation_started(self, state: RunState) -> None:
        """An evaluation begins."""
        self._tell(Sink.evaluation_started, state.num_trained_samples)

    def evaluation_stopped(self, state: RunState, mlm_accuracy: float) -> None:
        """That evaluation ends."""
        self._tell(Sink.evaluation_stopped, state.num_trained_samples, mlm_accuracy)

    def start_evaluated(self, state: RunState, seconds: float) -> None:
        """The start weights' figures; training begins after this."""
        wanted, there = self.config.num_eval_examples, state.eval_sequences
        # The default is MLPerf's number. Who has set a number learns that the set is smaller.
        if there < wanted and self._sources["num_eval_examples"] != "default":
            self.say(
                f"Notice: num_eval_examples {wanted:,}, but the evaluation set holds "
                f"{there:,} sequences; each evaluation uses them all"
            )
        self._tell(Sink.start_evaluated, _evaluation(state, seconds))
        self._begin_training()

    def resumed(self, path: Path, state: RunState, differences: list[str]) -> None:
        """The run goes on from a checkpoint; training begins after this.

        differences: settings and data that have changed since the checkpoint; if empty, the run
        continues bit for bit.

        Time and throughput are of the part that is trained here, and the MLPerf log says that
        it is only a part.
        """
        self._resumption = Resumption(
            path,
            state.global_steps,
            state.num_trained_samples,
            differences,
            state.eval_mlm_accuracy,
        )
        self._tell(Sink.resumed, self._resumption)
        self._begin_training()

    def _begin_training(self) -> None:
        self._init_time = time.time() - self._init_started
        self._trains = True
        self._tell(Sink.training_began)
        self._energy.mark(energy_sampler.TRAINING_BEGAN)
        self._train_started = self._window_started = time.time()

    def epoch_began(self, epoch: int) -> None:
        """The next update begins with a sample of another epoch."""
        self._tell(Sink.epoch_began, epoch)

    def epoch_ended(self, epoch: int) -> None:
        """The epoch's last update was made."""
        self._tell(Sink.epoch_ended, epoch)

    def skipped(self, state: RunState, count: int, loss_scale: float) -> None:
        """So many of the latest updates were skipped. Speeds count their sequences."""
        self._window_samples += count * self.config.global_batch_size
        self._skipped_samples += count * self.config.global_batch_size
        self._tell(Sink.skipped, state.global_steps, count, state.skipped_steps, loss_scale)

    def steps(
        self,
        state: RunState,
        count: int,
        samples_per_step: int,
        figures: dict | None,
        evaluation_seconds: float | None,
        work: Work | None = None,
    ) -> None:
        """`count` steps are done.

        figures, if any, go into the last one's STEP_END. work: since the step logged before.
        evaluation_seconds, if an evaluation followed it, does not count in any speed.
        """
        self._window_samples += count * samples_per_step
        self._window_started += evaluation_seconds or 0.0
        self._evaluation_time += evaluation_seconds or 0.0
        ahead = self._seconds_to_evaluation(state)
        if figures is not None:
            now, self._loss_scale = time.time(), figures.get("loss_scale")
            seconds, sequences = max(now - self._window_started, 1e-9), self._window_samples
            self._window_samples, self._window_started = 0, now
            step, samples = state.global_steps, state.num_trained_samples
            speed = self._speed(work, sequences, seconds)
            logged = StepFigures(step, samples, figures, sequences / seconds, ahead, speed)
            self._tell(Sink.step_logged, logged)
            self._energy.check()
        self._tell(Sink.advanced, count, ahead)
        if evaluation_seconds is not None:
            self._tell(Sink.evaluated, _evaluation(state, evaluation_seconds))

    def _speed(self, work: Work | None, sequences: int, seconds: float) -> Speed | None:
        has_updates = work is not None and work.updates
        return Speed.of(work, sequences, seconds, self._matrix_rate) if has_updates else None

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
        return state.num_trained_samples - (self._resumption.samples if self._resumption else 0)

    def trained(self, state: RunState) -> None:
        """The last step and its evaluation are done: both clocks stop."""
        self._tell(
            Sink.training_ended, state.num_trained_samples, state.eval_sequences, state.converged
        )
        self._energy.mark(energy_sampler.CLOCK_STOPPED)
        self._energy.mark(energy_sampler.TRAINING_ENDED)
        self._train_time = time.time() - self._train_started

    def finished(self, state: RunState, reason: str, work: Work | None = None) -> None:
        """The figures of the whole run, as logs and as a table. A collective.

        work: all that was done.
        """
        sequences = self._trained_here(state) + self._skipped_samples
        training = self._train_time - self._evaluation_time
        throughputs = _throughputs(sequences, self._train_time, training, work)
        result = RunResult(
            step=state.global_steps,
            samples=state.num_trained_samples,
            converged=state.converged,
            reason=reason,
            eval_loss=state.eval_loss,
            eval_mlm_accuracy=state.eval_mlm_accuracy,
            e2e_time=time.time() - self._started,
            train_time=self._train_time,
            init_time=self._init_time,
            sequences_per_second=sequences / max(self._train_time, 1e-9),
            resumed_from=self._resumption.steps if self._resumption else None,
            speed=self._speed(work, sequences, training),
            throughputs=throughputs if sequences else None,
            energy=self._energy.finish(sequences),
            loss_scale=None if self._loss_scale == 1.0 else self._loss_scale,
        )
        self._tell(Sink.finished, result)

    def aborted(self, state: RunState) -> None:
        """The run ends by an error or from outside: the MLPerf log says so, once."""
        self._tell(Sink.aborted, state.num_trained_samples, state.eval_sequences)

    def discard(self) -> None:
        """Remove the folder of a run that was refused before training; the error says why."""
        if self.folder is not None and not self._trains:
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close every output, and let the next run use the folder."""
        self._closing.close()


def _throughputs(sequences: int, seconds: float, training: float, work: Work | None) -> Throughputs:
    """seconds: in all. training: of those, without evaluations."""
    core = None
    if work is not None and work.seconds is not None:
        waited = work.updates * work.seconds["data"]
        core = sequences / max(training - waited, 1e-9)
    return Throughputs(sequences / max(seconds, 1e-9), sequences / max(training, 1e-9), core)


def _evaluation(state: RunState, seconds: float) -> EvaluationFigures:
    return EvaluationFigures(
        state.global_steps,
        state.num_trained_samples,
        state.eval_loss,
        state.eval_mlm_accuracy,
        state.eval_sequences,
        seconds,
    )


def mlperf_hyperparameters(config: Config) -> dict[str, float | int | str]:
    """What MLPerf's closed division asks for, by MLPerf's names. BERT's rules know LAMB only."""
    algorithm = config.optimizer_algorithm
    name = {} if algorithm == "lamb" else {"opt_name": algorithm}
    return {
        **name,
        "global_batch_size": config.global_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "opt_base_learning_rate": config.learning_rate,
        "opt_epsilon": config.opt_lamb_epsilon,
        f"opt_{algorithm}_epsilon": config.opt_lamb_epsilon,
        f"opt_{algorithm}_beta_1": config.opt_lamb_beta_1,
        f"opt_{algorithm}_beta_2": config.opt_lamb_beta_2,
        f"opt_{algorithm}_weight_decay_rate": config.weight_decay_rate,
        "opt_learning_rate_training_steps": config.max_steps,
        "opt_learning_rate_warmup_steps": config.resolved_warmup_steps,
        "num_warmup_steps": config.resolved_warmup_steps,
        "start_warmup_step": config.start_warmup_step,
    }
