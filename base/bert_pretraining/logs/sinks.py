"""What a run tells, and the outputs that take it: one class, in one module, for each output.

`RunLog` calls every sink of its list for every event. A new output derives from `Sink`, overrides
the events that it needs, and is added to `RunLog.make_sinks`; see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bert_pretraining.config import Config


@dataclass(frozen=True)
class RunFacts:
    """What is known as a run starts.

    started: Unix time in seconds, of the launch. caches_cleared: whether the page caches were
    dropped before it. folder: of the run; None where nothing is written.
    """

    config: Config
    config_path: str
    started: float
    caches_cleared: bool
    device_name: str
    world_size: int
    folder: Path | None


@dataclass(frozen=True)
class Resumption:
    """The run goes on from a checkpoint.

    differences: settings and data that have changed since the checkpoint; if empty, the run
    continues bit for bit. mlm_accuracy: of the last evaluation before.
    """

    checkpoint: Path
    steps: int
    samples: int
    differences: list[str]
    mlm_accuracy: float


@dataclass(frozen=True)
class EvaluationSetFacts:
    """What the evaluation set asks for.

    masked_tokens: all of its predictions. commonest_token: the id that is right most often;
    commonest_share: the accuracy of always guessing that one.
    """

    masked_tokens: int
    commonest_token: int
    commonest_share: float


@dataclass(frozen=True)
class StepFigures:
    """A logged step.

    samples: trained by then. values: loss, mlm_acc, grad_norm, learning_rate (of this step's
    update), epoch, end_training, iter_dataloader_idx, as STEP_END names them.
    sequences_per_second: since the step logged before, without evaluations.
    seconds_to_evaluation: at this run's mean speed; None where none follows.
    """

    step: int
    samples: int
    values: dict[str, float]
    sequences_per_second: float
    seconds_to_evaluation: float | None


@dataclass(frozen=True)
class EvaluationFigures:
    """An evaluation after `step` updates and `samples` trained sequences."""

    step: int
    samples: int
    loss: float
    mlm_accuracy: float
    num_sequences: int
    seconds: float


@dataclass(frozen=True)
class RunResult:
    """A run that ended by itself.

    reason: "target", or what else stopped it. Times in seconds. resumed_from: the step, or None.
    """

    step: int
    samples: int
    converged: bool
    reason: str
    eval_loss: float
    eval_mlm_accuracy: float
    e2e_time: float
    train_time: float
    init_time: float
    sequences_per_second: float
    resumed_from: int | None


@dataclass(frozen=True)
class Hyperparameters:
    """The seed, and what MLPerf's closed division asks for, by MLPerf's names."""

    seed: int
    values: dict[str, float | int | str] = field(default_factory=dict)


class Sink:
    """One output of a run. Every method does nothing unless a sink overrides it.

    The methods stand in the order in which a run calls them.
    """

    def launched(self, run: RunFacts) -> None:
        """The process has started, and the run has its folder."""

    def init_started(self) -> None:
        """Everything that needs no data is about to be built."""

    def hyperparameters(self, values: Hyperparameters) -> None:
        """The settings that training follows from are known."""

    def built(self, event: str, values: dict[str, object]) -> None:
        """A part was built: CONVERT_MODEL, CREATE_OPTIMIZER, MODEL_TO_FP16 or MODEL_TO_DDP."""

    def weights_loaded(self, parameters: Sequence[str]) -> None:
        """These parameters of the model have a start checkpoint's weights."""

    def clock_started(self) -> None:
        """From here on sequences are read, and MLPerf's clock runs."""

    def evaluation_set_read(self, facts: EvaluationSetFacts) -> None:
        """The evaluation set is in memory."""

    def evaluation_started(self, samples: int) -> None:
        """An evaluation begins, after `samples` trained sequences."""

    def evaluation_stopped(self, samples: int, mlm_accuracy: float) -> None:
        """That evaluation ends. `start_evaluated` or `evaluated` follows."""

    def start_evaluated(self, evaluation: EvaluationFigures) -> None:
        """The figures of the start weights."""

    def resumed(self, resumption: Resumption) -> None:
        """In place of `start_evaluated`: the run goes on from a checkpoint."""

    def training_began(self) -> None:
        """The first update follows."""

    def epoch_began(self, epoch: int) -> None:
        """The next update begins with a sample of another epoch."""

    def epoch_ended(self, epoch: int) -> None:
        """The epoch's last update was made."""

    def skipped(self, step: int, count: int, skipped_in_all: int, loss_scale: float) -> None:
        """`count` updates before step `step` + 1 were skipped: gradients that are not finite."""

    def step_logged(self, figures: StepFigures) -> None:
        """The figures of a step."""

    def advanced(self, steps: int, seconds_to_evaluation: float | None) -> None:
        """`steps` more updates were made, including the logged one."""

    def evaluated(self, evaluation: EvaluationFigures) -> None:
        """The figures of an evaluation."""

    def training_ended(self, samples: int, eval_samples: int, converged: bool) -> None:
        """The last step and its evaluation are done: the clocks stop."""

    def finished(self, result: RunResult) -> None:
        """The figures of the whole run."""

    def aborted(self, samples: int, eval_samples: int) -> None:
        """The run ends by an error or from outside; nothing but `close` follows."""

    def noticed(self, kind: str, text: str) -> None:
        """The run goes wrong, or not as its user may expect; `Watch` tells each kind once.

        kind: one word for programs. text: what was found, its likely cause, and what to do.
        """

    def said(self, text: str) -> None:
        """A line for people, at any time."""

    def close(self) -> None:
        """Nothing follows."""
