"""The MLPerf log: `:::MLLOG` lines, from rank 0 only."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

from bert_pretraining.logs.line_file import LineFile
from bert_pretraining.logs.mllog_line import END, POINT, START, line_maker
from bert_pretraining.logs.sinks import Hyperparameters, Resumption, RunFacts, Sink
from bert_pretraining.logs.source import calling_frame
from bert_pretraining.logs.tensor_names import mlperf_tensor_names

BLOCK = {"first_epoch_num": 1}  # MLPerf's tools want a block, and a run is one


class MlperfLog(Sink):
    """Every MLPerf event of a run, in the order that the compliance checker wants.

    Args:
        writers: called with each line.
        file: gets each line first, and is closed with this sink.
    """

    def __init__(
        self, writers: Sequence[Callable[[str], None]], file: LineFile | None = None
    ) -> None:
        self._writers = [file.line, *writers] if file else writers
        self._file = file
        self._line = line_maker()
        self._clock_runs = False
        self._evaluating: int | None = None  # the epoch_num of an eval_start without its end

    def launched(self, run: RunFacts) -> None:
        config, time_ms = run.config, int(run.started * 1000)
        self._write(POINT, "cache_clear", run.caches_cleared, time_ms=time_ms)
        self._write(START, "init_start", time_ms=time_ms)
        self._write(POINT, "submission_benchmark", "bert")
        self._write(POINT, "submission_org", config.submission_org)
        self._write(POINT, "submission_division", config.submission_division)
        self._write(POINT, "submission_status", config.submission_status)
        platform_name = config.submission_platform or platform.node() or "unknown"
        self._write(POINT, "submission_platform", platform_name)

    def hyperparameters(self, values: Hyperparameters) -> None:
        self._write(POINT, "seed", values.seed)
        for key, value in values.values.items():
            self._write(POINT, key, value)

    def weights_loaded(self, parameters: Sequence[str]) -> None:
        for tensor in mlperf_tensor_names(parameters):
            self._write(POINT, "weights_initialization", metadata={"tensor": tensor})

    def clock_started(self) -> None:
        self._write(END, "init_stop")
        self._write(START, "run_start")
        self._write(START, "block_start", metadata={**BLOCK, "epoch_count": 1})
        self._write(START, "epoch_start", metadata={"epoch_num": 0})
        self._clock_runs = True

    def resumed(self, resumption: Resumption) -> None:
        """Say that the clock tells only a part of the training.

        MLPerf has no such run, and its tools do not look for it; `submission check` does.
        """
        samples = resumption.samples
        counters = {"epoch_num": samples, "global_steps": resumption.steps}
        self._write(POINT, "resumed_from", samples, counters)

    def evaluation_started(self, samples: int) -> None:
        self._write(START, "eval_start", metadata={"epoch_num": samples})
        self._evaluating = samples

    def evaluation_stopped(self, samples: int, mlm_accuracy: float) -> None:
        self._write(POINT, "eval_accuracy", mlm_accuracy, {"epoch_num": samples})
        self._write(END, "eval_stop", metadata={"epoch_num": samples})
        self._evaluating = None

    def training_ended(self, samples: int, eval_samples: int, converged: bool) -> None:
        self._run_stop(run_status(converged), samples, eval_samples)

    def aborted(self, samples: int, eval_samples: int) -> None:
        self._run_stop(run_status(False), samples, eval_samples)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _run_stop(self, status: str, train_samples: int, eval_samples: int) -> None:
        """The clock stops; nothing, if it does not run. eval_samples: of one evaluation."""
        if not self._clock_runs:
            return
        self._clock_runs = False
        if self._evaluating is not None:
            self._write(END, "eval_stop", metadata={"epoch_num": self._evaluating})
        self._write(END, "block_stop", metadata=BLOCK)
        self._write(END, "epoch_stop", metadata={"epoch_num": 0})
        self._write(POINT, "train_samples", train_samples)
        self._write(POINT, "eval_samples", eval_samples)
        self._write(END, "run_stop", metadata={"status": status})

    def _write(
        self,
        kind: str,
        key: str,
        value: object = None,
        metadata: dict | None = None,
        time_ms: int | None = None,
    ) -> None:
        line = self._line(kind, key, value, metadata, time_ms, calling_frame()[1])
        for write in self._writers:
            write(line)


def run_status(converged: bool) -> str:
    """The status of `run_stop`: success only if the target was reached."""
    return "success" if converged else "aborted"
