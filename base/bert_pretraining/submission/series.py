"""A series: one training command run several times. All logs are kept; a series can be resumed.

DIR/series.json        the flags, the number of runs, and the outcome of each run
DIR/system.json        the description of this machine, from the start of the series
DIR/run_00/            output_dir of the first run: run-<UTC time>/mllog.txt and the rest
DIR/run_00/terminal.txt    its output
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bert_pretraining.errors import (
    EXIT_CONVERGED,
    EXIT_INTERRUPTED,
    EXIT_NOT_CONVERGED,
    EXIT_STOPPED,
    EXIT_USAGE,
    UserError,
)
from bert_pretraining.runtime import seeds
from bert_pretraining.runtime.files import write_whole
from bert_pretraining.runtime.lock import FolderLock
from bert_pretraining.runtime.words import counted, plural
from bert_pretraining.submission.score import RunFigures, run_figures
from bert_pretraining.submission.system import describe_machine
from bert_pretraining.submission.tree import ResultLog, read_result

STATE_FILE, SYSTEM_FILE = "series.json", "system.json"
TERMINAL_FILE, LOG_NAME = "terminal.txt", "mllog.txt"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
# The trainer logs it as MLPerf's cache_clear.
CACHES_DROPPED_VARIABLE = "BERT_PRETRAINING_CACHES_DROPPED"
# The launcher's exit code -> this command's: the series ends with a run that was interrupted.
ENDED_FROM_OUTSIDE = {
    EXIT_INTERRUPTED: EXIT_INTERRUPTED,
    128 + signal.SIGTERM: 128 + signal.SIGTERM,
    -signal.SIGTERM: 128 + signal.SIGTERM,
    EXIT_STOPPED: 128 + signal.SIGTERM,
}
OUTCOMES = {EXIT_CONVERGED: "converged", EXIT_NOT_CONVERGED: "not converged"}


@dataclass(frozen=True)
class SeriesRun:
    """One run of a series.

    Attributes:
        folder: its output_dir, within the series' directory.
        seed: master seed, from the system's entropy.
        caches_dropped: whether the page caches were dropped before it.
        started: Unix time in seconds.
        seconds: how long it took; None while it runs, or if the series was stopped during it.
        exit_code: of the launcher; None as for `seconds`.
    """

    folder: str
    seed: int
    caches_dropped: bool
    started: float
    seconds: float | None = None
    exit_code: int | None = None

    @property
    def outcome(self) -> str:
        if self.exit_code is None:
            return "ended from outside"
        return OUTCOMES.get(self.exit_code, f"failed with exit code {self.exit_code}")


@dataclass(frozen=True)
class Series:
    """The flags and number of runs of a series, and the runs so far in launch order."""

    flags: tuple[str, ...]
    number_of_runs: int
    runs: tuple[SeriesRun, ...] = ()

    @property
    def unconverged(self) -> int:
        return sum(run.exit_code != EXIT_CONVERGED for run in self.runs)

    @property
    def complete(self) -> bool:
        return len(self.runs) >= self.number_of_runs


def run_series(
    directory: Path,
    flags: Sequence[str],
    number_of_runs: int,
    drop_caches: str,
    show: bool,
    say: Callable[[str], None],
) -> Series:
    """Make the runs of a series that are missing, one after the other.

    Args:
        directory: of the series. A series that is there must have the same flags.
        flags: of `launch`, without --seed and --output_dir.
        drop_caches: the page caches, before each run: "auto" (where allowed), "never" or
            "required".
        show: runs print on this terminal instead of into terminal.txt.
        say: is called with lines to print.

    Raises:
        UserError: the series has other flags, another process works on it, the caches cannot be
            dropped although it is required, or a run refused its input.
    """
    with FolderLock(directory, "'submission run'"):
        series = _resume(directory, tuple(flags), number_of_runs, say)
        while not series.complete:
            series = _one_run(directory, series, drop_caches, show, say)
    return series


def load_series(directory: Path) -> Series:
    """Read the state of a series. Raises UserError if it is missing or cannot be read."""
    path = directory / STATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = tuple(SeriesRun(**run) for run in content["runs"])
        return Series(tuple(content["flags"]), content["number_of_runs"], runs)
    except FileNotFoundError as error:
        raise UserError(
            f"{directory} holds no {STATE_FILE}",
            "make a series with python -m bert_pretraining submission run",
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as a series ({error})", "pass another --output_dir"
        ) from error


def series_logs(directory: Path) -> list[ResultLog]:
    """The MLPerf logs of a series, in launch order, without the runs that wrote none."""
    paths = [find_log(directory / run.folder) for run in load_series(directory).runs]
    return [read_result(path) for path in paths if path is not None]


def find_log(folder: Path) -> Path | None:
    """The MLPerf log of one run, None if it ended before it wrote one."""
    found = sorted(folder.glob(f"run-*/{LOG_NAME}"))
    return found[-1] if found else None


def drop_page_caches(mode: str) -> tuple[bool, str]:
    """(whether they were dropped, the same in words). UserError if `mode` requires it."""
    if mode == "never":
        return False, "not dropped (--drop_caches never)"
    try:
        os.sync()
        DROP_CACHES.write_text("3\n")
    except OSError as error:
        if mode == "required":
            raise UserError(
                f"--drop_caches required: cannot write {DROP_CACHES} ({error.strerror})",
                "run as root, or pass --drop_caches auto",
            ) from error
        return False, f"not dropped ({error.strerror}; the log says so)"
    return True, "dropped"


def _resume(
    directory: Path, flags: tuple[str, ...], number_of_runs: int, say: Callable[[str], None]
) -> Series:
    # If the first run was refused, the series has no runs, and a new series starts.
    if not (directory / STATE_FILE).exists() or not load_series(directory).runs:
        series = Series(flags, number_of_runs)
        _write_json(directory / SYSTEM_FILE, describe_machine())
        _save(directory, series)
        return series
    series = load_series(directory)
    if (series.flags, series.number_of_runs) != (flags, number_of_runs):
        raise UserError(
            f"{directory} holds a series of {counted(series.number_of_runs, 'run')} of '"
            f"{shlex.join(series.flags)}'",
            "go on with those, or pass another --output_dir",
        )
    kept = f"{len(series.runs)} of {number_of_runs} runs {plural(len(series.runs), 'is')} there"
    lost = [run.folder for run in series.runs if run.exit_code is None]
    if lost:
        kept += f"; {', '.join(lost)} was ended from outside and counts as a failed run"
    say(kept)
    return series


def _one_run(
    directory: Path, series: Series, drop_caches: str, show: bool, say: Callable[[str], None]
) -> Series:
    number = len(series.runs)
    taken = {run.seed for run in series.runs}
    seed = next(seed for seed in iter(seeds.draw_master_seed, None) if seed not in taken)
    dropped, words = drop_page_caches(drop_caches)
    run = SeriesRun(f"run_{number:02d}", seed, dropped, time.time())
    folder = directory / run.folder
    folder.mkdir(exist_ok=True)
    say(f"Run {number + 1} of {series.number_of_runs}: seed {seed}, page caches {words}; {folder}")
    before = series
    series = dataclasses.replace(series, runs=(*series.runs, run))
    _save(directory, series)
    clock = time.monotonic()
    exit_code = launch_run(series.flags, seed, folder, dropped, show)
    log = find_log(folder)
    figures = run_figures(read_result(log)) if log else None
    if exit_code == EXIT_USAGE and (figures is None or figures.evaluations == 0):
        # Nothing was trained, so it does not count as a run.
        _save(directory, before)
        said = _last_error(folder) or "its error stands above"
        raise UserError(
            f"run {number + 1} refused its input: {said}", "correct its flags, after --"
        )
    run = dataclasses.replace(run, exit_code=exit_code, seconds=time.monotonic() - clock)
    series = dataclasses.replace(series, runs=(*series.runs[:-1], run))
    _save(directory, series)
    say(f"Run {number + 1} of {series.number_of_runs}: {_describe(run, figures)}")
    return series


def launch_run(flags: Sequence[str], seed: int, folder: Path, dropped: bool, show: bool) -> int:
    """Start the launcher, and return its exit code. It handles the signals itself."""
    command = [sys.executable, "-u", "-m", "bert_pretraining", "launch", *flags]
    command += ["--seed", str(seed), "--output_dir", str(folder)]
    environment = {**os.environ, CACHES_DROPPED_VARIABLE: str(int(dropped))}
    with contextlib.ExitStack() as stack:
        output = None if show else stack.enter_context(open(folder / TERMINAL_FILE, "wb"))
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output and subprocess.STDOUT
        )
        previous = signal.signal(signal.SIGTERM, lambda *_: process.send_signal(signal.SIGTERM))
        stack.callback(signal.signal, signal.SIGTERM, previous)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # The terminal has sent SIGINT to the launcher too, which stops its ranks.
            process.wait()
            raise
    if code in ENDED_FROM_OUTSIDE:
        raise SystemExit(ENDED_FROM_OUTSIDE[code])
    return code


def _describe(run: SeriesRun, figures: RunFigures | None) -> str:
    text = f"{run.outcome} after {run.seconds:.1f} s"
    if figures and figures.samples is not None:
        text += (
            f", MLM accuracy {figures.accuracy:.4f} after {counted(figures.samples, 'sequence')}"
        )
    return text


def _last_error(folder: Path) -> str | None:
    """The launcher's error line, which says why it refused to run."""
    path = folder / TERMINAL_FILE
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    return errors[-1].removeprefix("Error: ") if errors else None


def _save(directory: Path, series: Series) -> None:
    _write_json(directory / STATE_FILE, dataclasses.asdict(series))


def _write_json(path: Path, content: object) -> None:
    write_whole(path, json.dumps(content, indent=4) + "\n")
