"""The MLPerf log: `:::MLLOG` lines, from rank 0 only."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence

from bert_pretraining.logs.mllog_line import END, POINT, START, line_maker

BLOCK = {"first_epoch_num": 1}  # MLPerf's tools want a block, and a run is one


class MlperfLog:
    """Every MLPerf event of a run, in the order that the compliance checker wants.

    Args:
        sinks: called with each line; none on ranks other than 0.
    """

    def __init__(self, sinks: Sequence[Callable[[str], None]]) -> None:
        self._sinks = sinks
        self._line = line_maker()
        self._clock_runs = False
        self._evaluating: int | None = None  # the epoch_num of an eval_start without its end

    def submission(self, division: str, org: str, submitter_platform: str, status: str) -> None:
        """Who submits what, on which platform, in which division."""
        self._write(POINT, "submission_benchmark", "bert")
        self._write(POINT, "submission_org", org)
        self._write(POINT, "submission_division", division)
        self._write(POINT, "submission_status", status)
        self._write(
            POINT, "submission_platform", submitter_platform or platform.node() or "unknown"
        )

    def init_start(self, started: float, caches_cleared: bool) -> None:
        """The program started at `started` (Unix time, seconds).

        caches_cleared: what really happened.
        """
        time_ms = int(started * 1000)
        self._write(POINT, "cache_clear", caches_cleared, time_ms=time_ms)
        self._write(START, "init_start", time_ms=time_ms)

    def hyperparameters(self, seed: int, values: dict[str, float | int]) -> None:
        """The seed and every hyperparameter that the closed division asks for."""
        self._write(POINT, "seed", seed)
        for key, value in values.items():
            self._write(POINT, key, value)

    def weights_initialized(self, tensors: Iterable[str]) -> None:
        """Which tensors, by MLPerf's names, start from the checkpoint's weights."""
        for tensor in tensors:
            self._write(POINT, "weights_initialization", metadata={"tensor": tensor})

    def run_start(self) -> None:
        """The clock starts: from here on data may be touched."""
        self._write(END, "init_stop")
        self._write(START, "run_start")
        self._write(START, "block_start", metadata={**BLOCK, "epoch_count": 1})
        self._write(START, "epoch_start", metadata={"epoch_num": 0})
        self._clock_runs = True

    def resumed(self, steps: int, samples: int) -> None:
        """This run goes on where another had trained so much: its clock tells only the rest.

        MLPerf has no such run, and its tools do not look for it; `submission check` does.
        """
        self._write(POINT, "resumed_from", samples, {"epoch_num": samples, "global_steps": steps})

    def evaluation_start(self, samples: int) -> None:
        """An evaluation begins, after `samples` trained sequences."""
        self._write(START, "eval_start", metadata={"epoch_num": samples})
        self._evaluating = samples

    def evaluation_stop(self, accuracy: float, samples: int) -> None:
        """That evaluation's masked-token accuracy."""
        self._write(POINT, "eval_accuracy", accuracy, {"epoch_num": samples})
        self._write(END, "eval_stop", metadata={"epoch_num": samples})
        self._evaluating = None

    def run_stop(self, status: str, train_samples: int, eval_samples: int) -> None:
        """The clock stops; nothing, if it does not run.

        status: see `run_status`. eval_samples: sequences of an evaluation.
        """
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
        if not self._sinks:
            return
        # The place to name is where the method that called this one was called.
        line = self._line(kind, key, value, metadata, time_ms, 2)
        for sink in self._sinks:
            sink(line)


def run_status(converged: bool, failed: bool = False) -> str:
    """The status of `run_stop`: to reach the target and to end well is the only success.

    failed: the run ended by an error or from outside.
    """
    return "success" if converged and not failed else "aborted"
