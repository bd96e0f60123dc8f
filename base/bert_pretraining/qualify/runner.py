"""Runs a stage in a process of its own: one that crashes or hangs fails, and the rest go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from bert_pretraining.errors import TrainingError, UserError
from bert_pretraining.qualify import kept, other_programs
from bert_pretraining.qualify.context import Context
from bert_pretraining.qualify.record import FAIL, NOTE, Finding, StageResult, write_or_tell
from bert_pretraining.qualify.stages import STAGES, Stage, Tell
from bert_pretraining.runtime import rank_variables
from bert_pretraining.runtime.file_kind import cannot_write
from bert_pretraining.runtime.files import write_whole
from bert_pretraining.runtime.parent import end_with_parent

COMMAND = "qualify-stage"  # of this package's own; see __main__.py
PAGE_BYTES = 2**20
PROGRESS = "qualify: "  # begins a line of progress in the stage's output


def run_stage(stage: Stage, context: Context, context_file: Path, tell: Tell) -> StageResult:
    """Run a stage, and end its processes; whatever happens to it becomes its verdict.

    Its output is kept in stages/NAME.log. tell: gets its lines of progress. What it has measured
    is kept where it ends before its end (`kept.py`).

    Raises UserError where the folder cannot be written.
    """
    folder = context.folder / "stages"
    result, log = folder / f"{stage.name}.json", folder / f"{stage.name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result.unlink(missing_ok=True)
        opened = log.open("w", encoding="utf-8", errors="replace")
    except OSError as error:
        raise cannot_write(error.filename or folder, error) from error
    kept.forget(context)
    command = [sys.executable, "-m", "bert_pretraining", COMMAND, stage.name]
    limit, started = stage.limit(context), time.monotonic()
    cpu_time, steps = other_programs.StageTime(), Steps(tell)
    with opened as output:
        process = subprocess.Popen(
            [*command, str(context_file), str(result), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=rank_variables.environment_without_rank(),
            start_new_session=True,  # its ranks too can be ended with it
        )
        try:
            code = _wait(process, log, started + limit, steps)
            seconds, used = time.monotonic() - started, cpu_time.others_used(process.pid)
        finally:
            end_group(process)
    why, finding = "", None
    if code is None:
        why = f"ended at its limit of {limit:g} s{steps.place}"
    elif not result.is_file():
        why = f"{_how_it_ended(code)}: {_last_line(log)}"
    else:
        try:
            finding = Finding(**json.loads(result.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            why = f"its result cannot be read ({error}): {_how_it_ended(code)}"
    if finding is None:
        require_space(folder)
        so_far = kept.kept_figures(context, stage.name)
        fault = so_far.pop("fault")
        why = f"{f'{fault}; ' if fault else ''}{why}"
        why += "; the figures until then are kept" if so_far["figures"] else ""
        is_late = code is None and not fault
        finding = Finding(FAIL, f"{why}; see {log}", **so_far, is_late=is_late)
        write_or_tell(result, json.dumps(asdict(finding)))
    if finding.is_late:
        age = time.time() - max(kept.latest(context), steps.latest)
        cpus = len(os.sched_getaffinity(0))
        if other_programs.slowed(seconds, age, used, cpus):
            finding = _not_judged(finding, used, cpus, context.alone(stage.name))
            write_or_tell(result, json.dumps(asdict(finding)))
    kept.forget(context)
    found = asdict(finding)
    is_judged = not found.pop("is_late") or finding.verdict == FAIL
    return StageResult(stage.name, seconds=seconds, **found, is_judged=is_judged)


def _not_judged(finding: Finding, used: float, cpus: int, alone: str) -> Finding:
    """The finding on a stage that was only slow. alone: the command that repeats it."""
    reason = (
        f"not judged: {finding.reason}; it went on until then, but other programs used {used:.1f} "
        f"of the {cpus} CPUs: end them, and repeat this stage: {alone}"
    )
    return dataclasses.replace(finding, verdict=NOTE, reason=reason)


class Steps:
    """The lines of progress of a stage, which are told on.

    latest: when one ended, which is when the next one began; as `kept.latest`.
    """

    def __init__(self, tell: Tell) -> None:
        self._tell, self._text, self.latest = tell, "", 0.0

    def __call__(self, text: str) -> None:
        if self._text:
            self.latest = time.time()
        self._text = text
        self._tell(text)

    @property
    def place(self) -> str:
        """Where the stage was, for a reason."""
        return f", at '{self._text.partition(': ')[2]}'" if self._text else ""


def require_space(folder: Path) -> None:
    """UserError where a file of a page's size cannot be written.

    A stage that failed for want of space says nothing of the machine.
    """
    file = folder / "space"
    write_or_tell(file, bytes(PAGE_BYTES))
    file.unlink()


def main(arguments: list[str]) -> int:
    """The command COMMAND: run one stage in this process, and write its finding."""
    name, context_file, result, parent = arguments
    end_with_parent(int(parent))
    stage = next(stage for stage in STAGES if stage.name == name)

    def tell(text: str) -> None:
        print(f"{PROGRESS}{text}", flush=True)

    try:
        finding = stage.run(Context.read(Path(context_file)), tell)
    except UserError as error:
        finding = Finding(FAIL, error.problem, notes=[error.fix])
    except TrainingError as error:
        print(error.detail)
        finding = Finding(FAIL, str(error))
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        finding = Finding(FAIL, f"{type(error).__name__}: {lines[0]}")
    write_whole(Path(result), json.dumps(asdict(finding)))
    return 0


def end_group(process: subprocess.Popen) -> None:
    """End a process and all of its group, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait(process: subprocess.Popen, log: Path, deadline: float, tell: Tell) -> int | None:
    """The exit code, or None at the deadline; lines of progress are told meanwhile."""
    with log.open(encoding="utf-8", errors="replace") as lines:
        rest = ""
        while True:
            code, is_over = process.poll(), time.monotonic() > deadline
            rest += lines.read()
            *whole, rest = rest.split("\n")
            for line in whole:
                if line.startswith(PROGRESS):
                    tell(line.removeprefix(PROGRESS))
            if code is not None or is_over:
                return code
            time.sleep(0.05)


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError as error:  # the folder is gone; `require_space` tells of it
        return str(error)
    return lines[-1] if lines else "no output"
