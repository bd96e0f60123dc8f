"""What a run tells, and the outputs that take it: one class, in one module, for each output.

`RunLog` calls every sink of its list for every event. A new output derives from `Sink`, overrides
the events that it needs, and is added to `RunLog.make_sinks`; see docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
class MatrixRate:
    """What the ranks' devices can do at most: large products of matrices, all ranks at once.

    flop_per_second: floating-point operations, summed over the ranks. dtype: of the matrices, as
    DTYPES names it. shape: (m, k, n) of the product (m, k) x (k, n).
    """

    flop_per_second: float
    dtype: str
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class RunOutline:
    """What is trained, on what and how; known before the first evaluation.

    parameters: of the model. layers, hidden_size: of its encoder. sequences, shards: of the
    training set. kernels: the providers of the operators, by name. precision: fp32, bf16, fp16 or
    fp8. matrix_rate: None where it was not measured.
    """

    parameters: int
    layers: int
    hidden_size: int
    sequences: int
    shards: int
    kernels: str
    precision: str
    matrix_rate: MatrixRate | None


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


# The parts of a step. "data" is the time spent waiting for a batch, "reduction" that spent waiting
# for other ranks' gradients, as far as backward does not hide it.
PARTS = ("data", "forward_backward", "reduction", "optimizer", "other")


OWN_PARTS = ("data", "forward_backward", "optimizer")  # in which a rank waits for no other


class RankSeconds(NamedTuple):
    """A rank, and the seconds of its own work in a step: OWN_PARTS."""

    rank: int
    seconds: float


@dataclass(frozen=True)
class Work:
    """What all ranks did in some updates, and the time of its parts.

    updates: skipped ones included. tokens: real ones. flops: floating-point operations of the
    model's matrix products, see `step_flops`. The others as in `Speed`; seconds lack "other".
    """

    updates: int
    tokens: int
    flops: float
    peak_memory: int | None
    seconds: dict[str, float] | None = None
    fastest: RankSeconds | None = None
    slowest: RankSeconds | None = None
    median_seconds: float | None = None


@dataclass(frozen=True)
class Speed:
    """How fast some steps were, over all ranks, and where their time went. Evaluations excluded.

    sequences_per_second: over all ranks. tokens_per_second: real tokens, without padding.
    flop_per_second: floating-point operations of the model's matrix products, see `step_flops`.
    matrix_share: flop_per_second by the measured matrix rate; None with fp8, or if not measured.
    peak_memory: bytes, the most of any rank in training: of its device, or of its process on a
        CPU; None where it is not known.
    seconds: of a step, by PARTS, as the mean over the ranks; None where the device cannot tell.
    fastest, slowest, median_seconds: the ranks' own work in a step; None with `seconds`.
    """

    sequences_per_second: float
    tokens_per_second: float
    flop_per_second: float
    matrix_share: float | None
    peak_memory: int | None
    seconds: dict[str, float] | None = None
    fastest: RankSeconds | None = None
    slowest: RankSeconds | None = None
    median_seconds: float | None = None

    @classmethod
    def of(cls, work: Work, sequences: int, seconds: float, matrix_rate: float | None) -> Speed:
        """The speed of this work on so many sequences in so many seconds."""
        seconds = max(seconds, 1e-9)
        flop_per_second = work.flops / seconds
        parts = None
        if work.seconds is not None:
            other = seconds / max(work.updates, 1) - sum(work.seconds.values())
            parts = {**work.seconds, "other": max(other, 0.0)}
        return cls(
            sequences / seconds,
            work.tokens / seconds,
            flop_per_second,
            flop_per_second / matrix_rate if matrix_rate else None,
            work.peak_memory,
            parts,
            work.fastest,
            work.slowest,
            work.median_seconds,
        )

    def named(self) -> dict[str, float | int]:
        """The figures as logs and trackers name them, with six digits; not those unknown."""
        seconds = self.seconds or {}
        fastest, slowest = self.fastest, self.slowest
        figures = {
            "tokens/s": self.tokens_per_second,
            "tflop/s": self.flop_per_second / 1e12,
            "matrix_share": self.matrix_share,
            "peak_memory_mib": self.peak_memory and round(self.peak_memory / 2**20),
            **{f"seconds_{part}": seconds.get(part) for part in PARTS},
            "fastest_rank": fastest and fastest.rank,
            "fastest_rank_seconds": fastest and fastest.seconds,
            "slowest_rank": slowest and slowest.rank,
            "slowest_rank_seconds": slowest and slowest.seconds,
            "median_rank_seconds": self.median_seconds,
        }
        return {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in figures.items()
            if value is not None
        }


class Throughputs(NamedTuple):
    """FlagPerf's three, in sequences a second over all ranks, from the first update to the end.

    whole: all time. train: without evaluations. core: without waiting for data, too; None where
    that is not known.
    """

    whole: float
    train: float
    core: float | None

    def named(self) -> dict[str, float]:
        """By FlagPerf's names; not those unknown."""
        figures = {"p_whole": self.whole, "p_train": self.train, "p_core": self.core}
        return {name: value for name, value in figures.items() if value is not None}


@dataclass(frozen=True)
class Energy:
    """What the run's machines took, by their counters, in joules.

    source: what was counted, such as "NVML of 8 GPUs, RAPL of 2 CPU packages". run: from the ranks'
    connection to the end. training: from the first update to the last, evaluations included.
    sequences: trained meanwhile. training_seconds: of training; 0 where it is not known.
    """

    source: str
    run: float
    training: float
    sequences: int
    training_seconds: float = 0.0

    def named(self) -> dict[str, float | str | None]:
        """The figures as logs and trackers name them; None for what is not known."""
        sequences, seconds = self.sequences, self.training_seconds
        return {
            "joules_per_sequence": self.training / sequences if sequences else None,
            "joules_per_sequence_run": self.run / sequences if sequences else None,
            "mean_watts": self.training / seconds if seconds else None,
            "energy_source": self.source,
        }


@dataclass(frozen=True)
class StepFigures:
    """A logged step.

    samples: trained by then. values: loss, mlm_acc, grad_norm, learning_rate (of this step's
    update), loss_scale, epoch, end_training, iter_dataloader_idx, as STEP_END names them.
    sequences_per_second: since the step logged before, without evaluations.
    seconds_to_evaluation: at this run's mean speed; None where none follows.
    speed: of the steps since the one logged before; None where it is not measured.
    """

    step: int
    samples: int
    values: dict[str, float]
    sequences_per_second: float
    seconds_to_evaluation: float | None
    speed: Speed | None = None


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
    speed: of all steps made here; throughputs: the same time in three ways; None where a resumed
    run had nothing left to train. energy: None where no counter can be read. loss_scale: of the
    last update that was logged; None where it is 1.
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
    speed: Speed | None = None
    throughputs: Throughputs | None = None
    energy: Energy | None = None
    loss_scale: float | None = None

    def measured(self) -> dict[str, float | int | str | None]:
        """speed, throughputs, energy and loss scale as logs and trackers name them."""
        parts = (self.throughputs, self.speed, self.energy)
        found = {name: value for part in parts if part for name, value in part.named().items()}
        return found if self.loss_scale is None else found | {"loss_scale": self.loss_scale}


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

    def outlined(self, outline: RunOutline) -> None:
        """What is trained, on what and how: everything is built."""

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
